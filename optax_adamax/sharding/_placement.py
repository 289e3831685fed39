"""Where each leaf of a state belongs: what `optax_adamax.sharding` decides, leaf by leaf."""

import dataclasses
import math
from typing import Any

import jax
import numpy as np
import optax
from jax.core import Tracer
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from optax_adamax._paths import named_leaves, path_name
from optax_adamax.wrappers.packing import (
    PackedState,
    PackedTree,
    is_packed_state,
    is_packed_tree,
)


@dataclasses.dataclass(frozen=True)
class LeafSharding:
    """Where one leaf of the state belongs; no pytree node, so that a tree can have it as leaf."""

    sharding: NamedSharding
    bytes: int  # on each device
    reason: str | None  # why it is not split as asked


def leaf_shardings(
    tx: optax.GradientTransformation,
    params: optax.Params,
    zero_axis: str | None,
    memory_kind: str | None,
) -> Any:
    """A tree like the state, with a `LeafSharding` for each leaf."""
    described = describe(params)
    mesh = _mesh(described, zero_axis)
    if memory_kind is not None and not isinstance(memory_kind, str):
        raise TypeError(
            f"memory_kind must be a string such as 'pinned_host', but {memory_kind!r} was given."
        )
    replicated = NamedSharding(mesh, PartitionSpec(), memory_kind=memory_kind)

    def find(match: _Match) -> LeafSharding:
        if match.parameter is not None:
            return _leaf_sharding(match.leaf, match.parameter, zero_axis, memory_kind)
        reason = None
        if match.packed is None:
            reason = "it belongs to no parameter" if match.leaf.ndim else None
        elif zero_axis is not None or any(axes(e) for p in match.packed for e in p.sharding.spec):
            reason = "it is a buffer of pack_small_leaves, which is whole on each device"
        return LeafSharding(replicated, match.leaf.size * match.leaf.dtype.itemsize, reason)

    return jax.tree.map(find, _match(tx, described))


def split_params(
    tx: optax.GradientTransformation, params: optax.Params, zero_axis: str | None
) -> dict[str, NamedSharding]:
    """Where gradients, parameters and updates are while the state is updated, by name."""
    described = describe(params)
    _mesh(described, zero_axis)
    packed = {
        at.path
        for node in jax.tree.leaves(_abstract_state(tx, described), is_leaf=is_packed_state)
        if is_packed_state(node)
        for layout in node.layout
        for at in layout
        if at.buffer
    }
    return {
        name: _leaf_sharding(p, p, None if name in packed else zero_axis, None).sharding
        for name, p in named_leaves(described)
    }


@dataclasses.dataclass(frozen=True)
class _Match:
    leaf: jax.ShapeDtypeStruct
    parameter: jax.ShapeDtypeStruct | None = None
    packed: tuple[jax.ShapeDtypeStruct, ...] | None = None  # of a buffer, its parameters


def _match(tx: optax.GradientTransformation, described: Any) -> Any:
    """A tree like the state, with the parameter that each leaf is like."""
    state = _abstract_state(tx, described)
    try:
        matched = optax.tree.map_params(
            lambda params: _without_packed_states(tx.init(params)),
            _match_leaf,
            _without_packed_states(state),
            described,
            transform_non_params=_Match,
            is_leaf=_is_matched,
        )
    except Exception as error:
        raise TypeError(
            "optax.tree.map_params cannot tell which leaves of this state are like parameters: "
            "the init of the transformation does more than map over the tree that it is given "
            "(optax.lbfgs and optax.sm3 are such). Write its shardings by hand."
        ) from error
    return jax.tree.map(
        lambda node, inner: PackedState(node.layout, inner) if is_packed_state(node) else inner,
        state,
        matched,
        is_leaf=is_packed_state,
    )


def _match_leaf(leaf: Any, parameter: Any) -> Any:
    if isinstance(leaf, optax.MaskedNode):
        return leaf
    if not is_packed_tree(leaf):
        return _Match(leaf, parameter)
    by_name = dict(named_leaves(parameter))  # all of them: a PackedTree stands for the whole tree
    packed = tuple(p for name, p in by_name.items() if name not in leaf.unpacked)
    return PackedTree(
        unpacked={name: _Match(x, by_name[name]) for name, x in leaf.unpacked.items()},
        buffers={name: _Match(x, packed=packed) for name, x in leaf.buffers.items()},
    )


def _is_matched(node: Any) -> bool:
    # optax.masked and optax.partition leave a node where a parameter is not theirs.
    return isinstance(node, optax.MaskedNode) or is_packed_tree(node)


def _abstract_state(tx: optax.GradientTransformation, described: Any) -> Any:
    if not callable(getattr(tx, "init", None)):
        raise TypeError(f"tx must be an optax transformation, but {tx!r} was given.")
    shapes = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), described)
    return jax.eval_shape(tx.init, shapes)


def _without_packed_states(state: Any) -> Any:
    """A `PackedState` differs in its key from that of optax's placeholder."""
    return jax.tree.map(
        lambda node: node.inner_state if is_packed_state(node) else node,
        state,
        is_leaf=is_packed_state,
    )


def _leaf_sharding(
    leaf: jax.ShapeDtypeStruct,
    parameter: jax.ShapeDtypeStruct,
    zero_axis: str | None,
    memory_kind: str | None,
) -> LeafSharding:
    """Where a leaf of the state in the place of `parameter` belongs."""
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
    return LeafSharding(sharding, size, reason)


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


def _mesh(described: Any, zero_axis: str | None) -> Mesh | AbstractMesh:
    mesh = jax.tree.leaves(described)[0].sharding.mesh
    if zero_axis is not None and not isinstance(zero_axis, str):
        raise TypeError(
            f"zero_axis must be the name of one mesh axis, but {zero_axis!r} was given."
        )
    if zero_axis is not None and zero_axis not in mesh.axis_names:
        raise ValueError(
            f"zero_axis is {zero_axis!r}, but the mesh of the parameters has the axes "
            f"{mesh.axis_names}: name one of these."
        )
    return mesh


def leaf_name(path: Any) -> str:
    """How messages name a parameter."""
    return f"params{path_name(path)}"
