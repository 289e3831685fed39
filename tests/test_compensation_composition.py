"""compensate_rounding in chains, under JAX's transformations, sharded, and through checkpoints."""

import functools

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.tree
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from optax_adamax import (
    adamax,
    adamaxw,
    compensate_rounding,
    decode_state,
    encode_state,
    master_params,
    pack_small_leaves,
    sharding,
    split_master_params,
)

STORAGE = {
    "8 bytes": (None, None),
    "4 bytes": ("bfloat16", "bfloat16"),
    "2 bytes": ("int8", "uint8"),
}
STEPS = 30


def parameters():
    rng = np.random.default_rng(0)
    return {
        "a": jnp.asarray(rng.normal(size=(8, 16)), jnp.bfloat16),
        "b": jnp.asarray(rng.normal(size=8), jnp.float16),
        "c": jnp.asarray(rng.normal(size=8), jnp.float32),
    }


def gradients(params=None, seed=1):
    rng = np.random.default_rng(seed)
    params = parameters() if params is None else params
    return [
        jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), p.dtype), params)
        for _ in range(STEPS)
    ]


def optimizer(storage="2 bytes"):
    m_dtype, v_dtype = STORAGE[storage]
    # A power of two, with which no product and sum are rounded apart in one program only.
    return optax.chain(adamax(2.0**-10, m_dtype=m_dtype, v_dtype=v_dtype), compensate_rounding())


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


def assert_equal(tree, other):
    jax.tree.map(np.testing.assert_array_equal, tree, other)


def assert_same_masters(run, other):
    assert_equal(*(master_params(state, params) for params, state in (run, other)))


@pytest.mark.parametrize("storage", STORAGE)
def test_masters_are_the_float32_run(storage):
    """The true parameters are those of a float32 run with the same gradients."""
    params, sequence = parameters(), gradients()
    m_dtype, v_dtype = STORAGE[storage]
    tx = adamax(2.0**-10, m_dtype=m_dtype, v_dtype=v_dtype)
    masters = jax.tree.map(lambda p: p.astype(jnp.float32), params)
    wide = [jax.tree.map(lambda g: g.astype(jnp.float32), g) for g in sequence]
    expected, _ = run(tx, masters, wide)
    for residual, tolerance in (("int8", 2.0**-13), ("int16", 2.0**-20)):
        # Gradients of float32: of 16 bits, their updates would be rounded to 16 bits.
        found = run(optax.chain(tx, compensate_rounding(residual)), params, wide)
        jax.tree.map(
            lambda x, y, tolerance=tolerance: np.testing.assert_allclose(
                x, y, rtol=tolerance, atol=tolerance
            ),
            master_params(found[1], found[0]),
            expected,
        )


def test_scan_and_vmap():
    tx, params, sequence = optimizer(), parameters(), gradients()
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *sequence)

    def train(params, sequence):
        def step(carry, g):
            params, state = carry
            updates, state = tx.update(g, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, tx.init(params)), sequence)[0]

    with jax.numpy_dtype_promotion("standard"):
        scanned = jax.jit(train)(params, stacked)
        batched = jax.jit(jax.vmap(train))(
            jax.tree.map(lambda x: jnp.stack([x, x + x.dtype.type(1)]), params),
            jax.tree.map(lambda x: jnp.stack([x, x]), stacked),
        )
    expected = run(tx, params, sequence)
    assert_equal(scanned, expected)
    assert_equal(jax.tree.map(lambda x: x[0], batched), expected)


def test_masked_and_partition():
    params, sequence = parameters(), gradients()
    masked = optax.chain(
        adamax(2.0**-10), optax.masked(compensate_rounding(), {"a": True, "b": False, "c": True})
    )
    label = {"a": "x", "b": "y", "c": "x"}
    tx = optax.chain(adamax(2.0**-10), compensate_rounding())
    parts = optax.partition({"x": tx, "y": adamax(2.0**-10)}, label)
    expected = run(tx, params, sequence)
    masters = master_params(expected[1], expected[0])
    for wrapped in (masked, parts):
        found = run(wrapped, params, sequence)
        of_found = master_params(found[1], found[0])
        assert_equal(of_found["a"], masters["a"])
        assert of_found["b"] is found[0]["b"]
        state, stored = split_master_params(wrapped.init(params), params, of_found)
        assert_equal(stored, found[0])
        assert_equal(master_params(state, stored), of_found)


def test_partition_with_two_residuals():
    params, sequence = parameters(), gradients()
    tx = optax.partition(
        {"x": optimizer("8 bytes"), "y": optimizer("8 bytes")}, {"a": "x", "b": "y", "c": "y"}
    )
    assert_same_masters(run(tx, params, sequence), run(optimizer("8 bytes"), params, sequence))


def test_multi_steps():
    params = {k: v for k, v in parameters().items() if k == "a"}
    # MultiSteps of optax 0.2.6 accumulates in the dtype of the updates.
    sequence = [jax.tree.map(lambda g: g.astype(jnp.float32), g) for g in gradients(params)]
    twice = [g for pair in zip(sequence, sequence, strict=True) for g in pair]
    tx = optax.MultiSteps(optimizer(), 2).gradient_transformation()
    assert_same_masters(run(tx, params, twice), run(optimizer(), params, sequence))


def test_average_of_the_true_parameters():
    tx, params = optimizer(), parameters()
    average = optax.ema(0.9, debias=False)

    def train(params, masters_of):
        state, seen = tx.init(params), average.init(masters_of(tx.init(params), params))
        for g in gradients():
            params, state = run(tx, params, [g], state)
            mean, seen = average.update(masters_of(state, params), seen)
        return mean

    of_masters = train(parameters(), master_params)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(of_masters))
    stored = train(parameters(), lambda state, params: params)
    # The average of what is stored is off by up to half an ulp, that of the masters is not.
    assert (np.asarray(of_masters["a"]) != np.asarray(stored["a"]).astype(np.float32)).any()
    assert jax.tree.structure(of_masters) == jax.tree.structure(params)


def test_decoupled_decay_is_added_up():
    """The decay sees the stored parameter, and still nothing of it is lost."""
    params = {"w": jnp.asarray(np.linspace(0.5, 2, 64), jnp.bfloat16)}
    zeros = [jax.tree.map(jnp.zeros_like, params)] * 1000
    tx = adamaxw(1.0, weight_decay=2.0**-14)
    lost, _ = run(tx, params, zeros)
    assert_equal(lost, params)
    kept, state = run(optax.chain(tx, compensate_rounding()), params, zeros)
    expected = np.asarray(params["w"]).astype(np.float64) * (1 - 2.0**-14) ** 1000
    np.testing.assert_allclose(master_params(state, kept)["w"], expected, rtol=2.0**-12)


@pytest.mark.parametrize("zero_axis", [None, "data"])
@pytest.mark.parametrize("storage", STORAGE)
def test_sharded(storage, zero_axis):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    place = P("data") if zero_axis is None else P()
    tx, params, sequence = optimizer(storage), parameters(), gradients()
    expected = run(tx, params, sequence)
    params, sequence = jax.device_put((params, sequence), NamedSharding(mesh, place))
    state = sharding.init_sharded(tx, params, zero_axis=zero_axis)
    residual = state[-1].residual["a"]
    assert residual.addressable_shards[0].data.size == residual.size // 8
    kept = sharding.keep_sharded(tx, params, zero_axis=zero_axis)
    found = run(kept, params, sequence, state)
    assert_equal(found, expected)
    assert found[1][-1].residual["a"].sharding.is_equivalent_to(residual.sharding, 2)


def test_checkpoints(tmp_path):
    tx, params, sequence = optimizer(), parameters(), gradients()
    expected = run(tx, params, sequence)
    half = run(tx, params, sequence[: STEPS // 2])
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "half", half)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "half", jax.tree.map(jnp.zeros_like, half))
    assert_equal(run(tx, restored[0], sequence[STEPS // 2 :], restored[1]), expected)
    data = flax.serialization.to_bytes(half)
    restored = flax.serialization.from_bytes(jax.tree.map(jnp.zeros_like, half), data)
    restored = jax.tree.map(jnp.asarray, restored)
    assert_equal(run(tx, restored[0], sequence[STEPS // 2 :], restored[1]), expected)


def test_other_storage_in_mid_run_leaves_the_residual():
    tx, params, sequence = optimizer(), parameters(), gradients()
    _, state = run(tx, params, sequence)
    for other in (decode_state(state), encode_state(state, "bfloat16", "bfloat16")):
        assert_equal(other[-1], state[-1])


def test_the_state_is_mapped_like_parameters():
    tx, params = optimizer("8 bytes"), parameters()
    seen = optax.tree.map_params(
        tx,
        lambda leaf, p: leaf if isinstance(leaf, optax.MaskedNode) else leaf.shape == p.shape,
        tx.init(params),
        params,
        transform_non_params=lambda _: None,
        is_leaf=lambda x: isinstance(x, optax.MaskedNode),
    )
    assert seen[-1].residual == {"a": True, "b": True, "c": optax.MaskedNode()}
    assert optax.tree.get(tx.init(params), "residual")["a"].dtype == jnp.int8


@pytest.mark.skipif(jax.__version_info__ < (0, 10), reason="XLA copied more before jaxlib 0.10")
def test_memory_of_a_step():
    """Parameter 2, residual 1, state 2 and gradient 2 bytes; and nothing of 4 bytes is made."""
    n = 1 << 20
    tx = optax.chain(adamax(2.0**-10, m_dtype="int8", v_dtype="uint8"), compensate_rounding())

    def step(params, state, g):
        updates, state = tx.update(g, state, params)
        return optax.apply_updates(params, updates), state

    params = jnp.ones(n, jnp.bfloat16)
    with jax.numpy_dtype_promotion("standard"):
        lowered = jax.jit(step, donate_argnums=(0, 1)).lower(params, tx.init(params), params)
    memory = lowered.compile().memory_analysis()
    assert memory.argument_size_in_bytes == pytest.approx(7 * n, abs=100)
    assert memory.alias_size_in_bytes == pytest.approx(5 * n, abs=100)
    # On CPU: the direction, of the gradient's dtype, and the old residual, written in place before
    # the parameter is.
    assert memory.temp_size_in_bytes == pytest.approx(3 * n, abs=5000)


def test_packed_state():
    """Packed inside of the chain, the residual is where it was; packed with it, in the buffers."""
    params, sequence = parameters(), gradients()
    expected = run(optimizer(), params, sequence)
    adamax_, last = adamax(2.0**-10, m_dtype="int8", v_dtype="uint8"), compensate_rounding()
    outside = run(optax.chain(pack_small_leaves(adamax_), last), params, sequence)
    assert_same_masters(outside, expected)
    inside = run(pack_small_leaves(optax.chain(adamax_, last)), params, sequence)
    assert_equal(inside[0], expected[0])
    with pytest.raises(ValueError, match="put compensate_rounding after it"):
        master_params(inside[1], inside[0])
