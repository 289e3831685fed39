"""Arithmetic that does not depend on the optimizer: dtypes, bits, accurate functions."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax


def compute_dtype(*arrays: Any) -> np.dtype:
    """Returns float64 if an array is float64 or complex128, else float32."""
    has_float64 = any(jnp.result_type(x).name in ("float64", "complex128") for x in arrays)
    return np.dtype(np.float64 if has_float64 else np.float32)


def dtype_or_none(x: Any) -> np.dtype | None:
    """Returns the dtype of an array, a number or a shape; None for other objects."""
    if isinstance(x, (str, type, np.dtype)):  # `jnp.result_type` reads them as dtypes
        return None
    dtype = getattr(x, "dtype", np.dtype(float))  # numbers have none
    if dtype is None or isinstance(dtype, type):  # the attribute of a Flax module
        return None
    try:
        return jnp.result_type(x)
    except (TypeError, ValueError):
        return None


def wider_dtype(x: Any, y: Any) -> np.dtype:
    """Returns the dtype with more bits; the dtype of x if both have as many."""
    x, y = jnp.result_type(x), jnp.result_type(y)
    return y if jnp.finfo(y).bits > jnp.finfo(x).bits else x


def upcast(x: jax.Array, dtype: np.dtype) -> jax.Array:
    """Casts x to the real `dtype`, or to its complex counterpart if x is complex."""
    return x.astype(np.result_type(dtype, np.complex64) if jnp.iscomplexobj(x) else dtype)


def saturating_cast(x: jax.Array, dtype: np.dtype) -> jax.Array:
    """Casts x to `dtype`; finite x is clipped first if `dtype` has a smaller exponent range."""
    if x.dtype == dtype:
        return x
    if jnp.finfo(dtype).maxexp < jnp.finfo(x.dtype).maxexp:
        largest = float(jnp.finfo(dtype).max)
        clipped = map_real_imag(lambda x: jnp.clip(x, -largest, largest), x)
        x = jnp.where(jnp.isfinite(x), clipped, x)
    return x.astype(dtype)


def float32_bits(x: jax.Array) -> jax.Array:
    """Returns the bits of the real x, cast to float32, as int32."""
    return jax.lax.bitcast_convert_type(saturating_cast(x, np.dtype(np.float32)), jnp.int32)


def float32_from_bits(bits: jax.Array) -> jax.Array:
    """Returns the float32 with the given int32 bits."""
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def with_sign(size: jax.Array, number: jax.Array) -> jax.Array:
    """Returns the float `size` >= 0 with the sign of the integer `number`."""
    same = jnp.dtype(f"int{8 * size.dtype.itemsize}")
    sign = number.astype(same) & jnp.iinfo(same).min
    return jax.lax.bitcast_convert_type(jax.lax.bitcast_convert_type(size, same) | sign, size.dtype)


def abs_if_complex(g: jax.Array) -> jax.Array:
    """Returns the modulus of a complex g, and a real g unchanged."""
    return jnp.abs(g) if jnp.iscomplexobj(g) else g


def map_real_imag(linear: Callable[..., jax.Array], *arrays: jax.Array) -> jax.Array:
    """Applies a real linear function; of complex arrays, to both parts separately."""
    if not jnp.iscomplexobj(arrays[0]):
        return linear(*arrays)
    return jax.lax.complex(linear(*(x.real for x in arrays)), linear(*(x.imag for x in arrays)))


def safe_divide(x: jax.Array, y: jax.Array) -> jax.Array:
    """Returns x / y, and 0 if y is 0. If y is 0, the derivative is 0, too."""
    is_zero = y == 0
    return jnp.where(is_zero, 0, x / jnp.where(is_zero, 1, y))


def clip_symmetric(u: jax.Array, bound: jax.Array) -> jax.Array:
    """Clips u to [-bound, bound]; NaN stays NaN."""
    # With jnp.clip, -bound would be another scalar operand of the loop on TPU; see `_xla.pack`.
    return -jnp.minimum(-jnp.minimum(u, bound), bound)


def hash_uint32(x: jax.Array) -> jax.Array:
    """Returns pseudo-random bits: the bijection triple32 of Wellons (2018)."""
    x ^= x >> 17
    x *= np.uint32(0xED5AD4BB)
    x ^= x >> 11
    x *= np.uint32(0xAC4C1B51)
    x ^= x >> 15
    x *= np.uint32(0x31848BAB)
    return x ^ (x >> 14)


def incremented(count: Any) -> jax.Array:
    """Returns count + 1 as int32; saturates at 2**31 - 1.

    A count that was restored as a Python number would be int64 with x64.
    """
    return jnp.asarray(optax.safe_increment(jnp.asarray(count).astype(jnp.int32)))


def one_minus_power(a: jax.Array, t: jax.Array) -> jax.Array:
    """Returns 1 - (1 - a)**t without cancellation, for a in [0, 1] and integers t >= 1.

    At a = 1 (b1 = 0), the derivatives of the general expression are 0 * inf. The expression for
    a = 1 has correct first and second derivatives. A custom JVP rule would not work, because JAX
    (0.10.2) ignores it if a `lax.scan` is differentiated twice.
    """
    x, at_one = 1 - a, a == 1
    power = jnp.where(t == 1, x, jnp.where(t == 2, x * x, 0))
    others = -jnp.expm1(t * jnp.log1p(-jnp.where(at_one, 0, a)))
    return jnp.where(at_one, 1 - power, others)
