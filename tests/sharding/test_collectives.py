"""In a compiled step, the optimizer communicates only in the all-gather of ZeRO-1."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from parameters import formats

import optax_adamax
from optax_adamax import sharding
from sharding.common import (
    AXIS_TYPES,
    CASES,
    FORMATS,
    OPTIONS,
    SHARDED_BY_ZERO1,
    collectives,
    exact_adamaxw,
    fewest_bits,
    mesh_of,
    structs,
)


@cache
def gathers(types):
    return gather_alone(structs(mesh_of(AXIS_TYPES[types])))


def gather_alone(updates):
    """Returns the collectives that move `updates` from the shardings of ZeRO-1 to their own."""
    zero1 = sharding.shard(optax.trace(0.9), updates, zero1_axis="data").init(updates).trace
    gathered = {name: u.sharding for name, u in updates.items()}
    return collectives(jax.jit(lambda u: u, out_shardings=gathered).lower(zero1).compile())


def applied(tx):
    def step(params, state, gradients):
        return tx.apply_gradients(gradients, state, params)

    return step


def updated(tx):
    def step(params, state, gradients):
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    return step


@pytest.mark.parametrize(("name", "types", "options"), CASES)
def test_apply_gradients_has_one_all_gather_per_parameter_of_zero1(name, types, options):
    params = structs(mesh_of(AXIS_TYPES[types]))
    tx = sharding.shard(exact_adamaxw(name), params, **OPTIONS[options])
    found = collectives(jax.jit(applied(tx)).lower(params, tx.init(params), params).compile())
    if "zero1_axis" in OPTIONS[options]:
        assert found == gathers(types)
        assert [kind for kind, _ in found] == ["all-gather"] * len(SHARDED_BY_ZERO1)
    else:
        assert found == []


@pytest.mark.parametrize("types", ["auto", "explicit"])
def test_update_gathers_the_updates_and_not_their_inputs(types):
    """Without a constraint on the updates, XLA gathers a mask too (JAX 0.10.2, automatic axes)."""
    params = structs(mesh_of(AXIS_TYPES[types]))
    tx = sharding.shard(optax_adamax.scale_by_adamax(), params, zero1_axis="data")
    compiled = jax.jit(updated(tx)).lower(params, tx.init(params), params).compile()
    assert collectives(compiled) == gathers(types)


def network(mesh):
    """Returns parameters, batch and loss of a network with data and tensor parallelism."""
    params = {"in": P(None, "model"), "out": P("model", None), "bias": P()}
    shapes = {"in": (16, 32), "out": (32, 8), "bias": (8,)}
    params = {
        name: jax.ShapeDtypeStruct(
            shapes[name], np.float32, sharding=NamedSharding(mesh, params[name])
        )
        for name in params
    }
    batch = jax.ShapeDtypeStruct((64, 16), np.float32, sharding=NamedSharding(mesh, P("data")))

    def loss(params, x):
        hidden = jnp.tanh(x @ params["in"])
        return jnp.mean((hidden @ params["out"] + jnp.expand_dims(params["bias"], 0)) ** 2)

    return params, batch, loss


def compile_step(method, tx, state, **jit_options):
    """Compiles a step of the network; `method` is `applied` or `updated`."""
    params, batch, loss = network(mesh_of())

    def step(params, state, batch):
        return method(tx)(params, state, jax.grad(loss)(params, batch))

    step = jax.jit(step, donate_argnums=(0, 1), **jit_options)
    return step.lower(params, state, batch).compile()


def network_adamax(name):
    return optax_adamax.adamax(1e-3, **FORMATS[name])


@cache
def train_step(method, name, options):
    """Returns the compiled step with `shard`."""
    params, *_ = network(mesh_of())
    tx = sharding.shard(network_adamax(name), params, **OPTIONS[options])
    return compile_step(method, tx, tx.init(params))


@cache
def collectives_of_gradients():
    params, batch, loss = network(mesh_of())
    places = jax.tree.map(lambda p: p.sharding, params)
    return collectives(jax.jit(jax.grad(loss), out_shardings=places).lower(params, batch).compile())


TRAIN_STEPS = [(name, options) for name in FORMATS for options in ("like parameters", "zero")]
ALWAYS = [("float32", "like parameters"), ("2 bytes", "zero")]


@pytest.mark.parametrize("name, options", formats(TRAIN_STEPS, ALWAYS))
def test_collectives_of_a_train_step(name, options):
    found = collectives(train_step(updated, name, options))
    wanted = collectives_of_gradients()
    assert [kind for kind, _ in wanted].count("all-reduce") >= 3
    if "zero1_axis" in OPTIONS[options]:
        wanted = sorted(wanted + gather_alone(network(mesh_of())[0]))
    assert found == wanted


@fewest_bits
def test_apply_gradients_costs_no_more_than_the_choice_of_the_partitioner(name):
    """Without `sharding`, `out_shardings` give XLA the shardings of the results."""
    params, *_ = network(mesh_of())
    tx = sharding.shard(network_adamax(name), params, zero1_axis="data")
    state = tx.init(params)
    shardings = jax.tree.map(lambda x: x.sharding, (params, state))
    found = train_step(applied, name, "zero")
    choice = compile_step(updated, network_adamax(name), state, out_shardings=shardings)
    updates_gathered = train_step(updated, name, "zero")
    assert collectives(found) == collectives(choice)
    assert temporaries(found) <= temporaries(choice)
    assert bytes_accessed(found) <= bytes_accessed(choice)
    assert bytes_accessed(found) < bytes_accessed(updates_gathered)
    equal = jax.tree.map(equivalent, found.output_shardings, shardings, (params, state))
    assert jax.tree.all(equal)


def equivalent(got, wanted, x):
    return got.is_equivalent_to(wanted, x.ndim)


def temporaries(compiled):
    return compiled.memory_analysis().temp_size_in_bytes


def bytes_accessed(compiled):
    return compiled.cost_analysis()["bytes accessed"]
