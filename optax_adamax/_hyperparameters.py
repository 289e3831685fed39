"""The hyperparameters of Adamax, and the scalars of one step."""

import dataclasses
import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from optax_adamax import _checks, _shared_scale, _xla
from optax_adamax._m_formats import MFormat
from optax_adamax._numerics import hash_uint32, one_minus_power
from optax_adamax._shared_scale import SharedScale
from optax_adamax._v_formats import VFormat

EpsPlacement = Literal["max", "denominator"]


class Step(NamedTuple):
    """The scalars of step t; floats have the compute dtype.

    If v has a shared scale s_t, the equations compute s_t v_t instead of v_t. They compute s_t m_t
    if m is stored as a ratio to v. Conversions between these units are part of the fields, and the
    equations are the same for every format. A further field may slow the loop on TPU; see
    `_xla.pack`.
    """

    t: jax.Array  # int32: 1 in the first step
    b1: jax.Array  # b1/b2 if m is stored as a ratio to v
    one_minus_b1: jax.Array  # s_t (1 - b1) if v has a shared scale and m is a ratio to v
    b2: jax.Array  # 2**-k with a shared scale
    scale: jax.Array  # s_t; 1 without a shared scale
    eps_in_max: jax.Array  # 0 if eps is in the denominator
    eps_in_denominator: jax.Array | None  # multiplied by s_t; None if eps is in the maximum
    bias_correction: jax.Array  # 1 - b1**t, or 1; divided by s_t if only v is multiplied by s_t
    nesterov_b1: jax.Array | None  # b1 (1 - b1**t) / (1 - b1**(t + 1)) with Nesterov momentum
    bound: jax.Array | None  # largest |u_t| in exact arithmetic; None: updates are not clipped
    rounding_bits: jax.Array  # uint32: a hash of t; with a shared scale, its low bits contain b2
    grads_finite: jax.Array | None  # bool: see `_nonfinite.GRADS_FINITE`


_STATIC = {"static": True}  # a compile-time constant


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Hyperparameters:
    """The validated hyperparameters of `scale_by_adamax`."""

    b1: ArrayLike
    one_minus_b1: ArrayLike
    b2: ArrayLike
    log2_decay: ArrayLike  # log2(1 / b2)
    eps: ArrayLike
    eps_placement: EpsPlacement = dataclasses.field(metadata=_STATIC)
    bias_correction: bool = dataclasses.field(metadata=_STATIC)
    nesterov: bool = dataclasses.field(metadata=_STATIC)
    # Whether b1 and b2 are known numbers with b1 < b2. Then |u_t| has a bound.
    is_bounded: bool = dataclasses.field(metadata=_STATIC)

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
        """Checks the arguments of `scale_by_adamax`, and adds derived numbers."""
        _checks.check_decay("b1", b1, closed=False)
        _checks.check_decay("b2", b2, closed=True)
        _checks.check_scalar("eps", eps, 0.0, float("inf"))
        _checks.check_choice("eps_placement", eps_placement, ("max", "denominator"))
        _checks.check_flag("bias_correction", bias_correction)
        _checks.check_flag("nesterov", nesterov)
        known_b1, known_b2 = _checks.concrete_value(b1), _checks.concrete_value(b2)
        return cls(
            b1=b1,
            one_minus_b1=1 - b1,
            b2=b2,
            log2_decay=_shared_scale.log2_decay(b2),
            eps=eps,
            eps_placement=eps_placement,
            bias_correction=bias_correction,
            nesterov=nesterov,
            is_bounded=known_b1 is not None and known_b2 is not None and known_b1 < known_b2,
        )

    @functools.partial(jax.jit, static_argnames=("m_format", "v_format", "dtype"))
    def for_step(
        self,
        t: ArrayLike,
        shared: SharedScale | None,
        grads_finite: jax.Array | None = None,
        *,
        m_format: MFormat,
        v_format: VFormat,
        dtype: np.dtype,
    ) -> Step:
        """Returns the scalars of step t = 1, 2, ...

        Args:
          t: int32, the number of the step.
          shared: shared scale of v after the step; None if `v_format` does not use it.
          grads_finite: bool, see `_nonfinite.GRADS_FINITE`.
          m_format, v_format: storage formats of m and v.
          dtype: compute dtype, float32 or float64.
        """
        b1, one_minus_b1, b2, eps = (
            jnp.asarray(x, dtype) for x in (self.b1, self.one_minus_b1, self.b2, self.eps)
        )
        count = jnp.asarray(t, dtype)
        bias = next_bias = jnp.ones((), dtype)
        if self.bias_correction:
            bias, next_bias = (one_minus_power(one_minus_b1, n) for n in (count, count + 1))
        nesterov_b1 = b1 * (bias / next_bias) if self.nesterov else None
        bound = None
        if self.is_bounded and (m_format.is_quantized or v_format.is_quantized):
            ratio = _ratio_bound(count, b1, one_minus_b1, b2)
            bound = ratio / bias
            if nesterov_b1 is not None:
                bound = (nesterov_b1 * ratio + one_minus_b1) / bias
        step = Step(
            t=jnp.asarray(t),
            b1=b1 / jnp.where(b2 == 0, 1, b2) if m_format.is_ratio else b1,
            one_minus_b1=one_minus_b1,
            b2=b2,
            scale=jnp.ones((), dtype),
            eps_in_max=eps if self.eps_placement == "max" else jnp.zeros((), dtype),
            eps_in_denominator=eps if self.eps_placement == "denominator" else None,
            bias_correction=bias,
            nesterov_b1=nesterov_b1,
            bound=bound,
            rounding_bits=hash_uint32(jnp.asarray(t, jnp.uint32)),
            grads_finite=grads_finite,
        )
        return step if shared is None else _in_units_of(shared, step, m_format)


def _in_units_of(shared: SharedScale, step: Step, m_format: MFormat) -> Step:
    """Converts the scalars to units of the shared scale for v, and for m if it is a ratio to v."""
    scale, b2 = (x.astype(step.b1.dtype) for x in (shared.scale, shared.b2))
    if m_format.is_ratio:
        step = step._replace(one_minus_b1=scale * step.one_minus_b1)
    else:
        step = step._replace(bias_correction=step.bias_correction / scale)
    if step.eps_in_denominator is not None:
        step = step._replace(eps_in_denominator=scale * step.eps_in_denominator)
    packed = _xla.pack(step.rounding_bits, shared.b2)
    return step._replace(b2=b2, scale=scale, rounding_bits=packed)


def _ratio_bound(t: jax.Array, b1: jax.Array, one_minus_b1: jax.Array, b2: jax.Array) -> jax.Array:
    """Returns the largest |m_t| / v_t for constant b1 < b2, attained by the gradients b2^t."""
    a = (b2 - b1) / b2  # 1 - b1/b2
    return one_minus_b1 * one_minus_power(a, t) / a
