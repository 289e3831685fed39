"""Updates and moments agree with the float64 reference, the installed optax and the paper."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from transform_runs import run

import optax_adamax
from optax_adamax import adamax, adamaxw, scale_by_adamax
from tests.oracle import reference

RULES = [
    {},
    {"eps": 0.0},
    {"eps": 1e-3},
    {"eps": 1e-3, "eps_placement": "denominator"},
    {"bias_correction": False},
    {"nesterov": True},
    {"nesterov": True, "bias_correction": False, "eps_placement": "denominator"},
    {"b1": 0.0},
    {"b2": 0.0},
    {"b2": 0.0, "eps": 0.0},
    {"b2": 1.0},
    {"b1": 0.99, "b2": 0.9},
]


def awkward_gradients(steps=50, size=64, seed=0):
    """Returns heavy-tailed gradients over twelve decades, with zeros, a zero column and a spike."""
    rng = np.random.default_rng(seed)
    g = rng.standard_t(2, (steps, size)) * 10.0 ** rng.uniform(-9, 3, size)
    g[rng.random(g.shape) < 0.2] = 0.0
    g[:, 0] = 0.0
    g[7, 1] = 1e20
    return g


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_float64_agrees_with_the_reference(rule):
    check_float64(rule, awkward_gradients(), smallest=0)


# Every third rule is fast; together these cover each line of the step.
some_rules = pytest.mark.parametrize(
    "rule",
    [pytest.param(x, marks=pytest.mark.slow if i % 3 else ()) for i, x in enumerate(RULES)],
    ids=str,
)


@some_rules
def test_complex_gradients_agree_with_the_reference(rule):
    check_float64(rule, awkward_gradients() + 1j * awkward_gradients(seed=1), smallest=1e-300)


def check_float64(rule, gradients, smallest):
    with jax.enable_x64(True):
        u, state = run(scale_by_adamax(**rule), gradients)
    expected, moments = reference.run(gradients, **rule)
    np.testing.assert_allclose(u, expected, rtol=1e-11, atol=smallest)
    np.testing.assert_allclose(state.m, moments.m, rtol=1e-12, atol=0)
    assert state.v.dtype == np.float64
    np.testing.assert_allclose(state.v, moments.v, rtol=1e-14, atol=0)
    assert int(state.count) == moments.t


@some_rules
def test_every_real_dtype_is_computed_in_float32(rule):
    dtypes = (np.float32, jnp.bfloat16, np.float16)
    gradients = {d.__name__: (awkward_gradients() % 6e4).astype(d) for d in dtypes}
    u, state = run(scale_by_adamax(**rule), gradients)
    for name, g in gradients.items():
        check_float32_arithmetic(rule, g, u[name], state.m[name], state.v[name])


def check_float32_arithmetic(rule, gradients, u, m, v):
    dtype = gradients.dtype
    assert u.dtype == dtype and m.dtype == v.dtype == np.float32
    expected, moments = reference.run(gradients.astype(np.float64), **rule)
    # m is a sum of terms with both signs, so its error is relative to the largest term.
    scale = np.abs(gradients.astype(np.float64)).max(0)
    assert np.all(np.abs(m - moments.m) <= 1e-6 * scale)
    np.testing.assert_allclose(v, moments.v, rtol=1e-5)
    limit = float(jnp.finfo(dtype).max)
    ulp = float(jnp.finfo(dtype).eps)
    m_hat_scale = np.maximum(np.abs(expected), 10 * scale / np.maximum(moments.v, 1e-30))
    error = np.abs(u.astype(np.float64) - np.clip(expected, -limit, limit))
    assert np.all(error <= ulp * np.abs(expected) + 1e-5 * m_hat_scale)


def test_float32_agrees_with_optax():
    """m and v are equal bit for bit; updates differ only by the bias correction."""
    gradients = awkward_gradients().astype(np.float32)
    u, state = run(scale_by_adamax(), gradients)
    with jax.numpy_dtype_promotion("standard"):
        optax_u, optax_state = run(optax.scale_by_adamax(), gradients)
    np.testing.assert_array_equal(state.m, optax_state.mu)
    np.testing.assert_array_equal(state.v, optax_state.nu)
    np.testing.assert_allclose(u, optax_u, rtol=8 * 2**-23, atol=0)


@pytest.mark.parametrize(
    "b1",
    [0.9, *(pytest.param(x, marks=pytest.mark.slow) for x in (0.99, 0.999, 0.9999)), 0.9999999],
)
def test_bias_correction_is_more_accurate_than_in_optax(b1):
    gradients = np.ones((200, 1), np.float32)
    expected, _ = reference.run(gradients, b1=b1)
    u, state = run(scale_by_adamax(b1), gradients)
    with jax.numpy_dtype_promotion("standard"):
        optax_u, optax_state = run(optax.scale_by_adamax(b1), gradients)
    np.testing.assert_array_equal(state.m, optax_state.mu)
    # In the first step m is exact, so the error is the error of the bias correction.
    np.testing.assert_allclose(u[0], expected[0], rtol=3 * 2**-23)
    error, optax_error = (np.abs(x - expected).max() for x in (u, optax_u))
    assert error <= optax_error
    if b1 == 0.9999999:
        assert optax_u[0, 0] == pytest.approx(0.83886, rel=1e-4)


def test_positional_arguments_have_the_order_of_optax():
    gradients = awkward_gradients().astype(np.float32)
    params = np.ones(64, np.float32)
    pairs = [
        (adamax(0.1, 0.8, 0.95, 1e-3), optax.adamax(0.1, 0.8, 0.95, 1e-3)),
        (adamaxw(0.1, 0.8, 0.95, 1e-3, 0.2), optax.adamaxw(0.1, 0.8, 0.95, 1e-3, 0.2)),
        (
            adamaxw(0.1, 0.8, 0.95, 1e-3, 0.2, lambda p: False),
            optax.adamaxw(0.1, 0.8, 0.95, 1e-3, 0.2, lambda p: False),
        ),
    ]
    for tx, optax_tx in pairs:
        with jax.numpy_dtype_promotion("standard"):
            p, q = params, params
            s, r = tx.init(p), optax_tx.init(q)
            update, optax_update = jax.jit(tx.update), jax.jit(optax_tx.update)
            for g in gradients:
                u, s = update(g, s, p)
                w, r = optax_update(g, r, q)
                p, q = p + np.asarray(u), q + np.asarray(w)
        np.testing.assert_allclose(p, q, rtol=3e-6, atol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_nonfinite_gradients_propagate_as_in_optax(bad, dtype):
    tx, optax_tx = scale_by_adamax(), optax.scale_by_adamax(eps=1e-4)
    g = np.array([bad, 1.0], dtype)
    with jax.numpy_dtype_promotion("standard"):
        u, state = jax.jit(tx.update)(g, tx.init(g))
        w, _ = jax.jit(optax_tx.update)(g, optax_tx.init(g))
    np.testing.assert_array_equal(np.isnan(u), np.isnan(w))
    np.testing.assert_array_equal(np.isfinite(state.v), [False, True])


def test_public_names_are_unique_and_documented():
    assert sorted(optax_adamax.__all__) == sorted(set(optax_adamax.__all__))
    for name in optax_adamax.__all__:
        assert getattr(optax_adamax, name).__doc__
