"""Where the state lives: beside its parameters, split further (ZeRO-1), or in host memory.

Nothing here knows Adamax. `optax.tree.map_params` tells which leaves of a state are like
parameters, for any optax transformation or chain of them.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

from optax_adamax._paths import named_leaves
from optax_adamax.sharding import _constraints, _placement

__all__ = [
    "UnsplitLeaf",
    "init_sharded",
    "keep_sharded",
    "make_update_params",
    "state_shardings",
    "unsplit_leaves",
]


def __dir__() -> list[str]:
    return list(__all__)


class UnsplitLeaf(NamedTuple):
    """A leaf of the state that is split less than was asked for."""

    path: str  # as jax.tree_util.keystr writes it, without a box of Flax
    bytes: int  # on each device
    reason: str  # why it is not split further


def state_shardings(
    tx: optax.GradientTransformation,
    params: optax.Params,
    *,
    zero_axis: str | None = None,
    memory_kind: str | None = None,
) -> optax.OptState:
    """The shardings for the state of any optax transformation.

    A leaf that is like a parameter gets the sharding of that parameter; every other leaf
    (a step count, a hyperparameter) is replicated on the same mesh. A leaf in the place of a
    parameter but of another shape, as in `optax.adafactor`, is replicated too, and so are the
    buffers of :func:`optax_adamax.pack_small_leaves`; :func:`unsplit_leaves` names them.

    Args:
      tx: any optax transformation, a chain as well.
      params: a tree of arrays, or of `jax.ShapeDtypeStruct` with shardings: each one a
        `NamedSharding` on one mesh, concrete or abstract, or all of them on one single device.
      zero_axis: name of a mesh axis over which leaves that are like parameters are split further
        (ZeRO-1): along the largest dimension that the axis divides and that the sharding of the
        parameter leaves free. A leaf without such a dimension stays as it is;
        :func:`unsplit_leaves` names it.
      memory_kind: kind of memory for the whole state, ``"pinned_host"`` for the host's. None:
        that of the parameter.

    Returns:
      A tree like the state, with a `NamedSharding` for each leaf: for `out_shardings`, for
      `jax.device_put`, or for the restoring of a checkpoint.

    Raises:
      TypeError: a parameter without a sharding, or with one that names no mesh; a transformation
        whose state `optax.tree.map_params` cannot read.
      ValueError: parameters on several meshes, or none at all; an axis that the mesh does not
        have; a memory kind that the devices do not have.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jax.sharding import NamedSharding, PartitionSpec as P
      >>> from optax_adamax import scale_by_adamax, sharding
      >>> mesh = jax.make_mesh((1,), ("data",))
      >>> params = {"w": jax.device_put(jnp.ones((8, 2)), NamedSharding(mesh, P()))}
      >>> shardings = sharding.state_shardings(scale_by_adamax(), params, zero_axis="data")
      >>> print(tuple(shardings.count.spec), tuple(shardings.m["w"].spec))
      () ('data', None)

    Reference:
      Rajbhandari et al., `ZeRO: Memory Optimizations Toward Training Trillion Parameter Models
      <https://arxiv.org/abs/1910.02054>`_, 2020, stage 1.
    """
    return jax.tree.map(
        lambda leaf: leaf.sharding, _placement.leaf_shardings(tx, params, zero_axis, memory_kind)
    )


def unsplit_leaves(
    tx: optax.GradientTransformation, params: optax.Params, *, zero_axis: str | None = None
) -> list[UnsplitLeaf]:
    """The leaves that :func:`state_shardings` leaves less split than it was asked to.

    They are: with `zero_axis`, the leaves that it cannot split; without it, leaves in the place of
    a parameter that have another shape, and so cannot have its sharding; in both cases arrays that
    belong to no parameter, and buffers of `pack_small_leaves` (without `zero_axis` only where
    parameters are split). Scalars that belong to no parameter are left out.

    Args:
      tx: as for :func:`state_shardings`.
      params: likewise.
      zero_axis: likewise.

    Returns:
      Path, bytes on each device, and reason of each such leaf, in the order of the state.

    Raises:
      TypeError, ValueError: as :func:`state_shardings`.
    """
    found = named_leaves(_placement.leaf_shardings(tx, params, zero_axis, None))
    return [UnsplitLeaf(name, leaf.bytes, leaf.reason) for name, leaf in found if leaf.reason]


def init_sharded(
    tx: optax.GradientTransformation,
    params: optax.Params,
    *,
    zero_axis: str | None = None,
    memory_kind: str | None = None,
) -> optax.OptState:
    """The state of a new run, made where :func:`state_shardings` says.

    It is made in place: no leaf is whole on one device, unless its sharding says so.

    Args:
      tx: as for :func:`state_shardings`.
      params: the parameters, a tree of arrays.
      zero_axis: as for :func:`state_shardings`.
      memory_kind: likewise.

    Returns:
      The state.

    Raises:
      TypeError: `params` holds something else than arrays; else as :func:`state_shardings`.
      ValueError: as :func:`state_shardings`.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if isinstance(leaf, jax.ShapeDtypeStruct):
            raise TypeError(
                f"{_placement.leaf_name(path)} is a ShapeDtypeStruct, from which no state can be "
                f"made: give the parameters themselves. For the shardings alone, call "
                f"state_shardings."
            )
    shardings = state_shardings(tx, params, zero_axis=zero_axis, memory_kind=memory_kind)
    return jax.jit(tx.init, out_shardings=shardings)(params)


def keep_sharded(
    tx: optax.GradientTransformation,
    params: optax.Params,
    *,
    zero_axis: str | None = None,
    memory_kind: str | None = None,
) -> optax.GradientTransformationExtraArgs:
    """The same transformation, whose update leaves the state where :func:`init_sharded` put it.

    Call `update` under `jax.jit`. The gradients are split over `zero_axis` where the state is, and
    the updates come out sharded like the parameters: gathering them is the one communication
    that ZeRO adds. Where only :func:`optax.apply_updates` is to see the updates,
    :func:`make_update_params` is cheaper. A state in host memory is moved to the devices and back;
    donate it to the jitted step, or it is there twice. (On a mesh that has axes of both types,
    JAX 0.10.2 forgets the memory kind of results: give the jitted step its `out_shardings` there.)

    The arithmetic is that of one device. Bits may differ where XLA contracts a product and a sum
    to a fused multiply-add in one program and not in another (JAX 0.10.2 on CPU does, at
    ``p + learning_rate * u`` for example).

    Without `zero_axis` and `memory_kind` nothing has to be kept: a jitted step of an elementwise
    transformation such as Adamax leaves its state beside the parameters by itself.

    Args:
      tx: as for :func:`state_shardings`.
      params: likewise; only their shapes and shardings are used.
      zero_axis: likewise.
      memory_kind: likewise.

    Returns:
      A transformation with the state of `tx`.

    Raises:
      TypeError, ValueError: as :func:`state_shardings`.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from jax.sharding import NamedSharding, PartitionSpec as P
      >>> from optax_adamax import adamax, sharding
      >>> mesh = jax.make_mesh((1,), ("data",))
      >>> params = jax.device_put(jnp.array([1.0, 2.0]), NamedSharding(mesh, P()))
      >>> state = sharding.init_sharded(adamax(0.002), params, zero_axis="data")
      >>> tx = sharding.keep_sharded(adamax(0.002), params, zero_axis="data")
      >>> updates, state = jax.jit(tx.update)(params, state)
      >>> print(optax.apply_updates(params, updates))
      [0.998 1.998]
    """
    split_update = _split_update(tx, params, zero_axis, memory_kind)
    whole = _whole(params)

    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        updates, state = split_update(updates, state, params, **extra_args)
        return _constraints.constrain(updates, whole), state

    return optax.GradientTransformationExtraArgs(tx.init, update)


def make_update_params(
    tx: optax.GradientTransformation,
    params: optax.Params,
    *,
    zero_axis: str | None = None,
    memory_kind: str | None = None,
) -> Callable[..., tuple[optax.Params, optax.OptState]]:
    """:func:`keep_sharded` and `optax.apply_updates` in one: it adds, then it gathers.

    After :func:`keep_sharded` XLA gathers the updates, and each device adds all of them to all of
    the parameters. Here each device adds its part, and XLA gathers the sum instead: as much
    communication, and less to read, to write and to hold. (A step of 164 million float32 parameters
    compiled for 256 chips of TPU v5e, as the compiler estimates it: 5.1 million cycles and 0.72 GB
    of temporaries, not 10.3 million and 1.03 GB.)

    Args:
      tx: as for :func:`state_shardings`.
      params: likewise; only their shapes and shardings are used.
      zero_axis: likewise.
      memory_kind: likewise.

    Returns:
      A function ``(gradients, state, params, **extra_args) -> (params, state)``, to be called under
      `jax.jit`. The new parameters are sharded like `params`.

    Raises:
      TypeError, ValueError: as :func:`state_shardings`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jax.sharding import NamedSharding, PartitionSpec as P
      >>> from optax_adamax import adamax, sharding
      >>> mesh = jax.make_mesh((1,), ("data",))
      >>> params = jax.device_put(jnp.array([1.0, 2.0]), NamedSharding(mesh, P()))
      >>> state = sharding.init_sharded(adamax(0.002), params, zero_axis="data")
      >>> update_params = sharding.make_update_params(adamax(0.002), params, zero_axis="data")
      >>> params, state = jax.jit(update_params)(params, state, params)
      >>> print(params)
      [0.998 1.998]
    """
    split_update = _split_update(tx, params, zero_axis, memory_kind)
    split, whole = _split(tx, params, zero_axis), _whole(params)

    def update_params(
        gradients: optax.Updates, state: optax.OptState, params: optax.Params, **extra_args: Any
    ) -> tuple[optax.Params, optax.OptState]:
        updates, state = split_update(gradients, state, params, **extra_args)
        added = optax.apply_updates(_constraints.constrain(params, split), updates)
        return _constraints.constrain(_constraints.constrain(added, split), whole), state

    return update_params


def _split_update(
    tx: optax.GradientTransformation,
    params: optax.Params,
    zero_axis: str | None,
    memory_kind: str | None,
) -> Callable[..., tuple[optax.Updates, optax.OptState]]:
    """The update of :func:`keep_sharded` before its updates are gathered."""
    shardings = state_shardings(tx, params, zero_axis=zero_axis, memory_kind=memory_kind)
    at_rest = dict(named_leaves(shardings))
    at_work = {name: _constraints.on_device(sharding) for name, sharding in at_rest.items()}
    split = _split(tx, params, zero_axis)
    inner = optax.with_extra_args_support(tx)

    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        if memory_kind is not None:
            state = _constraints.move(state, at_work)
        updates = _constraints.constrain(updates, split)
        params = None if params is None else _constraints.constrain(params, split)
        updates, state = inner.update(updates, state, params, **extra_args)
        # Without this constraint XLA may gather what the updates are made of, not them.
        updates = _constraints.constrain(updates, split)
        state = _constraints.constrain(state, at_work)
        if memory_kind is not None:
            state = _constraints.move(state, at_rest)
        return updates, state

    return update


def _split(
    tx: optax.GradientTransformation, params: optax.Params, zero_axis: str | None
) -> _constraints.ByName:
    split = _placement.split_params(tx, params, zero_axis)
    return {name: _constraints.on_device(sharding) for name, sharding in split.items()}


def _whole(params: optax.Params) -> _constraints.ByName:
    described = named_leaves(_placement.describe(params))
    return {name: _constraints.on_device(p.sharding) for name, p in described}
