"""The hyperparameters, and what they make of step t."""

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from optax_adamax import _checks, _frame
from optax_adamax._m_formats import MFormat
from optax_adamax._numerics import hash_uint32, one_minus_power
from optax_adamax._step import SHIFT_BITS, Step
from optax_adamax._v_formats import VFormat

EpsPlacement = Literal["max", "denominator"]


def _static() -> Any:
    """A field that a program is compiled for."""
    return dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Hyperparameters:
    """What a step is made from, and where it is said what each one means."""

    b1: ArrayLike
    one_minus_b1: ArrayLike  # 1 - b1
    b2: ArrayLike
    octaves: ArrayLike  # by which v decays in a step
    eps: ArrayLike
    eps_in_max: bool = _static()
    bias_correction: bool = _static()
    nesterov: bool = _static()
    # K >= |m_t| / v_t in exact arithmetic for constant b1 and b2; None if one is traced
    largest_ratio: float | None = _static()

    @classmethod
    def validated(
        cls,
        b1: ArrayLike,
        b2: ArrayLike,
        eps: ArrayLike,
        eps_placement: EpsPlacement,
        bias_correction: bool,
        nesterov: bool,
    ) -> "Hyperparameters":
        """Of what `scale_by_adamax` is told, unless that cannot be."""
        _checks.check_decay("b1", b1, closed=False)
        _checks.check_decay("b2", b2, closed=True)
        _checks.check_scalar("eps", eps, 0.0, float("inf"))
        _checks.check_choice("eps_placement", eps_placement, ("max", "denominator"))
        _checks.check_flag("bias_correction", bias_correction)
        _checks.check_flag("nesterov", nesterov)
        return cls(
            b1=b1,
            one_minus_b1=1 - b1,
            b2=b2,
            octaves=_frame.octaves(b2),
            eps=eps,
            eps_in_max=eps_placement == "max",
            bias_correction=bias_correction,
            nesterov=nesterov,
            largest_ratio=_largest_ratio(_checks.concrete_value(b1), _checks.concrete_value(b2)),
        )

    @functools.partial(jax.jit, static_argnames=("m_format", "v_format", "dtype"))
    def for_step(
        self,
        t: ArrayLike,
        phase: jax.Array,
        grads_finite: jax.Array | None = None,
        *,
        m_format: MFormat,
        v_format: VFormat,
        dtype: np.dtype,
    ) -> Step:
        """Step t = 1, 2, ...

        Args:
          t: its number, int32.
          phase: of v's frame before the step, uint32.
          grads_finite: see `_nonfinite.handle_nonfinite`.
          m_format: how m is kept.
          v_format: how v is kept.
          dtype: of the arithmetic, float32 or float64.
        """
        b1, one_minus_b1, b2, eps = (
            jnp.asarray(x, dtype) for x in (self.b1, self.one_minus_b1, self.b2, self.eps)
        )
        count = jnp.asarray(t, dtype)
        bias = one_minus_power(one_minus_b1, count) if self.bias_correction else jnp.ones((), dtype)
        next_bias = one_minus_power(one_minus_b1, count + 1) if self.bias_correction else bias
        frame = _frame.advance(phase, self.octaves)
        scale = frame.scale.astype(dtype) if v_format.is_framed else jnp.ones((), dtype)
        is_rounded = m_format.is_rounded or v_format.is_rounded
        bound = None
        if is_rounded and self.largest_ratio not in (None, float("inf")):
            bound = _bound(count, b1, one_minus_b1, b2, bias, next_bias if self.nesterov else None)
        in_frame = m_format.is_ratio and v_format.is_framed
        shift = v_format.shift_of(frame.shift)
        return Step(
            t=jnp.asarray(t),
            b1=b1 / jnp.where(b2 == 0, 1, b2) if in_frame else b1,
            one_minus_b1=one_minus_b1,
            b2=b2,
            shift=shift,
            scale=scale if v_format.is_framed else None,
            eps_in_max=eps if self.eps_in_max else None,
            eps_in_denominator=None if self.eps_in_max else eps * scale,
            bias=bias if m_format.is_ratio else bias / scale,
            b1_ahead=b1 * (bias / next_bias) if self.nesterov else None,
            bound=bound,
            threshold=(hash_uint32(jnp.asarray(t, np.uint32)) >> SHIFT_BITS << SHIFT_BITS)
            | shift.astype(jnp.uint32),
            phase=frame.phase,
            grads_finite=grads_finite,
        )


def _largest_ratio(b1: float | None, b2: float | None) -> float | None:
    if b1 is None or b2 is None:
        return None
    return (1 - b1) / (1 - b1 / b2) if b1 < b2 else float("inf")


def _bound(
    t: jax.Array,
    b1: jax.Array,
    one_minus_b1: jax.Array,
    b2: jax.Array,
    bias: jax.Array,
    next_bias: jax.Array | None,
) -> jax.Array:
    """The largest |u_t| of exact arithmetic, for constant b1 < b2.

    It is C_t = sum (b1/b2)^k / sum b1^k over k < t, which tends to (1 - b1) / (1 - b1/b2): the
    gradients |g_k| = b2^k reach it, and none go beyond.
    """
    a = (b2 - b1) / b2
    ratio = one_minus_b1 * one_minus_power(a, t) / a  # of m / v
    return ratio / bias if next_bias is None else b1 * ratio / next_bias + one_minus_b1 / bias
