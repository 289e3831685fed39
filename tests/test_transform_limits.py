"""Updates are within their bound, and correct for the largest and smallest numbers."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transform_runs import eager_and_jit, every_dtype, run

from optax_adamax import scale_by_adamax
from tests.oracle.formats import step_bound


def heavy_tails():
    sizes = st.sampled_from([0.0, 1e-45, 1e-38, 1e-20, 1e-8, 1e-3, 1.0, 1e5, 1e30, 3.4e38])
    signed = st.tuples(sizes, st.floats(-1, 1, width=32)).map(lambda x: x[0] * x[1])
    return st.lists(signed, min_size=1, max_size=40)


@functools.cache
def bounded(b1, b2):
    """Returns one transformation that updates with all values and placements of eps."""
    rules = itertools.product([0.0, 1e-8], ["max", "denominator"])
    every = [scale_by_adamax(b1, b2, eps, eps_placement=placement) for eps, placement in rules]

    @jax.jit
    def update(g, states):
        updates = [tx.update(g, state) for tx, state in zip(every, states, strict=True)]
        return jnp.stack([u for u, _ in updates]), [state for _, state in updates]

    return optax.GradientTransformation(lambda g: [tx.init(g) for tx in every], update)


@given(
    heavy_tails(),
    st.sampled_from([(0.9, 0.999), (0.95, 0.999), (0.0, 0.5), (0.9, 1.0), (0.9, 0.99)]),
)
def test_updates_are_within_the_bound(gradients, betas):
    u, _ = run(bounded(*betas), np.float32(gradients)[:, None])
    u = u[..., 0].T
    t = np.arange(1, len(gradients) + 1)
    assert np.all(np.abs(u) <= step_bound(t, *betas) * (1 + 1e-6))


def test_decaying_gradients_reach_the_bound():
    t = np.arange(1, 201)
    u, _ = run(scale_by_adamax(eps=0.0), np.float32(0.999**t))
    np.testing.assert_allclose(u, step_bound(t, 0.9, 0.999), rtol=3e-6)


@every_dtype
@eager_and_jit
@pytest.mark.parametrize("eps", [0.0, pytest.param(1e-8, marks=pytest.mark.slow), 1e-40])
@pytest.mark.parametrize("placement", ["max", "denominator"])
def test_element_without_gradient_does_not_change(dtypes, jit, eps, placement):
    with jax.enable_x64("float64" in dtypes):
        tx = scale_by_adamax(eps=eps, eps_placement=placement)
        gradients = {d: np.array([0.0, 0.5], d) for d in dtypes}
        state = tx.init(gradients)
        update = jax.jit(tx.update) if jit else tx.update
        for _ in range(3):
            updates, state = update(gradients, state)
            for u in map(np.asarray, updates.values()):
                assert u[0] == 0
                assert u[1] == pytest.approx(1, rel=1e-2)


@pytest.mark.parametrize("size", [2.0**-126, 1e-38, 1e-39, 1e-45])
@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_subnormal_gradients_give_updates_within_the_bound(size, jit):
    """XLA on CPU flushes subnormals such as v (1 - b1^t) to zero, so optax returns NaN."""
    tx = scale_by_adamax(eps=0.0)
    ones = np.ones(1, np.float32)
    state = tx.init(ones)
    update = jax.jit(tx.update) if jit else tx.update
    u, state = update(np.full(1, size, np.float32), state)
    assert 0 <= np.asarray(u)[0] <= 1
    u, _ = update(ones, state)
    np.testing.assert_allclose(u, 0.1 / 0.19, rtol=1e-6)


def test_float16_updates_saturate():
    tx = scale_by_adamax(b2=0.0, eps=1e-8)
    zero, update = np.zeros(1, np.float16), jax.jit(tx.update)
    _, state = update(np.ones(1, np.float16), tx.init(zero))
    u, _ = update(zero, state)
    assert u.dtype == jnp.float16 and np.asarray(u)[0] == jnp.finfo(jnp.float16).max


@functools.cache
def default_transformation():
    tx = scale_by_adamax()
    return tx, jax.jit(tx.update)


@pytest.mark.parametrize("count", [2**24, 2**31 - 2, 2**31 - 1])
def test_count_saturates_and_updates_continue(count):
    tx, update = default_transformation()
    ones = np.ones(1, np.float32)
    state = tx.init(ones)._replace(count=np.int32(count))
    for _ in range(3):
        u, state = update(ones, state)
    assert int(state.count) == min(count + 3, 2**31 - 1)
    np.testing.assert_allclose(u, 1 - 0.9**3, rtol=1e-6)
