"""Many small updates of compensated parameters accumulate without drift."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compensated import adding, neighbours, residuals, stepper, take, to_float64

from optax_adamax import adamax, compensate_rounding, master_params


@residuals
@pytest.mark.parametrize("sign", [-1, 1])
def test_thousand_updates_of_a_thousandth_ulp_are_one_ulp(residual_dtype, sign):
    tx = adding(residual_dtype)
    params = jnp.asarray([1.0, 1.5, -1.0, -1.5, 100.0, 2.0**-10, 1e-3], jnp.bfloat16)
    below, above = neighbours(to_float64(params))
    target = above if sign > 0 else below
    update = jnp.asarray((target - to_float64(params)) / 1000, jnp.float32)

    @jax.jit
    def run(params, state):
        step = lambda carry, _: (take(tx, *carry, update), None)  # noqa: E731
        return jax.lax.scan(step, (params, state), length=1000)[0]

    new, state = run(params, tx.init(params))
    left = np.abs(to_float64(master_params(state, new)) - target) / np.abs(target)
    # int16: a thousand float32 additions. int8: a thousand stochastic roundings of a quarter unit.
    allowed = 1000 * 2.0**-24 if residual_dtype == "int16" else 4 * 16 * 2.0**-15
    assert (left <= allowed).all()


def at(count, path, leaf):
    """Returns `count` for a step count of the wrapper or of Adamax, and the leaf for all others."""
    return count if jax.tree_util.keystr(path).endswith(".count") else leaf


@functools.cache
def drifter(tx, start, steps):
    @jax.jit
    @functools.partial(jax.vmap, in_axes=(0, None, None))
    def run(count, gradients, period):
        params = jnp.full(gradients.shape[1], start, jnp.bfloat16)

        def step(carry, t):
            return take(tx, *carry, gradients[t % period]), None

        state = jax.tree_util.tree_map_with_path(functools.partial(at, count), tx.init(params))
        end, state = jax.lax.scan(step, (params, state), jnp.arange(steps))[0]
        return master_params(state, end) - params.astype(jnp.float32)

    return run


def drifts(tx, start, gradients, steps, streams=1):
    """Returns by how much the master parameters change, for each column of periodic gradients.

    A stream is a run that starts at another count and therefore has other rounding bits.
    """
    period = len(gradients)
    gradients = np.pad(gradients, ((0, 144 - period), (0, 0)))
    counts = np.arange(streams, dtype=np.int32) * 1_000_000
    return to_float64(drifter(tx, start, steps)(counts, gradients, period))


OPTIMIZERS = {
    residual_dtype: compensate_rounding(
        adamax(2.0**-14, m_dtype="int8", v_dtype="uint8"), residual_dtype
    )
    for residual_dtype in ("int8", "int16")
}


def patterns(period, rng):
    """Returns gradients with this period and nonzero mean, one pattern per column."""
    columns = rng.normal(size=(period, 16)) + 0.7
    return columns.astype(np.float32)


@pytest.mark.parametrize("period", [1, 2, 3, 4, 5, 6, 7, 8, 13, 144])
def test_periodic_updates_are_unbiased(period):
    """The rounding bits of m are another hash of the count. With the same hash, the bias is 4 %."""
    gradients = patterns(period, np.random.default_rng(period))
    # int16 residuals hold the exact sum of the same updates.
    found, exact = (drifts(OPTIMIZERS[x], 3.5, gradients, 5000, 64) for x in ("int8", "int16"))
    scale = np.sqrt(np.mean(exact**2))
    assert np.sqrt(np.mean(np.mean(found - exact, axis=0) ** 2)) <= 0.005 * scale


@pytest.mark.parametrize("period", [8, 144])
def test_rare_periodic_updates_are_unbiased(period):
    """Rounding by multiples of the golden ratio is biased by updates of a Fibonacci period."""
    int8, int16 = adding("int8"), adding("int16")
    rng = np.random.default_rng(period)
    updates = np.float32(2.0**-17 * (rng.random((period, 16)) < 0.3))
    exact, found = (drifts(tx, 3.0, updates, 5000) for tx in (int16, int8))
    # About 1,500 roundings of 1/8 unit have a deviation of 7 % of their sum.
    assert np.sqrt(np.mean((found - exact) ** 2)) <= 0.2 * np.sqrt(np.mean(exact**2))


def test_elements_have_different_rounding_bits():
    """If all elements of a layer rounded up in the same step, its mean would jitter."""
    updates = np.float32(2.0**-18 * np.linspace(1, 1.9, 4096))
    params = np.ones(4096, jnp.bfloat16)
    _, state = stepper(adding("int8"))(params, adding("int8").init(params), updates)
    up = to_float64(state.residual.int8)
    assert set(np.unique(up)) <= {0, 1}
    assert 1 / 8 < np.mean(up) < 1.9 / 8


def test_hundred_thousand_small_steps_are_unbiased():
    steps, ones = 100_000, np.ones((1, 1), np.float32)

    @jax.jit
    def plain(p):
        tx = adamax(1e-3)
        step = lambda carry, _: (take(tx, *carry, jnp.float32(1)), None)  # noqa: E731
        return jax.lax.scan(step, (p, tx.init(p)), length=steps)[0][0]

    assert plain(jnp.zeros((), jnp.bfloat16)) == -0.5
    float32 = float(plain(jnp.zeros(())))
    np.testing.assert_array_equal(
        drifts(compensate_rounding(adamax(1e-3), "int16"), 0.0, ones, steps), float32
    )
    for inner in (adamax(1e-3), adamax(1e-3, m_dtype="int8", v_dtype="uint8")):
        exact = drifts(compensate_rounding(inner, "int16"), 0.0, ones, steps)
        found = drifts(compensate_rounding(inner), 0.0, ones, steps, streams=32)
        # The deviation of one run is 0.18 %: each step rounds half a unit stochastically.
        assert np.abs(found - exact).max() <= 0.01 * np.abs(exact)
        assert np.mean(found) == pytest.approx(exact, rel=1.5e-3)
