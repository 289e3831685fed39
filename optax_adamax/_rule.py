"""The equations of Adamax: Kingma & Ba (2014), section 7.1."""

import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from optax_adamax import _checks
from optax_adamax._numerics import map_real_imag, one_minus_power, widen

EpsPlacement = Literal["max", "denominator"]


class AdamaxRule(NamedTuple):
    """The hyperparameters of Adamax; `scale_by_adamax` says what each one means."""

    b1: ArrayLike
    b2: ArrayLike
    eps: ArrayLike
    eps_placement: EpsPlacement
    bias_correction: bool
    nesterov: bool

    def check(self) -> None:
        """Refuses what cannot be a hyperparameter of Adamax."""
        _checks.check_decay("b1", self.b1, closed=False)
        _checks.check_decay("b2", self.b2, closed=True)
        _checks.check_scalar("eps", self.eps, 0.0, float("inf"))
        _checks.check_choice("eps_placement", self.eps_placement, ("max", "denominator"))
        _checks.check_flag("bias_correction", self.bias_correction)
        _checks.check_flag("nesterov", self.nesterov)

    def at(self, t: ArrayLike, dtype: np.dtype) -> "AdamaxStep":
        """The rule at step t = 1, 2, ..., ready for arithmetic in the real `dtype`."""
        real = functools.partial(jnp.asarray, dtype=dtype)
        in_max = self.eps_placement == "max"
        a1 = real(1 - self.b1)
        bias, next_bias = jnp.ones((), dtype), jnp.ones((), dtype)
        if self.bias_correction:
            bias = one_minus_power(a1, real(t))
            next_bias = one_minus_power(a1, real(t) + 1)
        return AdamaxStep(
            b1=real(self.b1),
            a1=a1,
            b2=real(self.b2),
            eps_in_max=real(self.eps if in_max else 0.0),
            eps_in_denominator=real(0.0 if in_max else self.eps),
            bias=bias,
            next_bias=next_bias if self.nesterov else None,
        )

    def bound(self, t: ArrayLike, step: "AdamaxStep") -> jax.Array:
        """The largest |direction| that step t can have in exact arithmetic; inf if b1 >= b2.

        It is C_t = sum (b1/b2)^k / sum b1^k over k < t, which tends to (1 - b1) / (1 - b1/b2):
        the gradients |g_k| = b2^k reach it, and none go beyond.
        """
        dtype = step.b1.dtype
        bounded = step.b2 > step.b1
        a = jnp.where(bounded, (step.b2 - step.b1) / jnp.where(bounded, step.b2, 1), 1)
        ratio = step.a1 * one_minus_power(a, jnp.asarray(t, dtype)) / a  # of m / v
        bound = ratio / step.bias
        if step.next_bias is not None:
            bound = step.b1 * ratio / step.next_bias + step.a1 / step.bias
        return jnp.where(bounded, bound, jnp.inf)


class AdamaxStep(NamedTuple):
    """One step of Adamax on arrays: section 7.1 of the paper, line by line."""

    b1: jax.Array
    a1: jax.Array  # 1 - b1
    b2: jax.Array
    eps_in_max: jax.Array
    eps_in_denominator: jax.Array
    bias: jax.Array  # 1 - b1**t, or 1 without bias correction
    next_bias: jax.Array | None  # 1 - b1**(t + 1) with Nesterov momentum, else None

    def next_m(self, g: jax.Array, m: jax.Array) -> jax.Array:
        """m_t = b1 m_{t-1} + (1 - b1) g_t."""
        return map_real_imag(lambda g, m: self.a1 * g + self.b1 * m, g, m)

    def next_v(self, g: jax.Array, v: jax.Array) -> jax.Array:
        """v_t = max(b2 v_{t-1}, |g_t|)."""
        return jnp.maximum(jnp.abs(g) + self.eps_in_max, self.b2 * v)

    def direction(self, g: jax.Array, m: jax.Array, v: jax.Array) -> jax.Array:
        """m_t / ((1 - b1^t) v_t), and 0 where v_t is 0: no gradient has been seen there."""
        # Not m / bias / v, of which XLA makes this in some programs, and in others not.
        scale = self.bias * (v + self.eps_in_denominator)
        unseen = scale == 0
        scale = jnp.where(unseen, 1, scale)

        def divide(g: jax.Array, m: jax.Array) -> jax.Array:
            if self.next_bias is not None:
                m = self.b1 * (self.bias / self.next_bias) * m + self.a1 * g
            return jnp.where(unseen, 0, m / scale)

        return map_real_imag(divide, g, m)

    def take(
        self, g: jax.Array, m: jax.Array, v: jax.Array, taken: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The direction and the new moments, from arrays of any dtype.

        Where `taken` is False the moments stay, and the direction means nothing.
        """
        g, m, v = (widen(x, self.b1.dtype) for x in (g, m, v))
        new_m, new_v = self.next_m(g, m), self.next_v(g, v)
        if taken is not None:
            new_m, new_v = jnp.where(taken, new_m, m), jnp.where(taken, new_v, v)
        return self.direction(g, new_m, new_v), new_m, new_v
