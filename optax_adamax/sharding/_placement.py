"""Derives the sharding of each state leaf from the shardings of the parameters."""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.core import Tracer
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from optax_adamax._messages import describe_value, with_article
from optax_adamax._paths import named_leaves, path_name
from optax_adamax.wrappers.packing import PackedState


class UnshardedLeaf(NamedTuple):
    """A state leaf that is sharded less than requested."""

    path: str  # in the state, such as "0/m/layer/kernel"
    bytes: int  # per device
    reason: str  # why it is not sharded as requested


@dataclasses.dataclass(frozen=True)
class LeafPlacement:
    """Sharding of one state leaf. It is not a pytree, and can therefore be a leaf of a tree."""

    sharding: NamedSharding
    bytes: int  # per device
    reason: str | None = None  # why it is not sharded as requested


@dataclasses.dataclass(frozen=True)
class _LeafMatch:
    leaf: jax.ShapeDtypeStruct
    parameter: jax.ShapeDtypeStruct | None = None


def place_state(
    tx: optax.GradientTransformation,
    described: Any,
    zero1_axes: tuple[str, ...],
    memory_kind: str | None,
) -> Any:
    """Returns a tree like the state of `tx`, with a `LeafPlacement` for each leaf."""
    if memory_kind is not None and not isinstance(memory_kind, str):
        raise TypeError(
            f"memory_kind must be None or a string such as 'pinned_host', but "
            f"{describe_value(memory_kind)} was given."
        )
    mesh = jax.tree.leaves(described)[0].sharding.mesh
    replicated = NamedSharding(mesh, PartitionSpec(), memory_kind=memory_kind)

    def place(match: _LeafMatch) -> LeafPlacement:
        if match.parameter is not None:
            return place_leaf(match.leaf, match.parameter, zero1_axes, memory_kind)
        reason = "it does not belong to a parameter" if match.leaf.ndim else None
        return LeafPlacement(replicated, _bytes(match.leaf.shape, match.leaf), reason)

    return jax.tree.map(place, _match_leaves(tx, described))


def place_leaf(
    leaf: jax.ShapeDtypeStruct,
    parameter: jax.ShapeDtypeStruct,
    zero1_axes: tuple[str, ...],
    memory_kind: str | None,
) -> LeafPlacement:
    """Returns the placement of a state leaf that belongs to `parameter`."""
    own: NamedSharding = parameter.sharding
    spec, reason = own.spec, None
    if leaf.shape != parameter.shape:
        spec = PartitionSpec()
        reason = f"its shape is {leaf.shape}, but the shape of its parameter is {parameter.shape}"
    if zero1_axes:
        extended = _add_axes(leaf.shape, spec, zero1_axes, own.mesh.shape)
        if extended is not None:
            spec, reason = extended, None
        elif reason is None:
            names = " and ".join(map(repr, zero1_axes))
            reason = f"no unsharded dimension of {leaf.shape} is divisible by {names}"
    kind = own.memory_kind if memory_kind is None else memory_kind
    sharding = NamedSharding(own.mesh, spec, memory_kind=kind)
    return LeafPlacement(sharding, _bytes(sharding.shard_shape(leaf.shape), leaf), reason)


def _add_axes(
    shape: tuple[int, ...], spec: PartitionSpec, zero1_axes: tuple[str, ...], sizes: Any
) -> PartitionSpec | None:
    """Adds the ZeRO-1 axes to the largest dimension that they can shard; None if they cannot."""
    entries = [*spec, *(None,) * (len(shape) - len(spec))]
    used = {axis for entry in entries for axis in axes_of(entry)}
    added = tuple(axis for axis in zero1_axes if axis not in used)
    if not added:
        return spec
    count = math.prod(sizes[axis] for axis in added)
    free = [d for d, n in enumerate(shape) if not axes_of(entries[d]) and n and n % count == 0]
    if not free:
        return None
    name, *others = added
    entries[max(free, key=lambda d: shape[d])] = added if others else name
    return PartitionSpec(*entries)


def _bytes(shape: tuple[int, ...], leaf: jax.ShapeDtypeStruct) -> int:
    return math.prod(shape) * leaf.dtype.itemsize


def _match_leaves(tx: optax.GradientTransformation, described: Any) -> Any:
    """Returns a tree like the state, with the parameter to which each leaf belongs."""
    shapes = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), described)
    state = jax.eval_shape(tx.init, shapes)
    nodes = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, PackedState))
    if any(isinstance(node, PackedState) for node in nodes):
        raise TypeError(
            "The transformation contains pack_small_leaves, whose buffers cannot be sharded. Pass "
            "the transformation without pack_small_leaves, which is for one CPU."
        )
    try:
        return optax.tree.map_params(
            tx,
            lambda leaf, p: leaf if isinstance(leaf, optax.MaskedNode) else _LeafMatch(leaf, p),
            state,
            described,
            transform_non_params=_LeafMatch,
            # optax.masked and optax.partition put this node in place of parameters that they skip.
            is_leaf=lambda x: isinstance(x, optax.MaskedNode),
        )
    except Exception as error:
        raise TypeError(
            "optax.tree.map_params cannot find the leaves of this state that belong to parameters, "
            "because the init of the transformation does more than map over its argument (as in "
            "optax.lbfgs and optax.sm3). Shard its state with shardings of your own."
        ) from error


def axes_of(entry: Any) -> tuple[str, ...]:
    """Returns the mesh axes in one entry of a PartitionSpec."""
    if isinstance(entry, tuple):
        return entry
    return () if entry is None else (entry,)


def describe(params: optax.Params) -> Any:
    """Returns the shapes, dtypes and shardings of parameters on one mesh."""
    described = jax.tree_util.tree_map_with_path(_describe_leaf, params)
    meshes: dict[Mesh | AbstractMesh, str] = {}
    for name, leaf in named_leaves(described):
        meshes.setdefault(leaf.sharding.mesh, f"params{name}")
    if not meshes:
        raise ValueError(
            "params must have at least one leaf, but it is empty. Pass the parameters, or their "
            "shapes and shardings."
        )
    if len(meshes) > 1:
        found = "; ".join(f"{name} on {mesh}" for mesh, name in meshes.items())
        raise ValueError(
            f"The parameters must be on one mesh, but they are on {len(meshes)} meshes: {found}. "
            f"Put them all on one with jax.device_put(params, NamedSharding(mesh, spec)), or shard "
            f"one transformation for each mesh."
        )
    return described


def _describe_leaf(path: Any, leaf: Any) -> jax.ShapeDtypeStruct:
    name = f"params{path_name(path)}"
    if isinstance(leaf, Tracer):
        raise TypeError(
            f"{name} must be concrete, but it is traced. Call shard outside of jax.jit."
        )
    sharding = getattr(leaf, "sharding", None)
    if isinstance(sharding, jax.sharding.SingleDeviceSharding):
        mesh = Mesh(np.array(*sharding.device_set), ())
        sharding = NamedSharding(mesh, PartitionSpec(), memory_kind=sharding.memory_kind)
    if not isinstance(sharding, NamedSharding):
        found = f"a {type(sharding).__name__}" if sharding is not None else "no sharding"
        raise TypeError(
            f"{name} must have a NamedSharding, but it is {with_article(type(leaf).__name__)} with "
            f"{found}. Place it first with jax.device_put(params, NamedSharding(mesh, spec)), or "
            f"pass a jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))."
        )
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def validate_axes(zero1_axis: Any, described: Any) -> tuple[str, ...]:
    """Returns the names of the ZeRO-1 axes as a tuple, after checks."""
    if zero1_axis is None:
        return ()
    names = zero1_axis if isinstance(zero1_axis, tuple) else (zero1_axis,)
    if not names or not all(isinstance(name, str) for name in names):
        raise TypeError(
            f"zero1_axis must be None, the name of a mesh axis or a tuple of names, but "
            f"{describe_value(zero1_axis)} was given."
        )
    mesh = jax.tree.leaves(described)[0].sharding.mesh
    if not mesh.axis_names:
        raise ValueError(
            f"zero1_axis is {zero1_axis!r}, but the parameters are not on a mesh. Put them on one "
            f"with jax.device_put(params, NamedSharding(mesh, spec))."
        )
    if not set(names) <= set(mesh.axis_names) or len(set(names)) < len(names):
        raise ValueError(
            f"zero1_axis is {zero1_axis!r}, but the mesh of the parameters has the axes "
            f"{mesh.axis_names}. Write one or several of these, each once."
        )
    return names
