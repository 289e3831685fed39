"""compensate_rounding against float64: no value, update or order of them may lose what it says."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from optax_adamax import Int8Residual, adamax, adamaxw, compensate_rounding, master_params
from optax_adamax.wrappers import _residual

residuals = pytest.mark.parametrize("residual_dtype", ["int8", "int16"])
UNIT = {"int8": 2.0**-15, "int16": 2.0**-24}  # the largest relative error of one step
FLUSHED = 2.0**-118  # below it XLA on CPU flushes updates of float32 to zero
SMALLEST = 2.0**-117  # an absolute error that is always allowed
LARGEST = float(jnp.finfo(jnp.bfloat16).max)
VALUES = jax.lax.bitcast_convert_type(jnp.arange(65536, dtype=jnp.uint16), jnp.bfloat16)
FINITE = VALUES[np.isfinite(np.asarray(VALUES).astype(np.float32))]


def wide(x):
    return np.asarray(x).astype(np.float64)


def neighbours(x):
    """The next numbers of bfloat16 below and above, in float64; inf is the one after the last."""
    order = np.unique(wide(VALUES[~jnp.isnan(VALUES)]))
    at = np.searchsorted(order, x)
    return order[np.maximum(at - 1, 0)], order[np.minimum(at + 1, len(order) - 1)]


def assert_nearest(stored, true):
    """No number of bfloat16 is nearer to `true` than `stored` is."""
    below, above = neighbours(wide(stored))
    with np.errstate(invalid="ignore"):  # only a mutant stores infinity for a finite number
        distance = np.abs(wide(stored) - wide(true))
    assert (distance <= np.abs(below - wide(true))).all()
    assert (distance <= np.abs(above - wide(true))).all()


def take(tx, params, state, gradient):
    with jax.numpy_dtype_promotion("standard"):  # apply_updates adds float32 to 16 bits
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state


def stepper(tx, compiled=True):
    def step(params, state, gradient):
        return take(tx, params, state, gradient)

    return jax.jit(step) if compiled else step


def adding(residual_dtype):
    """The gradient is the update."""
    return compensate_rounding(optax.identity(), residual_dtype)


def adversarial_updates(p, rng):
    """Updates for all values at once: each is what is worst for a rounding of some kind."""
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


def check_every_value(residual_dtype, compiled=True):
    tx = adding(residual_dtype)
    step = stepper(tx, compiled)
    rng = np.random.default_rng(0)
    ends = jnp.iinfo(residual_dtype)
    residual = jnp.asarray(rng.integers(ends.min, ends.max + 1, FINITE.shape), residual_dtype)
    state = tx.init(FINITE)
    state = state._replace(residual=type(state.residual)(residual))
    before = wide(master_params(state, FINITE))
    for name, update in adversarial_updates(FINITE, rng).items():
        with np.errstate(over="ignore", invalid="ignore"):
            wanted = before + update.astype(np.float64)
            float32 = (before.astype(np.float32) + update).astype(np.float64)
        new, new_state = step(FINITE, state, jnp.asarray(update))
        after = wide(master_params(new_state, new))
        followed = (np.abs(wanted) <= LARGEST) & (np.abs(wanted) >= FLUSHED)
        assert_nearest(new[followed], after[followed])
        size = np.maximum(np.abs(wide(FINITE)), np.abs(wanted))
        error = np.abs(after[followed] - wanted[followed])
        assert (error <= (UNIT[residual_dtype] * size + SMALLEST)[followed]).all(), name
        if residual_dtype == "int16":  # the very numbers of float32, but near zero
            exact = followed & (np.abs(wanted) > 2.0**-16 * np.abs(wide(FINITE)))
            exact &= np.abs(wanted) > 2.0**-100  # beyond which updates are flushed in part
            np.testing.assert_array_equal(after[exact], float32[exact])
        # What float32 can hold, no rounding to bfloat16 makes infinite.
        np.testing.assert_array_equal(np.isfinite(wide(new)), np.isfinite(float32), name)


@residuals
@pytest.mark.parametrize("compiled", [False, True])
def test_every_value_takes_every_kind_of_update(residual_dtype, compiled):
    check_every_value(residual_dtype, compiled)


def mutated(monkeypatch, name, mutant):
    """The module with another function, traced anew."""
    monkeypatch.setattr(_residual, name, mutant)
    step = _residual.add.__wrapped__
    monkeypatch.setattr(_residual, "add", lambda *arguments: step(*arguments))


def split_without_clip(theta, residual_dtype, threshold):
    width = jnp.iinfo(residual_dtype).bits
    fine = (_residual._bits(theta) + threshold * (width == 8)) >> (16 - width)
    upper = (fine + (1 << (width - 1))) >> width
    return fine, (fine - (upper << width)).astype(residual_dtype)


def stored_part_rounded_down(fine, residual):
    upper = fine >> jnp.iinfo(residual.dtype).bits
    return jax.lax.bitcast_convert_type(upper << 16, jnp.float32)


def join_with_any_residual(p, residual):
    bits = jax.lax.bitcast_convert_type(p, jnp.uint16).astype(jnp.uint32) << 16
    lost = 16 - jnp.iinfo(residual.dtype).bits
    bits += (residual.astype(jnp.int32) << lost).astype(jnp.uint32)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def join_without_sign(p, residual):
    return JOIN(jnp.abs(p), residual)


JOIN = _residual.join


@pytest.mark.parametrize(
    ("name", "mutant"),
    [
        ("split", split_without_clip),
        ("stored_part", stored_part_rounded_down),
        ("join", join_with_any_residual),
        ("join", join_without_sign),
        ("_threshold", lambda count, u_bits: jnp.uint32(300)),
        # Nothing is compared: a parameter is taken to arrive where float32 cannot.
        ("_bits", lambda x: jax.lax.bitcast_convert_type(x, jnp.uint32) & jnp.uint32(0xFFFFFFFE)),
    ],
)
def test_mutants_of_splitting_are_noticed(monkeypatch, name, mutant):
    mutated(monkeypatch, name, mutant)
    with pytest.raises(AssertionError):
        check_every_value("int8")
        check_every_value("int16")


@residuals
def test_a_parameter_set_from_outside_has_no_residual(residual_dtype):
    """A pruned one stays at zero, and infinity and NaN are what they say, in whatever is stored."""
    ends = jnp.iinfo(residual_dtype)
    residual = jnp.asarray([ends.min, -1, 1, ends.max] * 5, residual_dtype)
    params = jnp.repeat(jnp.asarray([0.0, -0.0, jnp.inf, -jnp.inf, jnp.nan], jnp.bfloat16), 4)
    state = adding(residual_dtype).init(params)
    state = state._replace(residual=type(state.residual)(residual))
    np.testing.assert_array_equal(master_params(state, params), wide(params))
    new, state = stepper(adding(residual_dtype))(params, state, jnp.zeros(20))
    np.testing.assert_array_equal(wide(new), wide(params))
    np.testing.assert_array_equal(master_params(state, new), wide(params))


def test_what_is_not_finite_is_added_as_it_is():
    params = jnp.asarray([jnp.inf, -jnp.inf, jnp.nan, 1, 1, 3e38], jnp.bfloat16)
    updates = jnp.asarray([1, 1, 1, jnp.nan, -jnp.inf, 3e38], jnp.float32)
    new, state = stepper(adding("int8"))(params, adding("int8").init(params), updates)
    plain = [np.inf, -np.inf, np.nan, np.nan, -np.inf, np.inf]
    np.testing.assert_array_equal(np.asarray(new).astype(np.float32), plain)
    np.testing.assert_array_equal(master_params(state, new), plain)


def inner_of(kind):
    """Rates that are no powers of two: their products are rounded, and may be contracted."""
    # Of products alone: a compiled cosine has other last bits.
    schedule = optax.piecewise_constant_schedule(3e-4, {5: 0.7, 11: 0.3})
    if kind == "decay":  # of a power of two, for optax's own product and sum
        return optax.chain(optax.add_decayed_weights(2.0**-10), optax.sgd(schedule))
    return {"rate": optax.sgd(3e-4), "schedule": optax.sgd(schedule)}[kind]


@residuals
@pytest.mark.parametrize("kind", ["rate", "schedule", "decay"])
def test_compiled_eager_and_scanned_agree(residual_dtype, kind):
    rng = np.random.default_rng(1)
    tx = compensate_rounding(inner_of(kind), residual_dtype)
    params = jnp.asarray(rng.normal(size=500), jnp.bfloat16)
    gradients = jnp.asarray(rng.normal(size=(20, 500)), jnp.bfloat16)
    eager = compiled = start = params, tx.init(params)
    step = stepper(tx)
    for g in gradients:
        eager, compiled = take(tx, *eager, g), step(*compiled, g)

    @jax.jit
    def scan(carry):
        return jax.lax.scan(lambda c, g: (take(tx, *c, g), None), carry, gradients)[0]

    jax.tree.map(np.testing.assert_array_equal, eager, compiled)
    jax.tree.map(np.testing.assert_array_equal, eager, scan(start))


def test_int16_is_float32_bit_for_bit():
    """With gradients of bfloat16, a decay and a rate that is no power of two, op by op."""
    rng, inner = np.random.default_rng(2), adamaxw(3e-4, weight_decay=0.01)
    tx = compensate_rounding(inner, "int16")
    params = jnp.asarray(rng.normal(size=300), jnp.bfloat16)
    masters = params.astype(jnp.float32)
    state, inner_state = tx.init(params), inner.init(masters)
    for g in jnp.asarray(rng.normal(size=(6, 300)), jnp.bfloat16):
        params, state = take(tx, params, state, g)
        updates, inner_state = inner.update(g.astype(jnp.float32), inner_state, masters)
        masters = optax.apply_updates(masters, updates)
        np.testing.assert_array_equal(master_params(state, params), masters)
    jax.tree.map(np.testing.assert_array_equal, state.inner_state, inner_state)


def run_with_decay(make, params, gradients):
    """How much of the true parameters a decay of 1e-4 takes away, in the mean."""
    ends = []
    for decay in (0.0, 1e-4):
        tx = make(decay)

        @jax.jit
        def run(params, state, tx=tx):
            step = lambda carry, g: (take(tx, *carry, g), None)  # noqa: E731
            return jax.lax.scan(step, (params, state), gradients)[0]

        with jax.numpy_dtype_promotion("standard"):
            stored, state = run(params, tx.init(params))
        ends.append(np.mean(wide(master_params(state, stored) if make is not PEER else stored)))
    return ends[0] - ends[1]


def PEER(decay):  # noqa: N802
    """What has float32 parameters."""
    return optax.adamaxw(0.01, weight_decay=decay)


def test_decay_arrives_in_full_with_bfloat16_gradients():
    """As a last link behind these gradients, 2 % of it arrived."""
    rng = np.random.default_rng(3)
    params = jnp.asarray(rng.uniform(1, 2, 4096), jnp.bfloat16)
    gradients = jnp.asarray(rng.normal(size=(300, 4096)), jnp.bfloat16)
    expected = run_with_decay(PEER, params.astype(jnp.float32), gradients.astype(jnp.float32))
    assert expected == pytest.approx(1e-4 * 300 * 0.01 * 1.5, rel=0.05)
    # int8 tosses 300 coins an element: a deviation of 1.4 % of what is measured.
    for residual_dtype, tolerance in (("int16", 2e-3), ("int8", 0.05)):

        def make(decay, residual_dtype=residual_dtype):
            return compensate_rounding(adamaxw(0.01, weight_decay=decay), residual_dtype)

        assert run_with_decay(make, params, gradients) == pytest.approx(expected, rel=tolerance)


@residuals
@pytest.mark.parametrize("sign", [-1, 1])
def test_a_thousand_updates_of_a_thousandth_of_an_ulp_are_one_ulp(residual_dtype, sign):
    tx = adding(residual_dtype)
    params = jnp.asarray([1.0, 1.5, -1.0, -1.5, 100.0, 2.0**-10, 1e-3], jnp.bfloat16)
    below, above = neighbours(wide(params))
    target = above if sign > 0 else below
    update = jnp.asarray((target - wide(params)) / 1000, jnp.float32)

    @jax.jit
    def run(params, state):
        step = lambda carry, _: (take(tx, *carry, update), None)  # noqa: E731
        return jax.lax.scan(step, (params, state), length=1000)[0]

    new, state = run(params, tx.init(params))
    left = np.abs(wide(master_params(state, new)) - target) / np.abs(target)
    # int16: a thousand additions in float32. int8: a thousand tosses for a quarter unit each.
    allowed = 1000 * 2.0**-24 if residual_dtype == "int16" else 4 * 16 * 2.0**-15
    assert (left <= allowed).all()


STEP = {residual_dtype: stepper(adding(residual_dtype)) for residual_dtype in UNIT}


@given(
    st.sampled_from(["int8", "int16"]),
    st.floats(-100, 100, width=32),
    st.lists(st.floats(-1, 1, width=32, allow_subnormal=False), min_size=1, max_size=30),
)
def test_the_true_parameter_follows_float64(residual_dtype, start, updates):
    step = STEP[residual_dtype]
    params = jnp.asarray(start, jnp.bfloat16)
    state = adding(residual_dtype).init(params)
    for u in updates:
        before = np.float64(master_params(state, params))
        size = max(abs(np.float64(params)), abs(before + u))
        params, state = step(params, state, jnp.float32(u))
        true = np.float64(master_params(state, params))
        assert abs(true - (before + u)) <= UNIT[residual_dtype] * size + SMALLEST
        assert_nearest(params, true)


@functools.cache
def drifter(tx, start, steps):
    @jax.jit
    @functools.partial(jax.vmap, in_axes=(0, None, None))
    def run(count, gradients, period):
        params = jnp.full(gradients.shape[1], start, jnp.bfloat16)

        def step(carry, t):
            return take(tx, *carry, gradients[t % period]), None

        state = tx.init(params)._replace(count=count)
        end, state = jax.lax.scan(step, (params, state), jnp.arange(steps))[0]
        return master_params(state, end) - params.astype(jnp.float32)

    return run


def drifts(tx, start, gradients, steps, streams=1):
    """What becomes of the true parameter in `steps`, for every column of periodic gradients.

    A stream is a run whose count starts elsewhere, and so has other thresholds.
    """
    period = len(gradients)
    gradients = jnp.pad(gradients, ((0, 144 - period), (0, 0)))
    counts = jnp.arange(streams, dtype=jnp.int32) * 1_000_000
    return wide(drifter(tx, start, steps)(counts, gradients, period))


CODED = {
    residual_dtype: compensate_rounding(
        adamax(2.0**-14, m_dtype="int8", v_dtype="uint8"), residual_dtype
    )
    for residual_dtype in ("int8", "int16")
}


def patterns(period, rng):
    """Gradients of this period, in columns, with a mean direction that is not too small."""
    columns = rng.normal(size=(period, 16)) + 0.7
    return jnp.asarray(columns, jnp.float32)


@pytest.mark.parametrize("period", [1, 2, 3, 4, 5, 6, 7, 8, 13, 144])
def test_the_mean_of_periodic_updates_is_right(period):
    """In closed loop with a rounded m, whose own threshold is a hash of the count, too."""
    gradients = patterns(period, np.random.default_rng(period))
    # What int16 adds up is the exact sum of the same updates.
    exact = drifts(CODED["int16"], 3.5, gradients, 5000)
    found = drifts(CODED["int8"], 3.5, gradients, 5000, streams=64)
    scale = np.sqrt(np.mean(exact**2))
    assert np.sqrt(np.mean((found.mean(0) - exact) ** 2)) <= 0.005 * scale


def golden_walk(count, u_bits):
    return (count.astype(jnp.uint32) * np.uint32(0x9E3779B9)) >> 24


@pytest.mark.parametrize(
    "threshold", [golden_walk, lambda count, u_bits: jnp.uint32(128), lambda *_: jnp.uint32(0)]
)
def test_mutants_of_the_threshold_are_noticed(monkeypatch, threshold):
    """A walk is biased by updates of its own period, and one for all steps by any."""
    mutated(monkeypatch, "_threshold", threshold)
    int8, int16 = adding("int8"), adding("int16")
    for period in (8, 144):
        rng = np.random.default_rng(period)
        updates = jnp.asarray(2.0**-17 * (rng.random((period, 16)) < 0.3), jnp.float32)
        exact, found = (drifts(tx, 3.0, updates, 5000) for tx in (int16, int8))
        if np.sqrt(np.mean((found - exact) ** 2)) > 0.2 * np.sqrt(np.mean(exact**2)):
            return
    pytest.fail("No pattern shows the bias.")


def test_elements_do_not_share_one_threshold():
    """Updates of nearly equal size go up in different steps: a layer's mean does not jitter."""
    updates = jnp.asarray(2.0**-18 * np.linspace(1, 1.9, 4096), jnp.float32)
    params = jnp.ones(4096, jnp.bfloat16)
    _, state = take(adding("int8"), params, adding("int8").init(params), updates)
    up = wide(state.residual.int8)
    assert set(np.unique(up)) <= {0, 1}
    assert 1 / 8 < np.mean(up) < 1.9 / 8


def test_a_hundred_thousand_small_steps():
    steps, ones = 100_000, jnp.ones((1, 1))

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
        # One run has a deviation of 0.18 %: it tosses a coin for half a unit at every step.
        assert np.abs(found - exact).max() <= 0.01 * np.abs(exact)
        assert np.mean(found) == pytest.approx(exact, rel=1.5e-3)


def test_wide_parameters_pass_unchanged():
    tx = compensate_rounding(optax.identity())
    params = {"w": jnp.ones(3), "b": jnp.ones(2, jnp.bfloat16), "z": jnp.ones(2, jnp.complex64)}
    state = tx.init(params)
    assert [x.dtype for x in jax.tree.leaves(state)] == [jnp.int32, jnp.int8]
    assert isinstance(state.residual, Int8Residual)
    updates = jax.tree.map(lambda p: p * p.dtype.type(0.001), params)
    new, state = tx.update(updates, state, params)
    np.testing.assert_array_equal(new["w"], updates["w"])
    np.testing.assert_array_equal(new["z"], updates["z"])
    assert {k: u.dtype for k, u in new.items()} == {"w": "float32", "b": "float32", "z": "c8"}
    masters = master_params(state, params)
    assert masters["w"] is params["w"]


def test_the_inner_one_sees_float32():
    """Gradients are widened, parameters are the true ones; float64 stays."""
    seen = []

    def update(updates, state, params=None, **extra):
        seen.append((updates, params, extra))
        return updates, state

    tx = compensate_rounding(optax.GradientTransformationExtraArgs(lambda _: (), update), "int16")
    params = {"a": jnp.ones(2, jnp.bfloat16), "b": jnp.ones(2)}
    state = tx.init(params)
    gradients = jax.tree.map(lambda p: p.astype(jnp.bfloat16) * jnp.bfloat16(0.001), params)
    params, state = take(tx, params, state, gradients)
    take(tx, params, state, gradients)
    for updates, masters, _ in seen:
        assert all(x.dtype == jnp.float32 for x in jax.tree.leaves((updates, masters)))
    assert float(seen[1][1]["a"][0]) == float(1 + jnp.float32(gradients["a"][0]))
    tx.update(gradients, state, params, value=3)
    assert seen[2][2] == {"value": 3}
    with jax.enable_x64(True):
        tx.update({"a": jnp.ones(2, jnp.float64), "b": jnp.ones(2)}, state, params)
        assert seen[3][0]["a"].dtype == jnp.float64


TX = compensate_rounding(adamax(1e-3))
LOW, WIDE = jnp.ones(2, jnp.bfloat16), jnp.ones(2)


def init(params):
    return TX.init(params)


@pytest.mark.parametrize(
    ("error", "words", "call"),
    [
        (TypeError, "int8 or int16", lambda: compensate_rounding(adamax(0.1), "float32")),
        (TypeError, r"compensate_rounding\(adamax", lambda: compensate_rounding("int8")),
        (TypeError, "cast it to bfloat16", lambda: init(jnp.ones(2, jnp.float8_e4m3fn))),
        (TypeError, r"\['b'\] is of dtype float16", lambda: init({"b": jnp.ones(2, "float16")})),
        (ValueError, "needs the parameters", lambda: TX.update(LOW, init(LOW))),
        (TypeError, "must be a CompensateRoundingState", lambda: TX.update(LOW, (init(LOW),), LOW)),
        (TypeError, "add them by optax.apply_updates", lambda: TX.update(LOW, init(LOW), WIDE)),
        (TypeError, "residual is none", lambda: TX.update(WIDE, init(WIDE), LOW)),
        (ValueError, r"shape \(3,\)", lambda: TX.update(LOW, init(LOW), jnp.ones(3, LOW.dtype))),
        (TypeError, "as Int8Residual, but the transformation as Int16Residual",
         lambda: compensate_rounding(adamax(0.1), "int16").update(LOW, init(LOW), LOW)),
        (ValueError, "no CompensateRoundingState", lambda: master_params((), LOW)),
        (ValueError, "another tree of parameters",
         lambda: master_params(init({"a": LOW}), {"b": LOW})),
        (TypeError, "add them by optax.apply_updates", lambda: master_params(init(LOW), WIDE)),
        (ValueError, r"shape \(3,\)", lambda: master_params(init(LOW), jnp.ones(3, LOW.dtype))),
    ],
)  # fmt: skip
def test_bad_input(error, words, call):
    with pytest.raises(error, match=words):
        call()
