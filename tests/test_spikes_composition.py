"""`limit_spikes` works in scan, vmap and on meshes, and with scheduled hyperparameters."""

import functools

import jax
import numpy as np
import optax
import optax.tree
import pytest
from jax.sharding import PartitionSpec as P
from spike_runs import PARAMS, compiled, every_action, gradient

from optax_adamax import adamax, limit_spikes

TRACE = optax.trace(0.5)
MAPPED, REPLICATED = P("x"), P()
ONES = np.ones(16, np.float32)
LARGE = np.where(np.arange(16) == 3, np.float32(99), ONES)


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
    sharded = [jax.device_put(g, jax.NamedSharding(mesh, jax.P("x"))) for g in gradients]
    jax.tree.map(close, run_on(sharded, update=jax.jit(tx.update)), expected)
    both = np.stack([gradients, np.ones_like(gradients)], axis=1)
    _, state = run_on(both, jax.jit(jax.vmap(tx.init)), jax.jit(jax.vmap(tx.update)))
    np.testing.assert_array_equal(state.spike_count, [1, 0])


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
def test_shard_map_devices_agree(action, check_vma):
    """The norm includes all shards, so a large element on one device limits every device."""
    tx = limit_spikes(TRACE, max_norm=10.0, action=action, axis_name="x")
    update = sharded_update(tx, check_vma=check_vma)
    init, expected = compiled(TRACE, None, max_norm=10.0, action=action)
    state = other = init(ONES)
    for g in (ONES, LARGE, np.float32(2.6) * ONES):
        u, state = update(g, state)
        v, other = expected(g, other)
        close = functools.partial(np.testing.assert_allclose, rtol=1e-6)
        jax.tree.map(close, (u, state), (v, other))
    assert int(state.spike_count) == 2  # the squared norm of 2.6 * ONES, 16 * 2.6**2, is above 100


def test_sharded_gradients_without_axis_name_raise():
    tx = limit_spikes(optax.trace(0.5), 5.0)
    with pytest.raises(ValueError, match="write axis_name='x'"):
        sharded_update(tx)(ONES, tx.init(ONES))


def test_replicated_gradients_are_counted_once():
    """Inside shard_map, types state which gradients are replicated, so axis_name is optional."""
    for axis_name in ("x", None):
        tx = limit_spikes(optax.trace(0.5), max_norm=10.0, axis_name=axis_name)
        _, state = sharded_update(tx, mapped=REPLICATED)(2 * ONES, tx.init(ONES))
        assert int(state.spike_count) == 0  # the norm is 8; counted eight times it would be 22
        np.testing.assert_allclose(state.norm_ema, 0.08, rtol=1e-5)


def test_pmap_devices_agree():
    tx = limit_spikes(optax.trace(0.5), max_norm=10.0, axis_name="i")
    g = np.float32([[1, 1, 1, 1], [99, 1, 1, 1]])
    state = jax.tree.map(lambda x: np.stack([x, x]), tx.init(g[0]))
    u, state = jax.pmap(tx.update, axis_name="i", devices=jax.devices()[:2])(g, state)
    assert not np.any(u)
    np.testing.assert_array_equal(state.spike_count, [1, 1])


def test_scheduled_hyperparameters_and_extra_arguments_work():
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


def test_state_can_be_donated():
    tx = limit_spikes(adamax(0.1), 5.0)
    state = jax.jit(tx.update, donate_argnums=1)(PARAMS, tx.init(PARAMS))[1]
    assert int(state.norm_count) == 1


def test_plain_run_continues_under_a_limit():
    plain = adamax(0.1)
    state = jax.jit(plain.update)(PARAMS, plain.init(PARAMS))[1]
    tx = limit_spikes(plain, 5.0)
    with pytest.raises(TypeError, match=r"init\(params\)\._replace\(inner_state=state\)"):
        tx.update(PARAMS, state)
    _, state = jax.jit(tx.update)(PARAMS, tx.init(PARAMS)._replace(inner_state=state))
    assert int(optax.tree.get(state, "count")) == 2
