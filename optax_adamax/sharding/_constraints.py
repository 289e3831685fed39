"""Puts the leaves of a tree where they belong, within a jitted function.

Shardings are found by the names of leaves, because Flax nnx boxes the leaves of some trees and not
those of others (see `optax_adamax._paths`).
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from optax_adamax._paths import named_leaves
from optax_adamax.sharding import _placement

ByName = Mapping[str, NamedSharding]


def constrain(tree: Any, shardings: ByName) -> Any:
    """Gives traced arrays their shardings, on axes of either type."""
    return _map(
        lambda *lists: [_constrain(*pair) for pair in zip(*lists, strict=True)], tree, shardings
    )


def move(tree: Any, shardings: ByName) -> Any:
    """Moves arrays between the memory of the host and of the devices."""
    return _map(jax.device_put, tree, shardings)


def on_device(sharding: NamedSharding) -> NamedSharding:
    return NamedSharding(sharding.mesh, sharding.spec)


def _map(
    function: Callable[[list[Any], list[NamedSharding]], list[Any]], tree: Any, shardings: ByName
) -> Any:
    named = named_leaves(tree)
    unknown = [name for name, _ in named if name not in shardings]
    if unknown:
        raise ValueError(
            f"keep_sharded was given parameters with the leaves {list(shardings)}, but here are "
            f"{unknown}. Call it with the parameters that are trained."
        )
    moved = function([leaf for _, leaf in named], [shardings[name] for name, _ in named])
    return jax.tree.structure(tree).unflatten(moved)


def _constrain(x: jax.Array, sharding: NamedSharding) -> jax.Array:
    # JAX 0.10 has no one call for both: reshard takes explicit axes only, and
    # with_sharding_constraint automatic ones only.
    types = sharding.mesh.axis_types
    if AxisType.Explicit in types:
        x = jax.sharding.reshard(x, _only(sharding, AxisType.Explicit))
    if AxisType.Auto in types:
        x = jax.lax.with_sharding_constraint(x, _only(sharding, AxisType.Auto))
    return x


def _only(sharding: NamedSharding, axis_type: AxisType) -> NamedSharding:
    """`sharding` without the axes of another type."""
    types = dict(zip(sharding.mesh.axis_names, sharding.mesh.axis_types, strict=True))
    entries = [
        tuple(axis for axis in _placement.axes(entry) if types[axis] == axis_type) or None
        for entry in sharding.spec
    ]
    return NamedSharding(sharding.mesh, PartitionSpec(*entries))
