"""Where `pack_small_leaves` stores each leaf."""

import functools
import json
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_adamax._paths import named_leaves


class PackedLeaf(NamedTuple):
    path: str  # in the form of jax.tree_util.keystr, without a box of Flax
    shape: tuple[int, ...]
    buffer: str  # its key in PackedTree.buffers, or "" for a leaf in PackedTree.unpacked


Layout = tuple[PackedLeaf, ...]


def choose(params: optax.Params, max_size: int) -> Layout:
    """The layout of these parameters, from their paths, shapes and dtypes."""

    def place(path: str, leaf: Any) -> PackedLeaf:
        try:
            dtype = jnp.result_type(leaf)
        except TypeError:  # not an array: `inner` raises a better error
            return PackedLeaf(path, (), "")
        packed = jnp.issubdtype(dtype, jnp.floating) and 1 < np.size(leaf) <= max_size
        return PackedLeaf(path, np.shape(leaf), dtype.name if packed else "")

    return tuple(place(*item) for item in named_leaves(params))


def encode(layout: Layout) -> str:
    """The layout in JSON, the same text for the same layout."""
    return json.dumps(layout, separators=(",", ":"))


@functools.cache
def decode(text: str) -> Layout:
    """The inverse of `encode`."""
    return tuple(PackedLeaf(path, tuple(shape), buffer) for path, shape, buffer in json.loads(text))


def order(layout: Layout) -> dict[str, list[int]]:
    """The leaves of each buffer as indices into the layout, sorted by size."""
    found: dict[str, list[int]] = {}
    for index in sorted(range(len(layout)), key=lambda i: math.prod(layout[i].shape)):
        found.setdefault(layout[index].buffer, []).append(index)
    found.pop("", None)
    return found


def validated_leaves(tree: Any, layout: Layout) -> list[Any]:
    """The leaves of `tree` in the order of the layout, whatever the order of their keys."""
    given = dict(named_leaves(tree))
    known = {at.path for at in layout}
    if given.keys() != known:
        missing = [at.path for at in layout if at.path not in given]
        surplus = [path for path in given if path not in known]
        raise ValueError(
            f"The tree differs from the tree that init received: it lacks {missing} and has the "
            f"additional leaves {surplus}. Give zeros for a parameter without a gradient, freeze "
            f"it by optax.set_to_zero in optax.partition, or call init again with these parameters."
        )
    for at in layout:
        leaf = given[at.path]
        if np.shape(leaf) != at.shape:
            raise ValueError(
                f"The leaf {at.path or 'given'} has shape {np.shape(leaf)}, but init received "
                f"shape {at.shape}."
            )
        if at.buffer and _is_explicitly_sharded(leaf):
            raise ValueError(
                f"The leaf {at.path or 'given'} is sharded over explicit mesh axes, but "
                f"pack_small_leaves is meant for one CPU: use the transformation without it."
            )
    return [given[at.path] for at in layout]


def _is_explicitly_sharded(x: Any) -> bool:
    spec = jax.typeof(x).sharding.spec if isinstance(x, jax.Array) else ()
    return any(entry is not None for entry in spec)
