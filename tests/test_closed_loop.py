"""The mean of quantized m over a run agrees with float64.

Each m depends on earlier rounded values. Rounding that is unbiased for a fixed m can correlate with
these values, so it is tested in closed loop. `benchmarks/mutants/rounding.toml` has mutants that
these checks detect.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parameters import formats

from optax_adamax import decode_state, scale_by_adamax
from tests.oracle.formats import LOW_BIT, SOME_FORMATS, V_DTYPES

ROUNDED_M = [dtypes for dtypes in LOW_BIT if dtypes[0] != "float32"]
B1 = np.float32([0.9, 0.95, 0.99, 0.999])
# Runs per b1, each from another count: the mean of m converges more slowly for b1 nearer to 1.
RUNS = {"bfloat16": [2, 2, 4, 16], "int8": [16, 16, 128, 384]}

# 34 periodic gradients. Three alternate between two values for which rounding by multiples of the
# golden ratio is biased; others are random with periods 2 to 8; the last are zero except once per
# SPARSE_PERIODS steps. The largest value of each is 1, which every format of v stores exactly if
# b2 = 1.
SPARSE_PERIODS = [144, 233, 377, 610, 987]
PERIODS = np.array([2] * 3 + [2, 3, 4, 5, 6, 7, 8] * 3 + SPARSE_PERIODS * 2)
PATTERNS = np.random.default_rng(0).uniform(-1, 1, (8, len(PERIODS))).astype(np.float32)
PATTERNS[0] = np.resize([1, -1], len(PERIODS))
PATTERNS[1, :3] = [-0.25, 0.5, -0.75]
PATTERNS[1:, -2 * len(SPARSE_PERIODS) :] = 0

BURN, STEPS = 8_000, 20_160
# Rows of `B1`. The last one, b1 = 0.999, needs two thirds of all int8 runs.
ALL, SHORT, LONG = np.s_[:], np.s_[:3], np.s_[3:]


def gradient(t, xp=jnp):
    """Returns the gradients of step t = 0, 1, ..., one per pattern."""
    at = t % xp.asarray(PERIODS, dtype=xp.int32)
    value = xp.take_along_axis(xp.asarray(PATTERNS), xp.minimum(at, 7)[None], 0)[0]
    return xp.where(at < 8, value, 0)


@functools.cache
def exact_means():
    """Returns the float64 mean of m over the steps after `BURN`, a row per b1."""
    b1 = np.float64(B1)[:, None]
    m, total = 0.0, 0.0
    for t in range(BURN + STEPS):
        m = b1 * m + (1 - b1) * gradient(t, np)
        total = total + (m if t >= BURN else 0.0)
    return total / STEPS


def means(m_dtype, v_dtype, b2, rows):
    """Returns the means of the stored m and of the updates, over the same steps and over `RUNS`.

    Args:
      m_dtype: storage format of m.
      v_dtype: storage format of v.
      b2: one number per entry of `B1`.
      rows: slice that selects entries of `B1`.
    """
    runs = RUNS[m_dtype][rows]
    nothing = np.zeros(len(PERIODS), np.float32)
    start = scale_by_adamax(m_dtype=m_dtype, v_dtype=v_dtype).init(nothing)

    def run(count, b1, b2):
        tx = scale_by_adamax(b1, b2, 0.0, m_dtype=m_dtype, v_dtype=v_dtype)

        def body(carry, t):
            state, m, u = carry
            new_u, state = tx.update(gradient(t), state)
            late = (t >= BURN).astype(jnp.float32)
            return (state, m + late * decode_state(state).m, u + late * new_u), None

        carry = (start._replace(count=count), nothing, nothing)
        return jax.lax.scan(body, carry, jnp.arange(BURN + STEPS))[0][1:]

    counts = 100_000 * np.arange(1, sum(runs) + 1, dtype=np.int32)
    b1, b2 = (np.repeat(np.float32(x[rows]), runs) for x in (B1, b2))
    parts = np.cumsum(runs)[:-1]
    totals = jax.jit(jax.vmap(run))(counts, b1, b2)
    return tuple(
        np.array([np.mean(part, axis=0) for part in np.split(np.float64(x), parts)]) / STEPS
        for x in totals
    )


def rms(x):
    return np.sqrt(np.mean(np.square(x), axis=-1))


def check_mean(m_dtype, v_dtype, b2, rows=ALL):
    """Checks for each b1 that the means of m agree with float64 within 0.5 % rms."""
    m, u = means(m_dtype, v_dtype, b2, rows)
    sparse = -2 * len(SPARSE_PERIODS)
    for columns in (np.s_[:, :sparse], np.s_[:, sparse:]):
        exact = exact_means()[rows][columns]
        assert np.all(rms(m[columns] - exact) <= 0.005 * rms(exact))
        if np.all(b2 == 1):  # then v is 1, and u is m
            assert np.all(rms(u[columns] - exact) <= 0.005 * rms(exact))


DECAYING_B2 = np.array([0.999, 0.999, 0.999, 0.9999])


@pytest.mark.parametrize("m_dtype, v_dtype", formats(ROUNDED_M, SOME_FORMATS))
def test_mean_of_m_agrees_with_float64(m_dtype, v_dtype):
    check_mean(m_dtype, v_dtype, DECAYING_B2, SHORT if m_dtype == "int8" else ALL)


@pytest.mark.slow
@pytest.mark.parametrize("v_dtype", V_DTYPES)
def test_mean_of_int8_m_agrees_with_float64_at_b1_0_999(v_dtype):
    check_mean("int8", v_dtype, DECAYING_B2, LONG)


@pytest.mark.parametrize(
    "m_dtype, v_dtype", formats([("bfloat16", "uint8"), ("int8", "uint8")], [("bfloat16", "uint8")])
)
def test_mean_update_agrees_with_float64_at_b2_1(m_dtype, v_dtype):
    check_mean(m_dtype, v_dtype, np.ones(len(B1)))


def check_constant_gradients(m_dtype, v_dtype):
    """Checks that updates of a constant gradient have mean 1 if v is exact."""
    b2 = 0.999999 if v_dtype == "float32" else 1.0  # quantized v is exactly 1
    txs = [scale_by_adamax(float(b1), b2, 0.0, m_dtype=m_dtype, v_dtype=v_dtype) for b1 in B1]

    def body(states, _):
        new = [tx.update(jnp.ones(()), state) for tx, state in zip(txs, states, strict=True)]
        return [state for _, state in new], jnp.stack([u for u, _ in new])

    start = [tx.init(jnp.zeros(())) for tx in txs]
    u = jax.jit(lambda: jax.lax.scan(body, start, length=20_000)[1])()
    np.testing.assert_allclose(np.mean(np.float64(u[-10_000:]), axis=0), 1, atol=5e-4)


@pytest.mark.parametrize("m_dtype, v_dtype", formats(ROUNDED_M, SOME_FORMATS))
def test_constant_gradient_gives_mean_update_1(m_dtype, v_dtype):
    check_constant_gradients(m_dtype, v_dtype)


def mean_direction(m_dtype, v_dtype, b1, b2):
    """Returns the mean update of constant gradients over two periods of the shared scale of v."""
    g = jnp.asarray(np.exp(np.random.default_rng(3).uniform(-3, 3, 256)), jnp.float32)
    tx = scale_by_adamax(b1, b2, m_dtype=m_dtype, v_dtype=v_dtype)

    def body(state, _):
        u, state = tx.update(g, state)
        return state, jnp.mean(u)

    u = jax.lax.scan(body, tx.init(g), length=2800)[1]
    return jnp.mean(u[-1386:])


@pytest.mark.parametrize(
    "m_dtype, v_dtype, short, mean",
    [
        ("bfloat16", "bfloat16", 0, 1),
        pytest.param("bfloat16", "uint8", 0.0182, 1.0056, marks=pytest.mark.slow),
        ("int8", "uint8", 0.0182, 1.0056),
    ],
)
def test_clip_shortens_updates_of_constant_gradients_as_documented(m_dtype, v_dtype, short, mean):
    """Exact updates are at the bound C_t, so the clip removes positive errors only.

    Without the clip (traced b1 and b2), the mean update is the mean ratio of v to its nearest code.
    """
    clipped = jax.jit(lambda: mean_direction(m_dtype, v_dtype, 0.9, 0.999))()
    free = jax.jit(functools.partial(mean_direction, m_dtype, v_dtype))(
        np.float32(0.9), np.float32(0.999)
    )
    assert 1 - short - 1e-3 <= clipped <= 1 + 1e-3
    np.testing.assert_allclose(free, mean, atol=0.002)


def check_updates_vanish(m_dtype, v_dtype):
    """Checks that updates vanish 20,000 steps after the last gradient, even at b1 = 0.998."""
    tx = scale_by_adamax(0.998, 0.999, 0.0, m_dtype=m_dtype, v_dtype=v_dtype)
    noise = jnp.asarray(np.random.default_rng(1).normal(size=(100, 64)), jnp.float32)

    def body(state, t):
        u, state = tx.update(jnp.where(t < 100, noise[jnp.minimum(t, 99)], 0), state)
        return state, jnp.max(jnp.abs(u))

    u = jax.jit(lambda: jax.lax.scan(body, tx.init(noise[0]), jnp.arange(20_100))[1])()
    assert u[99] > 0.1
    # bfloat16 m decays towards 0 without reaching it; int8 m reaches 0 from its smallest code.
    assert u[-1] == 0 if m_dtype == "int8" else u[-1] < 1e-10


@pytest.mark.parametrize("m_dtype, v_dtype", formats(ROUNDED_M, SOME_FORMATS))
def test_updates_vanish_after_the_last_gradient(m_dtype, v_dtype):
    check_updates_vanish(m_dtype, v_dtype)


def check_jitter(m_dtype, grad_dtype, limit):
    """Checks that the length of a layer's update, relative to float32, deviates by <= `limit`."""
    rng = np.random.default_rng(2)
    size = 10.0 ** rng.uniform(-3, 0, 4096)
    g = size * (rng.normal(size=4096) + rng.normal(size=(400, 4096)))
    gradients = jnp.asarray(g, grad_dtype)
    low, high = (scale_by_adamax(m_dtype=dtype) for dtype in (m_dtype, None))

    def body(states, g):
        u, low_state = low.update(g, states[0], jnp.zeros(4096))
        exact, high_state = high.update(g, states[1], jnp.zeros(4096))
        return (low_state, high_state), jnp.vdot(u, exact) / jnp.vdot(exact, exact)

    start = low.init(jnp.zeros(4096)), high.init(jnp.zeros(4096))
    lengths = jax.jit(lambda: jax.lax.scan(body, start, gradients)[1])()[100:]
    assert np.std(lengths) <= limit, np.std(lengths)


# For int8 m, independent rounding bits per element would give 0.2 %, shared bits give 4.8 %.
@pytest.mark.parametrize("m_dtype, limit", [("int8", 0.01), ("bfloat16", 6e-4)])
@pytest.mark.parametrize("grad_dtype", ["float32", "bfloat16"])
def test_update_length_of_a_layer_varies_little(m_dtype, grad_dtype, limit):
    check_jitter(m_dtype, grad_dtype, limit)
