"""Where each leaf of a state belongs: what `optax_adamax.sharding` decides, leaf by leaf."""

import dataclasses
import math
from typing import Any

import jax
import numpy as np
import optax
from jax.core import Tracer
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec


@dataclasses.dataclass(frozen=True)
class Place:
    """Where one leaf of the state belongs; no pytree node, so that a tree can have it as leaf."""

    sharding: NamedSharding
    bytes: int  # on each device
    reason: str | None  # why it is not split as asked


def places(
    tx: optax.GradientTransformation,
    params: optax.Params,
    zero_axis: str | None,
    memory_kind: str | None,
) -> Any:
    """A tree like the state, with a `Place` for each leaf."""
    if not callable(getattr(tx, "init", None)):
        raise TypeError(f"tx must be an optax transformation, but {tx!r} was given.")
    described = describe(params)
    mesh = jax.tree.leaves(described)[0].sharding.mesh
    _check_axis(mesh, zero_axis)
    if memory_kind is not None and not isinstance(memory_kind, str):
        raise TypeError(
            f"memory_kind must be a string such as 'pinned_host', but {memory_kind!r} was given."
        )
    replicated = NamedSharding(mesh, PartitionSpec(), memory_kind=memory_kind)

    def find(match: _Match) -> Place:
        if match.parameter is not None:
            return place(match.leaf, match.parameter, zero_axis, memory_kind)
        reason = "it belongs to no parameter" if match.leaf.ndim else None
        return Place(replicated, match.leaf.size * match.leaf.dtype.itemsize, reason)

    return jax.tree.map(find, _match(tx, described))


@dataclasses.dataclass(frozen=True)
class _Match:
    leaf: jax.ShapeDtypeStruct
    parameter: jax.ShapeDtypeStruct | None


def _match(tx: optax.GradientTransformation, described: Any) -> Any:
    """A tree like the state, with the parameter that each leaf is like."""
    shapes = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), described)
    state = jax.eval_shape(tx.init, shapes)
    try:
        return optax.tree.map_params(
            tx,
            # optax.masked and optax.partition leave a node where a parameter is not theirs.
            lambda leaf, p: leaf if isinstance(leaf, optax.MaskedNode) else _Match(leaf, p),
            state,
            described,
            transform_non_params=lambda leaf: _Match(leaf, None),
            is_leaf=lambda x: isinstance(x, optax.MaskedNode),
        )
    except Exception as error:
        raise TypeError(
            "optax.tree.map_params cannot tell which leaves of this state are like parameters: "
            "the init of the transformation does more than map over the tree that it is given "
            "(optax.lbfgs and optax.sm3 are such). Write its shardings by hand."
        ) from error


def place(leaf: Any, parameter: Any, zero_axis: str | None, memory_kind: str | None) -> Place:
    """Where a leaf that stands in the place of `parameter` belongs."""
    own: NamedSharding = parameter.sharding
    spec, reason = own.spec, None
    if leaf.shape != parameter.shape:
        spec = PartitionSpec()
        reason = f"its shape is {leaf.shape}, its parameter's {parameter.shape}"
    if zero_axis is not None:
        split = _split(leaf.shape, spec, zero_axis, own.mesh.shape[zero_axis])
        if split is None:
            reason = reason or f"no free dimension of {leaf.shape} is divided by {zero_axis!r}"
        else:
            spec, reason = split, None
    kind = own.memory_kind if memory_kind is None else memory_kind
    sharding = NamedSharding(own.mesh, spec, memory_kind=kind)
    size = math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    return Place(sharding, size, reason)


def _split(
    shape: tuple[int, ...], spec: PartitionSpec, axis: str, size: int
) -> PartitionSpec | None:
    """`spec` split further over `axis`, or None where no dimension is free for it."""
    entries = [*spec, *(None,) * (len(shape) - len(spec))]
    if any(axis in axes(entry) for entry in entries):
        return spec
    free = [d for d, n in enumerate(shape) if not axes(entries[d]) and n and n % size == 0]
    if not free:
        return None
    entries[max(free, key=lambda d: shape[d])] = axis
    return PartitionSpec(*entries)


def axes(entry: Any) -> tuple[str, ...]:
    """The mesh axes that one entry of a PartitionSpec names."""
    if isinstance(entry, tuple):
        return entry
    return () if entry is None else (entry,)


def describe(params: optax.Params) -> Any:
    """A tree of `jax.ShapeDtypeStruct`, each with a NamedSharding on the one mesh of `params`."""
    described = jax.tree_util.tree_map_with_path(_describe_leaf, params)
    meshes = {leaf.sharding.mesh for leaf in jax.tree.leaves(described)}
    if not meshes:
        raise ValueError("params has no leaf: give the parameters, or their shapes and shardings.")
    if len(meshes) > 1:
        first: dict[Mesh | AbstractMesh, str] = {}
        for path, leaf in jax.tree_util.tree_leaves_with_path(described):
            first.setdefault(leaf.sharding.mesh, leaf_name(path))
        found = "; ".join(f"{name} on {mesh}" for mesh, name in first.items())
        raise ValueError(
            f"The parameters are on {len(meshes)} meshes: {found}. Put them all on one with "
            f"jax.device_put(params, NamedSharding(mesh, spec)), or make one state for each mesh."
        )
    return described


def _describe_leaf(path: Any, leaf: Any) -> jax.ShapeDtypeStruct:
    if isinstance(leaf, Tracer):
        raise TypeError(f"{leaf_name(path)} is traced: call this outside of jax.jit.")
    sharding = getattr(leaf, "sharding", None)
    if isinstance(sharding, jax.sharding.SingleDeviceSharding):
        (device,) = sharding.device_set
        alone = Mesh(np.array(device), ())
        sharding = NamedSharding(alone, PartitionSpec(), memory_kind=sharding.memory_kind)
    if not isinstance(sharding, NamedSharding):
        found = f"a {type(sharding).__name__}" if sharding is not None else "no sharding"
        raise TypeError(
            f"{leaf_name(path)} is a {type(leaf).__name__} with {found}: place it first with "
            f"jax.device_put(params, NamedSharding(mesh, spec)), or give a "
            f"jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))."
        )
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _check_axis(mesh: Mesh | AbstractMesh, axis: str | None) -> None:
    if axis is None:
        return
    if not isinstance(axis, str):
        raise TypeError(f"zero_axis must be the name of one mesh axis, but {axis!r} was given.")
    if axis not in mesh.axis_names:
        raise ValueError(
            f"zero_axis is {axis!r}, but the mesh of the parameters has the axes "
            f"{mesh.axis_names}: name one of these."
        )


def leaf_name(path: Any) -> str:
    """How messages name a parameter."""
    return f"params{jax.tree_util.keystr(path)}"
