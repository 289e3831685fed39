"""Many small leaves as few buffers.

A jitted step of a thousand leaves spends its time on handing over buffers: parameter, m and v of
each leaf, in and out. Here those of the state become a few. How leaves are joined and cut is in
`_buffers`.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_adamax._paths import named_leaves
from optax_adamax.wrappers import _buffers


class PackedTree(NamedTuple):
    """A tree like the parameters, as the inner transformation of `pack_small_leaves` sees it."""

    unpacked: dict[str, Any]  # the leaves that are not packed, by their paths
    buffers: dict[
        str, Any
    ]  # by dtype, one-dimensional: the small leaves in the order of their sizes


class PackedLeaf(NamedTuple):
    """Where a leaf is kept."""

    path: str  # as jax.tree_util.keystr writes it, without a box of Flax
    shape: tuple[int, ...]
    buffer: str  # its key in PackedTree.buffers, or "" for a leaf in PackedTree.unpacked


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

    For models of hundreds of small parameters, as scales and biases are, where a step on CPU spends
    more time on passing buffers than on arithmetic. (It is for CPU. On TPU, as its compiler has it,
    the step of a GPT-2 is of more loops with it, not of fewer; a thousand leaves of 64 elements
    take a tenth of the time to compile.) In ``update`` the gradients (and the parameters, if given)
    of the small leaves are joined to one flat array for each dtype of the parameters, and the
    updates of `inner` are cut up again. (The bits are the same for the same gradients. Where XLA
    fuses ``update`` with what computes them, it may contract a product and a sum in one program and
    not in the other.)

    Which leaves are packed, and where, follows from the paths, shapes and dtypes of the parameters
    alone: not from their sharding, nor from a box of Flax around them. So a checkpoint fits as long
    as these and `max_size` are the same; :func:`unpack_state` and :func:`repack_state` carry a
    state over a change. The buffers are whole on each device: a small leaf that is split over
    devices is gathered in each step. :mod:`optax_adamax.sharding` knows them.

    `inner` must be elementwise, as :func:`adamax` and :func:`adamaxw` are in every storage
    format. It sees a :class:`PackedTree` in place of the parameters: norms of leaves (LARS,
    LAMB, adafactor) and rules or masks by path (`optax.partition`, the ``mask`` of `adamaxw`)
    mean nothing there. Put them around this transformation, or beside it in a chain. Nor can
    :func:`optax.tree.map_params` map over this state: unpack it first.

    Left alone, whatever their size, are leaves of other numbers than real floats, and leaves of one
    element, which XLA does not always round as it rounds arrays.

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
      >>> print(m.buffers["float32"].shape, m.unpacked["['w']"].shape)
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
        found = jax.tree.map(_buffers.reshard_like, _unpacked(packed, updates, layout), updates)
        return found, PackedState(state.layout, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def unpack_state(state: optax.OptState, params: optax.Params) -> optax.OptState:
    """The state without packing: what the same transformation without `pack_small_leaves` keeps.

    It takes a state over a change of `max_size`, of the package, or to what does not know packing::

        state = repack_state(unpack_state(old, params), like=tx.init(params))

    Args:
      state: a state with any number of :class:`PackedState` in it, or with none.
      params: the parameters that it belongs to; only the tree and its paths are used.

    Returns:
      The state, with the inner state of each :class:`PackedState` in its place, and in that a tree
      like `params` for each :class:`PackedTree`. Parameters that do not belong to it (as in
      `optax.masked`) are ``optax.MaskedNode()`` there, as in the unpacked state.

    Raises:
      ValueError: the state is packed for parameters that are not in `params`.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_adamax import adamax, pack_small_leaves, unpack_state
      >>> params = {"bias": jnp.zeros(2), "scale": jnp.ones(2)}
      >>> state = pack_small_leaves(adamax(0.002)).init(params)
      >>> print(sorted(unpack_state(state, params)[0].m))
      ['bias', 'scale']
    """
    names = [name for name, _ in named_leaves(params)]

    def unpack(node: Any) -> Any:
        if not isinstance(node, PackedState):
            return node
        (layout,) = node.layout
        unknown = [at.path for at in layout if at.path not in names]
        if unknown:
            raise ValueError(
                f"The state is packed for {unknown}, which are not in params. Give the parameters "
                f"that it was initialized for."
            )
        return jax.tree.map(
            lambda x: _unpacked(x, params, layout) if is_packed_tree(x) else x,
            node.inner_state,
            is_leaf=is_packed_tree,
        )

    return jax.tree.map(unpack, state, is_leaf=is_packed_state)


def repack_state(state: optax.OptState, like: optax.OptState) -> optax.OptState:
    """The state in the layout of another: the inverse of :func:`unpack_state`.

    Args:
      state: a state without packing.
      like: the packed state whose layout it shall have, of arrays or of shapes:
        ``tx.init(params)``, or ``jax.eval_shape(tx.init, params)``.

    Returns:
      A state of the structure of `like`.

    Raises:
      ValueError: the two states are not of the same transformation, or not for the same parameters.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_adamax import adamax, pack_small_leaves, repack_state, unpack_state
      >>> params = {"bias": jnp.zeros(2), "kernel": jnp.ones(50)}
      >>> state = unpack_state(pack_small_leaves(adamax(0.002), max_size=10).init(params), params)
      >>> larger = pack_small_leaves(adamax(0.002), max_size=100)
      >>> state = repack_state(state, larger.init(params))
      >>> updates, state = larger.update(params, state, params)
    """

    def repack(target: Any, node: Any) -> Any:
        if not isinstance(target, PackedState):
            return node
        (layout,) = target.layout
        inner_state = jax.tree.map(
            lambda t, x: _packed(x, layout) if is_packed_tree(t) else x,
            target.inner_state,
            node,
            is_leaf=is_packed_tree,
        )
        return PackedState(target.layout, inner_state)

    repacked = jax.tree.map(repack, like, state, is_leaf=is_packed_state)
    _check_like(repacked, like)
    return repacked


def _check_like(state: optax.OptState, like: optax.OptState) -> None:
    if jax.tree.structure(state) != jax.tree.structure(like):
        raise ValueError(
            f"The state is not of the transformation that `like` is of. It would be "
            f"{jax.tree.structure(state)}, but `like` is {jax.tree.structure(like)}."
        )
    for (path, leaf), wanted in zip(named_leaves(state), jax.tree.leaves(like), strict=True):
        found = jnp.shape(leaf), jnp.result_type(leaf)
        if found != (wanted.shape, wanted.dtype):
            raise ValueError(
                f"{path} has shape and dtype {found[0]}, {found[1]}, but in `like` "
                f"{wanted.shape}, {wanted.dtype}. Give `like` for the same parameters, and convert "
                f"the state with encode_state before, if the formats differ."
            )


def is_packed_state(node: Any) -> bool:
    return isinstance(node, PackedState)


def is_packed_tree(node: Any) -> bool:
    return isinstance(node, PackedTree)


def _layout(params: optax.Params, max_size: int) -> Layout:
    def kept(path: str, leaf: Any) -> PackedLeaf:
        try:
            dtype = jnp.result_type(leaf)
        except TypeError:  # no array, which is for `inner` to judge
            return PackedLeaf(path, (), "")
        packed = jnp.issubdtype(dtype, jnp.floating) and 1 < np.size(leaf) <= max_size
        return PackedLeaf(path, np.shape(leaf), dtype.name if packed else "")

    return tuple(kept(*item) for item in named_leaves(params))


def _order(layout: Layout) -> dict[str, list[int]]:
    """The leaves of each buffer, as indices into the layout: equal sizes stand together."""
    order: dict[str, list[int]] = {}
    for index in sorted(range(len(layout)), key=lambda i: math.prod(layout[i].shape)):
        order.setdefault(layout[index].buffer, []).append(index)
    order.pop("", None)
    return order


def _packed(tree: Any, layout: Layout) -> Any:
    leaves = _checked_leaves(tree, layout)
    if not layout:  # the placeholder of optax.tree.map_params is such a tree
        return tree
    order = _order(layout)
    return PackedTree(
        unpacked={at.path: x for at, x in zip(layout, leaves, strict=True) if not at.buffer},
        buffers={name: _buffers.join([leaves[i] for i in order[name]]) for name in order},
    )


def _checked_leaves(tree: Any, layout: Layout) -> list[Any]:
    given = dict(named_leaves(tree))
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
    if not layout:
        return packed
    found = {at.path: packed.unpacked[at.path] for at in layout if not at.buffer}
    for name, indices in _order(layout).items():
        leaves = _buffers.cut(packed.buffers[name], tuple(layout[i].shape for i in indices))
        found.update(zip((layout[i].path for i in indices), leaves, strict=True))
    leaves = [found.get(name, optax.MaskedNode()) for name, _ in named_leaves(like)]
    return jax.tree.structure(like).unflatten(leaves)
