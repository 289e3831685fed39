"""Updates agree with float64 over a million steps, and for extreme counts and hyperparameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_adamax import decode_state, scale_by_adamax
from tests.oracle import reference, scenarios
from tests.oracle.formats import SOME_FORMATS, V_DTYPES, v_error

# float32 v is multiplied by b2 in every step, and each product is rounded.
V_ERROR = {dtype: v_error(dtype, scale_error=0) for dtype in V_DTYPES} | {"float32": 3e-4}
M_ERROR = {"float32": 1e-6, "bfloat16": 4e-3, "int8": 0.02}


def check_long_run(formats, steps):
    for row in scenarios.long_run(formats, steps):
        assert row["steps"] == steps
        assert row["v_error"] <= V_ERROR[row["v_dtype"]], row
        assert row["m_error"] <= M_ERROR[row["m_dtype"]], row


def test_moments_agree_with_float64_after_20_000_steps():
    check_long_run(SOME_FORMATS, 20_000)


@pytest.mark.slow
def test_moments_agree_with_float64_after_a_million_steps():
    check_long_run(SOME_FORMATS, 1_000_000)


@pytest.mark.parametrize(
    "m_dtype, v_dtype, nonfinite",
    [
        *((*dtypes, "propagate") for dtypes in SOME_FORMATS),
        *((*SOME_FORMATS[-1], policy) for policy in ("zero", "skip_step")),
        *(
            pytest.param(*dtypes, policy, marks=pytest.mark.slow)
            for dtypes in SOME_FORMATS[:-1]
            for policy in ("zero", "skip_step")
        ),
    ],
)
def test_count_saturates_and_updates_stay_correct(m_dtype, v_dtype, nonfinite):
    tx = scale_by_adamax(m_dtype=m_dtype, v_dtype=v_dtype, nonfinite=nonfinite)
    update, state = jax.jit(tx.update), tx.init(jnp.zeros(4))
    state = jax.tree.map(lambda x: x, state)
    core = state if nonfinite == "propagate" else state.inner_state
    core = core._replace(count=jnp.int32(2**31 - 3))
    state = core if nonfinite == "propagate" else state._replace(inner_state=core)
    moments = reference.start((4,))._replace(t=2**31 - 3)
    for step in range(60):
        g = np.float32([1, -1, 0.5, 2.0 ** (-step % 7)])
        u, state = update(g, state)
        expected, moments = reference.step(g, moments)
    core = state if nonfinite == "propagate" else state.inner_state
    assert int(core.count) == 2**31 - 1
    if m_dtype == "int8":  # rounding depends on the count, which is constant now
        assert np.all(np.abs(u) <= 1.01) and np.all(np.sign(u) == np.sign(expected))
    else:
        np.testing.assert_allclose(u, expected, atol=1e-5 if m_dtype == "float32" else 0.03)


ENDS = [
    {"b1": 0.0},
    {"b1": 1 - 1e-6},
    {"b1": 1 - 1e-7},
    {"b1": 0.0, "b2": 0.0},
    {"b2": 0.0},
    {"b2": 1.0},
    {"b1": 0.9, "b2": 1.0, "eps": 0.0},
    {"b1": 0.0, "b2": 0.0, "eps": 0.0},
]


@pytest.mark.parametrize("rule", ENDS, ids=str)
@pytest.mark.parametrize(
    "v_dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow), "uint8"]
)
def test_extreme_hyperparameters_agree_with_float64(rule, v_dtype):
    """The first step is included: there, 1 - b1^t would cancel for b1 near 1."""
    rng = np.random.default_rng(0)
    gradients = (rng.standard_t(3, (300, 16)) * 10.0 ** rng.uniform(-3, 1, 16)).astype(np.float32)
    gradients[rng.random(gradients.shape) < 0.2] = 0
    tx = scale_by_adamax(**rule, v_dtype=v_dtype)

    @jax.jit
    def run(gradients):
        def body(state, g):
            u, state = tx.update(g, state)
            return state, (u, decode_state(state).v)

        return jax.lax.scan(body, tx.init(gradients[0]), gradients)[1]

    u, v = (np.asarray(x, np.float64) for x in run(gradients))
    expected, _ = reference.run(gradients, **rule)
    decay = rule.get("b2", 0.999)
    exact_v = np.zeros(gradients.shape)
    last = np.zeros(16)
    for t, size in enumerate(np.abs(np.float64(gradients)) + rule.get("eps", 1e-8)):
        exact_v[t] = last = np.maximum(decay * last, size)
    in_range = exact_v > 1e-8 if v_dtype == "uint8" else exact_v > 1e-30
    error = v_error(v_dtype, scale_error=0) or 3e-5
    assert np.all(np.abs(v / np.maximum(exact_v, 1e-300) - 1)[in_range] <= error)
    compared = in_range & (np.abs(expected) > 0)
    # The last term is the rounding error of m after cancellation, divided by a small v.
    rounding = 3e-7 * np.abs(gradients).max(axis=0) / np.maximum(exact_v, 1e-300)
    limit = 2.5 * error * np.abs(expected) + 1e-5 + rounding
    assert np.all(np.abs(u - expected)[compared] <= limit[compared])
    assert np.all(np.isfinite(u))
