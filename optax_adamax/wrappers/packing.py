"""Packs the state of many small leaves into a few buffers, for one CPU.

The time of a jitted step with a thousand leaves is mostly per-buffer overhead, because the
parameter, m and v of each leaf are inputs and outputs of the program. Packing reduces the state to
a few buffers.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_adamax._inner import as_transformation
from optax_adamax._messages import describe_value, key_paths, wrong_state
from optax_adamax._paths import named_leaves
from optax_adamax._tree_checks import check_arrays, without_unused
from optax_adamax.wrappers import _buffers, _layout


class PackedTree(NamedTuple):
    """A packed tree of parameters, gradients or moments: the form that `inner` receives."""

    unpacked: dict[str, Any]  # the leaves that are not packed, by path
    buffers: dict[str, Any]  # by dtype of the parameter: 1-D array of the small leaves, by size


class PackedState(NamedTuple):
    """State of `pack_small_leaves`."""

    # {text: None}, with path, shape and buffer of each parameter in JSON as text. The text is a
    # key, because checkpoint libraries compare keys. It is a string, because JAX exports and Flax
    # saves only string keys.
    layout: dict[str, Any]
    inner_state: optax.OptState  # the state of `inner`, for parameters as a PackedTree

    def __repr__(self) -> str:
        """Returns the inner state, without the layout."""
        return f"{type(self).__name__}(inner_state={self.inner_state!r})"


def pack_small_leaves(
    inner: optax.GradientTransformation, max_size: int = 1024
) -> optax.GradientTransformationExtraArgs:
    """Stores the state of small leaves in a few flat buffers, with bitwise equal updates.

    It is meant for one CPU and for models with hundreds of small parameters, such as scales and
    biases, whose steps are bound by per-buffer overhead. On TPU, packing increases the number of
    loops in a GPT-2 step, and compiles a thousand leaves of 64 elements in a tenth of the time
    (estimated by the compiler; not run).

    ``update`` concatenates the gradients of the small leaves into one flat array per dtype of the
    parameters, calls `inner`, and slices its updates. It does the same with the parameters if it
    receives them. Equal gradients give bitwise equal updates. If one jitted function computes
    gradients and updates, results may differ in the last bit, because XLA on CPU contracts a
    product and a sum to a fused multiply-add in some programs only.

    The layout depends only on `max_size` and on the paths, shapes and dtypes of the parameters. If
    one of these changes, a checkpoint does not fit; :func:`unpack_state` and :func:`repack_state`
    convert it. :func:`optax_adamax.sharding.shard` does not accept this transformation.

    `inner` must be elementwise, as :func:`adamax` and :func:`adamaxw` are in every storage format.
    It receives a :class:`PackedTree` instead of the parameters. So norms of leaves (LARS, LAMB,
    adafactor) and rules or masks by path or shape (`optax.partition`, the ``mask`` of `adamaxw`) do
    not work inside. Put them around this transformation, or before or after it in a chain.
    `adamaxw` raises an error for a mask that is a function.
    :func:`optax.tree.map_params` cannot map over the packed state: unpack it first.

    Only real float leaves with more than one element are packed. XLA may round scalars and arrays
    differently.

    Args:
      inner: an elementwise optax transformation, or an object with ``init`` and ``update``.
      max_size: largest number of elements of a leaf that is packed. On CPU, packing leaves of more
        than about 4,000 elements costs more than it saves (measured by `benchmarks/packing.py`).

    Returns:
      The transformation, with state :class:`PackedState`.

    Raises:
      ValueError: max_size < 0. From ``init`` and ``update``: a small leaf that is sharded over
        explicit mesh axes. From ``update``: gradients whose tree or shapes differ from the
        parameters given to ``init``.
      TypeError: `max_size` is not an integer, or `inner` is not a transformation. From ``update``:
        the state of another transformation, or gradients of several dtypes for one buffer.

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
    if isinstance(max_size, bool) or not isinstance(max_size, (int, np.integer)):
        raise TypeError(
            f"max_size must be an integer, but {describe_value(max_size)} was given. Write "
            f"max_size=1024. With optax.inject_hyperparams, name the argument in static_args."
        )
    if max_size < 0:
        raise ValueError(f"max_size must be at least 0, but {max_size} was given.")
    inner = as_transformation(inner, "pack_small_leaves(adamax(1e-3))")

    def init(params: optax.Params) -> PackedState:
        check_arrays("parameter", params)
        layout = _layout.choose(params, max_size)
        return PackedState({_layout.encode(layout): None}, inner.init(_pack(params, layout)))

    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, PackedState]:
        if not isinstance(state, PackedState):
            advice = "To pack a state, write repack_state(state, like=tx.init(params))."
            raise TypeError(wrong_state(PackedState, state, advice))
        layout = _layout_of(state)
        check_arrays("gradient", updates)
        gradients = _pack(updates, layout)
        parameters = None if params is None else _pack(without_unused(updates, params), layout)
        packed, inner_state = inner.update(gradients, state.inner_state, parameters, **extra_args)
        return _unpack(packed, updates, layout), PackedState(state.layout, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def unpack_state(state: optax.OptState, params: optax.Params) -> optax.OptState:
    """Converts a packed state to the state of the same transformation without packing.

    If `max_size` or the layout of the package has changed, convert an old state like this::

        state = repack_state(unpack_state(old, params), like=tx.init(params))

    Args:
      state: any tree, with or without :class:`PackedState` nodes.
      params: the parameters of the state. Only the tree and its paths are used.

    Returns:
      The state, in which each :class:`PackedState` is replaced by its inner state, and each
      :class:`PackedTree` by a tree like `params`. Parameters that are not in the packed tree, for
      example because of `optax.masked`, become ``optax.MaskedNode()``.

    Raises:
      ValueError: the state contains parameters that are not in `params`.

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
        unknown = [place.path for place in layout if place.path not in names]
        if unknown:
            raise ValueError(
                f"params must have the leaves of the parameters given to init, but it lacks "
                f"{key_paths(unknown)}. Pass the parameters given to init."
            )
        return jax.tree.map(
            lambda x: _unpack(x, params, layout) if _is_packed_tree(x) else x,
            node.inner_state,
            is_leaf=_is_packed_tree,
        )

    return jax.tree.map(unpack, state, is_leaf=_is_packed_state)


def repack_state(state: optax.OptState, like: optax.OptState) -> optax.OptState:
    """Packs a state in the layout of another state; the inverse of :func:`unpack_state`.

    Args:
      state: a state without packing.
      like: a packed state with the new layout, of arrays or shapes: ``tx.init(params)`` or
        ``jax.eval_shape(tx.init, params)``.

    Returns:
      The state, with the structure of `like`.

    Raises:
      ValueError: the two states belong to different transformations or parameters, or have
        different storage formats.

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
            f"The state must have the structure of `like` after packing, but it is "
            f"{jax.tree.structure(state)} instead of {jax.tree.structure(like)}. Pass `like` of "
            f"the same transformation."
        )
    for (path, leaf), wanted in zip(named_leaves(state), jax.tree.leaves(like), strict=True):
        found = jnp.shape(leaf), jnp.result_type(leaf)
        if found != (wanted.shape, wanted.dtype):
            raise ValueError(
                f"{path} must have shape {wanted.shape} and dtype {wanted.dtype}, as in `like`, "
                f"but it has {found[0]} and {found[1]}. Pass `like` for the same parameters. If "
                f"the storage formats differ, first convert the state with encode_state."
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
    if not layout:  # as for the placeholder that optax.tree.map_params passes to init
        return tree
    return PackedTree(
        unpacked={
            place.path: x for place, x in zip(layout, leaves, strict=True) if not place.buffer
        },
        buffers={
            name: _buffers.concatenate_leaves([leaves[i] for i in indices])
            for name, indices in _layout.indices_by_buffer(layout).items()
        },
    )


def _unpack(packed: Any, like: Any, layout: _layout.Layout) -> Any:
    if not layout:
        return packed
    found = {place.path: packed.unpacked[place.path] for place in layout if not place.buffer}
    for name, indices in _layout.indices_by_buffer(layout).items():
        shapes = tuple(layout[i].shape for i in indices)
        leaves = _buffers.slice_leaves(packed.buffers[name], shapes)
        found.update(zip((layout[i].path for i in indices), leaves, strict=True))
    leaves = [found.get(name, optax.MaskedNode()) for name, _ in named_leaves(like)]
    return jax.tree.structure(like).unflatten(leaves)
