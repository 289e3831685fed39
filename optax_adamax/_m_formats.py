"""Storage formats of m: a float, or an int8 code of m / v, which is bounded.

Quantized formats use hash-based stochastic rounding: they add pseudo-random bits to a float's bits
before they cut off its low bits. The mean over steps is then unbiased. With rounding to nearest, a
step that changes m by less than half the distance between two stored values would not change it.
"""

import abc
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from optax_adamax._formats import Format, FullPrecision, find_format, forbid_derivative
from optax_adamax._numerics import (
    float32_bits,
    float32_from_bits,
    map_real_imag,
    safe_divide,
    upcast,
    with_sign,
)


class MFormat(Format):
    """A storage format of m."""

    is_ratio: ClassVar[bool] = False  # whether m / v is stored
    largest_ratio: float = float("inf")  # the largest |m| / v that can be stored
    # The largest error of one rounding is relative_error |m| + resolution v.
    relative_error: float
    resolution: float = 0.0

    @abc.abstractmethod
    def decode(self, m: jax.Array, v: jax.Array) -> jax.Array:
        """Returns the stored m as a float; v is the decoded v of the same step."""

    @abc.abstractmethod
    def encode(self, m: jax.Array, v: jax.Array, rounding_bits: jax.Array) -> jax.Array:
        """Returns the float m as stored.

        Args:
          m: first moment.
          v: the decoded v of the same step.
          rounding_bits: uint32, pseudo-random; 2**31 rounds to nearest.
        """

    def ratio(
        self, m: jax.Array, v: jax.Array, bias_correction: jax.Array, eps: jax.Array | None
    ) -> jax.Array:
        """Returns m / (bias_correction (v + eps)) for the stored m."""
        return quotient(self.decode(m, v), v, bias_correction, eps)


def quotient(
    m: jax.Array, v: jax.Array, bias_correction: jax.Array, eps: jax.Array | None
) -> jax.Array:
    """Returns m / (bias_correction (v + eps)), or 0 if the denominator is 0."""
    # Not m / v / bias_correction, which XLA on CPU rewrites to this form in some programs only.
    v = bias_correction * (v if eps is None else v + eps)
    return map_real_imag(lambda m: safe_divide(m, v), m)


class FullPrecisionM(FullPrecision, MFormat):
    """m in full precision."""

    relative_error = 0.0

    def decode(self, m: jax.Array, v: jax.Array) -> jax.Array:
        return upcast(m, v.dtype)

    def encode(self, m: jax.Array, v: jax.Array, rounding_bits: jax.Array) -> jax.Array:
        del v, rounding_bits
        return m


class Bfloat16M(MFormat):
    """m as bfloat16."""

    dtype = np.dtype(jnp.bfloat16)
    relative_error = 2.0**-7

    def decode(self, m: jax.Array, v: jax.Array) -> jax.Array:
        return m.astype(v.dtype)

    def encode(self, m: jax.Array, v: jax.Array, rounding_bits: jax.Array) -> jax.Array:
        del v
        m = forbid_derivative(m)
        largest = float(jnp.finfo(self.dtype).max)
        upper = (float32_bits(jnp.clip(m, -largest, largest)) + _high_bits(rounding_bits, 16)) >> 16
        stored = jax.lax.bitcast_convert_type(upper.astype(jnp.int16), jnp.bfloat16)
        return jnp.where(jnp.isfinite(m), stored, jnp.bfloat16(jnp.nan))


class RatioInt8(NamedTuple):
    """m as int8 codes of the ratio m / v: a sign, 4 exponent bits and 3 mantissa bits."""

    ratio_int8: Any  # tree like the parameters, int8


class Int8M(MFormat):
    """m as an int8 code of m / v: a sign, 4 exponent bits and 3 mantissa bits.

        |m| / v = y - OFFSET,  bits(y) = bits(OFFSET) + (|code| << 20)

    y is a float with three mantissa bits, and code 0 is OFFSET. Near zero, the stored ratios are
    equally spaced; above, neighbors differ by 6 to 12 %. Code -128 is NaN. E4M3 has subnormal
    numbers instead of the offset.
    """

    dtype = np.dtype(np.int8)
    container = RatioInt8
    is_ratio = True
    OFFSET: ClassVar[float] = 2.0**-13
    OFFSET_BITS: ClassVar[int] = int(np.float32(OFFSET).view(np.int32))
    NAN_CODE: ClassVar[int] = -128
    largest_ratio = 7.5 - OFFSET  # code 127
    relative_error = 1 / 8
    resolution = OFFSET / 8

    def magnitude(self, code: jax.Array) -> jax.Array:
        """Decodes |m| / v as float32."""
        code = code.astype(jnp.int32)
        y = float32_from_bits((jnp.abs(code) << 20) + self.OFFSET_BITS)
        return jnp.where(code == self.NAN_CODE, jnp.nan, y - self.OFFSET)

    def decode(self, m: jax.Array, v: jax.Array) -> jax.Array:
        # The minimum matters if v is near the largest float and the ratio is above 1.
        size = jnp.minimum(self.magnitude(m).astype(v.dtype) * v, float(jnp.finfo(v.dtype).max))
        return with_sign(size, m)

    def encode(self, m: jax.Array, v: jax.Array, rounding_bits: jax.Array) -> jax.Array:
        m = forbid_derivative(m)
        y = jnp.abs(safe_divide(m, v)).astype(jnp.float32) + self.OFFSET
        y = jnp.minimum(y, self.largest_ratio + self.OFFSET)
        code = (float32_bits(y) - self.OFFSET_BITS + _high_bits(rounding_bits, 20)) >> 20
        code = jnp.where(m < 0, -code, code)
        return jnp.where(jnp.isfinite(m), code, self.NAN_CODE).astype(jnp.int8)

    def ratio(
        self, m: jax.Array, v: jax.Array, bias_correction: jax.Array, eps: jax.Array | None
    ) -> jax.Array:
        # Decoded from the code alone. XLA on CPU (jaxlib 0.10.2) would write a quotient to memory.
        size = self.magnitude(m).astype(v.dtype) * (1 / bias_correction)
        return with_sign(size if eps is None else size * safe_divide(v, v + eps), m)


def _high_bits(rounding_bits: jax.Array, count: int) -> jax.Array:
    """Returns the `count` highest bits of a uint32 as int32."""
    return (rounding_bits >> (32 - count)).astype(jnp.int32)


M_FORMATS: dict[str | None, MFormat] = {
    None: FullPrecisionM(None),
    "float32": FullPrecisionM(np.dtype(np.float32)),
    "float64": FullPrecisionM(np.dtype(np.float64)),
    "bfloat16": Bfloat16M(),
    "int8": Int8M(),
}


def m_format_of(dtype: DTypeLike | None) -> MFormat:
    """Returns the storage format of m for an argument `m_dtype`."""
    return find_format(M_FORMATS, "m_dtype", dtype)
