"""Numbers of 16 bits in their order, with room between them.

Within each sign, floats lie in the order of their bits. The ordinal of a number is its place in
that order, an integer, with as many more bits as float32 has: the numbers of a dtype of 16 bits are
the multiples of 2**extra. Powers of two, zero, the sign and subnormals are no special cases.
"""

import jax
import jax.numpy as jnp
import numpy as np

EXTRA = {np.dtype(jnp.bfloat16): 16, np.dtype(np.float16): 13}  # bits that float32 has more


def width_of(dtype: np.dtype, residual_dtype: np.dtype) -> int:
    """How many bits the residual has, of those that `dtype` lacks."""
    return min(EXTRA[dtype], jnp.iinfo(residual_dtype).bits)


def round_twice(
    x: jax.Array, dtype: np.dtype, residual_dtype: np.dtype, threshold: jax.Array | int
) -> tuple[jax.Array, jax.Array]:
    """The ordinal of x to the residual's precision, and to that of `dtype`."""
    width = width_of(dtype, residual_dtype)
    lost = EXTRA[dtype] - width
    fine = (to_ordinal(x, dtype) + (threshold >> (31 - lost))) >> lost
    return fine, (fine + (1 << (width - 1))) >> width


def join(p: jax.Array, residual: jax.Array) -> jax.Array:
    """The true parameter, in float32."""
    lost = EXTRA[p.dtype] - width_of(p.dtype, residual.dtype)
    ordinal = (place(p) << EXTRA[p.dtype]) + (residual.astype(jnp.int32) << lost)
    return jnp.where(jnp.isfinite(p), from_ordinal(ordinal, p.dtype), p.astype(jnp.float32))


HALF = 1 << 30  # the threshold that rounds to nearest


def place(p: jax.Array) -> jax.Array:
    """The place of p among the numbers of its dtype; 0 for both zeros."""
    # By the bits: XLA may leave out a cast to 16 bits and back, but never this.
    bits = jax.lax.bitcast_convert_type(p, jnp.uint16).astype(jnp.int32)
    size = bits & 0x7FFF
    return jnp.where(bits > 0x7FFF, -size, size)


# float16 has its smallest normal number, 2**-14, where float32 has a biased exponent of 113.
_REBIAS = 112 << 23


def to_ordinal(x: jax.Array, dtype: np.dtype) -> jax.Array:
    size = jax.lax.bitcast_convert_type(jnp.abs(x), jnp.int32)
    if dtype == np.float16:
        subnormal = jnp.round(jnp.minimum(jnp.abs(x), 1.0) * 2.0**37).astype(jnp.int32)
        size = jnp.where(size < (113 << 23), subnormal, size - _REBIAS)
    return jnp.where(x < 0, -size, size)


def from_ordinal(ordinal: jax.Array, dtype: np.dtype) -> jax.Array:
    size = jnp.abs(ordinal)
    if dtype == np.float16:
        normal = jax.lax.bitcast_convert_type(size + _REBIAS, jnp.float32)
        x = jnp.where(size < (1 << 23), size.astype(jnp.float32) * 2.0**-37, normal)
        x = jnp.where(size < (0x7C00 << 13), x, jnp.inf)
    else:
        x = jax.lax.bitcast_convert_type(size, jnp.float32)
    return jnp.where(ordinal < 0, -x, x)
