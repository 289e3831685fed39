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


def widen(x: jax.Array, dtype: np.dtype) -> jax.Array:
    """Casts x to the real `dtype`, or to its complex counterpart if x is complex."""
    return x.astype(np.result_type(dtype, np.complex64) if jnp.iscomplexobj(x) else dtype)


def narrow(x: jax.Array, dtype: np.dtype) -> jax.Array:
    """Casts x to `dtype`; what is finite stays so, at the largest number where x is beyond it."""
    if x.dtype == dtype:
        return x
    if jnp.finfo(dtype).maxexp < jnp.finfo(x.dtype).maxexp:
        largest = float(jnp.finfo(dtype).max)
        limited = map_real_imag(lambda x: jnp.clip(x, -largest, largest), x)
        x = jnp.where(jnp.isfinite(x), limited, x)
    return x.astype(dtype)


def modulus(g: jax.Array) -> jax.Array:
    """g, or its modulus if it is complex: what v sees, and what may be infinite."""
    return jnp.abs(g) if jnp.iscomplexobj(g) else g


def wider(x: Any, y: Any) -> np.dtype:
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


@jax.custom_jvp
def one_minus_power(a: jax.Array, t: jax.Array) -> jax.Array:
    """1 - (1 - a)**t without cancellation, for a in [0, 1] and t >= 1."""
    return -jnp.expm1(t * jnp.log1p(-a))


@one_minus_power.defjvp
def _(primals: tuple[Any, Any], tangents: tuple[Any, Any]) -> tuple[jax.Array, jax.Array]:
    # At a = 1 (b1 = 0) the derivative of the expression above is 0 * inf.
    (a, t), (a_dot, _) = primals, tangents
    return one_minus_power(a, t), t * _power(1 - a, t - 1) * a_dot


@jax.custom_jvp
def _power(x: jax.Array, n: jax.Array) -> jax.Array:
    """x**n for whole n >= 0: with finite derivatives of every order at x = 0, unlike `lax.pow`."""
    return x**n


@_power.defjvp
def _(primals: tuple[Any, Any], tangents: tuple[Any, Any]) -> tuple[jax.Array, jax.Array]:
    (x, n), (x_dot, _) = primals, tangents
    return _power(x, n), n * _power(x, jnp.maximum(n - 1, 0)) * x_dot


def map_real_imag(linear: Callable[..., jax.Array], *arrays: jax.Array) -> jax.Array:
    """Applies a real linear function, to real and imaginary parts apart if they are complex."""
    if not jnp.iscomplexobj(arrays[0]):
        return linear(*arrays)
    return jax.lax.complex(linear(*(x.real for x in arrays)), linear(*(x.imag for x in arrays)))


def on_device(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
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
