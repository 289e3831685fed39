"""Master parameters have a bounded error for every bfloat16 parameter and kind of update."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compensated import UNIT, VALUES, adding, neighbours, residuals, stepper, to_float64
from hypothesis import given
from hypothesis import strategies as st

from optax_adamax import master_params

FLUSHED = 2.0**-118  # XLA on CPU flushes smaller float32 updates to zero
SMALLEST = 2.0**-117  # absolute error that is always allowed
STEP = {residual_dtype: stepper(adding(residual_dtype)) for residual_dtype in UNIT}
LARGEST = float(jnp.finfo(jnp.bfloat16).max)
FINITE = VALUES[np.isfinite(VALUES.astype(np.float32))]


def assert_nearest(stored, true):
    """Checks that no bfloat16 number is nearer to `true` than `stored`."""
    below, above = neighbours(to_float64(stored))
    distance = np.abs(to_float64(stored) - to_float64(true))
    assert (distance <= np.abs(below - to_float64(true))).all()
    assert (distance <= np.abs(above - to_float64(true))).all()


def adversarial_updates(p, rng):
    """Returns updates for all values, each the worst case for one kind of rounding."""
    p = np.asarray(p).astype(np.float32)
    below, above = (x.astype(np.float32) for x in neighbours(p.astype(np.float64)))
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
            "to the end of float32": np.copysign(np.finfo(np.float32).max, p) - p,
            "infinite": np.full_like(p, np.inf),
        }


def check_every_value(residual_dtype, compiled=True, update_dtype="float32"):
    """Checks the new master parameters; with bfloat16 updates, p + u is computed in bfloat16."""
    tx = adding(residual_dtype, update_dtype=update_dtype)
    step = stepper(tx, compiled, cast=update_dtype == "float32")
    rng = np.random.default_rng(0)
    ends = jnp.iinfo(residual_dtype)
    residual = jnp.asarray(rng.integers(ends.min, ends.max + 1, FINITE.shape), residual_dtype)
    state = tx.init(FINITE)
    state = state._replace(residual=type(state.residual)(residual))
    masters = jax.jit(master_params) if compiled else master_params
    before = to_float64(masters(state, FINITE))
    for name, update in adversarial_updates(FINITE, rng).items():
        with np.errstate(over="ignore", invalid="ignore"):
            wanted = before + update.astype(np.float64)
            float32 = (before.astype(np.float32) + update).astype(np.float64)
        new, new_state = jax.tree.map(np.asarray, step(FINITE, state, update))
        after = to_float64(masters(new_state, new))
        followed = (np.abs(wanted) <= LARGEST) & (np.abs(wanted) >= FLUSHED)
        assert_nearest(new[followed], after[followed])
        size = np.maximum(np.abs(to_float64(FINITE)), np.abs(wanted))
        with np.errstate(invalid="ignore"):
            error = np.where(followed, np.abs(after - wanted), 0)
        near = np.abs(wanted) > 2.0**-16 * np.abs(to_float64(FINITE))
        if update_dtype == "bfloat16":  # the change is exact in bfloat16
            near = np.abs(wanted - 1.25 * to_float64(FINITE)) < 0.74 * np.abs(to_float64(FINITE))
            assert (error <= 1.5 * 2.0**-7 * size + SMALLEST).all(), name
        followed &= near | (update_dtype == "float32")
        assert (error <= UNIT[residual_dtype] * size + SMALLEST)[followed].all(), name
        if residual_dtype == "int16":  # equal to float32
            nearest = to_float64(float32.astype(jnp.bfloat16))
            missed = (np.abs(wanted) < 2.0**126) & (np.abs(wanted) > 2.0**-100)
            with np.errstate(invalid="ignore"):
                missed &= np.abs(to_float64(new) - float32) > np.abs(nearest - float32)
            np.testing.assert_array_equal(after[missed], to_float64(new)[missed])  # no residual
            exact = followed & near
            exact &= np.abs(wanted) > 2.0**-100  # smaller updates are flushed in part
            np.testing.assert_array_equal(after[exact], float32[exact])
        # Rounding to bfloat16 never makes a finite number infinite, except if a bfloat16 update
        # that leads to one of the largest numbers is rounded up.
        largest = (update_dtype == "bfloat16") & (np.abs(wanted) > 2.0**127)
        finite = np.isfinite(to_float64(new)) | largest
        np.testing.assert_array_equal(finite, np.isfinite(float32) | largest, name)


@pytest.mark.parametrize(
    "compiled, residual_dtype, update_dtype",
    [
        (True, "int8", "float32"),
        (True, "int16", "float32"),
        (True, "int8", "bfloat16"),
        (True, "int16", "bfloat16"),
        (False, "int8", "float32"),
        pytest.param(False, "int16", "float32", marks=pytest.mark.slow),
        pytest.param(False, "int16", "bfloat16", marks=pytest.mark.slow),
    ],
)
def test_every_update_of_every_value_is_added(compiled, residual_dtype, update_dtype):
    check_every_value(residual_dtype, compiled, update_dtype)


@residuals
def test_residual_of_zero_and_nonfinite_parameters_is_ignored(residual_dtype):
    """Pruned parameters stay zero; infinite and NaN parameters do not change."""
    ends = jnp.iinfo(residual_dtype)
    residual = jnp.asarray([ends.min, -1, 1, ends.max] * 5, residual_dtype)
    params = np.repeat(np.array([0.0, -0.0, np.inf, -np.inf, np.nan], jnp.bfloat16), 4)
    state = adding(residual_dtype).init(params)
    state = state._replace(residual=type(state.residual)(residual))
    masters = jax.jit(master_params)
    np.testing.assert_array_equal(masters(state, params), to_float64(params))
    new, state = STEP[residual_dtype](params, state, np.zeros(20, np.float32))
    np.testing.assert_array_equal(to_float64(new), to_float64(params))
    np.testing.assert_array_equal(masters(state, new), to_float64(params))


def test_nonfinite_updates_are_added_directly():
    params = jnp.asarray([jnp.inf, -jnp.inf, jnp.nan, 1, 1, 3e38], jnp.bfloat16)
    updates = jnp.asarray([1, 1, 1, jnp.nan, -jnp.inf, 3e38], jnp.float32)
    new, state = STEP["int8"](params, adding("int8").init(params), updates)
    plain = [np.inf, -np.inf, np.nan, np.nan, -np.inf, np.inf]
    np.testing.assert_array_equal(np.asarray(new).astype(np.float32), plain)
    np.testing.assert_array_equal(master_params(state, new), plain)
    assert not np.any(state.residual.int8)  # so the parameter can be set to a finite number again


@given(
    st.sampled_from(["int8", "int16"]),
    st.floats(-100, 100, width=32),
    st.lists(st.floats(-1, 1, width=32, allow_subnormal=False), min_size=1, max_size=30),
)
def test_master_parameter_follows_float64(residual_dtype, start, updates):
    step, masters = STEP[residual_dtype], jax.jit(master_params)
    params = jnp.asarray(start, jnp.bfloat16)
    state = adding(residual_dtype).init(params)
    for u in updates:
        before = np.float64(masters(state, params))
        size = max(abs(np.float64(params)), abs(before + u))
        params, state = step(params, state, np.float32(u))
        master = np.float64(masters(state, params))
        assert abs(master - (before + u)) <= UNIT[residual_dtype] * size + SMALLEST
        assert_nearest(params, master)
