"""The state of `compensate_rounding` can be sharded, moved, saved and converted."""

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.tree
import orbax.checkpoint as ocp
import pytest
from compensated import (
    STEPS,
    assert_equal,
    expected,
    gradients,
    optimizer,
    parameters,
    run,
)
from compiled import since_010, train_step
from flax_boxes import linen, nnx, unboxed
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from optax_adamax import (
    adamax,
    compensate_rounding,
    decode_state,
    encode_state,
    master_params,
    sharding,
)


def test_average_of_master_parameters_is_in_float32():
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
    # Stored parameters are off by up to half an ULP, and so is their average.
    assert (np.asarray(of_masters["a"]) != np.asarray(stored["a"]).astype(np.float32)).any()
    assert jax.tree.structure(of_masters) == jax.tree.structure(parameters())


@pytest.mark.parametrize("zero1_axis", [None, "data"])
def test_residuals_are_sharded_like_parameters(zero1_axis):
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
def test_state_in_host_memory_has_the_same_masters(kind):
    params, state = expected()
    if kind not in {m.kind for m in jax.devices()[0].addressable_memories()}:
        pytest.skip(f"this version of JAX has no {kind} on CPU")
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0], memory_kind=kind)
    hosted = jax.device_put(state, place)
    assert_equal(master_params(hosted, params), master_params(state, params))
    assert_equal(jax.jit(master_params)(hosted, params), master_params(state, params))


def test_checkpoint_resumes_exactly(tmp_path):
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


@pytest.mark.parametrize("saved", ["int8", "int16"])
def test_checkpoint_of_another_residual_dtype_raises(tmp_path, saved):
    """If Orbax cast the integers, every master parameter would be wrong."""
    other = {"int8": "int16", "int16": "int8"}[saved]
    target = optimizer(other).init(parameters())
    _, state = expected(saved)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / saved, state)
        checkpointer.wait_until_finished()
        with pytest.raises(ValueError, match=other):
            checkpointer.restore(tmp_path / saved, target)
    with pytest.raises(ValueError, match=other):
        flax.serialization.from_bytes(target, flax.serialization.to_bytes(state))


def test_converting_moments_keeps_the_residual():
    tx = compensate_rounding(adamax(2.0**-10, m_dtype="int8", v_dtype="uint8"))
    params = {"a": parameters()["a"]}
    _, state = run(tx, params, gradients(params, steps=1))
    for other in (decode_state(state), encode_state(state, "bfloat16", "bfloat16")):
        assert_equal(other.residual, state.residual)


def test_map_params_visits_residuals():
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


def test_init_accepts_shapes_none_and_masks():
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


def test_init_of_shapes_keeps_shardings():
    """Without shardings, all moments and residuals of a sharded model would be on one device."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    place = NamedSharding(mesh, P("data"))
    shape = jax.ShapeDtypeStruct((16,), jnp.bfloat16, sharding=place)
    state = compensate_rounding(adamax(0.1), check_applied=True).init({"w": shape})
    arrays = [x for x in jax.tree.leaves(state) if x.ndim]
    assert len(arrays) == 4  # residual, m, v and expected parameters
    assert all(x.sharding.is_equivalent_to(place, 1) for x in arrays)


class Model(nnx.Module):
    def __init__(self, rngs):
        options = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}
        self.layer = nnx.Linear(2, 3, rngs=rngs, **options)


def test_boxed_state_has_boxed_masters():
    """`nnx.Optimizer` wraps the state in variables, which do not change its values."""
    model = Model(nnx.Rngs(0))
    tx = compensate_rounding(adamax(1e-3), "int16")
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    boxed = nnx.state(model, nnx.Param)
    bare, g = nnx.to_pure_dict(boxed), jax.tree.map(jnp.ones_like, boxed)
    bare_state = tx.init(bare)
    with jax.numpy_dtype_promotion("standard"):
        for _ in range(3):
            optimizer.update(model, g)
            bare, bare_state = run(tx, bare, [nnx.to_pure_dict(g)], bare_state)
    boxed = nnx.state(model, nnx.Param)
    masters = master_params(optimizer.opt_state, boxed)
    kernel = masters["layer"]["kernel"]
    assert isinstance(kernel, nnx.Param) and kernel.dtype == jnp.float32
    assert_equal(nnx.to_pure_dict(masters), master_params(bare_state, bare))
    boxed_in_linen = jax.tree.map(lambda p: linen.Partitioned(p, names=("x",)), bare)
    of_linen = master_params(bare_state, boxed_in_linen)
    assert isinstance(of_linen["layer"]["bias"], linen.Partitioned)
    assert_equal(unboxed(of_linen), master_params(bare_state, bare))


@pytest.mark.parametrize("other", [{"x": np.ones(5000, jnp.bfloat16)}, {}, [np.ones(9)], None])
def test_messages_about_trees_name_leaves_and_print_no_arrays(other):
    _, state = expected()
    for call in (
        lambda: master_params(state, other),
        lambda: optimizer().update(gradients()[0], state, {"many": other}),
    ):
        with pytest.raises(ValueError, match=r"\['a'\], \['b'\]") as raised:
            call()
        assert len(str(raised.value)) < 400 and "Array" not in str(raised.value)


@since_010
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("residual_dtype", ["int8", "int16"])
def test_step_copies_only_the_residual(residual_dtype, dtype):
    """`inner` has no temporaries here. The gradients are bfloat16 or float32."""
    n, width = 1 << 20, jnp.iinfo(residual_dtype).bits // 8
    tx = compensate_rounding(optax.sgd(3e-4), residual_dtype)
    with jax.numpy_dtype_promotion("standard"):
        memory = train_step(tx, n, jnp.bfloat16, dtype).memory_analysis()
    held = (2 + width + dtype.dtype.itemsize) * n
    assert memory.argument_size_in_bytes == pytest.approx(held, abs=100)
    assert memory.alias_size_in_bytes == pytest.approx((2 + width) * n, abs=100)
    assert memory.temp_size_in_bytes == pytest.approx(width * n, abs=5000)
