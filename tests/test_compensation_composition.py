"""`compensate_rounding` composes with other wrappers and with transformations of JAX."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.tree
import pytest
from compensated import (
    SGD,
    assert_equal,
    assert_same_masters,
    compiled,
    expected,
    gradients,
    optimizer,
    parameters,
    run,
)
from jax.sharding import PartitionSpec as P

from optax_adamax import (
    adamax,
    compensate_rounding,
    limit_spikes,
    master_params,
    pack_small_leaves,
)

STORAGE = {
    "8 bytes": (None, None),
    "4 bytes": ("bfloat16", "bfloat16"),
    "2 bytes": ("int8", "uint8"),
}


@pytest.mark.parametrize(
    "storage", ["8 bytes", pytest.param("4 bytes", marks=pytest.mark.slow), "2 bytes"]
)
def test_master_parameters_follow_the_float32_run(storage):
    """The two runs differ only by the rounding of the residual."""
    m_dtype, v_dtype = STORAGE[storage]
    inner = adamax(2.0**-10, m_dtype=m_dtype, v_dtype=v_dtype)
    params, sequence = {"a": parameters()["a"]}, gradients({"a": parameters()["a"]})
    to_float32 = functools.partial(jax.tree.map, lambda x: np.asarray(x).astype(np.float32))
    expected, _ = run(inner, to_float32(params), list(map(to_float32, sequence)))
    for residual_dtype, tolerance in (("int8", 2.0**-13), ("int16", 2.0**-21)):
        found, state = run(compensate_rounding(inner, residual_dtype), params, sequence)
        close = functools.partial(np.testing.assert_allclose, rtol=tolerance, atol=tolerance / 16)
        jax.tree.map(close, master_params(state, found), expected)


def test_vmap_scan_and_pmap_agree():
    tx, params = optimizer(), parameters()
    stacked = jax.tree.map(lambda *x: np.stack(x), *gradients())

    def train(params, sequence):
        def step(carry, g):
            params, state = carry
            updates, state = tx.update(g, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, tx.init(params)), sequence)[0]

    pair = jax.tree.map(lambda x: np.stack([x, np.asarray(x) + x.dtype.type(1)]), params)
    twice = jax.tree.map(lambda x: np.stack([x, x]), stacked)
    with jax.numpy_dtype_promotion("standard"):
        batched = jax.jit(jax.vmap(train))(pair, twice)
        mapped = jax.pmap(train, devices=jax.devices()[:2])(pair, twice)
    assert_equal(batched, mapped)
    assert_equal(jax.tree.map(lambda x: np.asarray(x)[0], batched), expected())


def test_shard_map_agrees():
    """Gradients, parameters and residuals are sharded over the devices."""
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    tx, params, whole = optimizer(), parameters(), gradients(steps=1)
    (expected_params, expected_state), params = run(tx, params, whole), {"a": params["a"]}
    state, g = tx.init(params), {"a": whole[0]["a"]}
    specs = jax.tree.map(lambda x: P("x") if x.ndim else P(), (params, state, g))
    step = jax.shard_map(compiled(tx).__wrapped__, mesh=mesh, in_specs=specs, out_specs=specs[:2])
    with jax.numpy_dtype_promotion("standard"):
        found = jax.jit(step)(params, state, g)
    assert_equal(found[0]["a"], expected_params["a"])
    for name in ("int8", "trace"):
        of_found, of_all = (optax.tree.get(s, name)["a"] for s in (found[1], expected_state))
        assert_equal(of_found, of_all)


def test_masked_and_partition_compensate_the_selected_leaves():
    params, sequence = parameters(), gradients()
    masters = master_params(*reversed(expected()))
    masked = optax.chain(
        optax.masked(optimizer(), {"a": True, "b": False, "c": True}),
        optax.masked(SGD, {"a": False, "b": True, "c": False}),
    )
    label = {"a": "x", "b": "y", "c": "x"}
    parts = optax.partition({"x": optimizer(), "y": SGD}, label)
    for wrapped in (masked, parts):
        found = run(wrapped, params, sequence)
        of_found = master_params(found[1], found[0])
        assert_equal(of_found["a"], masters["a"])
        assert of_found["b"] is found[0]["b"]
        assert_equal(of_found["c"], masters["c"])


def test_partition_with_two_residuals_has_both_masters():
    tx = optax.partition(
        {"x": optimizer(), "y": optimizer("int16")}, {"a": "x", "b": "y", "c": "y"}
    )
    params, state = run(tx, parameters(), gradients())
    masters = master_params(state, params)
    assert_equal(masters["a"], master_params(*reversed(expected()))["a"])
    assert_equal(masters["b"], master_params(*reversed(expected("int16")))["b"])


def test_multi_steps_inside_and_outside_accumulates():
    """Inside, MultiSteps accumulates float32 gradients. Outside, it rounds the mean to bfloat16."""
    params, sequence = parameters(), gradients()
    twice = [g for g in sequence for _ in range(2)]
    inside = compensate_rounding(optax.MultiSteps(SGD, 2))
    found = run(inside, params, twice)
    # MultiSteps doubles the outer count, so the residuals round with other bits.
    assert_equal(found[1].inner_state.inner_opt_state, expected()[1].inner_state)
    close = functools.partial(np.testing.assert_allclose, rtol=2.0**-12, atol=2.0**-16)
    jax.tree.map(close, *(master_params(s, p) for p, s in (found, expected())))
    sums = jax.tree.leaves(found[1].inner_state.acc_grads)
    assert all(x.dtype == jnp.float32 for x in sums)
    around = optax.MultiSteps(optimizer(), 2).gradient_transformation()
    assert_same_masters(run(around, params, twice), expected())


@pytest.mark.parametrize("guard", ["apply_if_finite", "conditionally_mask", "limit_spikes"])
def test_guards_inside_skip_steps(guard):
    """In compensate_rounding(guard(tx)), both branches of the guard have float32 updates."""
    inner = {
        "apply_if_finite": lambda: optax.apply_if_finite(SGD, 5),
        "conditionally_mask": lambda: optax.conditionally_mask(SGD, lambda step, **_: step != 3),
        "limit_spikes": lambda: limit_spikes(SGD, max_norm=100.0),
    }[guard]()
    params, sequence = parameters(), gradients()
    tx = compensate_rounding(inner, "int16")
    bad = jnp.nan if guard == "apply_if_finite" else 1e4
    bad = jax.tree.map(lambda p: np.full(p.shape, bad, p.dtype), params)
    half = run(tx, params, sequence[:3])
    skipped = run(tx, *half[:1], [bad], half[1])
    assert_equal(skipped[0], half[0])
    assert_equal(skipped[1].residual, half[1].residual)
    found = run(tx, skipped[0], sequence[3:], skipped[1])
    assert_equal(found[0], expected("int16")[0])
    assert_equal(found[1].residual, expected("int16")[1].residual)


@pytest.mark.parametrize(
    "guard",
    [
        lambda tx: optax.apply_if_finite(tx, 5),
        lambda tx: optax.conditionally_mask(tx, lambda step, **_: step != 3),
    ],
)
def test_guards_of_optax_outside_are_rejected_by_jax(guard):
    """If this test fails, optax supports these compositions, and the guide must be changed."""
    params, tx = parameters(), guard(optimizer())
    with pytest.raises(TypeError, match=r"differ"):
        run(tx, params, gradients(steps=1))


def test_limit_spikes_and_clipping_outside_work():
    params, sequence = parameters(), gradients()
    tx = limit_spikes(optimizer(), max_norm=100.0)
    half = run(tx, params, sequence[:3])
    spike = jax.tree.map(lambda p: np.full(p.shape, 1e4, p.dtype), params)
    skipped = run(tx, half[0], [spike], half[1])
    assert int(skipped[1].spike_count) == 1
    assert_equal((skipped[0], skipped[1].inner_state), (half[0], half[1].inner_state))
    found = run(tx, skipped[0], sequence[3:], skipped[1])
    assert_equal((found[0], found[1].inner_state), expected())
    clipped = run(optax.chain(optax.clip_by_global_norm(1e9), optimizer()), params, sequence)
    assert_equal((clipped[0], clipped[1][1]), expected())


def test_pack_small_leaves_inside_and_outside_agree():
    """Inside, residuals are not packed. Outside, they are packed into the buffers."""
    params, sequence = parameters(), gradients()
    inside = run(compensate_rounding(pack_small_leaves(SGD)), params, sequence)
    assert_same_masters(inside, expected())
    around = run(pack_small_leaves(optimizer()), params, sequence)
    assert_equal(around[0], expected()[0])
    with pytest.raises(ValueError, match=r"compensate_rounding\(pack_small_leaves"):
        master_params(around[1], around[0])
