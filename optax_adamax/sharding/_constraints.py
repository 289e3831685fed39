"""Moves the leaves of a tree to given shardings, inside a jitted function.

Shardings are looked up by the names of leaves, because Flax nnx wraps the leaves of only some trees
in variables; see `optax_adamax._paths`.
"""

from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from optax_adamax._paths import named_leaves
from optax_adamax.sharding import _placement

ByName = Mapping[str, NamedSharding]


def constrain(tree: Any, shardings: ByName) -> Any:
    """Constrains the shardings of traced arrays, over explicit and automatic mesh axes."""
    wanted = jax.tree.leaves(select(shardings, tree))
    leaves = [_constrain(x, s) for x, s in zip(jax.tree.leaves(tree), wanted, strict=True)]
    return jax.tree.structure(tree).unflatten(leaves)


def move(tree: Any, shardings: ByName) -> Any:
    """Moves arrays between the memory of the host and of the devices."""
    return jax.device_put(tree, select(shardings, tree))


def select(shardings: ByName, tree: Any) -> Any:
    """Returns a tree like `tree` with the sharding of each leaf."""
    return jax.tree.structure(tree).unflatten([shardings[name] for name, _ in named_leaves(tree)])


def on_device(shardings: ByName) -> ByName:
    """Returns the same shardings in the default memory of the devices."""
    return {name: NamedSharding(s.mesh, s.spec) for name, s in shardings.items()}


def _constrain(x: jax.Array, sharding: NamedSharding) -> jax.Array:
    # In JAX 0.10, reshard accepts explicit axes only, and with_sharding_constraint automatic ones.
    types = sharding.mesh.axis_types
    if AxisType.Explicit in types:
        x = jax.sharding.reshard(x, _only(sharding, AxisType.Explicit))
    if AxisType.Auto in types:
        x = jax.lax.with_sharding_constraint(x, _only(sharding, AxisType.Auto))
    return x


def _only(sharding: NamedSharding, axis_type: AxisType) -> NamedSharding:
    """Returns `sharding` without the axes of another type."""
    types = dict(zip(sharding.mesh.axis_names, sharding.mesh.axis_types, strict=True))
    entries = [
        tuple(axis for axis in _placement.axes_of(entry) if types[axis] == axis_type) or None
        for entry in sharding.spec
    ]
    return NamedSharding(sharding.mesh, PartitionSpec(*entries))
