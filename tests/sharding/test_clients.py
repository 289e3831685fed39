"""`shard` returns an optax transformation that Flax, Equinox and optax's wrappers accept."""

from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState
from flax_boxes import nnx, unboxed
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import optax_adamax
from optax_adamax import sharding
from sharding.common import (
    assert_same_bits,
    collectives,
    exact_adamaxw,
    is_at,
    mesh_of,
    random_like,
    structs,
)

NAMES = ("wide", "bias")


def some_params():
    return random_like({name: structs(mesh_of())[name] for name in NAMES}, 0)


def is_sharded(state, tx):
    return jax.tree.all(jax.tree.map(is_at, state, tx.shardings))


def test_shard_returns_an_optax_transformation():
    tx = sharding.shard(optax.trace(0.9), some_params())
    assert isinstance(tx, optax.GradientTransformationExtraArgs)
    assert optax.with_extra_args_support(tx) is tx
    init, update = tx
    assert (init, update) == (tx.init, tx.update)


def test_a_pytree_round_trip_preserves_the_attributes():
    """eqx.filter_jit flattens its arguments and rebuilds them."""
    tx = sharding.shard(optax.trace(0.9), some_params(), zero1_axis="data")
    rebuilt = jax.tree.map(lambda x: x, tx)
    assert rebuilt.shardings == tx.shardings and rebuilt.unsharded == tx.unsharded
    applied = eqx.filter_jit(lambda tx, p, s: tx.apply_gradients(p, s, p))
    _, state = applied(tx, some_params(), tx.init(some_params()))
    assert is_sharded(state, tx)


def test_optax_maps_over_the_parameters_of_a_sharded_state():
    params = some_params()
    tx = sharding.shard(optax_adamax.adamax(0.1), params, zero1_axis="data")
    state = optax.tree.map_params(
        tx, lambda _, p: p, tx.init(params), params, transform_non_params=lambda _: None
    )
    assert state[0].m is not params and state[0].m == params


def test_flax_train_state_is_sharded_from_its_creation():
    params = some_params()
    tx = sharding.shard(exact_adamaxw("2 bytes"), params, zero1_axis="data")
    train_state = TrainState.create(apply_fn=None, params=params, tx=tx)
    assert is_sharded(train_state.opt_state, tx)
    step = jax.jit(lambda s, g: s.apply_gradients(grads=g))
    train_state = step(train_state, random_like(params, 1))
    assert is_sharded(train_state.opt_state, tx)
    assert all(is_at(x, params[name].sharding) for name, x in train_state.params.items())
    inner, host = exact_adamaxw("2 bytes"), jax.tree.map(np.asarray, params)
    gradients = jax.tree.map(np.asarray, random_like(params, 1))
    updates, state = jax.jit(inner.update)(gradients, inner.init(host), host)
    assert_same_bits(train_state.opt_state, state)
    assert_same_bits(train_state.params, jax.jit(optax.apply_updates)(host, updates))


def sharded_linear():
    """Returns a model on a mesh of data x model, its kernel sharded over the model axis."""
    model = nnx.Linear(8, 4, rngs=nnx.Rngs(0))
    mesh = mesh_of()
    specs = {"kernel": P(None, "model"), "bias": P()}
    for name, spec in specs.items():
        parameter = getattr(model, name)
        parameter.value = jax.device_put(parameter.value, NamedSharding(mesh, spec))
    return model


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_nnx_optimizer_is_sharded_from_its_creation():
    model = sharded_linear()
    params = nnx.state(model, nnx.Param)
    tx = sharding.shard(optax_adamax.adamax(0.1), params, zero1_axis="data")
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    wanted = jax.tree.leaves(tx.shardings)

    def assert_sharded():
        leaves = jax.tree.leaves(nnx.state(optimizer)["opt_state"])
        assert all(is_at(x, s) for x, s in zip(leaves, wanted, strict=True))
        m = optimizer.opt_state[0].m
        assert m["kernel"].value.sharding.spec == P("data", "model")

    assert_sharded()
    before = unboxed(jax.tree.map(np.asarray, params))

    @nnx.jit
    def step(model, optimizer):
        optimizer.update(model, nnx.grad(lambda m: jnp.sum(m(jnp.ones((1, 8)))))(model))

    step(model, optimizer)
    assert_sharded()
    # With equal gradients, the first step of Adamax has the length of the learning rate.
    moved = jax.tree.map(
        lambda a, b: np.asarray(a) - b, unboxed(nnx.state(model, nnx.Param)), before
    )
    for leaf in jax.tree.leaves(moved):
        np.testing.assert_allclose(leaf, -0.1, rtol=1e-5)


@pytest.mark.parametrize("boxed", [True, False])
def test_names_of_leaves_ignore_boxes_of_flax(boxed):
    """nnx.Optimizer passes boxed parameters to init and arrays to update."""
    mesh = jax.make_mesh((4,), ("data",), devices=jax.devices()[:4])
    partitioned = nnx.with_partitioning(nnx.initializers.ones, (None, "data"))
    with jax.set_mesh(mesh):
        params = nnx.state(nnx.Linear(8, 4, rngs=nnx.Rngs(0), kernel_init=partitioned), nnx.Param)
        params = jax.tree.map(lambda p: jax.device_put(p, NamedSharding(mesh, P())), params)
        tx = sharding.shard(optax_adamax.scale_by_adamax(), params, zero1_axis="data")
        state = tx.init(params)
        given = (params, state) if boxed else unboxed((params, state))
        updates, state = jax.jit(tx.update)(*given)
    assert jax.tree.structure((updates, state)) == jax.tree.structure(given)
    assert all(u.sharding.is_fully_replicated for u in jax.tree.leaves(updates))
    assert all(m.sharding.spec[0] == "data" for m in jax.tree.leaves(state.m))
    assert tx.unsharded == ()


def test_multi_steps_inside_is_sharded_with_its_accumulator():
    """An `optax.MultiSteps` object has init and update, but is not a tuple of them."""

    def scale(updates, state, params=None, *, value):
        return jax.tree.map(lambda g: g * value, updates), state

    scaled = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), scale)
    inner = optax.chain(exact_adamaxw("float32"), scaled)
    params = some_params()
    tx = sharding.shard(optax.MultiSteps(inner, 2), params, zero1_axis="data")
    state = tx.init(params)
    assert state.acc_grads["wide"].sharding.spec == P("data", "model")
    with jax.numpy_dtype_promotion("standard"):  # optax needs it
        for _ in range(2):
            apply_gradients = jax.jit(tx.apply_gradients)
            new, state = apply_gradients(params, state, params, value=jnp.float32(0.0))
    assert is_sharded(state, tx)
    assert int(state.gradient_step) == 1
    assert_same_bits(new, params)  # the extra argument reached `scale`


def test_inside_a_chain_its_own_part_of_the_state_is_sharded():
    """A chain calls only init and update of `shard`, which cannot detect the chain."""
    params = some_params()
    inner = sharding.shard(exact_adamaxw("float32"), params, zero1_axis="data")
    tx = optax.chain(optax.trace(0.5), inner)
    state = jax.jit(tx.init)(params)
    updates, state = jax.jit(tx.update)(params, state, params)
    assert is_sharded(state[1], inner)
    assert not hasattr(tx, "apply_gradients")
    alone = optax.chain(optax.trace(0.5), exact_adamaxw("float32"))
    host = jax.tree.map(np.asarray, params)
    assert_same_bits((updates, state), jax.jit(alone.update)(host, alone.init(host), host))


def test_fsdp_over_one_axis_and_zero1_over_another():
    """Parameters are sharded over `fsdp` and replicated over `replica`, as in hybrid sharding."""
    mesh = jax.make_mesh((2, 4), ("replica", "fsdp"), (jax.sharding.AxisType.Auto,) * 2)
    params = jax.device_put(jnp.ones((16, 8)), NamedSharding(mesh, P("fsdp")))
    tx = sharding.shard(optax_adamax.adamax(0.1), params, zero1_axis=("replica", "fsdp"))
    state = tx.init(params)
    assert state[0].m.sharding.spec == P("fsdp", "replica")
    step = jax.jit(tx.apply_gradients)
    new, state = step(params, state, params)
    assert is_sharded(state, tx) and is_at(new, params.sharding)
    assert [kind for kind, _ in collectives(step.lower(params, state, params).compile())] == [
        "all-gather"
    ]


def test_a_step_on_a_replicated_mesh_with_two_zero1_axes():
    params = jax.device_put(jnp.ones((16, 8)), NamedSharding(mesh_of(), P()))
    tx = sharding.shard(optax_adamax.adamax(0.1), params, zero1_axis=("data", "model"))
    state = tx.init(params)
    assert {shard.data.size for shard in state[0].m.addressable_shards} == {16}
    step = jax.jit(partial(tx.apply_gradients))
    assert [kind for kind, _ in collectives(step.lower(params, state, params).compile())] == [
        "all-gather"
    ]
