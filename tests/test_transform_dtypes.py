"""v decays in every dtype, and the dtypes of moments and updates follow fixed rules."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parameters import formats
from transform_runs import eager_and_jit, every_dtype

from optax_adamax import scale_by_adamax
from tests.oracle import reference


@every_dtype
@eager_and_jit
def test_v_decays_in_every_dtype(dtypes, jit):
    """After one gradient of 1 and 2,000 gradients of 1e-6, v is 0.999**2000 = 0.135."""
    with jax.enable_x64("float64" in dtypes):
        tx = scale_by_adamax()
        steps = 2000 if jit else 20
        ones, small = ({d: np.full(1, x, d) for d in dtypes} for x in (1, 1e-6))

        def body(state, _):
            return tx.update(small, state)[1], None

        def simulate(state):
            _, state = tx.update(ones, state)
            return jax.lax.scan(body, state, length=steps)[0]

        state = jax.jit(simulate)(tx.init(ones)) if jit else tx.init(ones)
        if not jit:
            _, state = tx.update(ones, state)
            for _ in range(steps):
                state, _ = body(state, None)
    for v in state.v.values():
        np.testing.assert_allclose(v, 0.999**steps, rtol=2e-4)


def test_state_dtypes_are_fixed_by_init():
    """In optax, moments become float32 if float32 gradients are passed for bfloat16 parameters."""
    tx = scale_by_adamax()
    state = tx.init(np.zeros(3, jnp.bfloat16))

    def body(state, g):
        u, state = tx.update(g, state)
        return state, u

    state, u = jax.lax.scan(body, state, np.ones((4, 3), jnp.float32))
    assert state.m.dtype == state.v.dtype == u.dtype == jnp.float32
    state, u = jax.lax.scan(body, state, np.ones((4, 3), jnp.bfloat16))
    assert state.m.dtype == state.v.dtype == jnp.float32 and u.dtype == jnp.bfloat16


@pytest.mark.parametrize(
    "m_dtype, v_dtype",
    formats(
        itertools.product([None, "float32", "float64"], repeat=2),
        [(None, None), ("float32", "float64"), ("float64", "float32")],
    ),
)
def test_moments_have_the_requested_or_the_default_dtype(m_dtype, v_dtype):
    dtypes = ("bfloat16", "float32", "float64", "complex64", "complex128")
    with jax.enable_x64(True):
        tx = scale_by_adamax(m_dtype=m_dtype, v_dtype=v_dtype)
        gradients = {dtype: np.full(3, 0.5, dtype) for dtype in dtypes}
        state, update = tx.init(gradients), jax.jit(tx.update)
        for _ in range(3):
            updates, state = update(gradients, state)
            for dtype, u in updates.items():
                default = "float64" if dtype in ("float64", "complex128") else "float32"
                real = m_dtype or default
                m = np.result_type(real, np.complex64) if "complex" in dtype else np.dtype(real)
                assert state.m[dtype].dtype == m
                assert state.v[dtype].dtype == (v_dtype or default)
                assert u.dtype == dtype
                np.testing.assert_allclose(np.asarray(u).real.astype(float), 1, rtol=2**-7)


def test_float64_gradients_of_float32_parameters_give_float64_updates():
    with jax.enable_x64(True):
        tx = scale_by_adamax()
        state = tx.init(np.zeros(1, np.float32))
        u, state = jax.jit(tx.update)(np.full(1, 0.1), state)
        assert u.dtype == jnp.float64 and state.m.dtype == jnp.float32
        # The update is computed from the stored moments.
        expected = (np.float64(state.m) / 0.1) / np.float64(state.v)
        np.testing.assert_allclose(u, expected, rtol=1e-14)
        np.testing.assert_allclose(u, 0.1 / (0.1 + 1e-8), rtol=1e-7)


@pytest.mark.parametrize("rule", [{}, {"eps_placement": "denominator", "nesterov": True}], ids=str)
def test_float64_moments_are_computed_in_float64_for_float32_gradients(rule):
    gradients = np.float32(np.random.default_rng(0).normal(size=(5, 7)))
    expected, last = reference.run(gradients, b1=0.7, b2=0.8, **rule)
    with jax.enable_x64(True):
        tx = scale_by_adamax(0.7, 0.8, m_dtype="float64", v_dtype="float64", **rule)
        state, update = tx.init(gradients[0]), jax.jit(tx.update)
        for g in gradients:
            u, state = update(g, state)
        np.testing.assert_allclose(state.m, last.m, rtol=1e-14)
        np.testing.assert_allclose(state.v, last.v, rtol=1e-14)
        np.testing.assert_allclose(u, expected[-1], rtol=1e-6)
