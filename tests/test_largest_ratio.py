"""int8 m stores the largest ratio of m to v, and decay rates with larger ratios are rejected."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_adamax import scale_by_adamax
from tests.oracle import reference
from tests.oracle.formats import step_bound


@pytest.mark.parametrize("b2", [0.92, 0.95, 0.99])
def test_int8_stores_the_largest_ratios(b2):
    """|m| / v is up to 4.6 at b2 = 0.92. Clipping at the bound makes the mean slightly smaller."""
    sizes = np.geomspace(0.1, 10, 32)
    gradients = np.float32(b2 ** np.arange(180.0)[:, None] * sizes)
    tx = scale_by_adamax(0.9, b2, 0.0, m_dtype="int8", v_dtype="uint8")
    start = tx.init(jnp.zeros(32))
    step = jax.jit(lambda: jax.lax.scan(lambda s, g: tx.update(g, s)[::-1], start, gradients))
    _, u = step()
    expected, _ = reference.run(gradients, b2=b2, eps=0.0)
    np.testing.assert_allclose(np.mean(u[100:]), np.mean(expected[100:]), rtol=0.04)
    bound = step_bound(np.arange(1, 181)[:, None], 0.9, b2)
    assert np.all(np.abs(u) <= bound * (1 + 1e-5))


@pytest.mark.parametrize("b2", [0.9, 0.91, 0.5])
def test_int8_rejects_decay_rates_beyond_its_ratio(b2):
    with pytest.raises(ValueError, match="requires b1 < b2"):
        scale_by_adamax(0.9, b2, m_dtype="int8")


@pytest.mark.parametrize("b2", [0.9, 0.5])
def test_updates_without_a_bound_are_not_clipped(b2):
    gradients = np.float32([[1.0, -3.0], *[[0.1, 0.1]] * 5])
    tx = scale_by_adamax(0.9, b2, m_dtype="bfloat16", v_dtype="bfloat16")
    start = tx.init(gradients[0])
    step = jax.jit(lambda: jax.lax.scan(lambda s, g: tx.update(g, s)[::-1], start, gradients))
    expected, _ = reference.run(gradients, b2=b2)
    np.testing.assert_allclose(step()[1], expected, rtol=0.03)
