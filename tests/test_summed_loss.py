"""For a loss summed over 20,000 examples, quantized state trains like float32 state."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_adamax import adamax, describe_state
from optax_adamax._v_formats import V_FORMATS

STEPS = 400


@functools.cache
def data():
    """Returns 20,000 counts of a Poisson regression with a large intercept."""
    rng = np.random.default_rng(0)
    x = np.concatenate([np.ones((20_000, 1)), rng.normal(size=(20_000, 7))], axis=1)
    weights = np.array([6.0, 0.5, -0.4, 0.3, 0.2, -0.2, 0.1, 0.0])
    return jnp.asarray(x, jnp.float32), jnp.asarray(rng.poisson(np.exp(x @ weights)), jnp.float32)


def loss(weights):
    """Returns the summed negative log-likelihood of all counts, without its constant term."""
    x, y = data()
    log_rate = jnp.dot(x, weights, precision="highest")
    return jnp.sum(jnp.exp(log_rate) - y * log_rate)


@functools.cache
def train(m_dtype, v_dtype):
    tx = adamax(0.05, m_dtype=m_dtype, v_dtype=v_dtype)

    def body(carry, _):
        weights, state = carry
        gradient = jax.grad(loss)(weights)
        updates, state = tx.update(gradient, state)
        return (weights + updates, state), jnp.max(jnp.abs(gradient))

    start = jnp.zeros(8), tx.init(jnp.zeros(8))
    (weights, state), largest = jax.jit(lambda: jax.lax.scan(body, start, length=STEPS))()
    return float(loss(weights)), float(largest.max()), state


@pytest.mark.parametrize("m_dtype, v_dtype", [("bfloat16", "bfloat16"), ("int8", "uint8")])
def test_summed_loss_ends_as_with_float32_state(m_dtype, v_dtype):
    start = float(loss(jnp.zeros(8)))
    expected, _, _ = train("float32", "float32")
    found, largest_gradient, state = train(m_dtype, v_dtype)
    assert 5e6 < largest_gradient < V_FORMATS[v_dtype].range[1]
    assert describe_state(state).fits
    assert abs(found - expected) < 1e-3 * abs(start - expected)
