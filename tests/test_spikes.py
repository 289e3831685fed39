"""`limit_spikes`: what is a spike, what becomes of it, and how a lasting change gets through."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.tree
import pytest
from jax.sharding import PartitionSpec as P

from optax_adamax import LimitSpikesState, adamax, adamaxw, limit_spikes, scale_by_adamax

every_action = pytest.mark.parametrize("action", ["skip", "clip"])
PARAMS = {"a": np.ones(3, np.float32), "b": [np.ones((2, 2), np.float32), None]}


def gradient(norm, seed=0):
    """Of a given global norm, in float32."""
    rng = np.random.default_rng(seed)
    g = jax.tree.map(lambda p: rng.normal(size=p.shape), PARAMS)
    size = np.sqrt(sum(np.sum(x**2) for x in jax.tree.leaves(g)))
    return jax.tree.map(lambda x: np.asarray(x * norm / size, np.float32), g)


def norm_of(updates):
    return np.sqrt(sum(np.sum(np.float64(u) ** 2) for u in jax.tree.leaves(updates)))


def oracle(norms, max_norm_ratio, decay):
    """The rule of the docstring in float64: which norms are spikes, and the limits."""
    s = seen = 0
    spikes, limits = [], []
    for n in norms:
        limit = max_norm_ratio * s / (1 - decay**seen) if seen else np.inf
        spikes.append(seen >= 10 and n > limit)
        limits.append(limit)
        if n > 0 and np.isfinite(min(n, limit)):  # which NaN is not
            s, seen = decay * s + (1 - decay) * min(n, limit), seen + 1
    return np.array(spikes), np.array(limits)


IDENTITY = optax.identity()
SKIP_STEP = scale_by_adamax(nonfinite="skip_step")
TRACE = optax.trace(0.5)


def compiled(inner=IDENTITY, max_norm_ratio=5.0, *, max_norm=None, decay=0.99, action="skip"):
    return compiled_once(inner, max_norm_ratio, max_norm, decay, action)


@functools.cache
def compiled_once(inner, max_norm_ratio, max_norm, decay, action):
    tx = limit_spikes(inner, max_norm_ratio, max_norm=max_norm, decay=decay, action=action)
    return tx.init, jax.jit(tx.update)


def run(norms, max_norm_ratio=5.0, *, inner=IDENTITY, **options):
    """Spike or not for each norm, from the counter, and the last state."""
    init, update = compiled(inner, max_norm_ratio, **options)
    state, spikes = init(PARAMS), []
    for t, norm in enumerate(norms):
        before = int(state.spike_count)
        updates, state = update(gradient(norm, t), state, PARAMS)
        spikes.append(int(state.spike_count) - before == 1)
        if spikes[-1] and options.get("action") != "clip":
            assert not any(np.any(u) for u in jax.tree.leaves(updates))
    return np.array(spikes), state


@every_action
@pytest.mark.parametrize("decay", [0.0, 0.9, 0.99])
def test_spikes_are_those_of_the_oracle(action, decay):
    rng = np.random.default_rng(1)
    norms = np.exp(rng.normal(size=150))
    norms[rng.random(150) < 0.1] *= 30
    norms[[20, 21]] = 0
    spikes, limits = oracle(norms, 3.0, decay)
    near = np.abs(norms / np.maximum(limits, 1e-9) - 1) < 1e-4
    found, state = run(norms, 3.0, decay=decay, action=action)
    assert spikes.sum() > 10 and not near.any()
    np.testing.assert_array_equal(found, spikes)
    assert int(optax.tree.get(state, "spike_count")) == spikes.sum()
    assert int(optax.tree.get(state, "norm_count")) == 148


def test_a_skipped_spike_is_no_step():
    norms = [1.0] * 12 + [40.0] + [1.0] * 5
    inner = adamax(optax.exponential_decay(0.1, 3, 0.5), m_dtype="int8", v_dtype="uint8")
    _, state = run(norms, inner=inner)
    update, expected = jax.jit(inner.update), inner.init(PARAMS)
    for t, norm in enumerate(norms):
        if norm == 1.0:
            _, expected = update(gradient(norm, t), expected, PARAMS)
    jax.tree.map(np.testing.assert_array_equal, state.inner_state, expected)


def test_a_clipped_spike_has_the_norm_of_the_limit():
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
def test_one_spike_does_not_poison_the_average(action):
    """Whatever its size, it raises the average by a factor of 1 + (1 - d)(c - 1) at most."""
    for size in (1e2, 1e10, 1e30, np.inf):
        steady = run([1.0] * 50, action=action)[1]
        struck = run([1.0] * 50 + [size], action=action)[1]
        assert int(struck.spike_count) == 1

        def mean(state):
            return float(state.norm_ema) / (1 - 0.99 ** int(state.norm_count))

        assert 1 < mean(struck) / mean(steady) < 1 + 2.6 * 0.01 * 4  # young averages move faster
    later = run([1.0] * 500 + [1e30], action=action)[1]
    assert mean(later) < 1 + 1.02 * 0.01 * 4


@every_action
@pytest.mark.parametrize("factor", [6.0, 100.0, 1e4])
def test_a_lasting_change_is_accepted_after_the_stated_steps(action, factor):
    c, d = 5.0, 0.99
    stated = np.log(factor / c) / np.log(1 + (1 - d) * (c - 1))
    spikes, _ = run([1.0] * 400 + [factor] * (int(stated) + 10), c, decay=d, action=action)
    assert not spikes[:400].any() and spikes[400]
    waited = spikes.sum()
    assert not spikes[400 + waited :].any()
    assert abs(waited - stated) <= 2 + 0.02 * stated


@every_action
def test_smaller_gradients_are_no_spikes_and_silence_is_no_measure(action):
    """After a million steps without a gradient the first one is none either."""
    spikes, state = run([1.0] * 20 + [1e-3] * 20 + [0.0] * 20, action=action)
    silent = state._replace(norm_count=np.int32(2**31 - 1))
    assert not spikes.any()
    _, update = compiled(action=action)
    _, after = update(gradient(0.0), silent, PARAMS)
    assert float(after.norm_ema) == float(silent.norm_ema) and int(after.norm_count) == 2**31 - 1
    _, after = update(gradient(1e-2), after, PARAMS)
    assert int(after.spike_count) == 0 and int(after.norm_count) == 2**31 - 1


@every_action
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_reaches_the_policy_inside(action, bad):
    """NaN always, and infinity when it is clipped; the average keeps out of it."""
    _, state = run([1.0] * 12, inner=SKIP_STEP, action=action)
    g = {**gradient(1.0), "a": np.full(3, bad, np.float32)}
    updates, after = compiled(SKIP_STEP, 5.0, action=action)[1](g, state, PARAMS)
    assert not any(np.any(u) for u in jax.tree.leaves(updates))
    inside = np.isnan(bad) or action == "clip"
    assert int(optax.tree.get(after, "nonfinite_count")) == inside
    assert int(after.spike_count) == np.isinf(bad)
    assert np.isfinite(after.norm_ema)
    jax.tree.map(np.testing.assert_array_equal, after.inner_state.inner_state,
                 state.inner_state.inner_state)  # fmt: skip


def test_clipping_keeps_the_dtype_and_the_direction_of_every_leaf():
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


@every_action
def test_scan_vmap_and_sharded_agree(action):
    norms = [1.0] * 12 + [50.0, 1.0]
    gradients = np.stack([gradient(n, t)["a"] for t, n in enumerate(norms)])
    gradients = np.tile(gradients, (1, 8))
    tx = limit_spikes(optax.sgd(0.1, momentum=0.9), 5.0, action=action)

    def run_on(gradients, init=tx.init, update=tx.update):
        state = init(gradients[0])
        for g in gradients:
            updates, state = update(g, state)
        return updates, state

    expected = run_on(gradients, update=jax.jit(tx.update))
    assert int(expected[1].spike_count) == 1
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)

    def body(state, g):
        updates, state = tx.update(g, state)
        return state, updates

    state, updates = jax.lax.scan(body, tx.init(gradients[0]), gradients)
    jax.tree.map(close, (np.asarray(updates)[-1], state), expected)
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    split = [jax.device_put(g, jax.NamedSharding(mesh, jax.P("x"))) for g in gradients]
    jax.tree.map(close, run_on(split, update=jax.jit(tx.update)), expected)
    both = np.stack([gradients, np.ones_like(gradients)], axis=1)
    _, state = run_on(both, jax.jit(jax.vmap(tx.init)), jax.jit(jax.vmap(tx.update)))
    np.testing.assert_array_equal(state.spike_count, [1, 0])


def test_a_fixed_limit_holds_from_the_first_step_on():
    spikes, state = run([99.0, 101.0, 50.0, np.inf, 101.0], None, max_norm=100.0)
    np.testing.assert_array_equal(spikes, [False, True, False, True, True])
    assert int(state.spike_count) == 3


def test_the_lower_of_two_limits_counts():
    norms = [1.0] * 12 + [6.0, 4.0, 11.0] + [3.0] * 300 + [11.0, 9.0]
    spikes, _ = run(norms, 5.0, max_norm=10.0)
    np.testing.assert_array_equal(np.flatnonzero(spikes), [12, 14, len(norms) - 2])


def test_a_fixed_limit_clips():
    tx = limit_spikes(optax.identity(), max_norm=2.0, action="clip")
    updates, _ = tx.update(gradient(50.0), tx.init(PARAMS))
    np.testing.assert_allclose(norm_of(updates), 2.0, rtol=1e-5)


@pytest.mark.parametrize(
    "limits", [{}, {"max_norm": 0.0}, {"max_norm": -1.0}, {"max_norm_ratio": 1.0}]
)
def test_limits_that_are_none(limits):
    with pytest.raises(ValueError, match=r"max_norm|max_norm_ratio"):
        limit_spikes(adamax(0.1), **limits)


@every_action
def test_updates_may_be_wider_than_gradients(action):
    """The branches of a cond would differ in dtype."""
    params = {"w": np.ones(4, np.float32)}
    tx = limit_spikes(adamaxw(0.1), max_norm=10.0, action=action)
    state, u = tx.init(params), {}
    update = jax.jit(tx.update)
    for norm, spikes in ((1.0, 0), (100.0, 1)):
        with jax.numpy_dtype_promotion("standard"):  # the decay is optax's
            u, state = update({"w": np.full(4, norm, jnp.bfloat16)}, state, params)
        assert int(state.spike_count) == spikes
    assert np.any(u["w"]) == (action == "clip")


MAPPED, REPLICATED = P("x"), P()
ONES = np.ones(16, np.float32)
LARGE = np.where(np.arange(16) == 3, np.float32(99), ONES)


def sharded_update(tx, *, check_vma=True, mapped=MAPPED):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    state_spec = optax.tree.map_params(
        tx, lambda _: mapped, tx.init(ONES), transform_non_params=lambda _: REPLICATED
    )
    return jax.jit(
        jax.shard_map(
            lambda g, state: tx.update(g, state),
            mesh=mesh,
            in_specs=(mapped, state_spec),
            out_specs=(mapped, state_spec),
            check_vma=check_vma,
        )
    )


@every_action
@pytest.mark.parametrize("check_vma", [True, False])
def test_devices_of_shard_map_agree(action, check_vma):
    """The norm is that of all parts: the large element, on one device, stops every device."""
    tx = limit_spikes(TRACE, max_norm=10.0, action=action, axis_name="x")
    update = sharded_update(tx, check_vma=check_vma)
    init, expected = compiled(TRACE, None, max_norm=10.0, action=action)
    state = other = init(ONES)
    for g in (ONES, LARGE, np.float32(2.6) * ONES):
        u, state = update(g, state)
        v, other = expected(g, other)
        close = functools.partial(np.testing.assert_allclose, rtol=1e-6)
        jax.tree.map(close, (u, state), (v, other))
    assert int(state.spike_count) == 2  # 16 times 2.6**2 is above 100


def test_devices_that_would_not_agree_are_refused():
    tx = limit_spikes(optax.trace(0.5), 5.0)
    with pytest.raises(ValueError, match="write axis_name='x'"):
        sharded_update(tx)(ONES, tx.init(ONES))


def test_gradients_that_are_the_same_everywhere_are_counted_once():
    """Under shard_map JAX knows which parts are, whether the axis is named or not."""
    for axis_name in ("x", None):
        tx = limit_spikes(optax.trace(0.5), max_norm=10.0, axis_name=axis_name)
        _, state = sharded_update(tx, mapped=REPLICATED)(2 * ONES, tx.init(ONES))
        assert int(state.spike_count) == 0  # the norm is 8; counted eight times it would be 22
        np.testing.assert_allclose(state.norm_ema, 0.08, rtol=1e-5)


def test_devices_of_pmap_agree():
    tx = limit_spikes(optax.trace(0.5), max_norm=10.0, axis_name="i")
    g = np.float32([[1, 1, 1, 1], [99, 1, 1, 1]])
    state = jax.tree.map(lambda x: np.stack([x, x]), tx.init(g[0]))
    u, state = jax.pmap(tx.update, axis_name="i", devices=jax.devices()[:2])(g, state)
    assert not np.any(u)
    np.testing.assert_array_equal(state.spike_count, [1, 1])


def test_hyperparameters_may_be_scheduled_and_arguments_reach_the_inner_one():
    schedule = optax.linear_schedule(10.0, 2.0, 20)
    with jax.numpy_dtype_promotion("standard"):
        tx = optax.inject_hyperparams(limit_spikes, static_args=("inner", "action"))(
            optax.identity(), schedule
        )
        state, update = tx.init(PARAMS), jax.jit(tx.update)
        for t in range(25):
            _, state = update(gradient(1.0, t), state)
        _, state = update(gradient(3.0), state)
    assert int(optax.tree.get(state, "spike_count")) == 1
    plateau = optax.contrib.reduce_on_plateau(factor=0.5, patience=1)
    tx = limit_spikes(plateau, 5.0)
    with jax.numpy_dtype_promotion("standard"):
        updates, _ = jax.jit(tx.update)(PARAMS, tx.init(PARAMS), PARAMS, value=np.float32(1.0))
    jax.tree.map(np.testing.assert_array_equal, updates, PARAMS)


def test_the_counts_stop_at_their_largest():
    _, update = compiled()
    state = LimitSpikesState((optax.EmptyState()), *(np.int32(2**31 - 1), np.float32(1.0)),
                       np.int32(2**31 - 1))  # fmt: skip
    _, state = update(gradient(100.0), state, PARAMS)
    assert int(state.spike_count) == int(state.norm_count) == 2**31 - 1


def test_the_state_can_be_donated():
    tx = limit_spikes(adamax(0.1), 5.0)
    state = jax.jit(tx.update, donate_argnums=1)(PARAMS, tx.init(PARAMS))[1]
    assert int(state.norm_count) == 1


def test_a_run_is_continued_under_a_limit():
    plain = adamax(0.1)
    state = jax.jit(plain.update)(PARAMS, plain.init(PARAMS))[1]
    tx = limit_spikes(plain, 5.0)
    with pytest.raises(TypeError, match=r"init\(params\)\._replace\(inner_state=state\)"):
        tx.update(PARAMS, state)
    _, state = jax.jit(tx.update)(PARAMS, tx.init(PARAMS)._replace(inner_state=state))
    assert int(optax.tree.get(state, "count")) == 2
