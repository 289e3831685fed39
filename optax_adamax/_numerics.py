"""Arithmetic that knows no optimizer: dtypes to compute in, and powers without cancellation."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer


def compute_dtype(*arrays: Any) -> np.dtype:
    """The real dtype to compute in: float64 if one of `arrays` is of 64 bits, else float32."""
    wide = any(jnp.result_type(x).name in ("float64", "complex128") for x in arrays)
    return np.dtype(np.float64 if wide else np.float32)


def upcast(x: jax.Array, dtype: np.dtype) -> jax.Array:
    """Casts x to the real `dtype`, or to its complex counterpart if x is complex."""
    return x.astype(np.result_type(dtype, np.complex64) if jnp.iscomplexobj(x) else dtype)


def saturating_cast(x: jax.Array, dtype: np.dtype) -> jax.Array:
    """Casts x to `dtype`; what is finite stays so, at the largest number where x is beyond it."""
    if x.dtype == dtype:
        return x
    if jnp.finfo(dtype).maxexp < jnp.finfo(x.dtype).maxexp:
        largest = float(jnp.finfo(dtype).max)
        limited = map_real_imag(lambda x: jnp.clip(x, -largest, largest), x)
        x = jnp.where(jnp.isfinite(x), limited, x)
    return x.astype(dtype)


def abs_if_complex(g: jax.Array) -> jax.Array:
    """g, or its modulus if it is complex: what v sees, and what may be infinite."""
    return jnp.abs(g) if jnp.iscomplexobj(g) else g


def wider_dtype(x: Any, y: Any) -> np.dtype:
    """The dtype of x, or that of y if it has more bits."""
    x, y = jnp.result_type(x), jnp.result_type(y)
    return y if jnp.finfo(y).bits > jnp.finfo(x).bits else x


def hash_uint32(x: jax.Array) -> jax.Array:
    """A bijection of uint32 whose outputs look random: triple32 of Wellons, 2018."""
    x ^= x >> 17
    x *= np.uint32(0xED5AD4BB)
    x ^= x >> 11
    x *= np.uint32(0xAC4C1B51)
    x ^= x >> 15
    x *= np.uint32(0x31848BAB)
    return x ^ (x >> 14)


def one_minus_power(a: jax.Array, t: jax.Array) -> jax.Array:
    """1 - (1 - a)**t without cancellation, for a in [0, 1] and whole t >= 1.

    At a = 1 (b1 = 0) the derivatives of the expression for other a are 0 * inf, so there stands one
    whose first and second derivatives are right. Not a rule for them: JAX leaves rules out where it
    differentiates a `lax.scan` a second time.
    """
    x, at_one = 1 - a, a == 1
    power = jnp.where(t == 1, x, jnp.where(t == 2, x * x, 0))
    others = -jnp.expm1(t * jnp.log1p(-jnp.where(at_one, 0, a)))
    return jnp.where(at_one, 1 - power, others)


def map_real_imag(linear: Callable[..., jax.Array], *arrays: jax.Array) -> jax.Array:
    """Applies a real linear function, to real and imaginary parts apart if they are complex."""
    if not jnp.iscomplexobj(arrays[0]):
        return linear(*arrays)
    return jax.lax.complex(linear(*(x.real for x in arrays)), linear(*(x.imag for x in arrays)))


def preserving_memory_kind(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """`function` of arrays in any memory: the result lies where the first argument does."""

    def call(first: Any, *rest: Any) -> jax.Array:
        first = jnp.asarray(first)
        device = jnp.zeros(())
        arrays = (first, *map(jnp.asarray, rest))
        return _in_memory_of(first, function(*(_in_memory_of(device, x) for x in arrays)))

    return call


def _in_memory_of(like: jax.Array, x: jax.Array) -> jax.Array:
    if isinstance(like, Tracer) or isinstance(x, Tracer):
        space, given = _memory_space(like), _memory_space(x)
        return x if given == space else jax.device_put(x, space)
    # To `jax.typeof` (JAX 0.10.2) what is in unpinned_host is on the device.
    kind = like.sharding.memory_kind
    if kind is None or x.sharding.memory_kind == kind:
        return x
    return jax.device_put(x, x.sharding.with_memory_kind(kind))


def _memory_space(x: jax.Array) -> Any:
    return getattr(jax.typeof(x), "memory_space", None)  # none in JAX 0.7.0
