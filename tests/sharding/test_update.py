"""`update` and `apply_gradients` give the same bits and shardings on 8 devices as on 1."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_adamax
from optax_adamax import sharding
from sharding.common import (
    AXIS_TYPES,
    CASES,
    HOST_MEMORY,
    OPTIONS,
    STEPS,
    assert_same_bits,
    collectives,
    count_compilations,
    exact_adamaxw,
    is_at,
    mesh_of,
    on_one_device,
    random_like,
    struct,
    structs,
    train,
)


@cache
def trained(name, types, options):
    """Returns transformation, parameters and the result of `train`, for several tests."""
    params = random_like(structs(mesh_of(AXIS_TYPES[types])), 99)
    tx = sharding.shard(exact_adamaxw(name), params, **OPTIONS[options])
    state = tx.init(params)
    with count_compilations("step") as compilations:
        history, state, step = train(tx, params, state)
    return tx, params, history, state, step, len(compilations)


@pytest.mark.parametrize(("name", "types", "options"), CASES)
def test_update_gives_the_bits_of_one_device(name, types, options):
    tx, params, history, state, *_ = trained(name, types, options)
    assert_same_bits((history, state), on_one_device(name))
    assert all(is_at(u, params[k].sharding) for k, u in history[-1][1].items())
    assert jax.tree.all(jax.tree.map(is_at, state, tx.shardings))


@pytest.mark.parametrize("options", ["zero", pytest.param("host", marks=HOST_MEMORY)])
def test_update_over_axes_of_both_types_gives_the_bits_of_one_device(options):
    """JAX 0.10.2 needs the argument `out_shardings` for such meshes."""
    params = random_like(structs(mesh_of(AXIS_TYPES["mixed"])), 99)
    tx = sharding.shard(exact_adamaxw("float32"), params, **OPTIONS[options])
    of_params = jax.tree.map(lambda p: p.sharding, params)
    places = (of_params, tx.shardings, of_params)
    history, state, _ = train(tx, params, tx.init(params), out_shardings=places)
    assert_same_bits((history, state), on_one_device("float32"))
    assert jax.tree.all(jax.tree.map(is_at, state, tx.shardings))


@pytest.mark.parametrize("name", ["float32", "2 bytes"])
def test_the_plain_transformation_preserves_the_shardings_of_the_parameters(name):
    """Without ZeRO-1 and host memory, a state from `shard` can be trained without `shard`."""
    params = random_like(structs(mesh_of()), 99)
    sharded = sharding.shard(exact_adamaxw(name), params)
    history, state, step = train(exact_adamaxw(name), params, sharded.init(params))
    assert_same_bits((history, state), on_one_device(name))
    assert jax.tree.all(jax.tree.map(is_at, state, sharded.shardings))
    assert collectives(step.lower(params, state, params).compile()) == []


@HOST_MEMORY
@pytest.mark.parametrize(
    ("types", "options"),
    [
        ("auto", "zero and host"),
        ("explicit", "host"),
        pytest.param("auto", "host", marks=pytest.mark.slow),
        pytest.param("explicit", "zero and host", marks=pytest.mark.slow),
    ],
)
def test_a_donated_state_in_host_memory_exists_once(types, options):
    params = random_like(structs(mesh_of(AXIS_TYPES[types])), 0)
    tx = sharding.shard(optax_adamax.adamax(0.1), params, **OPTIONS[options])
    before = tx.init(params)
    _, after = jax.jit(tx.update, donate_argnums=1)(params, before)
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        assert old.is_deleted()
        assert new.sharding.memory_kind == "pinned_host"


@pytest.mark.parametrize(("name", "types", "options"), CASES)
def test_update_compiles_once(name, types, options):
    *_, compilations = trained(name, types, options)
    assert compilations == 1


@pytest.mark.parametrize("types", ["auto", "explicit"])
def test_a_transformation_that_selects(types):
    """With explicit axes, lax.select rejects operands with different shardings."""

    def update(updates, state, params=None):
        trace = jax.tree.map(
            lambda g, m, p: jnp.where(g > 0, m, jnp.where(m > p, g, p)),
            updates,
            state.trace,
            params,
        )
        return trace, optax.TraceState(trace)

    params = random_like({"wide": structs(mesh_of(AXIS_TYPES[types]))["wide"]}, 0)
    tx = optax.GradientTransformation(optax.trace(0.9).init, update)
    sharded = sharding.shard(tx, params, zero1_axis="data")
    gradients = random_like(params, 1)
    got = jax.jit(sharded.update)(gradients, sharded.init(params), params)
    g, p = np.asarray(gradients["wide"]), np.asarray(params["wide"])
    wanted = {"wide": np.where(g > 0, 0, np.where(p < 0, g, p))}
    assert_same_bits(got, (wanted, optax.TraceState(wanted)))


@pytest.mark.parametrize("types", ["auto", "explicit"])
def test_a_state_that_does_not_depend_on_sharded_arrays_is_sharded(types):
    """XLA would leave the new state unsharded, because nothing propagates a sharding to it."""

    def update(updates, state, params=None):
        return updates, optax.TraceState(jax.tree.map(jnp.zeros_like, updates))

    params = random_like({"wide": structs(mesh_of(AXIS_TYPES[types]))["wide"]}, 0)
    tx = optax.GradientTransformation(optax.trace(0.9).init, update)
    sharded = sharding.shard(tx, params, zero1_axis="data")
    _, state = jax.jit(sharded.update)(params, sharded.init(params))
    assert jax.tree.all(jax.tree.map(is_at, state, sharded.shardings))


@HOST_MEMORY
def test_the_state_of_parameters_in_host_memory_is_moved_by_the_step():
    """`shard` received parameters in host memory; the step receives them on the devices."""
    on_device = random_like({"wide": structs(mesh_of())["wide"]}, 0)
    stored = jax.tree.map(
        lambda p: struct(p, p.sharding.with_memory_kind("pinned_host")), on_device
    )
    tx = sharding.shard(exact_adamaxw("2 bytes"), stored)
    state = tx.init(jax.device_put(on_device, jax.tree.map(lambda p: p.sharding, stored)))
    for _ in range(2):
        new, state = jax.jit(tx.apply_gradients)(on_device, state, on_device)
    assert {x.sharding.memory_kind for x in jax.tree.leaves(state[0].m)} == {"pinned_host"}
    assert jax.tree.all(jax.tree.map(is_at, state, tx.shardings))
    assert is_at(new["wide"], on_device["wide"].sharding)


def test_extra_arguments_reach_the_transformation():
    def update(updates, state, params=None, *, value):
        return jax.tree.map(lambda g: g * value, updates), state

    params = random_like({"wide": structs(mesh_of())["wide"]}, 0)
    tx = optax.chain(
        optax_adamax.scale_by_adamax(),
        optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update),
    )
    sharded = sharding.shard(tx, params, zero1_axis="data")
    state = sharded.init(params)
    updates, _ = jax.jit(sharded.update)(params, state, value=jnp.float32(2.0))
    alone, _ = jax.jit(optax_adamax.scale_by_adamax().update)(params, state[0])
    assert_same_bits(updates, jax.tree.map(lambda u: u * 2.0, alone))
    applied, _ = jax.jit(sharded.apply_gradients)(params, state, params, value=jnp.float32(2.0))
    assert_same_bits(applied, jax.jit(optax.apply_updates)(params, updates))


@pytest.mark.parametrize(
    ("types", "options"),
    [
        ("explicit", "zero"),
        pytest.param("auto", "zero and host", marks=HOST_MEMORY),
        pytest.param("auto", "zero", marks=pytest.mark.slow),
        pytest.param("explicit", "zero and host", marks=[HOST_MEMORY, pytest.mark.slow]),
    ],
)
def test_apply_gradients_gives_the_bits_of_one_device(types, options):
    params = random_like(structs(mesh_of(AXIS_TYPES[types])), 99)
    tx = sharding.shard(exact_adamaxw("2 bytes"), params, **OPTIONS[options])
    state, apply_gradients = tx.init(params), jax.jit(tx.apply_gradients)
    history, last_state = on_one_device("2 bytes")
    for t in range(STEPS):
        params, state = apply_gradients(random_like(params, t), state, params)
        assert_same_bits(params, history[t][0])
    assert_same_bits(state, last_state)
    assert jax.tree.all(jax.tree.map(is_at, state, tx.shardings))
    own = structs(mesh_of(AXIS_TYPES[types]))
    assert all(is_at(x, own[name].sharding) for name, x in params.items())
