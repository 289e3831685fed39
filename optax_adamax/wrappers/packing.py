"""Many small leaves as few buffers.

A jitted step of a thousand leaves spends its time on handing over buffers: parameter, m and v of
each leaf, in and out. Here those of the state become a few. What is left to do well is compiling:
a slice at an offset that XLA knows is a kernel of its own for each leaf, ten milliseconds of
compiling each on CPU. `_unpack` hides the offsets, and one kernel serves all leaves of a size.
"""

import functools
import itertools
import math
from collections import Counter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike


class PackedTree(NamedTuple):
    """A tree like the parameters, as the inner transformation of `pack_small_leaves` sees it."""

    alone: dict[str, Any]  # the leaves that are not packed, by their paths
    flat: dict[str, Any]  # by dtype, one-dimensional: the small leaves in the order of their sizes


class PackedLeaf(NamedTuple):
    """Where a leaf is kept."""

    path: str
    shape: tuple[int, ...]
    buffer: str  # its key in PackedTree.flat, or "" for a leaf in PackedTree.alone


Layout = tuple[PackedLeaf, ...]


class PackedState(NamedTuple):
    """State of `pack_small_leaves`."""

    # One key and no leaf: where each leaf of the parameters is kept. A key, because keys are the
    # one thing beside arrays that every checkpoint format keeps.
    layout: dict[Layout, None]
    inner_state: optax.OptState  # for parameters in the form of a PackedTree


def pack_small_leaves(
    inner: optax.GradientTransformation, max_size: int = 1024
) -> optax.GradientTransformationExtraArgs:
    """Keeps the state of small leaves in a few flat buffers; the results are the same bit for bit.

    For models of hundreds of small parameters, as scales and biases are, where a step spends more
    time on passing buffers than on arithmetic. In ``update`` the gradients (and the parameters, if
    given) of the small leaves are joined to one flat array for each dtype of the parameters, and
    the updates of `inner` are cut up again. Which leaves are packed, and where, follows from the
    paths, shapes and dtypes of the parameters alone, so that a checkpoint is stable. (The bits are
    the same for the same gradients. Where XLA fuses ``update`` with what computes them, it may
    contract a product and a sum in one program and not in the other.)

    `inner` must be elementwise, as :func:`adamax` and :func:`adamaxw` are in every storage
    format. It sees a :class:`PackedTree` in place of the parameters: norms of leaves (LARS,
    LAMB, adafactor) and rules or masks by path (`optax.partition`, the ``mask`` of `adamaxw`)
    mean nothing there. Put them around this transformation, or beside it in a chain. Nor can
    :func:`optax.tree.map_params` and :mod:`optax_adamax.sharding` tell what of this state is
    like a parameter.

    Left alone, whatever their size, are leaves of other numbers than real floats, leaves that are
    split over explicit axes of a mesh (JAX does not show how a leaf is split over automatic axes: a
    small one may be gathered in each step), and leaves of one element, which XLA does not always
    round as it rounds arrays.

    Args:
      inner: an elementwise optax transformation.
      max_size: number of elements up to which a leaf is small. On CPU, packing leaves of more than
        about 4,000 costs more than it saves (`benchmarks/packing.py`).

    Returns:
      The transformation, with state :class:`PackedState`.

    Raises:
      ValueError: max_size < 0; from ``update``, gradients whose tree or shapes are not those of
        the parameters given to ``init``.
      TypeError: max_size is no integer; from ``update``, a state that is none of this
        transformation, or gradients of several dtypes for one buffer.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_adamax import adamax, pack_small_leaves
      >>> tx = pack_small_leaves(adamax(0.002))
      >>> params = {"bias": jnp.zeros(2), "scale": jnp.ones(2), "w": jnp.ones((100, 100))}
      >>> state = tx.init(params)
      >>> m = state.inner_state[0].m
      >>> print(m.flat["float32"].shape, m.alone["['w']"].shape)
      (4,) (100, 100)
      >>> updates, state = tx.update(params, state, params)
      >>> print(updates["scale"])
      [-0.002 -0.002]
    """
    if isinstance(max_size, bool) or not isinstance(max_size, int):
        raise TypeError(f"max_size must be an integer, but {max_size!r} was given.")
    if max_size < 0:
        raise ValueError(f"max_size must be at least 0, but {max_size} was given.")
    inner = optax.with_extra_args_support(inner)

    def init(params: optax.Params) -> PackedState:
        layout = _layout(params, max_size)
        return PackedState({layout: None}, inner.init(_packed(params, layout)))

    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, PackedState]:
        if not isinstance(state, PackedState):
            raise TypeError(
                f"The state must be a PackedState, but a {type(state).__name__} was given: take "
                f"the one that the init of pack_small_leaves returns."
            )
        (layout,) = state.layout
        gradients = _packed(updates, layout)
        parameters = None if params is None else _packed(params, layout)
        packed, inner_state = inner.update(gradients, state.inner_state, parameters, **extra_args)
        return _unpacked(packed, updates, layout), PackedState(state.layout, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def _layout(params: optax.Params, max_size: int) -> Layout:
    def place(path: Any, leaf: Any) -> PackedLeaf:
        try:
            dtype = jnp.result_type(leaf)
        except TypeError:  # no array, which is for `inner` to judge
            return PackedLeaf(jax.tree_util.keystr(path), (), "")
        small = jnp.issubdtype(dtype, jnp.floating) and 1 < np.size(leaf) <= max_size
        packed = small and not _is_split(leaf)
        return PackedLeaf(jax.tree_util.keystr(path), np.shape(leaf), dtype.name if packed else "")

    return tuple(place(*item) for item in jax.tree_util.tree_leaves_with_path(params))


def _is_split(leaf: Any) -> bool:
    """Whether the type of an array says that it is split over devices."""
    if not isinstance(leaf, jax.Array):
        return False
    return any(entry is not None for entry in jax.typeof(leaf).sharding.spec)


def _order(layout: Layout) -> dict[str, list[int]]:
    """The leaves of each buffer, as indices into the layout: equal sizes stand together."""
    order: dict[str, list[int]] = {}
    for index in sorted(range(len(layout)), key=lambda i: math.prod(layout[i].shape)):
        order.setdefault(layout[index].buffer, []).append(index)
    order.pop("", None)
    return order


def _packed(tree: Any, layout: Layout) -> PackedTree:
    leaves = _checked_leaves(tree, layout)
    order = _order(layout)
    return PackedTree(
        alone={at.path: x for at, x in zip(layout, leaves, strict=True) if not at.buffer},
        flat={name: _join([leaves[i] for i in order[name]]) for name in order},
    )


def _checked_leaves(tree: Any, layout: Layout) -> list[Any]:
    given = {jax.tree_util.keystr(p): x for p, x in jax.tree_util.tree_leaves_with_path(tree)}
    known = {at.path: at.shape for at in layout}
    if list(given) != list(known):
        missing = [path for path in known if path not in given]
        surplus = [path for path in given if path not in known]
        raise ValueError(
            f"The tree is not the one that the state was initialized for: it lacks {missing} and "
            f"has {surplus} beside it. Give zeros for a parameter without a gradient, freeze it by "
            f"optax.set_to_zero in optax.partition, or call init again with these parameters."
        )
    for path, leaf in given.items():
        if np.shape(leaf) != known[path]:
            raise ValueError(
                f"The leaf {path or 'given'} has shape {np.shape(leaf)}, but the state was "
                f"initialized for shape {known[path]}."
            )
    return list(given.values())


def _unpacked(packed: Any, like: Any, layout: Layout) -> Any:
    found = {i: packed.alone[at.path] for i, at in enumerate(layout) if not at.buffer}
    for name, indices in _order(layout).items():
        shapes = tuple(layout[i].shape for i in indices)
        found.update(zip(indices, _cut(packed.flat[name], shapes), strict=True))
    return jax.tree.structure(like).unflatten([found[i] for i in range(len(layout))])


def _join(leaves: list[Any]) -> Any:
    dtypes = {jnp.result_type(x) for x in leaves}
    if len(dtypes) > 1:
        raise TypeError(
            f"The gradients of leaves in one buffer are {' and '.join(sorted(map(str, dtypes)))}: "
            f"cast them to one dtype. Leaves are in one buffer if their parameters have one dtype."
        )
    if any(isinstance(x, jax.ShapeDtypeStruct) for x in leaves):
        return jax.ShapeDtypeStruct((sum(x.size for x in leaves),), *dtypes)
    return _concatenate(leaves)


@jax.jit
def _concatenate(leaves: list[ArrayLike]) -> jax.Array:
    return jnp.concatenate([jnp.ravel(x) for x in leaves])


@functools.partial(jax.jit, static_argnames="shapes")
def _cut(flat: jax.Array, shapes: tuple[tuple[int, ...], ...]) -> list[jax.Array]:
    """The arrays of these shapes that follow each other in `flat`, equal sizes together."""
    sizes = [math.prod(shape) for shape in shapes]
    base = math.isqrt(max(Counter(sizes).values())) + 1
    flat, digits = _with_digits(flat, base)
    start, leaves = 0, []
    for size, run in itertools.groupby(shapes, math.prod):
        for row, shape in enumerate(run):
            offset = start + size * (base * digits[row // base] + digits[row % base])
            leaf = jax.lax.dynamic_slice(flat, (offset,), (size,), allow_negative_indices=False)
            leaves.append(leaf.reshape(shape))
        start = sum(sizes[: len(leaves)])
    return leaves


def _with_digits(flat: jax.Array, base: int) -> tuple[jax.Array, list[jax.Array]]:
    """`flat` and the numbers below `base`; on CPU in a form into which XLA does not see.

    It does not look into a branch, and does not ask whether both are the same: it computes `flat`
    once, instead of a piece in each kernel, and does not know the numbers. Seen in jaxlib 0.10.2.
    On a GPU a branch would make the host wait.
    """

    def known(flat: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
        return flat, [jnp.int32(i) for i in range(base)]

    def hidden(flat: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
        return jax.lax.cond(flat[0] == 0, known, known, flat)

    return jax.lax.platform_dependent(flat, cpu=hidden, default=known)
