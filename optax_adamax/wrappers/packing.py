"""Packs the state of many small leaves into few buffers, for one CPU.

A jitted step of a thousand leaves is bound by per-buffer overhead: parameter, m and v of each leaf
are passed in and out. Packing reduces the buffers of the state to a few. `_buffers` concatenates
and slices the leaves.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_adamax._paths import named_leaves
from optax_adamax.wrappers import _buffers, _layout


class PackedTree(NamedTuple):
    """A tree like the parameters, in the form that `inner` of `pack_small_leaves` receives."""

    unpacked: dict[str, Any]  # the leaves that are not packed, by their paths
    buffers: dict[str, Any]  # by dtype, one-dimensional: the small leaves, sorted by size


class PackedState(NamedTuple):
    """State of `pack_small_leaves`."""

    # One key without a value: path, shape and buffer of each parameter in JSON. A key, because
    # checkpoints compare keys, and a string, because JAX exports and Flax saves only string keys.
    layout: dict[str, Any]
    inner_state: optax.OptState  # for parameters in the form of a PackedTree


def pack_small_leaves(
    inner: optax.GradientTransformation, max_size: int = 1024
) -> optax.GradientTransformationExtraArgs:
    """Stores the state of small leaves in a few flat buffers; the results are the same bit for bit.

    It is meant for one CPU and for models of hundreds of small parameters, such as scales and
    biases, whose steps are bound by per-buffer overhead. (On TPU, according to compiler estimates,
    packing increases the number of loops in a GPT-2 step; a thousand leaves of 64 elements compile
    in a tenth of the time.) ``update`` concatenates the gradients of the small leaves, and their
    parameters if given, into one flat array per dtype of the parameters, and slices the updates of
    `inner`. (The same gradients give the same bits. If XLA fuses ``update`` with the computation of
    the gradients, it may contract a product and a sum in one program and not in the other.)

    Which leaves are packed, and in which order, follows from the paths, shapes and dtypes of the
    parameters and from `max_size` alone. A checkpoint fits as long as these are the same;
    :func:`unpack_state` and :func:`repack_state` convert a state after a change.
    :func:`optax_adamax.sharding.shard` does not accept this transformation.

    `inner` must be elementwise, as :func:`adamax` and :func:`adamaxw` are in every storage
    format. It receives a :class:`PackedTree` instead of the parameters, so that norms of leaves
    (LARS, LAMB, adafactor) and rules or masks by path (`optax.partition`, the ``mask`` of
    `adamaxw`) do not work inside. Put them around this transformation, or next to it in a chain.
    :func:`optax.tree.map_params` cannot map over this state: unpack it first.

    Leaves that are not real floats, and leaves of one element, are never packed. (XLA does not
    always round scalars as it rounds arrays.)

    Args:
      inner: an elementwise optax transformation.
      max_size: largest number of elements of a small leaf. On CPU, packing leaves of more than
        about 4,000 costs more than it saves (`benchmarks/packing.py`).

    Returns:
      The transformation, with state :class:`PackedState`.

    Raises:
      ValueError: max_size < 0; from ``update``, gradients whose tree or shapes differ from the
        parameters given to ``init``; a small leaf that is sharded over explicit mesh axes.
      TypeError: max_size is not an integer; from ``update``, a state of another transformation, or
        gradients of several dtypes for one buffer.

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
        layout = _layout.choose(params, max_size)
        return PackedState({_layout.encode(layout): None}, inner.init(_pack(params, layout)))

    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, PackedState]:
        if not isinstance(state, PackedState):
            raise TypeError(
                f"The state must be a PackedState, but a {type(state).__name__} was given: give "
                f"the state that the init of pack_small_leaves returned."
            )
        layout = _layout_of(state)
        gradients = _pack(updates, layout)
        parameters = None if params is None else _pack(params, layout)
        packed, inner_state = inner.update(gradients, state.inner_state, parameters, **extra_args)
        return _unpack(packed, updates, layout), PackedState(state.layout, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def unpack_state(state: optax.OptState, params: optax.Params) -> optax.OptState:
    """Converts a packed state to the state of the same transformation without packing.

    Use it after a change of `max_size` or of the package::

        state = repack_state(unpack_state(old, params), like=tx.init(params))

    Args:
      state: a state with any number of :class:`PackedState` in it, or with none.
      params: the parameters of the state; only the tree and its paths are used.

    Returns:
      The state, with the inner state of each :class:`PackedState` in its place, and a tree like
      `params` in place of each :class:`PackedTree`. Parameters that the state does not have
      (as in `optax.masked`) are ``optax.MaskedNode()`` there, as in the unpacked state.

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
        layout = _layout_of(node)
        unknown = [at.path for at in layout if at.path not in names]
        if unknown:
            raise ValueError(
                f"The state is packed for {unknown}, which are not in params. Give the parameters "
                f"that init received."
            )
        return jax.tree.map(
            lambda x: _unpack(x, params, layout) if _is_packed_tree(x) else x,
            node.inner_state,
            is_leaf=_is_packed_tree,
        )

    return jax.tree.map(unpack, state, is_leaf=_is_packed_state)


def repack_state(state: optax.OptState, like: optax.OptState) -> optax.OptState:
    """Packs a state in the layout of another state: the inverse of :func:`unpack_state`.

    Args:
      state: a state without packing.
      like: a packed state with the layout to use, of arrays or of shapes:
        ``tx.init(params)``, or ``jax.eval_shape(tx.init, params)``.

    Returns:
      A state of the structure of `like`.

    Raises:
      ValueError: the two states belong to different transformations or parameters.

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
        layout = _layout_of(target)
        inner_state = jax.tree.map(
            lambda t, x: _pack(x, layout) if _is_packed_tree(t) else x,
            target.inner_state,
            node,
            is_leaf=_is_packed_tree,
        )
        return PackedState(target.layout, inner_state)

    repacked = jax.tree.map(repack, like, state, is_leaf=_is_packed_state)
    _check_like(repacked, like)
    return repacked


def _check_like(state: optax.OptState, like: optax.OptState) -> None:
    if jax.tree.structure(state) != jax.tree.structure(like):
        raise ValueError(
            f"The state belongs to another transformation than `like`: its structure is "
            f"{jax.tree.structure(state)}, but `like` has {jax.tree.structure(like)}."
        )
    for (path, leaf), wanted in zip(named_leaves(state), jax.tree.leaves(like), strict=True):
        found = jnp.shape(leaf), jnp.result_type(leaf)
        if found != (wanted.shape, wanted.dtype):
            raise ValueError(
                f"{path} has shape and dtype {found[0]}, {found[1]}, but in `like` "
                f"{wanted.shape}, {wanted.dtype}. Give `like` for the same parameters. If the "
                f"storage formats differ, first convert the state with encode_state."
            )


def _is_packed_state(node: Any) -> bool:
    return isinstance(node, PackedState)


def _is_packed_tree(node: Any) -> bool:
    return isinstance(node, PackedTree)


def _layout_of(state: PackedState) -> _layout.Layout:
    (text,) = state.layout
    return _layout.decode(text)


def _pack(tree: Any, layout: _layout.Layout) -> Any:
    leaves = _layout.validated_leaves(tree, layout)
    if not layout:  # the placeholder of optax.tree.map_params is such a tree
        return tree
    order = _layout.order(layout)
    return PackedTree(
        unpacked={at.path: x for at, x in zip(layout, leaves, strict=True) if not at.buffer},
        buffers={
            name: _buffers.concatenate_leaves([leaves[i] for i in order[name]]) for name in order
        },
    )


def _unpack(packed: Any, like: Any, layout: _layout.Layout) -> Any:
    if not layout:
        return packed
    found = {at.path: packed.unpacked[at.path] for at in layout if not at.buffer}
    for name, indices in _layout.order(layout).items():
        shapes = tuple(layout[i].shape for i in indices)
        leaves = _buffers.slice_leaves(packed.buffers[name], shapes)
        found.update(zip((layout[i].path for i in indices), leaves, strict=True))
    leaves = [found.get(name, optax.MaskedNode()) for name, _ in named_leaves(like)]
    return jax.tree.structure(like).unflatten(leaves)
