"""One step of Adamax for one array: Kingma & Ba (2014), section 7.1."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from optax_adamax import _xla
from optax_adamax._hyperparameters import Step
from optax_adamax._m_formats import MFormat, quotient
from optax_adamax._numerics import (
    abs_if_complex,
    clip_symmetric,
    float32_bits,
    saturating_cast,
    upcast,
)
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
    """Returns the update u_t, and m_t and v_t as stored.

    The update is computed from the stored moments. So XLA writes no parameter-sized float array
    between the two parts, and the next step depends only on values that a checkpoint contains.

    Args:
      g: gradient g_t, float or complex, of any shape.
      m, v: m_{t-1} and v_{t-1} as stored in `m_format` and `v_format`, with the shape of g.
      step: the scalars of step t.
      m_format, v_format: storage formats of m and v.
      dtype: dtype of the update.
    """
    moments = functools.partial(_moments, step=step, m_format=m_format, v_format=v_format)
    quantized = m_format.is_quantized, v_format.is_quantized
    m, v = _xla.evaluate_moments(moments, g, m, v, step.t, quantized=quantized)
    return saturating_cast(_update(g, m, v, step, m_format, v_format), dtype), m, v


def _moments(
    g: jax.Array, m: jax.Array, v: jax.Array, step: Step, m_format: MFormat, v_format: VFormat
) -> tuple[jax.Array, jax.Array]:
    """Returns m_t = b1 m_{t-1} + (1 - b1) g_t and v_t = max(b2 v_{t-1}, |g_t| + eps), as stored."""
    dtype, quantized = step.b1.dtype, m_format.is_quantized or v_format.is_quantized
    g = _gradient(g, step)
    bits = _xla.add_above_packed(step.rounding_bits, float32_bits(jnp.abs(g)))
    b2 = _xla.unpack(bits, step.b2) if v_format.has_shared_scale else step.b2

    b2_v = b2 * upcast(v_format.decode(v), dtype)
    # If m is stored as a ratio to v, this is b2 m_{t-1}, and step.b1 is b1 / b2.
    m_prev = m_format.decode(m, b2_v)
    m_t = _xla.add_products(step.b1, m_prev, step.one_minus_b1, g, step.t, exactly=quantized)
    v_t = jnp.maximum(b2_v, step.scale * (jnp.abs(g) + step.eps_in_max))

    new_v = _unless_skipped(v_format.encode(v_t), v, step)
    v_t = upcast(v_format.decode(new_v), dtype)
    new_m = _unless_skipped(m_format.encode(m_t, v_t, bits), m, step)
    return new_m, new_v


def _update(
    g: jax.Array, m: jax.Array, v: jax.Array, step: Step, m_format: MFormat, v_format: VFormat
) -> jax.Array:
    """Returns u_t = m_t / ((1 - b1^t) v_t), computed from the stored moments."""
    quantized = m_format.is_quantized or v_format.is_quantized
    v_t = upcast(v_format.decode(v), step.b1.dtype)
    bias_correction, eps = step.bias_correction, step.eps_in_denominator
    u = m_format.ratio(m, v_t, bias_correction, eps)
    if step.nesterov_b1 is not None:
        g = quotient(_gradient(g, step), v_t, bias_correction, eps)
        u = _xla.add_products(step.nesterov_b1, u, step.one_minus_b1, g, step.t, exactly=quantized)
    if step.bound is None:
        return u
    if not m_format.is_quantized:  # the clip would make the update of an infinite m finite
        u = jnp.where(jnp.isinf(u), jnp.nan, u)
    return clip_symmetric(u, step.bound)


def _gradient(g: jax.Array, step: Step) -> jax.Array:
    """Casts g to the compute dtype. A non-finite policy replaces non-finite elements by 0."""
    g = upcast(g, step.b1.dtype)
    return g if step.grads_finite is None else jnp.where(jnp.isfinite(abs_if_complex(g)), g, 0)


def _unless_skipped(new: jax.Array, old: jax.Array, step: Step) -> jax.Array:
    """Returns `new` in the stored dtype, or `old` if a non-finite policy skips the step."""
    new = saturating_cast(new, old.dtype)
    return new if step.grads_finite is None else jnp.where(step.grads_finite, new, old)
