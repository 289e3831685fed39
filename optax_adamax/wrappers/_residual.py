"""Residuals: the part of a master parameter that bfloat16 cannot represent.

float32 is stored as sign and magnitude, and bfloat16 is its upper half. So the master parameter, as
a 32-bit integer, is the stored parameter's bits followed by the residual's. All rounding is done on
integers, because XLA may remove a cast to bfloat16 and back.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

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
      The update of p, which leaves the rounded new master parameter, and the new residual.
    """
    u = _forbid_derivative(u)
    # XLA computes this sum in several kernels. u is a product, and must be rounded in all of them.
    u = jax.lax.platform_dependent(u, count, cpu=without_fma, default=lambda u, count: u)
    theta = merge_residual(p, residual) + u
    stored = p.astype(jnp.float32)
    rounded, left = split_residual(theta, residual.dtype, _rounding_bits(count, _bits(u)))
    step = rounded - stored
    if update_dtype == jnp.bfloat16:
        step = jnp.clip(step, -LARGEST_BFLOAT16, LARGEST_BFLOAT16)
        step = jax.lax.reduce_precision(step, exponent_bits=8, mantissa_bits=7)
    # Not every difference of two bfloat16 numbers is a number of `update_dtype`. If the sum misses
    # `rounded` by half a bfloat16 ULP or more, the cast back to bfloat16 does not correct it.
    reached = _bits(stored + step) - _bits(rounded) + 0x7FFF < 0xFFFF
    finite = jnp.isfinite(theta)
    new_residual = jnp.where(reached & finite, left, jnp.zeros_like(left))
    step = write_after(new_residual, jnp.where(finite, step, u), count)
    return step.astype(update_dtype), new_residual


@jax.jit
def merge_residual(p: jax.Array, residual: jax.Array) -> jax.Array:
    """Returns the master parameter in float32.

    Zero, infinity and NaN have no residual, so the stored one is ignored: a parameter that was set
    to zero from outside (for example by pruning) stays zero.
    """
    bits = jax.lax.bitcast_convert_type(p, jnp.uint16).astype(jnp.uint32)
    unused_bits = 16 - jnp.iinfo(residual.dtype).bits
    lower = (residual.astype(jnp.int32) << unused_bits).astype(jnp.uint32)
    has_residual = (bits & 0x7FFF) - 1 < 0x7F7F  # wraps at 0
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

    They are a hash of the count, because they must not correlate with the updates. Updates may be
    periodic, and they come from an m that was rounded with another hash of the count. The bits of u
    make them differ between elements. The element's index would too, but it changes with sharding.
    """
    x = hash_uint32(count.astype(jnp.uint32) ^ np.uint32(0x9E3779B9))
    return (x + (u_bits << 9)) >> 24


@jax.custom_jvp
def _forbid_derivative(u: jax.Array) -> jax.Array:
    """Returns u, and raises if it is differentiated, because rounding is piecewise constant."""
    return u


@_forbid_derivative.defjvp
def _(primals: Any, tangents: Any) -> Any:
    del primals, tangents
    raise TypeError(
        "An update of compensate_rounding was differentiated, but rounding has no useful "
        "derivative. Differentiate the inner transformation with float32 parameters, or put "
        "jax.lax.stop_gradient around the gradients. Implicit differentiation (implicit_diff=True "
        "in jaxopt, the default adjoint of optimistix) does not differentiate updates."
    )
