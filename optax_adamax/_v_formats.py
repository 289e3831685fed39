"""Storage formats of v: a float, or a quantized value with a shared scale.

A quantized format stores w = s v, with the scale s of `_shared_scale`. In full precision, w is v.
"""

import abc
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from optax_adamax._formats import Format, FullPrecision, find_format, forbid_derivative
from optax_adamax._numerics import float32_bits, float32_from_bits, saturating_cast


class VFormat(Format):
    """A storage format of v."""

    range: tuple[float, float]  # of v, in which `relative_error` holds
    relative_error: float  # of v, at most, after any number of steps

    @property
    def has_shared_scale(self) -> bool:
        """Returns whether w = s v is stored, with the phase of s in the container."""
        return self.container is not None

    @abc.abstractmethod
    def decode(self, w: jax.Array) -> jax.Array:
        """Returns the stored w as a float."""

    @abc.abstractmethod
    def encode(self, w: jax.Array) -> jax.Array:
        """Returns the float w >= 0 as stored."""


class FullPrecisionV(FullPrecision, VFormat):
    """v in full precision."""

    range = (0.0, float("inf"))
    relative_error = 0.0

    def decode(self, w: jax.Array) -> jax.Array:
        return w

    def encode(self, w: jax.Array) -> jax.Array:
        return w


class ScaledBfloat16(NamedTuple):
    """v as bfloat16 with a shared scale: ``v = scaled_bfloat16 / 2**(phase / 2**32 - 1)``."""

    scaled_bfloat16: Any  # tree like the parameters, bfloat16
    phase: jax.Array  # shape=(), dtype=uint32: log2 of the scale plus 1, in units of 2**-32


class Bfloat16V(VFormat):
    """v rounded to the nearest bfloat16."""

    dtype = np.dtype(jnp.bfloat16)
    container = ScaledBfloat16
    LARGEST: ClassVar[float] = float(jnp.finfo(jnp.bfloat16).max) / 2  # w / s <= 2 w is finite
    range = (2.0**-120, LARGEST)
    relative_error = 2.0**-8

    def decode(self, w: jax.Array) -> jax.Array:
        return w.astype(jnp.float32)

    def encode(self, w: jax.Array) -> jax.Array:
        w = jnp.minimum(saturating_cast(forbid_derivative(w), np.dtype(np.float32)), self.LARGEST)
        # XLA may remove a cast to bfloat16 and back, but not reduce_precision.
        return jax.lax.reduce_precision(w, exponent_bits=8, mantissa_bits=7).astype(self.dtype)


class ScaledUint8(NamedTuple):
    """v as uint8 codes of s v, with a shared scale s, 6 exponent bits and 2 mantissa bits."""

    scaled_uint8: Any  # tree like the parameters, uint8
    phase: jax.Array  # shape=(), dtype=uint32: log2 of the scale plus 1, in units of 2**-32


class Uint8V(VFormat):
    """v as an unsigned float with 6 exponent bits and 2 mantissa bits (E6M2), rounded to nearest.

        bits(w) = bits(SMALLEST) + (code << 21)

    The codes are upper bits of a float32. Code 0 is SMALLEST, not zero. Values below SMALLEST
    become code 0, and values above LARGEST code 255.
    """

    dtype = np.dtype(np.uint8)
    container = ScaledUint8
    SMALLEST: ClassVar[float] = 2.0**-34
    LARGEST: ClassVar[float] = 1.75 * 2.0**29
    SMALLEST_BITS: ClassVar[int] = int(np.float32(SMALLEST).view(np.int32))
    range = (2 * SMALLEST, LARGEST)  # v = w / s is between w and 2 w
    relative_error = 1 / 8

    def decode(self, w: jax.Array) -> jax.Array:
        return float32_from_bits((w.astype(jnp.int32) << 21) + self.SMALLEST_BITS)

    def encode(self, w: jax.Array) -> jax.Array:
        w = jnp.clip(forbid_derivative(w), self.SMALLEST, self.LARGEST)
        return ((float32_bits(w) - self.SMALLEST_BITS + (1 << 20)) >> 21).astype(self.dtype)


V_FORMATS: dict[str | None, VFormat] = {
    None: FullPrecisionV(None),
    "float32": FullPrecisionV(np.dtype(np.float32)),
    "float64": FullPrecisionV(np.dtype(np.float64)),
    "bfloat16": Bfloat16V(),
    "uint8": Uint8V(),
}


def v_format_of(dtype: DTypeLike | None) -> VFormat:
    """Returns the storage format of v for an argument `v_dtype`."""
    return find_format(V_FORMATS, "v_dtype", dtype)
