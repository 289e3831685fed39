"""What a parameter of bfloat16 cannot hold, kept beside it.

float32 is sign and magnitude, and bfloat16 is its upper half. So the true parameter, as an integer
of 32 bits, is the bits of the stored one, and behind them a residual: `join` puts the two together,
`split` takes them apart. Everything goes through integers, because XLA may leave out a cast
to bfloat16 and back, but never this.
"""

import jax
import jax.numpy as jnp
import numpy as np

from optax_adamax._numerics import hash_uint32
from optax_adamax._xla import without_fma, write_after


@jax.jit  # traced once for all leaves of one shape
def add(
    u: jax.Array, p: jax.Array, residual: jax.Array, count: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The update that takes p to the rounded sum of p, residual and u, and the new residual.

    Args:
      u: the update, float32.
      p: the stored parameter, bfloat16.
      residual: of p, int8 or int16.
      count: int32, the number of the step.
    """
    # XLA computes the sum in more than one kernel, and u is a product: in each it must be rounded.
    u = jax.lax.platform_dependent(u, count, cpu=without_fma, default=lambda u, count: u)
    moved = join(p, residual) + u
    stored = p.astype(jnp.float32)
    rounded, left = split(moved, residual.dtype, _threshold(count, _bits(u)))
    # The way from p to a number below 2**-16 |p| may be none of float32: p then ends beside it, by
    # more than the half unit in the last place that a cast to bfloat16 mends.
    beside = _bits(stored + (rounded - stored)) - _bits(rounded)
    reached = beside + 0x7FFF < 0xFFFF
    finite = jnp.isfinite(moved)
    new_residual = jnp.where(reached & finite, left, jnp.zeros_like(left))
    return write_after(new_residual, jnp.where(finite, rounded - stored, u), count), new_residual


@jax.jit
def join(p: jax.Array, residual: jax.Array) -> jax.Array:
    """The true parameter, of float32, whose upper bits are those of p.

    Beside 0, infinity and NaN there is no residual, whatever is stored as such: a parameter that
    somebody has set to zero (as pruning does) stays there.
    """
    bits = jax.lax.bitcast_convert_type(p, jnp.uint16).astype(jnp.uint32)
    lost = 16 - jnp.iinfo(residual.dtype).bits
    behind = (residual.astype(jnp.int32) << lost).astype(jnp.uint32)
    has_residual = (bits & 0x7FFF) - 1 < 0x7F7F  # wraps at 0
    joined = (bits << 16) + jnp.where(has_residual, behind, 0)
    return jax.lax.bitcast_convert_type(joined, jnp.float32)


def split(
    theta: jax.Array, residual_dtype: np.dtype, threshold: jax.Array | int
) -> tuple[jax.Array, jax.Array]:
    """The stored parameter, as float32, and its residual.

    Args:
      theta: float32, finite.
      residual_dtype: int8 or int16.
      threshold: uint32, where int8 rounds up: below 2**8, and 2**7 rounds to the nearest.
    """
    width = jnp.iinfo(residual_dtype).bits
    # Beyond its largest numbers, bfloat16 would round up to infinity.
    largest = np.uint32(0x7F7F7FFF if width == 16 else 0x7F7F7F00).view(np.float32)
    bits = _bits(jnp.clip(theta, -largest, largest))
    fine = bits if width == 16 else (bits + threshold) >> (16 - width)
    upper = (fine + (1 << (width - 1))) >> width
    stored = jax.lax.bitcast_convert_type(upper << 16, jnp.float32)
    return stored, (fine - (upper << width)).astype(residual_dtype)


def _bits(x: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(x, jnp.uint32)


def _threshold(count: jax.Array, u_bits: jax.Array) -> jax.Array:
    """Where to round up in this step, of uint32 in [0, 2**8).

    A hash of the count, because it has to be independent of the update, which may be periodic, and
    which comes from an m that was rounded by another hash of the count. The bits of u keep the
    elements from sharing one threshold; an index would, but would change with the sharding.
    """
    x = hash_uint32(count.astype(jnp.uint32) ^ np.uint32(0x9E3779B9))
    return (x + (u_bits << 9)) >> 24
