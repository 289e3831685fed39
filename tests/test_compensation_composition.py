"""compensate_rounding around and inside others, under JAX's transformations, and in checkpoints."""

import functools

import equinox as eqx
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.tree
import orbax.checkpoint as ocp
import pytest
from compiled import since_010, train_step
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from optax_adamax import (
    CompensateRoundingState,
    adamax,
    adamaxw,
    compensate_rounding,
    decode_state,
    encode_state,
    limit_spikes,
    master_params,
    pack_small_leaves,
    sharding,
)

STORAGE = {
    "8 bytes": (None, None),
    "4 bytes": ("bfloat16", "bfloat16"),
    "2 bytes": ("int8", "uint8"),
}
STEPS = 12
# A power of two, with which no product and sum are rounded apart in one program only.
SGD = optax.sgd(2.0**-10, momentum=0.5)


def parameters():
    rng = np.random.default_rng(0)
    return {
        "a": jnp.asarray(rng.normal(size=(8, 16)), jnp.bfloat16),
        "b": jnp.asarray(rng.normal(size=8), jnp.bfloat16),
        "c": jnp.asarray(rng.normal(size=8), jnp.float32),
    }


def gradients(params=None, steps=STEPS, seed=1):
    rng = np.random.default_rng(seed)
    params = parameters() if params is None else params
    return [
        jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), p.dtype), params)
        for _ in range(steps)
    ]


@functools.cache
def optimizer(residual_dtype="int8"):
    return compensate_rounding(SGD, residual_dtype)


@functools.cache
def compiled(tx):
    @jax.jit
    def step(params, state, g):
        updates, state = tx.update(g, state, params)
        return optax.apply_updates(params, updates), state

    return step


def run(tx, params, sequence, state=None):
    """Parameters and state; apply_updates adds float32 to 16 bits, which strict modes refuse."""
    step = compiled(tx)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        state = tx.init(params) if state is None else state
        for g in sequence:
            params, state = step(params, state, g)
    return params, state


@functools.cache
def expected(residual_dtype="int8"):
    """The run that the others are compared with."""
    return run(optimizer(residual_dtype), parameters(), gradients())


def assert_equal(tree, other):
    jax.tree.map(np.testing.assert_array_equal, tree, other)


def assert_same_masters(run, other):
    assert_equal(*(master_params(state, params) for params, state in (run, other)))


@pytest.mark.parametrize(
    "storage", ["8 bytes", pytest.param("4 bytes", marks=pytest.mark.slow), "2 bytes"]
)
def test_masters_are_the_float32_run(storage):
    """The true parameters are those of a float32 run with the same gradients."""
    m_dtype, v_dtype = STORAGE[storage]
    inner = adamax(2.0**-10, m_dtype=m_dtype, v_dtype=v_dtype)
    params, sequence = {"a": parameters()["a"]}, gradients({"a": parameters()["a"]})
    widened = functools.partial(jax.tree.map, lambda x: np.asarray(x).astype(np.float32))
    wide, _ = run(inner, widened(params), list(map(widened, sequence)))
    for residual_dtype, tolerance in (("int8", 2.0**-13), ("int16", 2.0**-21)):
        found, state = run(compensate_rounding(inner, residual_dtype), params, sequence)
        close = functools.partial(np.testing.assert_allclose, rtol=tolerance, atol=tolerance / 16)
        jax.tree.map(close, master_params(state, found), wide)


def test_vmap_of_scan_and_pmap():
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


def test_shard_map():
    """Gradients are split over the devices, parameters and residuals with them."""
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


def test_masked_and_partition():
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


def test_partition_with_two_residuals():
    tx = optax.partition(
        {"x": optimizer(), "y": optimizer("int16")}, {"a": "x", "b": "y", "c": "y"}
    )
    params, state = run(tx, parameters(), gradients())
    masters = master_params(state, params)
    assert_equal(masters["a"], master_params(*reversed(expected()))["a"])
    assert_equal(masters["b"], master_params(*reversed(expected("int16")))["b"])


def test_multi_steps_inside_and_around():
    """Inside, what is accumulated is of float32; around, the mean is rounded to bfloat16."""
    params, sequence = parameters(), gradients()
    twice = [g for g in sequence for _ in range(2)]
    inside = compensate_rounding(optax.MultiSteps(SGD, 2).gradient_transformation())
    found = run(inside, params, twice)
    # Its thresholds are those of every second count.
    assert_equal(found[1].inner_state.inner_opt_state, expected()[1].inner_state)
    close = functools.partial(np.testing.assert_allclose, rtol=2.0**-12, atol=2.0**-16)
    jax.tree.map(close, *(master_params(s, p) for p, s in (found, expected())))
    sums = jax.tree.leaves(found[1].inner_state.acc_grads)
    assert all(x.dtype == jnp.float32 for x in sums)
    around = optax.MultiSteps(optimizer(), 2).gradient_transformation()
    assert_same_masters(run(around, params, twice), expected())


@pytest.mark.parametrize("guard", ["apply_if_finite", "conditionally_mask", "limit_spikes"])
def test_guards_go_inside(guard):
    """compensate_rounding(guard(tx)): both branches of optax's own have float32 updates then."""
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
def test_guards_of_optax_around_are_refused_by_jax(guard):
    """Should this fail, optax has learned it, and the guide need not say so any more."""
    params, tx = parameters(), guard(optimizer())
    with pytest.raises(TypeError, match=r"differ"):
        run(tx, params, gradients(steps=1))


def test_limit_spikes_and_clipping_around():
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


def test_average_of_the_true_parameters():
    average = optax.ema(0.9, debias=False)

    def train(masters_of):
        tx, params, masters_of = optimizer(), parameters(), jax.jit(masters_of)
        state, update = tx.init(params), jax.jit(average.update)
        seen = average.init(masters_of(state, params))
        for g in gradients():
            params, state = run(tx, params, [g], state)
            mean, seen = update(masters_of(state, params), seen)
        return mean

    of_masters = train(master_params)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(of_masters))
    stored = train(lambda state, params: params)
    # The average of what is stored is off by up to half an ulp, that of the masters is not.
    assert (np.asarray(of_masters["a"]) != np.asarray(stored["a"]).astype(np.float32)).any()
    assert jax.tree.structure(of_masters) == jax.tree.structure(parameters())


@pytest.mark.parametrize("zero1_axis", [None, "data"])
def test_sharded(zero1_axis):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    place = P("data") if zero1_axis is None else P()
    tx = optimizer()
    params, sequence = jax.device_put((parameters(), gradients()), NamedSharding(mesh, place))
    sharded = sharding.shard(tx, params, zero1_axis=zero1_axis)
    state = sharded.init(params)
    residual = state.residual.int8["a"]
    assert residual.addressable_shards[0].data.size == residual.size // 8
    found = run(sharded, params, sequence, state)
    assert_equal(found, expected())
    assert found[1].residual.int8["a"].sharding.is_equivalent_to(residual.sharding, 2)
    if zero1_axis is None:
        eager = tx.init(params).residual.int8["a"]
        assert eager.sharding.is_equivalent_to(params["a"].sharding, 2)


@pytest.mark.parametrize("kind", ["pinned_host", "unpinned_host"])
def test_masters_of_a_state_in_host_memory(kind):
    params, state = expected()
    if kind not in {m.kind for m in jax.devices()[0].addressable_memories()}:
        pytest.skip(f"this version of JAX has no {kind} on CPU")
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0], memory_kind=kind)
    hosted = jax.device_put(state, place)
    assert_equal(master_params(hosted, params), master_params(state, params))
    assert_equal(jax.jit(master_params)(hosted, params), master_params(state, params))


def test_checkpoints_are_resumed(tmp_path):
    tx, params, sequence = optimizer(), parameters(), gradients()
    half = run(tx, params, sequence[: STEPS // 2])
    zeros = jax.tree.map(lambda x: jnp.asarray(np.zeros(x.shape, x.dtype)), half)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "half", half)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "half", zeros)
    assert_equal(run(tx, restored[0], sequence[STEPS // 2 :], restored[1]), expected())
    restored = flax.serialization.from_bytes(zeros, flax.serialization.to_bytes(half))
    restored = jax.tree.map(jnp.asarray, restored)
    assert_equal(run(tx, restored[0], sequence[STEPS // 2 :], restored[1]), expected())


@pytest.mark.parametrize("kept", ["int8", "int16"])
def test_a_checkpoint_of_another_residual_is_refused(tmp_path, kept):
    """Orbax would cast the numbers, and with them every parameter would be wrong."""
    other = {"int8": "int16", "int16": "int8"}[kept]
    target = optimizer(other).init(parameters())
    _, state = expected(kept)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / kept, state)
        checkpointer.wait_until_finished()
        with pytest.raises(ValueError, match=other):
            checkpointer.restore(tmp_path / kept, target)
    with pytest.raises(ValueError, match=other):
        flax.serialization.from_bytes(target, flax.serialization.to_bytes(state))


def test_other_storage_in_mid_run_leaves_the_residual():
    tx = compensate_rounding(adamax(2.0**-10, m_dtype="int8", v_dtype="uint8"))
    params = {"a": parameters()["a"]}
    _, state = run(tx, params, gradients(params, steps=1))
    for other in (decode_state(state), encode_state(state, "bfloat16", "bfloat16")):
        assert_equal(other.residual, state.residual)


def test_the_state_is_mapped_like_parameters():
    tx, params = optimizer(), parameters()
    seen = optax.tree.map_params(
        tx,
        lambda leaf, p: leaf if isinstance(leaf, optax.MaskedNode) else leaf.shape == p.shape,
        tx.init(params),
        params,
        transform_non_params=lambda _: None,
        is_leaf=lambda x: isinstance(x, optax.MaskedNode),
    )
    assert seen.residual.int8 == {"a": True, "b": True, "c": optax.MaskedNode()}
    assert optax.tree.get(tx.init(params), "int8")["a"].dtype == jnp.int8


def test_init_takes_shapes_and_trees_with_holes():
    tx, params = optimizer(), {**parameters(), "d": None, "e": optax.MaskedNode()}
    state = tx.init(params)
    shapes = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), params)
    for other in (jax.eval_shape(tx.init, params), tx.init(shapes)):
        assert jax.tree.structure(other) == jax.tree.structure(state)
        assert [x.dtype for x in jax.tree.leaves(other)] == [
            x.dtype for x in jax.tree.leaves(state)
        ]
    found, _ = run(tx, params, [g | {"d": None, "e": optax.MaskedNode()} for g in gradients()])
    assert found.pop("d") is None and found.pop("e") == optax.MaskedNode()
    assert_equal(found, expected()[0])


@since_010
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("residual_dtype", ["int8", "int16"])
def test_memory_of_a_step(residual_dtype, dtype):
    """Beyond those of the inner one, only the old residual is copied, whatever the gradients."""
    n, width = 1 << 20, jnp.iinfo(residual_dtype).bits // 8
    tx = compensate_rounding(optax.sgd(3e-4), residual_dtype)
    with jax.numpy_dtype_promotion("standard"):
        memory = train_step(tx, n, jnp.bfloat16, dtype).memory_analysis()
    held = (2 + width + dtype.dtype.itemsize) * n
    assert memory.argument_size_in_bytes == pytest.approx(held, abs=100)
    assert memory.alias_size_in_bytes == pytest.approx((2 + width) * n, abs=100)
    assert memory.temp_size_in_bytes == pytest.approx(width * n, abs=5000)


def test_packed_state():
    """Packed inside, the residual is where it was; packed with it, in the buffers."""
    params, sequence = parameters(), gradients()
    inside = run(compensate_rounding(pack_small_leaves(SGD)), params, sequence)
    assert_same_masters(inside, expected())
    around = run(pack_small_leaves(optimizer()), params, sequence)
    assert_equal(around[0], expected()[0])
    with pytest.raises(ValueError, match=r"compensate_rounding\(pack_small_leaves"):
        master_params(around[1], around[0])


def test_equinox():
    """eqx.apply_updates adds without a cast: refused in the next step, with what to write."""
    key = jax.random.key(0)
    model = eqx.nn.Linear(2, 1, use_bias=False, key=key, dtype=jnp.bfloat16)
    tx = compensate_rounding(adamaxw(1e-3))
    arrays, rest = eqx.partition(model, eqx.is_inexact_array)
    state = tx.init(arrays)
    x = jnp.asarray(np.ones(2, jnp.bfloat16))
    update = jax.jit(tx.update)
    with jax.numpy_dtype_promotion("standard"):
        g = eqx.filter_jit(eqx.filter_grad(lambda model: model(x)[0]))(model)
        updates, state = update(g, state, arrays)
        wide = eqx.apply_updates(model, updates)
        with pytest.raises(TypeError, match=r"between eqx\.partition"):
            update(g, state, eqx.filter(wide, eqx.is_inexact_array))
        model = eqx.combine(optax.apply_updates(arrays, updates), rest)
    assert {a.dtype for a in jax.tree.leaves(eqx.filter(model, eqx.is_array))} == {
        jnp.dtype(jnp.bfloat16)
    }
    masters = master_params(state, eqx.filter(model, eqx.is_inexact_array))
    assert masters.weight.dtype == jnp.float32
    assert isinstance(state, CompensateRoundingState)
