"""The layout of a packed tree: the place of each leaf in the buffers of `pack_small_leaves`."""

import functools
import json
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_adamax._messages import key_paths
from optax_adamax._paths import named_leaves


class PackedLeaf(NamedTuple):
    """The place of one leaf."""

    path: str  # as from jax.tree_util.keystr, without Flax variables, such as "['dense']['bias']"
    shape: tuple[int, ...]
    buffer: str  # key of PackedTree.buffers; "" for a leaf in PackedTree.unpacked


Layout = tuple[PackedLeaf, ...]


def choose(params: optax.Params, max_size: int) -> Layout:
    """Chooses the layout from the paths, shapes and dtypes of the parameters."""

    def place(path: str, leaf: Any) -> PackedLeaf:
        dtype = jnp.result_type(leaf)
        packed = jnp.issubdtype(dtype, jnp.floating) and 1 < np.size(leaf) <= max_size
        return PackedLeaf(path, np.shape(leaf), dtype.name if packed else "")

    return tuple(place(*item) for item in named_leaves(params))


def encode(layout: Layout) -> str:
    """Converts a layout to JSON. Equal layouts have equal text."""
    return json.dumps(layout, separators=(",", ":"))


@functools.cache
def decode(text: str) -> Layout:
    """Converts the text that `encode` returned to the layout."""
    return tuple(PackedLeaf(path, tuple(shape), buffer) for path, shape, buffer in json.loads(text))


def indices_by_buffer(layout: Layout) -> dict[str, list[int]]:
    """Returns the leaves of each buffer as indices into the layout, sorted by leaf size."""
    found: dict[str, list[int]] = {}
    for index in sorted(range(len(layout)), key=lambda i: math.prod(layout[i].shape)):
        found.setdefault(layout[index].buffer, []).append(index)
    found.pop("", None)
    return found


def validated_leaves(tree: Any, layout: Layout) -> list[Any]:
    """Returns the leaves of `tree` in the order of the layout, after checks.

    Raises:
      ValueError: the paths or shapes differ from the layout; a leaf to pack is explicitly sharded.
    """
    given = dict(named_leaves(tree))
    known = {place.path for place in layout}
    if given.keys() != known:
        missing = [place.path for place in layout if place.path not in given]
        surplus = [path for path in given if path not in known]
        differences = [f"lacks {key_paths(missing)}"] if missing else []
        differences += [f"has also {key_paths(surplus)}"] if surplus else []
        raise ValueError(
            f"The tree must have the leaves of the parameters given to init, but it "
            f"{' and '.join(differences)}. Pass zeros for a parameter without a gradient, freeze "
            f"it with optax.partition and optax.set_to_zero, or call init again with these "
            f"parameters."
        )
    for place in layout:
        leaf = given[place.path]
        label = f"leaf {place.path}".rstrip()
        if np.shape(leaf) != place.shape:
            raise ValueError(
                f"The {label} must have shape {place.shape}, as in init, but its shape is "
                f"{np.shape(leaf)}."
            )
        if place.buffer and _is_explicitly_sharded(leaf):
            raise ValueError(
                f"The {label} is sharded over explicit mesh axes, but pack_small_leaves is for one "
                f"CPU. Use the transformation without it."
            )
    return [given[place.path] for place in layout]


def _is_explicitly_sharded(x: Any) -> bool:
    spec = jax.typeof(x).sharding.spec if isinstance(x, jax.Array) else ()
    return any(entry is not None for entry in spec)
