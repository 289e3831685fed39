"""compensate_rounding against float64: no value, update or order of them may lose what it says."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from optax_adamax import (
    adamax,
    compensate_rounding,
    master_params,
    split_master_params,
)

DTYPES = [jnp.bfloat16, jnp.float16]
RESIDUALS = [jnp.int8, jnp.int16]
formats = pytest.mark.parametrize("dtype", DTYPES)
residuals = pytest.mark.parametrize("residual_dtype", RESIDUALS)

# Below it XLA on CPU flushes updates of float32 to zero; float16 has no number there.
FLUSHED = {jnp.bfloat16: 2.0**-118, jnp.float16: 0.0}


def unit(dtype, residual_dtype):
    """The largest relative error of one step."""
    if residual_dtype == jnp.int8:
        return {jnp.bfloat16: 2.0**-15, jnp.float16: 2.0**-18}[dtype]
    return 2.0**-24


def smallest(dtype):
    """An absolute error that is always allowed: half the last place that is kept of subnormals."""
    return {jnp.bfloat16: 2.0**-117, jnp.float16: 2.0**-32}[dtype]


def all_values(dtype):
    return jax.lax.bitcast_convert_type(jnp.arange(65536, dtype=jnp.uint16), dtype)


def neighbours(x, dtype):
    """The next numbers of `dtype` below and above, in float64; inf is the one after the last."""
    values = all_values(dtype)
    order = np.unique(np.asarray(values[~jnp.isnan(values)]).astype(np.float64))
    at = np.searchsorted(order, x)
    return order[np.maximum(at - 1, 0)], order[np.minimum(at + 1, len(order) - 1)]


def assert_nearest(stored, true, dtype):
    """No number of `dtype` is nearer to `true` than `stored` is."""
    stored, true = np.asarray(stored).astype(np.float64), np.asarray(true).astype(np.float64)
    below, above = neighbours(stored, dtype)
    distance = np.abs(stored - true)
    assert (distance <= np.abs(below - true)).all()
    assert (distance <= np.abs(above - true)).all()


def take(tx, params, state, updates):
    with jax.numpy_dtype_promotion("standard"):  # apply_updates adds float32 to 16 bits
        updates, state = tx.update(updates, state, params)
        return optax.apply_updates(params, updates), state


def stepper(tx, compiled):
    def step(params, state, updates):
        return take(tx, params, state, updates)

    return jax.jit(step) if compiled else step


def adversarial_updates(p, dtype, rng):
    """Updates for all values at once: each is what is worst for a rounding of some kind."""
    p = np.asarray(p).astype(np.float32)
    below, above = (x.astype(np.float32) for x in neighbours(p.astype(np.float64), dtype))
    with np.errstate(invalid="ignore", over="ignore"):
        return {
            "nothing": np.zeros_like(p),
            "half an ulp up": (above - p) / 2,
            "half an ulp down": (below - p) / 2,
            "just under half an ulp": np.nextafter((above - p) / 2, np.float32(0)),
            "a thousandth of an ulp": (above - p) / 1000,
            "to zero": -p,
            "nearly to zero": -p * np.float32(1 - 2.0**-10),
            "across zero": -p * np.float32(1 + 2.0**-20),
            "to the other sign": -2 * p,
            "doubled": p,
            "halved": -p / 2,
            "half and a bit": -p * np.float32(0.5000001),
            "any size": np.float32(rng.normal(size=p.shape) * 2.0 ** rng.uniform(-30, 30, p.shape)),
            "subnormal": np.full_like(p, 2.0**-130),
            "infinite": np.full_like(p, np.inf),
        }


@formats
@residuals
@pytest.mark.parametrize("compiled", [False, True])
def test_every_value_takes_every_kind_of_update(dtype, residual_dtype, compiled):
    tx = compensate_rounding(residual_dtype)
    step = stepper(tx, compiled)
    params = all_values(dtype)
    params = params[np.isfinite(np.asarray(params).astype(np.float32))]
    rng = np.random.default_rng(0)
    reach = {jnp.int8: 128, jnp.int16: 4096 if dtype == jnp.float16 else 32768}[residual_dtype]
    residual = jnp.asarray(rng.integers(-reach, reach, params.shape), residual_dtype)
    state = tx.init(params)._replace(residual=residual)
    for name, update in adversarial_updates(params, dtype, rng).items():
        before = np.asarray(master_params(state, params)).astype(np.float64)
        with np.errstate(over="ignore"):
            wanted = before + update.astype(np.float64)
        new, new_state = step(params, state, jnp.asarray(update))
        stored = np.asarray(new).astype(np.float64)
        after = np.asarray(master_params(new_state, new)).astype(np.float64)
        largest = float(jnp.finfo(dtype).max)
        followed = (np.abs(wanted) <= largest) & (np.abs(wanted) >= FLUSHED[dtype])
        assert_nearest(stored[followed], after[followed], dtype)
        size = np.maximum(np.abs(np.asarray(params).astype(np.float64)), np.abs(wanted))
        allowed = unit(dtype, residual_dtype) * size + smallest(dtype)
        error = np.abs(after[followed] - wanted[followed])
        assert (error <= allowed[followed]).all(), name
        overflown = ~(np.abs(wanted) < largest * (1 + 2.0**-7))
        assert not np.isfinite(stored[overflown]).any()


@formats
@residuals
def test_compiled_and_eager_agree(dtype, residual_dtype):
    rng = np.random.default_rng(1)
    tx = compensate_rounding(residual_dtype)
    params = jnp.asarray(rng.normal(size=500), dtype)
    updates = jnp.asarray(rng.normal(size=(20, 500)) * 2.0 ** rng.uniform(-12, 0, (20, 500)), dtype)
    eager = compiled = scanned = params, tx.init(params)
    for u in updates:
        eager = stepper(tx, False)(*eager, u)
        compiled = stepper(tx, True)(*compiled, u)

    @jax.jit
    def scan(carry):
        return jax.lax.scan(lambda c, u: (take(tx, *c, u), None), carry, updates)[0]

    jax.tree.map(np.testing.assert_array_equal, eager, compiled)
    jax.tree.map(np.testing.assert_array_equal, eager, scan(scanned))


@formats
@residuals
@pytest.mark.parametrize("sign", [-1, 1])
def test_a_thousand_updates_of_a_thousandth_of_an_ulp_are_one_ulp(dtype, residual_dtype, sign):
    tx = compensate_rounding(residual_dtype)
    params = jnp.asarray([1.0, 1.5, -1.0, -1.5, 100.0, 2.0**-10, 1e-3], dtype)
    below, above = neighbours(np.asarray(params).astype(np.float64), dtype)
    target = above if sign > 0 else below
    update = jnp.asarray((target - np.asarray(params).astype(np.float64)) / 1000, jnp.float32)

    @jax.jit
    def run(params, state):
        def step(carry, _):
            return take(tx, *carry, update), None

        return jax.lax.scan(step, (params, state), length=1000)[0]

    new, state = run(params, tx.init(params))
    np.testing.assert_array_equal(np.asarray(new).astype(np.float64), target)
    left = np.abs(np.asarray(master_params(state, new)).astype(np.float64) - target)
    # A thousand additions in float32, and what the residual cannot hold of the last ones.
    assert (left <= (1000 * 2.0**-24 + 2 * unit(dtype, residual_dtype)) * np.abs(target)).all()


@given(
    st.sampled_from(DTYPES),
    st.sampled_from(RESIDUALS),
    st.floats(-100, 100, width=32),
    st.lists(st.floats(-1, 1, width=32, allow_subnormal=False), min_size=1, max_size=30),
)
def test_the_true_parameter_follows_float64(dtype, residual_dtype, start, updates):
    tx = compensate_rounding(residual_dtype)
    params = jnp.asarray(start, dtype)
    state = tx.init(params)
    for u in updates:
        before = np.float64(master_params(state, params))
        size = max(abs(np.float64(params)), abs(before + u))
        params, state = take(tx, params, state, jnp.float32(u))
        true = np.float64(master_params(state, params))
        assert abs(true - (before + u)) <= unit(dtype, residual_dtype) * size + smallest(dtype)
        assert_nearest(params, true, dtype)


def run_constant_gradient(tx, start, steps):
    params = jnp.asarray(start)

    @jax.jit
    def run(params, state):
        def step(carry, _):
            return take(tx, *carry, jnp.ones(params.shape, jnp.float32)), None

        return jax.lax.scan(step, (params, state), length=steps)[0]

    return run(params, tx.init(params))


def test_a_hundred_thousand_small_steps():
    steps, zero = 100_000, jnp.zeros((), jnp.bfloat16)
    plain, _ = run_constant_gradient(adamax(1e-3), zero, steps)
    assert float(plain) == -0.5
    wide, _ = run_constant_gradient(adamax(1e-3), zero.astype(jnp.float32), steps)
    for residual_dtype, tolerance in ((jnp.int16, 0), (jnp.int8, 1e-4)):
        tx = optax.chain(adamax(1e-3), compensate_rounding(residual_dtype))
        params, state = run_constant_gradient(tx, zero, steps)
        assert float(master_params(state, params)) == pytest.approx(float(wide), rel=tolerance)
        assert float(params) == -100


def test_the_thresholds_of_m_and_of_the_residual_are_independent():
    """With one sequence for both, the int8 residual would be 0.4 % off after 100,000 steps."""
    ends = []
    for residual_dtype in RESIDUALS:
        inner = adamax(1e-3, m_dtype="int8", v_dtype="uint8")
        tx = optax.chain(inner, compensate_rounding(residual_dtype))
        params, state = run_constant_gradient(tx, jnp.zeros((), jnp.bfloat16), 100_000)
        ends.append(float(master_params(state, params)))
    assert ends[0] == pytest.approx(ends[1], rel=2e-4)


def test_wide_parameters_pass_unchanged():
    tx = compensate_rounding()
    params = {"w": jnp.ones(3), "b": jnp.ones(2, jnp.bfloat16), "z": jnp.ones(2, jnp.complex64)}
    state = tx.init(params)
    assert [x.dtype for x in jax.tree.leaves(state)] == [jnp.int32, jnp.int8]
    updates = jax.tree.map(lambda p: p * p.dtype.type(0.001), params)
    new, state = tx.update(updates, state, params)
    assert new["w"] is updates["w"]
    assert new["z"] is updates["z"]
    assert new["b"].dtype == jnp.float32
    masters = master_params(state, params)
    assert masters["w"] is params["w"]


@formats
@residuals
def test_splitting_undoes_joining(dtype, residual_dtype):
    rng = np.random.default_rng(2)
    tx = optax.chain(adamax(1e-3), compensate_rounding(residual_dtype))
    params = {"w": jnp.asarray(rng.normal(size=1000), dtype), "b": jnp.ones(3)}
    state = tx.init(params)
    params, state = take(tx, params, state, jax.tree.map(jnp.ones_like, params))
    masters = master_params(state, params)
    empty = tx.init(jax.tree.map(jnp.zeros_like, params))
    new_state, new_params = split_master_params(empty, params, masters)
    jax.tree.map(np.testing.assert_array_equal, new_params, params)
    jax.tree.map(np.testing.assert_array_equal, new_state[-1].residual, state[-1].residual)


def test_masters_of_float32_are_split_to_the_nearest():
    masters = jnp.asarray(np.random.default_rng(3).normal(size=1000), jnp.float32)
    tx = compensate_rounding("int16")
    params = masters.astype(jnp.bfloat16)
    state, stored = split_master_params(tx.init(params), params, masters)
    assert_nearest(stored, masters, jnp.bfloat16)
    np.testing.assert_array_equal(master_params(state, stored), masters)
    state, stored = split_master_params(state, params, masters.at[0].set(jnp.inf).at[1].set(3.4e38))
    assert np.isinf(np.asarray(stored[:2]).astype(np.float32)).all()


def test_what_is_not_finite_is_added_as_it_is():
    tx = compensate_rounding()
    params = jnp.asarray([jnp.inf, -jnp.inf, jnp.nan, 1, 1, 3e38], jnp.bfloat16)
    updates = jnp.asarray([1, 1, 1, jnp.nan, -jnp.inf, 3e38], jnp.float32)
    new, state = stepper(tx, True)(params, tx.init(params), updates)
    plain = [np.inf, -np.inf, np.nan, np.nan, -np.inf, np.inf]
    np.testing.assert_array_equal(np.asarray(new).astype(np.float32), plain)
    np.testing.assert_array_equal(master_params(state, new), plain)


@pytest.mark.parametrize(
    ("error", "words", "call"),
    [
        (TypeError, "int8 or int16", lambda: compensate_rounding("float32")),
        (TypeError, "float8_e4m3fn", lambda: init(jnp.ones(2, jnp.float8_e4m3fn))),
        (ValueError, "needs the parameters", lambda: TX.update(LOW, init(LOW))),
        (TypeError, "must be a CompensateRoundingState", lambda: TX.update(LOW, (init(LOW),), LOW)),
        (TypeError, "residual is int8", lambda: TX.update(LOW, init(LOW), WIDE)),
        (TypeError, "residual is none", lambda: TX.update(WIDE, init(WIDE), LOW)),
        (ValueError, r"shape \(3,\)", lambda: TX.update(LOW, init(LOW), jnp.ones(3, LOW.dtype))),
        (ValueError, "no CompensateRoundingState", lambda: master_params((), LOW)),
        (ValueError, "not of the tree", lambda: master_params(init({"a": LOW}), {"b": LOW})),
        (TypeError, "residual is int8", lambda: split_master_params(init(LOW), WIDE, WIDE)),
    ],
)
def test_bad_input(error, words, call):
    with pytest.raises(error, match=words):
        call()


TX = compensate_rounding()
LOW, WIDE = jnp.ones(2, jnp.bfloat16), jnp.ones(2)


def init(params):
    return TX.init(params)
