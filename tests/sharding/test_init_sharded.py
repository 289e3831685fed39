"""The state is made in place: compared with tx.init itself, and with what the compiler says."""

import jax
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import optax_adamax
from optax_adamax import sharding
from sharding.common import (
    AXIS_TYPES,
    CASES,
    FORMATS,
    OPTIONS,
    assert_same_bits,
    collectives,
    each_format,
    is_at,
    mesh_of,
    random_like,
    structs,
)


@pytest.mark.parametrize(("name", "types", "options"), [*CASES, ("2 bytes", "mixed", "zero")])
def test_every_leaf_is_in_its_place(name, types, options):
    params = random_like(structs(mesh_of(AXIS_TYPES[types])), 0)
    tx = optax_adamax.adamaxw(1e-3, **FORMATS[name])
    state = sharding.init_sharded(tx, params, **OPTIONS[options])
    assert_same_bits(state, jax.jit(tx.init)(jax.tree.map(np.asarray, params)))
    wanted = sharding.state_shardings(tx, params, **OPTIONS[options])
    for leaf, place in zip(jax.tree.leaves(state), jax.tree.leaves(wanted), strict=True):
        assert is_at(leaf, place)


def big_structs(mesh):
    """Parameters that are all split, so that any whole leaf shows."""
    place = NamedSharding(mesh, P(None, "model"))
    return {
        name: jax.ShapeDtypeStruct(shape, np.float32, sharding=place)
        for name, shape in {"a": (64, 128), "b": (256, 32), "c": (4, 4096)}.items()
    }


def bytes_on_a_device(stats):
    return stats.output_size_in_bytes + stats.temp_size_in_bytes + stats.argument_size_in_bytes


@pytest.mark.parametrize("types", ["auto", "explicit"])
@each_format
@pytest.mark.parametrize(("options", "parts"), [("like parameters", 2), ("zero", 8)])
def test_no_leaf_is_ever_whole_on_one_device(name, types, options, parts):
    params = big_structs(mesh_of(AXIS_TYPES[types]))
    tx = optax_adamax.scale_by_adamax(**FORMATS[name])
    compiled = (
        jax.jit(tx.init, out_shardings=sharding.state_shardings(tx, params, **OPTIONS[options]))
        .lower(params)
        .compile()
    )
    leaves = jax.tree.leaves(jax.eval_shape(tx.init, params))
    whole = [leaf.size * leaf.dtype.itemsize for leaf in leaves]
    # Each device holds its parts, the scalars, and a table of one pointer for each leaf.
    table = 8 * len(whole)
    wanted = sum(size // parts if size > 8 else size for size in whole) + table
    assert bytes_on_a_device(compiled.memory_analysis()) == wanted
    assert wanted < max(whole) + table if parts == 8 else wanted < sum(whole)
    assert collectives(compiled) == []


def test_the_memory_analysis_sees_a_whole_leaf():
    """The recipe that the function replaces leaves everything on one device."""
    params = big_structs(mesh_of())
    naive = jax.jit(optax_adamax.scale_by_adamax().init).lower(params).compile()
    whole = 2 * sum(4 * np.prod(p.shape) for p in params.values())
    assert bytes_on_a_device(naive.memory_analysis()) >= whole


def test_a_state_that_holds_copies_of_the_parameters():
    """Schedule-free's z starts as the parameters, so that init cannot forget its argument."""
    params = random_like(big_structs(mesh_of()), 0)
    tx = optax.contrib.schedule_free(optax_adamax.adamax(1e-3, b1=0.0), 1e-3)
    state = sharding.init_sharded(tx, params, zero_axis="data")
    assert_same_bits(state.z, params)
    for leaf in jax.tree.leaves(state.z):
        assert {shard.data.size for shard in leaf.addressable_shards} == {leaf.size // 8}
    shardings = sharding.state_shardings(tx, params, zero_axis="data")
    compiled = jax.jit(tx.init, out_shardings=shardings).lower(params).compile()
    assert collectives(compiled) == []
