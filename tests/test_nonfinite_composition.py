"""Policies for non-finite gradients compose with scan, vmap, sharding, wrappers and conversion."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.tree
import pytest
from compiled import copies, passes, since_010, train_step
from nonfinite_runs import (
    BAD_STEPS,
    PARAMS,
    SCHEDULE,
    adamax_with,
    adamaxw_of,
    assert_same,
    clean_gradients,
    every_policy,
    run,
    some_pairs,
    spoiled,
)
from parameters import formats

from optax_adamax import (
    HandleNonfiniteState,
    ScaleByAdamaxState,
    adamax,
    adamaxw,
    decode_state,
    encode_state,
    scale_by_adamax,
)
from optax_adamax.compat import optax as compat_optax
from tests.oracle.formats import FORMATS, SOME_FORMATS


@some_pairs
def test_scan_equals_the_loop(policy, m_dtype, v_dtype):
    gradients, _ = spoiled(clean_gradients())
    tx = adamaxw_of(m_dtype, v_dtype, nonfinite=policy)
    _, expected_params, expected = run(tx, gradients)[-1]

    @jax.jit
    def scan(gradients):
        def body(carry, g):
            params, state = carry
            updates, state = tx.update(g, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(body, (PARAMS, tx.init(PARAMS)), gradients)[0]

    params, state = scan(jax.tree.map(lambda *g: np.stack(g), *gradients))
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(close, (params, state), (expected_params, expected))
    assert int(state.nonfinite_count) == int(expected.nonfinite_count) > 0


@some_pairs
def test_sharded_devices_agree(policy, m_dtype, v_dtype):
    """The bad element is on one of eight devices; all devices skip and count."""
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    sharded = jax.NamedSharding(mesh, jax.P("x"))
    rng = np.random.default_rng(0)
    gradients = rng.normal(size=(6, 64)).astype(np.float32)
    gradients[2, 37], gradients[4, [0, 63]] = np.nan, np.inf
    tx = adamaxw_of(m_dtype, v_dtype, nonfinite=policy)
    place = functools.partial(jax.device_put, device=sharded)
    _, params, state = run(tx, [place(g) for g in gradients], place(np.ones(64, np.float32)))[-1]
    _, expected, alone = run(tx, gradients, np.ones(64, np.float32))[-1]
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(close, (params, state), (expected, alone))
    counts = {int(shard.data) for shard in state.nonfinite_count.addressable_shards}
    assert len(state.nonfinite_count.addressable_shards) == 8
    assert counts == {2 if policy == "skip_step" else 3}


@every_policy
def test_vmap_decides_per_row(policy):
    tx = scale_by_adamax(m_dtype="int8", v_dtype="uint8", nonfinite=policy)
    g = np.random.default_rng(0).normal(size=(4, 3, 16)).astype(np.float32)
    g[2, 1, 5] = np.nan
    params = np.zeros((3, 16), np.float32)
    state, update = jax.jit(jax.vmap(tx.init))(params), jax.jit(jax.vmap(tx.update))
    for x in g:
        updates, state = update(x, state)
    updates = np.asarray(updates)
    np.testing.assert_array_equal(state.nonfinite_count, [0, 1, 0])
    for row in range(3):
        alone, _, expected = run(tx, g[:, row], params[row])[-1]
        np.testing.assert_allclose(updates[row], alone, rtol=1e-5, atol=1e-6)
        assert int(expected.inner_state.count) == np.asarray(state.inner_state.count)[row]


@every_policy
def test_inject_hyperparams_and_apply_if_finite_compose(policy):
    gradients, _ = spoiled(clean_gradients())
    tx = optax.inject_hyperparams(adamaxw, static_args=("nonfinite", "mask"))(
        learning_rate=SCHEDULE, mask=None, nonfinite=policy
    )
    with jax.numpy_dtype_promotion("standard"):
        _, params, state = run(tx, gradients)[-1]
    expected = 6 if policy == "zero" else len(BAD_STEPS)
    assert int(optax.tree.get(state, "nonfinite_count")) == expected
    assert all(np.all(np.isfinite(p)) for p in jax.tree.leaves(params))
    around = optax.apply_if_finite(adamax_with(policy), 2)
    _, params, state = run(around, gradients)[-1]
    assert int(state.total_notfinite) == len(BAD_STEPS)
    assert int(optax.tree.get(state, "nonfinite_count")) == 0  # apply_if_finite skips them all
    persistent = [jax.tree.map(lambda g: g * np.float32(np.nan), gradients[1])] * 5
    _, params, state = run(around, persistent)[-1]  # more than apply_if_finite skips in a row
    assert int(optax.tree.get(state, "nonfinite_count")) == 3 * (
        sum(np.size(p) for p in jax.tree.leaves(PARAMS)) if policy == "zero" else 1
    )
    assert_same(params, PARAMS)


@every_policy
def test_traced_hyperparameters_work(policy):
    ones, g = np.ones(2, np.float32), np.float32([1.0, np.nan])

    @jax.jit
    def two_steps(b1, b2):
        tx = scale_by_adamax(b1, b2, v_dtype="bfloat16", nonfinite=policy)
        updates, state = tx.update(g, tx.update(ones, tx.init(ones))[1])
        return updates, decode_state(state)

    updates, state = map(jax.device_get, two_steps(0.9, 0.5))
    expected = 0.5 if policy == "zero" else 1.0
    np.testing.assert_allclose(state.inner_state.v[1], expected, rtol=1e-6)
    momentum = 0.09 / 0.19 / 0.5  # m of one gradient over a v that has halved
    np.testing.assert_allclose(updates[1], momentum if policy == "zero" else 0, rtol=1e-6)


@every_policy
def test_none_masks_and_empty_trees_work(policy):
    tx = adamax_with(policy)
    updates, state = tx.update((), tx.init(()))
    assert updates == () and int(state.nonfinite_count) == 0
    masked = optax.masked(tx, {"a": True, "b": False})
    gradients = {"a": np.float32([np.nan]), "b": np.float32([np.nan])}
    updates, state = masked.update(gradients, masked.init(gradients))
    assert np.asarray(updates["a"]) == 0 and np.isnan(updates["b"])
    assert int(optax.tree.get(state, "nonfinite_count")) == 1
    empty = np.zeros((0, 3), np.float32)
    assert int(jax.jit(tx.update)(empty, tx.init(empty))[1].nonfinite_count) == 0


@every_policy
def test_plain_state_is_converted_and_continued(policy):
    """The state of a run without a policy is also converted to another storage format."""
    gradients, _ = spoiled(clean_gradients())
    plain_tx = adamaxw_of("float32", "float32")
    _, params, plain = run(plain_tx, clean_gradients())[-1]
    tx = adamaxw_of("int8", "uint8", nonfinite=policy)
    empty = tx.init(params)
    state = empty._replace(inner_state=encode_state(plain, "int8", "uint8"))
    assert jax.tree.map(jax.typeof, state) == jax.tree.map(jax.typeof, empty)
    _, _, state = run(tx, gradients, params, state)[-1]
    assert int(state.nonfinite_count) > 0
    decoded = decode_state(state)
    assert (
        isinstance(decoded, HandleNonfiniteState)
        and decoded.nonfinite_count == state.nonfinite_count
    )
    assert decoded.inner_state[0].m["a"].dtype == jnp.float32
    again = encode_state(state, "int8", "uint8")
    assert_same(again, state)


@every_policy
def test_optax_round_trip_resets_the_counter(policy):
    _, params, state = run(adamax_with(policy), clean_gradients())[-1]
    optax_state = compat_optax.dump_state(state, params, optax.adamax(0.1))
    assert_same(optax.tree.get(optax_state, "mu"), state.inner_state[0].m)
    back = compat_optax.load_state(optax_state, params, adamax_with(policy))
    assert_same(back.inner_state, state.inner_state)
    assert isinstance(back, HandleNonfiniteState) and int(back.nonfinite_count) == 0


@pytest.mark.parametrize("make", [scale_by_adamax, functools.partial(adamax, 0.1)])
def test_propagate_adds_no_state(make):
    state = make().init(PARAMS)
    found = state if isinstance(state, ScaleByAdamaxState) else state[0]
    assert isinstance(found, ScaleByAdamaxState)
    assert jax.tree.structure(make(nonfinite="propagate").init(PARAMS)) == jax.tree.structure(state)


@functools.cache
def train_step_of(size, m_dtype, v_dtype, policy):
    return train_step(adamaxw(1e-3, m_dtype=m_dtype, v_dtype=v_dtype, nonfinite=policy), size)


@since_010
@every_policy
@pytest.mark.parametrize("m_dtype, v_dtype", formats(FORMATS, SOME_FORMATS[::2]))
def test_policy_adds_one_reduction_and_no_copies(policy, m_dtype, v_dtype):
    size = 1 << 16
    plain, with_policy = (train_step_of(size, m_dtype, v_dtype, x) for x in ("propagate", policy))
    assert copies(with_policy, size) == 0
    assert passes(with_policy, size) == passes(plain, size)
    account = with_policy.memory_analysis()
    assert account.alias_size_in_bytes >= plain.memory_analysis().alias_size_in_bytes
    # A branch that counts the elements runs only if one of them is not finite.
    allowed = size // 16 if policy == "skip_step" else 5 * size
    assert account.temp_size_in_bytes <= allowed
