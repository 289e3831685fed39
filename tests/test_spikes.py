"""`limit_spikes` finds, skips or clips spikes, and its average follows the documented rule."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.tree
import pytest
from spike_runs import PARAMS, compiled, every_action, gradient, norm_of, run

from optax_adamax import LimitSpikesState, adamax, adamaxw, limit_spikes, scale_by_adamax

SKIP_STEP = scale_by_adamax(nonfinite="skip_step")


def reference(norms, max_norm_ratio, decay):
    """Returns spikes and limits by the rule in the docstring of `limit_spikes`, in float64."""
    s = count = 0
    spikes, limits = [], []
    for n in norms:
        limit = max_norm_ratio * s / (1 - decay**count) if count else np.inf
        spikes.append(count >= 10 and n > limit)
        limits.append(limit)
        if n > 0 and np.isfinite(min(n, limit)):  # False for NaN
            s, count = decay * s + (1 - decay) * min(n, limit), count + 1
    return np.array(spikes), np.array(limits)


@every_action
@pytest.mark.parametrize("decay", [0.0, 0.9, 0.99])
def test_spikes_agree_with_the_reference(action, decay):
    rng = np.random.default_rng(1)
    norms = np.exp(rng.normal(size=150))
    norms[rng.random(150) < 0.1] *= 30
    norms[[20, 21]] = 0
    spikes, limits = reference(norms, 3.0, decay)
    near = np.abs(norms / np.maximum(limits, 1e-9) - 1) < 1e-4
    found, state = run(norms, 3.0, decay=decay, action=action)
    assert spikes.sum() > 10 and not near.any()
    np.testing.assert_array_equal(found, spikes)
    assert int(optax.tree.get(state, "spike_count")) == spikes.sum()
    assert int(optax.tree.get(state, "norm_count")) == 148


def test_skipped_spike_leaves_the_inner_state_unchanged():
    norms = [1.0] * 12 + [40.0] + [1.0] * 5
    inner = adamax(optax.exponential_decay(0.1, 3, 0.5), m_dtype="int8", v_dtype="uint8")
    _, state = run(norms, inner=inner)
    update, expected = jax.jit(inner.update), inner.init(PARAMS)
    for t, norm in enumerate(norms):
        if norm == 1.0:
            _, expected = update(gradient(norm, t), expected, PARAMS)
    jax.tree.map(np.testing.assert_array_equal, state.inner_state, expected)


def test_clipped_spike_has_the_norm_of_the_limit():
    init, update = compiled(action="clip")
    state = init(PARAMS)
    for t in range(12):
        updates, state = update(gradient(2.0, t), state, PARAMS)
        jax.tree.map(np.testing.assert_array_equal, updates, gradient(2.0, t))
    updates, state = update(gradient(1e6), state, PARAMS)
    np.testing.assert_allclose(norm_of(updates), 10.0, rtol=1e-5)
    ratio = jax.tree.map(lambda u, g: np.asarray(u) / g, updates, gradient(1e6))
    for r in jax.tree.leaves(ratio):
        np.testing.assert_allclose(r, 1e-5, rtol=1e-5)


@every_action
def test_one_spike_raises_the_average_by_a_bounded_factor(action):
    """A spike of any size raises the average by a factor of at most 1 + (1 - d)(c - 1)."""
    for size in (1e2, 1e10, 1e30, np.inf):
        steady = run([1.0] * 50, action=action)[1]
        struck = run([1.0] * 50 + [size], action=action)[1]
        assert int(struck.spike_count) == 1

        def mean(state):
            return float(state.norm_ema) / (1 - 0.99 ** int(state.norm_count))

        assert (
            1 < mean(struck) / mean(steady) < 1 + 2.6 * 0.01 * 4
        )  # the average of few norms changes faster
    later = run([1.0] * 500 + [1e30], action=action)[1]
    assert mean(later) < 1 + 1.02 * 0.01 * 4


@every_action
@pytest.mark.parametrize("factor", [6.0, 100.0, 1e4])
def test_permanently_larger_gradients_are_accepted_after_the_documented_steps(action, factor):
    c, d = 5.0, 0.99
    stated = np.log(factor / c) / np.log(1 + (1 - d) * (c - 1))
    spikes, _ = run([1.0] * 400 + [factor] * (int(stated) + 10), c, decay=d, action=action)
    assert not spikes[:400].any() and spikes[400]
    waited = spikes.sum()
    assert not spikes[400 + waited :].any()
    assert abs(waited - stated) <= 2 + 0.02 * stated


@every_action
def test_smaller_and_zero_gradients_are_not_spikes(action):
    """A small gradient after zero gradients late in a run is not a spike, either."""
    spikes, state = run([1.0] * 20 + [1e-3] * 20 + [0.0] * 20, action=action)
    late = state._replace(norm_count=np.int32(2**31 - 1))
    assert not spikes.any()
    _, update = compiled(action=action)
    _, after = update(gradient(0.0), late, PARAMS)
    assert float(after.norm_ema) == float(late.norm_ema) and int(after.norm_count) == 2**31 - 1
    _, after = update(gradient(1e-2), after, PARAMS)
    assert int(after.spike_count) == 0 and int(after.norm_count) == 2**31 - 1


@every_action
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_reaches_the_inner_policy_and_infinity_does_not(action, bad):
    """An infinite gradient is clipped to zeros. Momentum then still changes the parameters."""
    _, state = run([1.0] * 12, inner=SKIP_STEP, action=action)
    g = {**gradient(1.0), "a": np.full(3, bad, np.float32)}
    updates, after = compiled(SKIP_STEP, 5.0, action=action)[1](g, state, PARAMS)
    steps = action == "clip" and np.isinf(bad)
    assert all(np.any(u) == steps for u in jax.tree.leaves(updates))
    assert int(optax.tree.get(after, "nonfinite_count")) == np.isnan(bad)
    assert int(after.spike_count) == np.isinf(bad)
    assert np.isfinite(after.norm_ema)
    count = optax.tree.get(after, "ScaleByAdamaxState").count
    assert int(count) == 12 + steps


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "complex64"])
@pytest.mark.parametrize("steps_before", [0, 12])
@every_action
def test_infinite_gradient_gives_zero_updates(action, steps_before, dtype):
    """This includes the first steps. Clipping must not multiply infinity by zero."""
    init, update = compiled(action=action)
    params = np.ones(3, dtype)
    average = {12: 1.0, 0: 0.0}[steps_before]
    state = init(params)._replace(norm_count=np.int32(steps_before), norm_ema=np.float32(average))
    updates, after = update(np.array([1, np.inf, -2], dtype), state)
    np.testing.assert_array_equal(updates, np.zeros(3, dtype))
    assert updates.dtype == dtype and int(after.spike_count) == 1
    assert np.isfinite(after.norm_ema)


def test_infinite_elements_stay_infinite_without_a_spike():
    """If NaN makes the norm NaN, casts must not turn infinity into the largest finite number."""
    init, update = compiled(action="clip")
    g = np.array([np.nan, np.inf, 1], np.float16)
    np.testing.assert_array_equal(update(g, init(g))[0], g)


@every_action
def test_float16_norm_is_computed_in_float32(action):
    """The square of 300 is infinite in float16."""
    g = np.full(4, 300, np.float16)
    tx = limit_spikes(optax.identity(), max_norm=700.0, action=action)
    updates, state = tx.update(g, tx.init(g))
    np.testing.assert_array_equal(updates, g)
    np.testing.assert_allclose(state.norm_ema, 6.0, rtol=1e-6)
    assert int(state.spike_count) == 0


@every_action
@pytest.mark.parametrize("steps_before", range(1, 10))
def test_spike_during_warmup_enters_the_average_at_the_limit(action, steps_before):
    _, before = run([1.0] * steps_before, action=action)
    spikes, after = run([1.0] * steps_before + [1e6], action=action)
    assert not spikes.any()  # passed, because the average does not limit these steps yet
    expected = 0.99 * float(before.norm_ema) + 0.01 * 5.0
    np.testing.assert_allclose(after.norm_ema, expected, rtol=1e-5)


@every_action
def test_average_of_ten_norms_limits_the_next_step(action):
    spikes, _ = run([1.0] * 10 + [1e6], action=action)
    np.testing.assert_array_equal(spikes, [False] * 10 + [True])


def test_clipping_preserves_the_dtype_and_direction_of_every_leaf():
    dtypes = ("float16", "bfloat16", "float32", "complex64")
    params, large = ({d: np.full(4, x, d) for d in dtypes} for x in (1, 100))
    init, update = compiled(max_norm_ratio=2.0, action="clip")
    state = init(params)
    for _ in range(11):
        _, state = update(params, state)
    updates, state = update(large, state)
    assert int(state.spike_count) == 1
    for dtype, u in updates.items():
        assert u.dtype == dtype
        np.testing.assert_allclose(np.asarray(u, np.complex64), 2, rtol=2**-8)


def test_fixed_limit_applies_from_the_first_step():
    spikes, state = run([99.0, 101.0, 50.0, np.inf, 101.0], None, max_norm=100.0)
    np.testing.assert_array_equal(spikes, [False, True, False, True, True])
    assert int(state.spike_count) == 3


def test_lower_of_two_limits_applies():
    norms = [1.0] * 12 + [6.0, 4.0, 11.0] + [3.0] * 300 + [11.0, 9.0]
    spikes, _ = run(norms, 5.0, max_norm=10.0)
    np.testing.assert_array_equal(np.flatnonzero(spikes), [12, 14, len(norms) - 2])


def test_fixed_limit_clips():
    tx = limit_spikes(optax.identity(), max_norm=2.0, action="clip")
    updates, _ = tx.update(gradient(50.0), tx.init(PARAMS))
    np.testing.assert_allclose(norm_of(updates), 2.0, rtol=1e-5)


def test_fixed_limit_clips_to_itself_during_warmup():
    """The average does not limit the first ten steps, so it does not scale them either."""
    tx = limit_spikes(optax.identity(), max_norm_ratio=2.0, max_norm=100.0, action="clip")
    state = tx.init(PARAMS)
    for norm, expected in ((1.0, 1.0), (99.0, 99.0), (200.0, 100.0)):
        updates, state = tx.update(gradient(norm), state)
        np.testing.assert_allclose(norm_of(updates), expected, rtol=1e-5)
    assert int(state.spike_count) == 1


@pytest.mark.parametrize(
    "limits", [{}, {"max_norm": 0.0}, {"max_norm": -1.0}, {"max_norm_ratio": 1.0}]
)
def test_missing_or_useless_limits_raise(limits):
    with pytest.raises(ValueError, match=r"max_norm|max_norm_ratio"):
        limit_spikes(adamax(0.1), **limits)


@every_action
def test_updates_wider_than_gradients_work(action):
    """Both branches of the cond must have the dtype of the updates."""
    params = {"w": np.ones(4, np.float32)}
    tx = limit_spikes(adamaxw(0.1), max_norm=10.0, action=action)
    state, u = tx.init(params), {}
    update = jax.jit(tx.update)
    for norm, spikes in ((1.0, 0), (100.0, 1)):
        with jax.numpy_dtype_promotion("standard"):  # the decay of optax needs it
            u, state = update({"w": np.full(4, norm, jnp.bfloat16)}, state, params)
        assert int(state.spike_count) == spikes
    assert np.any(u["w"]) == (action == "clip")


def test_counts_saturate():
    _, update = compiled()
    largest = np.int32(2**31 - 1)
    state = LimitSpikesState(largest, largest, np.float32(1.0), optax.EmptyState())
    _, state = update(gradient(100.0), state, PARAMS)
    assert int(state.spike_count) == int(state.norm_count) == 2**31 - 1
