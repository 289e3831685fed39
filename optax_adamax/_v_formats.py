"""How v may be kept: a maximum that decays, in a moving frame where it is kept in few bits.

Here v is in the units of its frame, w = s v: what is kept as it was computed has none, and s = 1.
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
    py_float32,
    py_float32_bits,
)
from optax_adamax._numerics import saturating_cast


class VFormat(Format):
    """How v is kept."""

    range: tuple[float, float]  # of v within which `relative_error` holds
    relative_error: float  # of v in this range, at most, after any number of steps
    smallest: float = 0.0  # that `decode` returns

    @property
    def is_framed(self) -> bool:
        """Whether there is a frame, of which the state then holds the phase."""
        return self.container is not None

    @abc.abstractmethod
    def decode(self, w: jax.Array) -> jax.Array:
        """The float that is stored as w."""

    @abc.abstractmethod
    def encode(self, w: jax.Array) -> jax.Array:
        """The float w as it is stored."""

    def shift_of(self, octaves: jax.Array) -> jax.Array:
        """The `shift` that folds the frame back by so many octaves: int32 in [0, 2**9)."""
        return octaves

    @abc.abstractmethod
    def fold(self, w: jax.Array, shift: jax.Array) -> jax.Array:
        """What is stored, in the units of the next step's frame but for a factor of 1 / b2."""

    @abc.abstractmethod
    def next(self, w: jax.Array, abs_g: jax.Array, b2: jax.Array, shift: jax.Array) -> jax.Array:
        """max(b2 v, |g|), from what is stored to what is stored."""


class FullPrecisionV(FullPrecision, VFormat):
    """v kept as it was computed."""

    range = (0.0, float("inf"))
    relative_error = 0.0

    def decode(self, w: jax.Array) -> jax.Array:
        return w

    def encode(self, w: jax.Array) -> jax.Array:
        return w

    def fold(self, w: jax.Array, shift: jax.Array) -> jax.Array:
        del shift
        return w

    def next(self, w: jax.Array, abs_g: jax.Array, b2: jax.Array, shift: jax.Array) -> jax.Array:
        del shift
        return jnp.maximum(b2 * w.astype(b2.dtype), abs_g)


class ScaledBfloat16(NamedTuple):
    """v kept as bfloat16 in a frame: it is ``scaled_bfloat16 / 2**(phase / 2**32 - 1)``."""

    scaled_bfloat16: Any  # a tree like the parameters
    phase: jax.Array  # shape=(), dtype=uint32: fraction of an octave, in units of 2**-32


class Bfloat16V(VFormat):
    """Rounded to the nearest bfloat16 when it is set, and halved exactly from then on."""

    dtype = np.dtype(jnp.bfloat16)
    container = ScaledBfloat16
    range = (2.0**-120, 2.0**127)
    relative_error = 2.0**-8

    def decode(self, w: jax.Array) -> jax.Array:
        return w.astype(jnp.float32)

    def encode(self, w: jax.Array) -> jax.Array:
        w = saturating_cast(forbid_derivative(w), np.dtype(np.float32))
        w = jnp.minimum(w, float(jnp.finfo(self.dtype).max))  # else it may be rounded to infinity
        # Not a cast alone: XLA may leave out a cast to bfloat16 and back, but never this.
        return jax.lax.reduce_precision(w, exponent_bits=8, mantissa_bits=7).astype(self.dtype)

    def next(self, w: jax.Array, abs_g: jax.Array, b2: jax.Array, shift: jax.Array) -> jax.Array:
        del b2
        return self.encode(
            jnp.maximum(self.fold(w, shift), saturating_cast(abs_g, np.dtype(np.float32)))
        )

    def shift_of(self, octaves: jax.Array) -> jax.Array:
        return 127 - octaves  # the exponent of the factor

    def fold(self, w: jax.Array, shift: jax.Array) -> jax.Array:
        return self.decode(w) * float32_from_bits(shift << 23)


class ScaledUint8(NamedTuple):
    """v kept as codes in a frame; `Uint8V` says what they mean."""

    scaled_uint8: Any  # a tree like the parameters
    phase: jax.Array  # shape=(), dtype=uint32: fraction of an octave, in units of 2**-32


class Uint8V(VFormat):
    """The nearest of 256 codes, six to an octave and equally spaced within it.

    They are cut from the bits of a float, so that a fold by an octave moves every code by the same
    integer. What is below the range takes code 0, what is above it the last one.
    """

    dtype = np.dtype(np.uint8)
    container = ScaledUint8
    CODES_PER_OCTAVE: ClassVar[int] = 6
    SPACING: ClassVar[int] = (1 << 23) // CODES_PER_OCTAVE  # of codes, in a float's last places
    FLOOR: ClassVar[float] = 2.0**-30  # w of code 0
    CEILING: ClassVar[float] = py_float32(
        py_float32_bits(FLOOR) + 255 * SPACING
    )  # w of code 255: 6144
    smallest = FLOOR
    range = (2 * FLOOR, CEILING)  # w is v at one end of an octave of decay, and v / 2 at the other
    relative_error = 1 / (2 * CODES_PER_OCTAVE)

    def decode(self, w: jax.Array) -> jax.Array:
        return float32_from_bits(w.astype(jnp.int32) * self.SPACING + py_float32_bits(self.FLOOR))

    def encode(self, w: jax.Array) -> jax.Array:
        w = jnp.clip(
            saturating_cast(forbid_derivative(w), np.dtype(np.float32)), self.FLOOR, self.CEILING
        )
        # (bits(w) - bits(FLOOR)) / SPACING to the nearest: modulo 2**32 the products wrap, and
        # their difference is right.
        half = (1 << 22) - self.CODES_PER_OCTAVE * py_float32_bits(self.FLOOR)
        code = float32_bits(w).astype(jnp.uint32) * self.CODES_PER_OCTAVE + np.uint32(
            half % (1 << 32)
        )
        return (code >> 23).astype(self.dtype)

    def next(self, w: jax.Array, abs_g: jax.Array, b2: jax.Array, shift: jax.Array) -> jax.Array:
        del b2
        return jnp.maximum(self.fold(w, shift), self.encode(abs_g))

    def shift_of(self, octaves: jax.Array) -> jax.Array:
        return jnp.minimum(octaves * self.CODES_PER_OCTAVE, 255)

    def fold(self, w: jax.Array, shift: jax.Array) -> jax.Array:
        shift = shift.astype(self.dtype)
        return jnp.maximum(w, shift) - shift


V_FORMATS: dict[str | None, VFormat] = {
    None: FullPrecisionV(None),
    "float32": FullPrecisionV(np.dtype(np.float32)),
    "float64": FullPrecisionV(np.dtype(np.float64)),
    "bfloat16": Bfloat16V(),
    "uint8": Uint8V(),
}
