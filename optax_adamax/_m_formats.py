"""How m may be kept: as a number, or as a ratio to v, which bounds it.

What is rounded is rounded up or down by a threshold that looks random from step to step, so that
the mean over the steps is right. Nearest rounding would stall: where a step moves m by less than
half the distance of two stored values, it would stay where it is for ever.
"""

import abc
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optax_adamax._formats import (
    Format,
    FullPrecision,
    float32_bits,
    float32_from_bits,
    forbid_derivative,
    py_float32_bits,
    with_sign,
)
from optax_adamax._numerics import map_real_imag, saturating_cast, upcast
from optax_adamax._step import Step


class MFormat(Format):
    """How m is kept."""

    is_ratio: ClassVar[bool] = False  # to v: m is then in the units of v's frame, as v is
    largest_ratio: float = float("inf")  # of |m| to v that can be kept
    relative_error: float  # of m in one step, at most; in the mean over steps it is 0
    resolution: float = 0.0  # in units of v: an error that is always possible

    @abc.abstractmethod
    def decode(self, m: jax.Array, v: jax.Array) -> jax.Array:
        """m as a float of the dtype of the float v, which is of the same step."""

    @abc.abstractmethod
    def encode(
        self, m: jax.Array, v: jax.Array, threshold: jax.Array, smallest_v: float = 0.0
    ) -> jax.Array:
        """m as it is stored. `threshold`, in units of 2**-32, is added before bits are cut off.

        `smallest_v`: what v is known to be at least.
        """

    def ratio(self, m: jax.Array, v: jax.Array, step: Step) -> jax.Array:
        """m / ((1 - b1^t) (v + eps)) of the stored m, limited; 0 where no gradient was seen."""
        # Not m / v / bias, of which XLA makes this in some programs, and in others not.
        return clip_update(safe_divide(self.decode(m, v), step.divisor(v)), step.bound)


def safe_divide(m: jax.Array, v: jax.Array, smallest_v: float = 0.0) -> jax.Array:
    """m / v, and 0 where v is 0, if it may be so small."""
    if smallest_v > 0:  # on CPU XLA keeps a bare quotient that is used more than once
        return map_real_imag(lambda m: m / v, m)
    unseen = v == 0
    v = jnp.where(unseen, 1, v)
    return map_real_imag(lambda m: jnp.where(unseen, 0, m / v), m)


def clip_update(u: jax.Array, bound: jax.Array | None) -> jax.Array:
    """u within +-bound, and NaN where it is not finite."""
    if bound is None:
        return u
    # Not jnp.clip, to which -bound would be another scalar.
    within = -jnp.minimum(-jnp.minimum(u, bound), bound)
    return jnp.where(jnp.isfinite(u), within, jnp.nan)


class FullPrecisionM(FullPrecision, MFormat):
    """m kept as it was computed."""

    relative_error = 0.0

    def decode(self, m: jax.Array, v: jax.Array) -> jax.Array:
        return upcast(m, v.dtype)

    def encode(
        self, m: jax.Array, v: jax.Array, threshold: jax.Array, smallest_v: float = 0.0
    ) -> jax.Array:
        del v, threshold, smallest_v
        return m


class Bfloat16M(MFormat):
    """m kept as bfloat16."""

    dtype = np.dtype(jnp.bfloat16)
    relative_error = 2.0**-7

    def decode(self, m: jax.Array, v: jax.Array) -> jax.Array:
        return m.astype(v.dtype)

    def encode(
        self, m: jax.Array, v: jax.Array, threshold: jax.Array, smallest_v: float = 0.0
    ) -> jax.Array:
        del v, smallest_v
        m = forbid_derivative(m)
        largest = float(jnp.finfo(self.dtype).max)
        cut = float32_bits(jnp.clip(saturating_cast(m, np.dtype(np.float32)), -largest, largest))
        cut = (cut + (threshold >> 16).astype(jnp.int32)) >> 16
        kept = jax.lax.bitcast_convert_type(cut.astype(jnp.int16), jnp.bfloat16)
        return jnp.where(jnp.isfinite(m), kept, jnp.bfloat16(jnp.nan))


class RatioInt8(NamedTuple):
    """m kept as codes of m / v; `Int8M` says what they mean."""

    ratio_int8: Any  # a tree like the parameters


class Int8M(MFormat):
    """m kept as a code of m / v: a sign, and eight codes in each of sixteen octaves.

    |m| / v = y - OFFSET, where the code counts y upwards from OFFSET in the bits of a float: equal
    steps near zero, and of 6 to 12 % of the value above.
    """

    dtype = np.dtype(np.int8)
    container = RatioInt8
    is_ratio = True
    OFFSET: ClassVar[float] = 2.0**-13
    NAN_CODE: ClassVar[int] = -128
    largest_ratio = 7.5 - OFFSET  # code 127
    relative_error = 1 / 8
    resolution = OFFSET / 8

    def magnitude(self, code: jax.Array) -> jax.Array:
        """|m| / v in float32."""
        code = code.astype(jnp.int32)
        size = float32_from_bits((jnp.abs(code) << 20) + py_float32_bits(self.OFFSET)) - self.OFFSET
        return jnp.where(code == self.NAN_CODE, jnp.nan, size)

    def decode(self, m: jax.Array, v: jax.Array) -> jax.Array:
        # Where v is near the largest float, a ratio above 1 may take m beyond it.
        size = self.magnitude(m).astype(v.dtype) * v
        return with_sign(jnp.minimum(size, float(jnp.finfo(v.dtype).max)), m)

    def encode(
        self, m: jax.Array, v: jax.Array, threshold: jax.Array, smallest_v: float = 0.0
    ) -> jax.Array:
        m = forbid_derivative(m)
        y = (
            saturating_cast(jnp.abs(safe_divide(m, v, smallest_v)), np.dtype(np.float32))
            + self.OFFSET
        )
        y = jnp.minimum(y, self.largest_ratio + self.OFFSET)
        code = (
            float32_bits(y) - py_float32_bits(self.OFFSET) + (threshold >> 12).astype(jnp.int32)
        ) >> 20
        code = jnp.where(m < 0, -code, code)
        return jnp.where(jnp.isfinite(m), code, self.NAN_CODE).astype(jnp.int8)

    def ratio(self, m: jax.Array, v: jax.Array, step: Step) -> jax.Array:
        # A division would be dear to XLA, which then keeps its result instead of the code.
        size = self.magnitude(m).astype(v.dtype) * (1 / step.bias)
        if step.eps_in_denominator is not None:
            size *= safe_divide(v, v + step.eps_in_denominator)
        return with_sign(size if step.bound is None else jnp.minimum(size, step.bound), m)


M_FORMATS: dict[str | None, MFormat] = {
    None: FullPrecisionM(None),
    "float32": FullPrecisionM(np.dtype(np.float32)),
    "float64": FullPrecisionM(np.dtype(np.float64)),
    "bfloat16": Bfloat16M(),
    "int8": Int8M(),
}
