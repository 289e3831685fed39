"""The update against the float64 oracle, against the installed optax, and against the paper."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from parameters import formats

import optax_adamax
from optax_adamax import adamax, adamaxw, scale_by_adamax
from tests.oracle import reference
from tests.oracle.formats import step_bound

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
    """Heavy tails over twelve decades, with exact zeros, a dead element and a spike."""
    rng = np.random.default_rng(seed)
    g = rng.standard_t(2, (steps, size)) * 10.0 ** rng.uniform(-9, 3, size)
    g[rng.random(g.shape) < 0.2] = 0.0
    g[:, 0] = 0.0
    g[7, 1] = 1e20
    return g


def run(tx, gradients):
    """Directions and last state of a compiled run on a tree of gradients, a row a step."""
    steps = [
        jax.tree.map(lambda g, t=t: g[t], gradients)
        for t in range(len(jax.tree.leaves(gradients)[0]))
    ]
    state, update, directions = tx.init(steps[0]), jax.jit(tx.update), []
    for g in steps:
        u, state = update(g, state)
        directions.append(u)
    return jax.tree.map(lambda *u: np.stack(u), *directions), jax.device_get(state)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_float64_is_the_oracle(rule):
    check_float64(rule, awkward_gradients(), smallest=0)


# In real float64 every rule is in every run, and below one for each line of the step.
some_rules = pytest.mark.parametrize(
    "rule",
    [pytest.param(x, marks=pytest.mark.slow if i % 3 else ()) for i, x in enumerate(RULES)],
    ids=str,
)


@some_rules
def test_complex_v_is_the_modulus(rule):
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
def test_float32_arithmetic_for_every_real_dtype(rule):
    dtypes = (np.float32, jnp.bfloat16, np.float16)
    gradients = {d.__name__: (awkward_gradients() % 6e4).astype(d) for d in dtypes}
    u, state = run(scale_by_adamax(**rule), gradients)
    for name, g in gradients.items():
        check_float32_arithmetic(rule, g, u[name], state.m[name], state.v[name])


def check_float32_arithmetic(rule, gradients, u, m, v):
    dtype = gradients.dtype
    assert u.dtype == dtype and m.dtype == v.dtype == np.float32
    expected, moments = reference.run(gradients.astype(np.float64), **rule)
    # m is a sum of terms of either sign: its error is measured in the largest of them.
    scale = np.abs(gradients.astype(np.float64)).max(0)
    assert np.all(np.abs(m - moments.m) <= 1e-6 * scale)
    np.testing.assert_allclose(v, moments.v, rtol=1e-5)
    limit = float(jnp.finfo(dtype).max)
    ulp = float(jnp.finfo(dtype).eps)
    m_hat_scale = np.maximum(np.abs(expected), 10 * scale / np.maximum(moments.v, 1e-30))
    error = np.abs(u.astype(np.float64) - np.clip(expected, -limit, limit))
    assert np.all(error <= ulp * np.abs(expected) + 1e-5 * m_hat_scale)


def test_optax_trajectory_in_float32():
    """m and v are optax's bit for bit; the steps differ by the bias correction alone."""
    gradients = awkward_gradients().astype(np.float32)
    ours, state = run(scale_by_adamax(), gradients)
    with jax.numpy_dtype_promotion("standard"):
        theirs, optax_state = run(optax.scale_by_adamax(), gradients)
    np.testing.assert_array_equal(state.m, optax_state.mu)
    np.testing.assert_array_equal(state.v, optax_state.nu)
    np.testing.assert_allclose(ours, theirs, rtol=8 * 2**-23, atol=0)


@pytest.mark.parametrize(
    "b1",
    [0.9, *(pytest.param(x, marks=pytest.mark.slow) for x in (0.99, 0.999, 0.9999)), 0.9999999],
)
def test_bias_correction_is_nearer_to_the_oracle_than_optax(b1):
    gradients = np.ones((200, 1), np.float32)
    expected, _ = reference.run(gradients, b1=b1)
    ours, state = run(scale_by_adamax(b1), gradients)
    with jax.numpy_dtype_promotion("standard"):
        theirs, optax_state = run(optax.scale_by_adamax(b1), gradients)
    np.testing.assert_array_equal(state.m, optax_state.mu)
    # In the first step m is exact, so that nothing but the correction is seen.
    np.testing.assert_allclose(ours[0], expected[0], rtol=3 * 2**-23)
    our_error, their_error = (np.abs(x - expected).max() for x in (ours, theirs))
    assert our_error <= their_error
    if b1 == 0.9999999:
        assert theirs[0, 0] == pytest.approx(0.83886, rel=1e-4)


def test_positional_arguments_are_those_of_optax():
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
    for ours, theirs in pairs:
        with jax.numpy_dtype_promotion("standard"):
            p, q = params, params
            s, r = ours.init(p), theirs.init(q)
            update, their_update = jax.jit(ours.update), jax.jit(theirs.update)
            for g in gradients:
                u, s = update(g, s, p)
                w, r = their_update(g, r, q)
                p, q = p + np.asarray(u), q + np.asarray(w)
        np.testing.assert_allclose(p, q, rtol=3e-6, atol=1e-6)


def heavy_tails():
    sizes = st.sampled_from([0.0, 1e-45, 1e-38, 1e-20, 1e-8, 1e-3, 1.0, 1e5, 1e30, 3.4e38])
    signed = st.tuples(sizes, st.floats(-1, 1, width=32)).map(lambda x: x[0] * x[1])
    return st.lists(signed, min_size=1, max_size=40)


@functools.cache
def bounded(b1, b2):
    """Every eps and placement of it beside each other, in one program."""
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
def test_step_bound(gradients, betas):
    u, _ = run(bounded(*betas), np.float32(gradients)[:, None])
    u = u[..., 0].T
    t = np.arange(1, len(gradients) + 1)
    assert np.all(np.abs(u) <= step_bound(t, *betas) * (1 + 1e-6))


def test_step_bound_is_reached():
    t = np.arange(1, 201)
    u, _ = run(scale_by_adamax(eps=0.0), np.float32(0.999**t))
    np.testing.assert_allclose(u, step_bound(t, 0.9, 0.999), rtol=3e-6)


# float64 is there only where it is enabled, and with it other dtypes of constants.
every_dtype = pytest.mark.parametrize(
    "dtypes", [("float32", "bfloat16", "float16", "complex64"), ("float64",)], ids=["x32", "x64"]
)
eager_and_jit = pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])


@every_dtype
@eager_and_jit
def test_v_decays_in_every_dtype(dtypes, jit):
    """One gradient of 1, then 2,000 of 1e-6: v must be 0.999**2000 = 0.135."""
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


@every_dtype
@eager_and_jit
@pytest.mark.parametrize("eps", [0.0, pytest.param(1e-8, marks=pytest.mark.slow), 1e-40])
@pytest.mark.parametrize("placement", ["max", "denominator"])
def test_unseen_element_does_not_move(dtypes, jit, eps, placement):
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
def test_subnormal_gradients_move_by_no_more_than_the_bound(size, jit):
    """XLA flushes subnormals to zero on CPU, v (1 - b1^t) among them: optax answers NaN here."""
    tx = scale_by_adamax(eps=0.0)
    ones = np.ones(1, np.float32)
    state = tx.init(ones)
    update = jax.jit(tx.update) if jit else tx.update
    u, state = update(np.full(1, size, np.float32), state)
    assert 0 <= np.asarray(u)[0] <= 1
    u, _ = update(ones, state)
    np.testing.assert_allclose(u, 0.1 / 0.19, rtol=1e-6)


def test_float16_steps_beyond_its_range_are_limited():
    tx = scale_by_adamax(b2=0.0, eps=1e-8)
    zero, update = np.zeros(1, np.float16), jax.jit(tx.update)
    _, state = update(np.ones(1, np.float16), tx.init(zero))
    u, _ = update(zero, state)
    assert u.dtype == jnp.float16 and np.asarray(u)[0] == jnp.finfo(jnp.float16).max


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_bad_gradients_propagate_as_in_optax(bad, dtype):
    tx, peer = scale_by_adamax(), optax.scale_by_adamax(eps=1e-4)
    g = np.array([bad, 1.0], dtype)
    with jax.numpy_dtype_promotion("standard"):
        u, state = jax.jit(tx.update)(g, tx.init(g))
        w, _ = jax.jit(peer.update)(g, peer.init(g))
    np.testing.assert_array_equal(np.isnan(u), np.isnan(w))
    np.testing.assert_array_equal(np.isfinite(state.v), [False, True])


def test_state_dtypes_are_fixed_by_init():
    """optax's moments become float32 when float32 gradients meet bfloat16 parameters."""
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
def test_moment_dtypes(m_dtype, v_dtype):
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


@functools.cache
def default():
    tx = scale_by_adamax()
    return tx, jax.jit(tx.update)


@pytest.mark.parametrize("count", [2**24, 2**31 - 2, 2**31 - 1])
def test_count_stops_and_steps_go_on(count):
    tx, update = default()
    ones = np.ones(1, np.float32)
    state = tx.init(ones)._replace(count=np.int32(count))
    for _ in range(3):
        u, state = update(ones, state)
    assert int(state.count) == min(count + 3, 2**31 - 1)
    np.testing.assert_allclose(u, 1 - 0.9**3, rtol=1e-6)


def test_float64_gradients_of_float32_parameters():
    with jax.enable_x64(True):
        tx = scale_by_adamax()
        state = tx.init(np.zeros(1, np.float32))
        u, state = jax.jit(tx.update)(np.full(1, 0.1), state)
        assert u.dtype == jnp.float64 and state.m.dtype == jnp.float32
        # The step is taken from the moments as they are stored.
        expected = (np.float64(state.m) / 0.1) / np.float64(state.v)
        np.testing.assert_allclose(u, expected, rtol=1e-14)
        np.testing.assert_allclose(u, 0.1 / (0.1 + 1e-8), rtol=1e-7)


def test_public_names():
    assert sorted(optax_adamax.__all__) == sorted(set(optax_adamax.__all__))
    for name in optax_adamax.__all__:
        assert getattr(optax_adamax, name).__doc__
