"""Wraps an optax transformation, and shards its state."""

from typing import Any

import jax
import numpy as np
import optax
from jax.core import Tracer

from optax_adamax._inner import as_transformation
from optax_adamax._messages import ORDER, key_paths
from optax_adamax._paths import named_leaves
from optax_adamax._tree_checks import without_unused
from optax_adamax.sharding import _constraints, _placement
from optax_adamax.sharding._placement import UnshardedLeaf

# pyright --verifytypes does not read optax, which has no py.typed marker. With the annotation, the
# base class is then known to be a tuple. Otherwise it is known to be optax's class.
_Transformation: type[tuple[Any, ...]] = optax.GradientTransformationExtraArgs


class ShardedTransformation(_Transformation):
    """An optax transformation with a sharded state; the result of :func:`shard`.

    ``init`` creates each shard on its own device. No leaf is unsharded on one device, unless its
    sharding says so. For `jax.ShapeDtypeStruct` parameters, ``init`` returns the state as
    `jax.ShapeDtypeStruct` with shardings, a target for checkpoints. (`jax.eval_shape` drops
    shardings over automatic mesh axes.) ``init`` also works inside `jax.jit`.

    ``update`` returns updates that are sharded like the parameters. With ZeRO-1, it gathers them
    for callers that add updates themselves (`optax.apply_updates`, Flax). Call it inside `jax.jit`.
    """

    # Properties, because a pytree round trip rebuilds this tuple from init and update alone.

    @property
    def shardings(self) -> optax.OptState:
        """Returns a tree like the state, with the `NamedSharding` of each leaf."""
        return _implementation(self).shardings

    @property
    def unsharded(self) -> tuple[UnshardedLeaf, ...]:
        """Returns the leaves that are sharded less than requested, in the order of the state.

        With `zero1_axis`, these are leaves that it cannot shard. Without, these are leaves whose
        shape differs from the shape of their parameter. Arrays that do not belong to a parameter
        are listed in both cases, except scalars.
        """
        return _implementation(self).unsharded

    def apply_gradients(
        self, gradients: optax.Updates, state: optax.OptState, params: optax.Params, **extra: Any
    ) -> tuple[optax.Params, optax.OptState]:
        """Returns the new parameters and the new state; call it inside `jax.jit`.

        With ZeRO-1, each device adds its shard of the updates to its shard of the parameters, and
        XLA gathers the sums, once per parameter. ``update`` followed by `optax.apply_updates`
        communicates as much, but each device adds all updates to all parameters. The page "On TPU
        and GPU" has estimates of both.

        Args:
          gradients: a tree like `params`.
          state: the state from ``init`` or from the last step.
          params: the parameters, with the shapes and shardings given to :func:`shard`.
          **extra: further arguments for ``update`` of the wrapped transformation.
        """
        return _implementation(self).apply_gradients(gradients, state, params, **extra)


def _implementation(tx: ShardedTransformation) -> "_Implementation":
    return getattr(tx.update, "__self__")  # noqa: B009


def shard(
    tx: optax.GradientTransformation | optax.MultiSteps,
    params: optax.Params,
    zero1_axis: str | tuple[str, ...] | None = None,
    memory_kind: str | None = None,
) -> ShardedTransformation:
    """Shards the state of any optax transformation.

    A state leaf that belongs to a parameter gets the sharding of that parameter. Every other leaf,
    such as a step count or a hyperparameter, is replicated on the same mesh. A leaf whose shape
    differs from the shape of its parameter is also replicated, as in `optax.adafactor`.

    The arithmetic is the same as on one device. Results may differ in the last bit, because XLA on
    CPU (JAX 0.10.2) contracts a product and a sum to a fused multiply-add in some programs only,
    for example in ``p + learning_rate * u``.

    Make it the outermost wrapper: ``shard(optax.chain(...), params)``. Inside `optax.chain` or
    `optax.MultiSteps`, it shards only its own part of the state, and the result of `optax.chain`
    does not have ``apply_gradients``.

    Args:
      tx: an optax transformation or chain without :func:`optax_adamax.pack_small_leaves`, or an
        object with ``init`` and ``update``.
      params: a tree of arrays, or of `jax.ShapeDtypeStruct` with shardings. Each has a
        `NamedSharding` on one mesh, concrete or abstract, or all are on one device. Only shapes,
        dtypes and shardings are used.
      zero1_axis: name of a mesh axis, or a tuple of names, over which state leaves are sharded
        further (ZeRO-1). The axes shard the largest dimension that is unsharded in the parameter
        and divisible by their size. A leaf without such a dimension has the sharding of its
        parameter, and is listed in ``unsharded``. Axes that already shard the parameter are
        ignored.
      memory_kind: kind of memory for the state between steps, for example ``"pinned_host"``. None:
        the memory kind of the parameter. A step moves the state to the devices and back. Donate
        the state to avoid a second copy. On a mesh with both explicit and automatic
        axes, JAX 0.10.2 drops the memory kind of results: pass ``tx.shardings`` as `out_shardings`
        of the jitted step.

    Returns:
      A transformation with the state of `tx`; see :class:`ShardedTransformation`.

    Raises:
      TypeError: a parameter without a `NamedSharding` that is not on one device; a `tx` that is not
        a transformation, or whose state `optax.tree.map_params` cannot map; a packed state.
      ValueError: parameters on several meshes, or no parameters; an axis that the mesh does not
        have; `zero1_axis` for parameters that are not on a mesh; an unknown memory kind. From
        ``init`` and ``update``: other parameters. From ``update``: another state.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jax.sharding import NamedSharding, PartitionSpec as P
      >>> from optax_adamax import adamax, sharding
      >>> mesh = jax.make_mesh((1,), ("data",))
      >>> params = jax.device_put(jnp.array([1.0, 2.0]), NamedSharding(mesh, P()))
      >>> tx = sharding.shard(adamax(0.002), params, zero1_axis="data")
      >>> state = tx.init(params)
      >>> print(tuple(state[0].m.sharding.spec))
      ('data',)
      >>> params, state = jax.jit(tx.apply_gradients)(params, state, params)
      >>> print(params)
      [0.998 1.998]

    Reference:
      Rajbhandari et al., `ZeRO: Memory Optimizations Toward Training Trillion Parameter Models
      <https://arxiv.org/abs/1910.02054>`_, 2020, stage 1.
    """
    tx = as_transformation(tx, "shard(adamax(1e-3), params)")
    sharded = _Implementation(tx, params, zero1_axis, memory_kind)
    return ShardedTransformation(sharded.init, sharded.update)


class _Implementation:
    """The methods of a `ShardedTransformation` and their shared data."""

    def __init__(
        self,
        tx: optax.GradientTransformationExtraArgs,
        params: optax.Params,
        zero1_axis: str | tuple[str, ...] | None,
        memory_kind: str | None,
    ) -> None:
        described = _placement.describe(params)
        zero1_axes = _placement.validate_axes(zero1_axis, described)
        placements = _placement.place_state(tx, described, zero1_axes, memory_kind)
        self.inner = tx
        self.shardings = jax.tree.map(lambda leaf: leaf.sharding, placements)
        self.unsharded = tuple(
            UnshardedLeaf(path, leaf.bytes, leaf.reason)
            for path, leaf in named_leaves(placements, "/")
            if leaf.reason
        )
        self.stored = dict(named_leaves(self.shardings))
        self.computed = _constraints.on_device(self.stored)
        named = dict(named_leaves(described))
        self.shapes = {name: p.shape for name, p in named.items()}
        self.params = _constraints.on_device({name: p.sharding for name, p in named.items()})
        self.zero1_params = _constraints.on_device(
            {n: _placement.place_leaf(p, p, zero1_axes, None).sharding for n, p in named.items()}
        )

    def init(self, params: optax.Params) -> optax.OptState:
        self._check_parameters("init", params)
        leaves = jax.tree.leaves(params)
        missing = self.shapes.keys() - {name for name, _ in named_leaves(params)}
        if leaves and missing:  # optax.tree.map_params passes a tree without leaves
            raise ValueError(
                f"init must receive all parameters that were given to shard, but it lacks "
                f"{key_paths(sorted(missing))}. Call shard with the parameters that are trained."
            )
        structs = jax.eval_shape(self.inner.init, params)
        shardings = _constraints.select(self.stored, structs)
        if any(isinstance(x, jax.ShapeDtypeStruct) for x in leaves):
            return jax.tree.map(lambda x, s: x.update(sharding=s), structs, shardings)
        if any(isinstance(x, Tracer) for x in leaves):
            # Inside another jit, JAX 0.10.2 ignores the memory kind of out_shardings, and with
            # explicit axes also their specs.
            shardings = _constraints.select(self.computed, structs)
            state = jax.jit(self.inner.init, out_shardings=shardings)(params)
            return self._store(_constraints.constrain(state, self.computed))
        return jax.jit(self.inner.init, out_shardings=shardings)(params)

    def update(
        self,
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        updates, state = self._zero1_update("update", updates, state, params, **extra_args)
        return _constraints.constrain(updates, self.params), state

    def apply_gradients(
        self, gradients: optax.Updates, state: optax.OptState, params: optax.Params, **extra: Any
    ) -> tuple[optax.Params, optax.OptState]:
        updates, state = self._zero1_update("apply_gradients", gradients, state, params, **extra)
        params = optax.apply_updates(_constraints.constrain(params, self.zero1_params), updates)
        return _constraints.constrain(params, self.params), state

    def _zero1_update(
        self,
        function: str,
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        """Returns the updates, sharded over the ZeRO-1 axes, and the new state.

        Errors name `function`, which the user called.
        """
        self._check_parameters(function, updates)
        self._check_state(function, state)
        if self.stored != self.computed:
            state = _constraints.move(state, self.computed)
        updates = _constraints.constrain(updates, self.zero1_params)
        if params is not None:
            params = without_unused(updates, params)
            self._check_parameters(function, params)
            params = _constraints.constrain(params, self.zero1_params)
        updates, state = self.inner.update(updates, state, params, **extra_args)
        # Without this constraint, XLA may gather the inputs of the updates as well.
        updates = _constraints.constrain(updates, self.zero1_params)
        return updates, self._store(_constraints.constrain(state, self.computed))

    def _store(self, state: optax.OptState) -> optax.OptState:
        return state if self.stored == self.computed else _constraints.move(state, self.stored)

    def _check_parameters(self, function: str, tree: Any) -> None:
        order = "" if function == "init" else f" {ORDER.replace('update', function)}"
        for name, leaf in named_leaves(tree):
            found, known = np.shape(leaf), self.shapes.get(name)
            if found != known:
                label = f"leaf {name}".rstrip()
                wanted = "was called without it" if known is None else f"received shape {known}"
                raise ValueError(
                    f"{function} received a {label} of shape {found}, but shard {wanted}. Call "
                    f"shard with the parameters that are trained.{order}"
                )

    def _check_state(self, function: str, state: optax.OptState) -> None:
        for name, _ in named_leaves(state):
            if name not in self.stored:
                raise ValueError(
                    f"{function} received a state with the leaf {name or 'array'}, which is not in "
                    f"the state of this transformation. Pass the state that its init returned. "
                    f"{ORDER.replace('update', function)}"
                )
