"""How m and v are kept between steps.

A format knows one array at a time: it knows no tree and no optimizer state. Where a moment
is kept in fewer bits than the arithmetic has, three facts keep it from drifting:

- v is a maximum that decays, v_t = max(b2 v_{t-1}, |g_t|), and a maximum commutes with a common
  factor. So the decay is divided out: what is kept is `w = v s`, where the scale s doubles in
  every octave of decay and is folded back into [1/2, 1]. Each element is rounded once, when it
  is set; the decay is then the fold `w * 2**-k` alone, which is exact.
- m is bounded by v, |m| <= K v with K near 1, so the ratio m / v needs no scale of its own.
- The codes are cut from the bits of a float, equally spaced within an octave: cheap to compute,
  and a fold by an octave moves every code by the same integer.
"""

import dataclasses
import math
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from optax_adamax._numerics import compute_dtype


class FramedMaximum(NamedTuple):
    """v in few bits: the codes stand for w = v * 2**(phase / 2**32 - 1)."""

    codes: Any  # shaped like the parameters: bfloat16 or uint8
    phase: jax.Array  # shape=(), dtype=uint32: fraction of an octave, in units of 2**-32


class Frame(NamedTuple):
    """One step of the decay of v, as scalars."""

    b2: jax.Array
    folds: jax.Array  # int32: k, the octaves by which the scale has wrapped around in this step
    fold: jax.Array  # float32: 2**-k
    scale: jax.Array  # float32, in [1/2, 1]: w / v after the step
    old_unit: jax.Array  # float32, in [1, 2]: v / w before the step
    unit: jax.Array  # float32, in [1, 2]: v / w after the step


def scale_of(phase: jax.Array) -> jax.Array:
    """w / v at this phase of the frame."""
    return jnp.exp2(phase.astype(jnp.float32) * jnp.float32(2**-32) - 1)


def advance(phase: jax.Array, b2: ArrayLike) -> tuple[jax.Array, Frame]:
    """Moves the frame by one step of decay b2: the new phase, and what it does to the codes."""
    octaves = _octaves(1 - b2)
    whole = jnp.minimum(jnp.floor(octaves), 127)
    fraction = jnp.where(octaves < 127, octaves - whole, 0)
    ticks = jnp.minimum(jnp.round(fraction * 2.0**32), 2.0**32 - 256)
    new_phase = phase + ticks.astype(jnp.uint32)
    carry = (new_phase < phase).astype(jnp.int32)
    k = jnp.minimum(whole.astype(jnp.int32) + carry, 127)
    scale = scale_of(new_phase)
    return new_phase, Frame(
        b2=jnp.asarray(b2, jnp.float32),
        folds=k,
        fold=_float((127 - k) << 23),
        scale=scale,
        old_unit=1 / scale_of(phase),
        unit=1 / scale,
    )


def _octaves(one_minus_b2: ArrayLike) -> jax.Array:
    """log2(1 / b2) in float32, without cancellation as b2 nears 1."""
    if isinstance(one_minus_b2, jax.Array):
        return jnp.log1p(-one_minus_b2).astype(jnp.float32) * (-1 / math.log(2))
    # On the host, for XLA's constant folding and its kernels may differ in the last bit.
    with np.errstate(divide="ignore"):
        return jnp.float32(np.log1p(-np.asarray(one_minus_b2, np.float64)) * (-1 / math.log(2)))


def _bits(x: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(x, jnp.int32)


def _float(bits: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def _bits_of(number: float) -> int:
    return int(np.float32(number).view(np.int32))


@dataclasses.dataclass(frozen=True)
class Float:
    """m or v kept as floats: in `dtype`, or in the dtype of the arithmetic where it is None."""

    dtype: np.dtype | None = None
    is_framed: ClassVar[bool] = False

    @property
    def is_low_bit(self) -> bool:
        """Whether the moment is kept in fewer bits than the arithmetic has."""
        return self.dtype == jnp.bfloat16

    def keeps(self, dtype: np.dtype) -> bool:
        """Whether an array of this dtype is a moment in this format."""
        if self.dtype is None:
            return jnp.issubdtype(dtype, jnp.inexact) and jnp.finfo(dtype).bits >= 32
        return dtype == self.dtype or dtype == np.result_type(self.dtype, np.complex64)

    def zeros(self, parameter: Any, *, real: bool) -> jax.Array:
        """The moment before the first step, shaped and sharded like `parameter`."""
        dtype = compute_dtype(parameter) if self.dtype is None else self.dtype
        if jax.dtypes.canonicalize_dtype(dtype) != dtype:
            raise ValueError("A float64 moment needs jax.config.update('jax_enable_x64', True).")
        if not real and _is_complex(parameter):
            if dtype == jnp.bfloat16:
                raise TypeError(_COMPLEX.format("bfloat16"))
            dtype = np.result_type(dtype, np.complex64)
        return jnp.zeros_like(parameter, dtype=dtype)

    def decode_m(self, m: jax.Array, v: jax.Array) -> jax.Array:
        """m in float32."""
        del v
        return m.astype(jnp.float32)

    def encode_m(self, m: jax.Array, v: jax.Array, threshold: jax.Array) -> jax.Array:
        """m, rounded to what can be kept; what is finite stays so."""
        del v, threshold
        if self.dtype != jnp.bfloat16:
            return m
        limit = float(jnp.finfo(jnp.bfloat16).max)
        return _round_to_bfloat16(jnp.where(jnp.isfinite(m), jnp.clip(m, -limit, limit), m))

    def decode_v(self, v: jax.Array, unit: jax.Array) -> jax.Array:
        """v in float32."""
        del unit
        return v.astype(jnp.float32)

    def next_v(self, v: jax.Array, size: jax.Array, frame: Frame) -> jax.Array:
        """max(b2 v, size)."""
        return jnp.maximum(size, frame.b2 * v.astype(jnp.float32))


@dataclasses.dataclass(frozen=True)
class _LowBit:
    dtype: ClassVar[np.dtype]
    is_low_bit: ClassVar[bool] = True

    def keeps(self, dtype: np.dtype) -> bool:
        """Whether an array of this dtype is a moment in this format."""
        return dtype == self.dtype

    def zeros(self, parameter: Any, *, real: bool) -> jax.Array:
        """The moment before the first step, shaped and sharded like `parameter`."""
        del real
        if _is_complex(parameter):
            raise TypeError(_COMPLEX.format(self.dtype))
        return jnp.zeros_like(parameter, dtype=self.dtype)


class FramedBfloat16(_LowBit):
    """v kept as bfloat16 in the frame: relative error <= 2**-8, from 1e-37 to 3e38."""

    dtype: ClassVar[np.dtype] = jnp.dtype(jnp.bfloat16)
    is_framed: ClassVar[bool] = True

    def decode_v(self, v: jax.Array, unit: jax.Array) -> jax.Array:
        # 2 w may be rounded up beyond the largest float.
        return jnp.minimum(v.astype(jnp.float32) * unit, _LARGEST)

    def encode_v(self, w: jax.Array) -> jax.Array:
        return _round_to_bfloat16(w)

    def next_v(self, v: jax.Array, size: jax.Array, frame: Frame) -> jax.Array:
        w = self.decode_v(v, frame.fold)
        return self.encode_v(jnp.maximum(w, size * frame.scale))


class FramedUint8(_LowBit):
    """v kept as one of 256 codes in the frame, six an octave, from 1e-9 to 5.8e3.

    Codes are equally spaced within an octave, and the nearest is taken: v is wrong by at most a
    factor of 1 + 1/12. What is below the range takes code 0, what is above it 255.
    """

    dtype: ClassVar[np.dtype] = np.dtype(np.uint8)
    is_framed: ClassVar[bool] = True
    CODES_PER_OCTAVE: ClassVar[int] = 6
    FLOOR: ClassVar[int] = _bits_of(2.0**-30)
    SPACING: ClassVar[int] = (1 << 23) // 6

    def decode_v(self, v: jax.Array, unit: jax.Array) -> jax.Array:
        return _float(v.astype(jnp.int32) * self.SPACING + self.FLOOR) * unit

    def encode_v(self, w: jax.Array) -> jax.Array:
        above = jnp.clip(_bits(w) - self.FLOOR, 0, 85 << 22)
        return ((above >> 3) * self.CODES_PER_OCTAVE + (1 << 19)) >> 20

    def next_v(self, v: jax.Array, size: jax.Array, frame: Frame) -> jax.Array:
        down = jnp.minimum(frame.folds * self.CODES_PER_OCTAVE, 255).astype(jnp.uint8)
        code = self.encode_v(size * frame.scale).astype(jnp.uint8)
        return jnp.maximum(jnp.maximum(v, down) - down, code)


class RatioInt8(_LowBit):
    """m kept as a code of m / v: a sign, and eight codes in each of sixteen octaves.

    |m| = LARGEST v (y - NEAR_ZERO), where the code counts y upwards from NEAR_ZERO: equal steps
    of 2**-19 near zero, and of 6 to 12 % of the value above. The code is rounded up or down by a
    threshold that walks with t, so that the mean over the steps is m: nearest rounding would
    leave a small m where it is for ever, for 0.9 m would round back to m.
    """

    dtype: ClassVar[np.dtype] = np.dtype(np.int8)
    is_framed: ClassVar[bool] = False
    LARGEST: ClassVar[float] = 1.25
    NEAR_ZERO: ClassVar[float] = 2.0**-16
    LOST: ClassVar[int] = -128

    def decode_m(self, m: jax.Array, v: jax.Array) -> jax.Array:
        code = m.astype(jnp.int32)
        y = _float((jnp.abs(code) << 20) + _bits_of(self.NEAR_ZERO))
        ratio = jnp.where(code == self.LOST, jnp.nan, (y - self.NEAR_ZERO) * self.LARGEST)
        # A ratio near 1, rounded up, may take m beyond the largest float.
        return jnp.clip(jnp.where(code < 0, -ratio, ratio) * v, -_LARGEST, _LARGEST)

    def encode_m(self, m: jax.Array, v: jax.Array, threshold: jax.Array) -> jax.Array:
        """The code of m / v; `threshold` in [0, 2**20) is added before the bits are cut."""
        v = jnp.where(v == 0, 1, v)  # then m is 0, too
        y = jnp.abs(m) / v * (1 / self.LARGEST) + self.NEAR_ZERO
        size = (_bits(y) - _bits_of(self.NEAR_ZERO) + threshold) >> 20
        size = jnp.minimum(size, 127).astype(jnp.int8)
        code = jnp.where(m < 0, -size, size)
        return jnp.where(jnp.isfinite(m), code, jnp.int8(self.LOST))

    def is_lost(self, m: jax.Array) -> jax.Array:
        """Where a gradient that was not finite has left no m."""
        return m == self.LOST


_LARGEST = float(jnp.finfo(jnp.float32).max)

MFormat = Float | RatioInt8
VFormat = Float | FramedBfloat16 | FramedUint8

_COMPLEX = (
    "Moments of complex parameters cannot be kept in {}: wrap the transformation in "
    "optax.contrib.split_real_and_imaginary, which keeps the two parts as real numbers."
)


def _is_complex(x: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(x), jnp.complexfloating)


def _round_to_bfloat16(x: jax.Array) -> jax.Array:
    # Not a cast: XLA may leave out a cast to bfloat16 and back, but never this.
    return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)


def pinned(x: jax.Array, t: jax.Array) -> jax.Array:
    """x itself, for t >= 0, in a form into which XLA does not see.

    It keeps a product from being contracted with a following addition, which rounds once where
    two operations round twice, in some programs and not in others: codes would differ.
    """
    return _float(_bits(x) | jnp.minimum(t, 0))


def threshold(t: jax.Array) -> jax.Array:
    """Where RatioInt8 rounds up in step t, in [0, 2**20): multiples of the golden ratio, mod 1."""
    return ((t.astype(jnp.uint32) * np.uint32(2654435769)) >> 12).astype(jnp.int32)


def m_format(dtype: DTypeLike | None) -> MFormat:
    """The format for `m_dtype`; raises TypeError or ValueError if there is none."""
    dtype = _as_dtype("m_dtype", dtype, ("float32", "float64", "bfloat16", "int8"))
    return RatioInt8() if dtype == np.int8 else Float(dtype)


def v_format(dtype: DTypeLike | None) -> VFormat:
    """The format for `v_dtype`; raises TypeError or ValueError if there is none."""
    dtype = _as_dtype("v_dtype", dtype, ("float32", "float64", "bfloat16", "uint8"))
    if dtype == jnp.bfloat16:
        return FramedBfloat16()
    return FramedUint8() if dtype == np.uint8 else Float(dtype)


def _as_dtype(name: str, dtype: DTypeLike | None, known: tuple[str, ...]) -> np.dtype | None:
    if dtype is None:
        return None
    if isinstance(dtype, jax.Array):
        raise TypeError(
            f"{name} must be a dtype, but an array was given. optax.inject_hyperparams takes a "
            f"callable such as jnp.float32 for a schedule: write {name}='float32'."
        )
    try:
        dtype = jnp.dtype(dtype)
    except TypeError:
        raise TypeError(f"{name} must be a dtype, but {dtype!r} was given.") from None
    if dtype.name not in known:
        raise ValueError(
            f"{name} must be None or one of {', '.join(known)}, but {dtype} was given. For "
            f"complex parameters give the dtype of the real part."
        )
    return dtype
