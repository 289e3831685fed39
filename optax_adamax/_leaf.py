"""Adamax, the variant of Adam with an infinity norm: Kingma & Ba (2014), section 7.1."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from optax_adamax import _xla
from optax_adamax._formats import float32_bits
from optax_adamax._m_formats import MFormat, clip_update, safe_divide
from optax_adamax._numerics import abs_if_complex, map_real_imag, saturating_cast, upcast
from optax_adamax._step import SHIFT_BITS, Step
from optax_adamax._v_formats import VFormat


@functools.partial(jax.jit, static_argnames=("m_format", "v_format", "dtype"))
def update_leaf(
    g: jax.Array,
    m: jax.Array,
    v: jax.Array,
    step: Step,
    *,
    m_format: MFormat,
    v_format: VFormat,
    dtype: np.dtype,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Section 7.1 of the paper, line by line.

    v_t and m_t are computed as they are stored, and the update from what is stored: so no float of
    the parameters' size is written between the lines, and a checkpoint explains the next step.

    Args:
      g: gradient g_t, of any float dtype.
      m: m_{t-1} as `m_format` stores it, shaped like g.
      v: v_{t-1} as `v_format` stores it, shaped like g.
      step: the scalars of step t.
      m_format: how m is kept.
      v_format: how v is kept.
      dtype: of the update.

    Returns:
      The update u_t in `dtype`, and m_t and v_t as they are stored.
    """

    def next_v(v: jax.Array, g: jax.Array) -> jax.Array:
        """v_t = max(b2 v_{t-1}, |g_t| + eps)."""
        new_v = v_format.next(v, _magnitude(g, step), step.b2, _shift(g, step))
        return _if_taken(step, saturating_cast(new_v, v.dtype), v)

    def next_m(
        m: jax.Array, v: jax.Array, new_v: jax.Array, g: jax.Array, add: _xla.Add
    ) -> jax.Array:
        """m_t = b1 m_{t-1} + (1 - b1) g_t."""
        m_prev = m_format.decode(m, decode_v(v_format.fold(v, _shift(g, step))))
        m_t = map_real_imag(lambda g, m: add(step.one_minus_b1 * g, step.b1 * m), g_t(g), m_prev)
        threshold = _threshold(_gradient(g, step), step)
        new_m = m_format.encode(m_t, decode_v(new_v), threshold, v_format.smallest)
        return _if_taken(step, saturating_cast(new_m, m.dtype), m)

    def g_t(g: jax.Array) -> jax.Array:
        """The gradient in the units in which m is kept."""
        g = _gradient(g, step)
        return g * step.scale if m_format.is_ratio and step.scale is not None else g

    def decode_v(v: jax.Array) -> jax.Array:
        return v_format.decode(v).astype(step.b1.dtype)

    if m_format.is_rounded or v_format.is_rounded:
        new_m, new_v = _xla.store(next_m, next_v, m, v, g, step.t, rounds_m=m_format.is_rounded)
    else:
        new_v = next_v(v, g)
        new_m = next_m(m, v, new_v, g, jnp.add)

    # u_t = m_t / ((1 - b1^t) v_t)
    v_t = decode_v(new_v)
    if step.b1_ahead is None:
        u = m_format.ratio(new_m, v_t, step)
    else:
        u = _look_ahead(g_t(g), m_format.decode(new_m, v_t), v_t, step)
    return saturating_cast(u, dtype), new_m, new_v


def _gradient(g: jax.Array, step: Step) -> jax.Array:
    """g_t, in the dtype of the arithmetic; what is not finite counts as 0 if it is looked at."""
    g = upcast(g, step.b1.dtype)
    return g if step.grads_finite is None else jnp.where(jnp.isfinite(abs_if_complex(g)), g, 0)


def _magnitude(g: jax.Array, step: Step) -> jax.Array:
    """|g_t| + eps, in the units of v's frame."""
    abs_g = jnp.abs(_gradient(g, step))
    abs_g = abs_g if step.eps_in_max is None else abs_g + step.eps_in_max
    return abs_g if step.scale is None else abs_g * step.scale


def _look_ahead(g: jax.Array, m: jax.Array, v: jax.Array, step: Step) -> jax.Array:
    """Nesterov's update, (b1 m_t / (1 - b1^(t+1)) + (1 - b1) g_t / (1 - b1^t)) / v_t."""
    m = map_real_imag(lambda g, m: step.b1_ahead * m + step.one_minus_b1 * g, g, m)
    return clip_update(safe_divide(m, step.divisor(v)), step.bound)


def _threshold(g: jax.Array, step: Step) -> jax.Array:
    """uint32, uniform over the steps whatever g is; the bits of g tell the elements apart."""
    mantissa = (
        float32_bits(saturating_cast(jnp.abs(g), np.dtype(np.float32))).astype(jnp.uint32)
        << SHIFT_BITS
    )
    return step.threshold + mantissa


def _shift(g: jax.Array, step: Step) -> jax.Array:
    """How far the frame is folded back: also the last bits of each threshold."""
    if step.scale is None:
        return step.shift
    last_bits = _threshold(_gradient(g, step), step) & ((1 << SHIFT_BITS) - 1)
    return _xla.per_element(step.shift, last_bits.astype(step.shift.dtype))


def _if_taken(step: Step, new: jax.Array, old: jax.Array) -> jax.Array:
    return new if step.grads_finite is None else jnp.where(step.grads_finite, new, old)
