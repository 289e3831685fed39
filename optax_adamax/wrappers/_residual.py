"""Residuals: the part of a master parameter that bfloat16 cannot represent.

A bfloat16 number has the upper 16 bits of a float32 number. So the bits of the master parameter are
the bits of the stored parameter, shifted by 16, plus the residual as a signed integer. All rounding
is done on integers, because XLA may remove a cast to bfloat16 and back.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from optax_adamax._derivatives import identity_without_derivative
from optax_adamax._numerics import hash_uint32
from optax_adamax._xla import without_fma, write_after

LARGEST_BFLOAT16 = float(jnp.finfo(jnp.bfloat16).max)


@functools.partial(jax.jit, static_argnames="update_dtype")  # traced once per shape
def add(
    u: jax.Array, p: jax.Array, residual: jax.Array, count: jax.Array, update_dtype: np.dtype
) -> tuple[jax.Array, jax.Array]:
    """Adds u to a master parameter.

    Args:
      u: the update of the master parameter, float32.
      p: the stored parameter, bfloat16.
      residual: the residual of p, int8 or int16.
      count: int32, the number of the step.
      update_dtype: dtype of the update of p, float32 or bfloat16.

    Returns:
      The update of p, after which p is the rounded new master parameter, and the new residual.
    """
    u = _forbid_derivative(u)
    # XLA computes the sum below in several kernels. u is usually a product, which must be rounded
    # before the addition in all of them.
    u = jax.lax.platform_dependent(u, count, cpu=without_fma, default=lambda u, count: u)
    theta = merge_residual(p, residual) + u
    stored = p.astype(jnp.float32)
    rounded, left = split_residual(theta, residual.dtype, _rounding_bits(count, _bits(u)))
    step = rounded - stored
    if update_dtype == jnp.bfloat16:
        step = jnp.clip(step, -LARGEST_BFLOAT16, LARGEST_BFLOAT16)
        step = jax.lax.reduce_precision(step, exponent_bits=8, mantissa_bits=7)
    # `update_dtype` cannot represent every difference of two bfloat16 numbers. If stored + step
    # misses `rounded` by half a bfloat16 ULP or more, p becomes another number, and the residual is
    # set to zero, because it belongs to `rounded`.
    reached = _bits(stored + step) - _bits(rounded) + 0x7FFF < 0xFFFF
    finite = jnp.isfinite(theta)
    new_residual = jnp.where(reached & finite, left, jnp.zeros_like(left))
    step = write_after(new_residual, jnp.where(finite, step, u), count)
    return step.astype(update_dtype), new_residual


@jax.jit
def merge_residual(p: jax.Array, residual: jax.Array) -> jax.Array:
    """Returns the master parameter in float32.

    The residual of zero, infinity and NaN is ignored. So a parameter that the user sets to zero,
    for example by pruning, remains zero.
    """
    bits = jax.lax.bitcast_convert_type(p, jnp.uint16).astype(jnp.uint32)
    unused_bits = 16 - jnp.iinfo(residual.dtype).bits
    lower = (residual.astype(jnp.int32) << unused_bits).astype(jnp.uint32)
    has_residual = (bits & 0x7FFF) - 1 < 0x7F7F  # finite and not 0, for which this wraps
    merged = (bits << 16) + jnp.where(has_residual, lower, 0)
    return jax.lax.bitcast_convert_type(merged, jnp.float32)


def split_residual(
    theta: jax.Array, residual_dtype: np.dtype, rounding_bits: jax.Array | int
) -> tuple[jax.Array, jax.Array]:
    """Returns the stored parameter, as float32, and its residual.

    Args:
      theta: the master parameter, float32, finite.
      residual_dtype: int8 or int16.
      rounding_bits: uint32 below 2**8, added before int8 cuts off 8 bits; 2**7 rounds to nearest.
    """
    width = jnp.iinfo(residual_dtype).bits
    # bfloat16 would round larger numbers up to infinity.
    largest = np.uint32(0x7F7F7FFF if width == 16 else 0x7F7F7F00).view(np.float32)
    bits = _bits(jnp.clip(theta, -largest, largest))
    fine = bits if width == 16 else (bits + rounding_bits) >> (16 - width)
    upper = (fine + (1 << (width - 1))) >> width
    stored = jax.lax.bitcast_convert_type(upper << 16, jnp.float32)
    return stored, (fine - (upper << width)).astype(residual_dtype)


def _bits(x: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(x, jnp.uint32)


def _rounding_bits(count: jax.Array, u_bits: jax.Array) -> jax.Array:
    """Returns the bits for stochastic rounding in this step, uint32 in [0, 2**8).

    A hash of the count does not correlate with the updates, which may be periodic. m is rounded
    with another hash of the count: with the same hash, the sum of periodic updates is biased. The
    bits of u distinguish elements. The index of an element would depend on the sharding.
    """
    x = hash_uint32(count.astype(jnp.uint32) ^ np.uint32(0x9E3779B9))
    return (x + (u_bits << 9)) >> 24


# Applied to updates before the master parameter is rounded.
_forbid_derivative = identity_without_derivative(
    "An update of compensate_rounding was differentiated, but rounding has no useful "
    "derivative. Differentiate the inner transformation with float32 parameters, or put "
    "jax.lax.stop_gradient around the gradients. Implicit differentiation (implicit_diff=True "
    "in jaxopt, the default adjoint of optimistix) does not differentiate updates."
)
