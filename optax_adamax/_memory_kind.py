"""Computation with arrays in host memory, as a state of `sharding.shard` may have them."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer


def preserving_memory_kind(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Extends `function` to arrays in host memory; its result has the memory kind of the first."""

    def call(first: Any, *rest: Any) -> jax.Array:
        first = jnp.asarray(first)
        device = jnp.zeros(())
        arrays = (first, *map(jnp.asarray, rest))
        return _in_memory_of(first, function(*(_in_memory_of(device, x) for x in arrays)))

    return call


def _in_memory_of(like: jax.Array, x: jax.Array) -> jax.Array:
    """Returns x in the memory kind of `like`."""
    if isinstance(like, Tracer) or isinstance(x, Tracer):
        space, given = _memory_space(like), _memory_space(x)
        return x if given == space else jax.device_put(x, space)
    # Not `jax.typeof`, which reports arrays in unpinned_host as device arrays (JAX 0.10.2).
    kind = like.sharding.memory_kind
    if kind is None or x.sharding.memory_kind == kind:
        return x
    return jax.device_put(x, x.sharding.with_memory_kind(kind))


def _memory_space(x: jax.Array) -> Any:
    return getattr(jax.typeof(x), "memory_space", None)  # does not exist in JAX 0.7.0
