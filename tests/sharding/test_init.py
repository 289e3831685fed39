"""`init` creates each state leaf with its sharding: eager, inside jit, and for shapes."""

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
def test_eager_init_shards_every_leaf(name, types, options):
    params = random_like(structs(mesh_of(AXIS_TYPES[types])), 0)
    inner = optax_adamax.adamaxw(1e-3, **FORMATS[name])
    tx = sharding.shard(inner, params, **OPTIONS[options])
    state = tx.init(params)
    assert_same_bits(state, jax.jit(inner.init)(jax.tree.map(np.asarray, params)))
    assert jax.tree.all(jax.tree.map(is_at, state, tx.shardings))


def big_structs(mesh):
    """Returns parameters that are all sharded, so one unsharded state leaf changes the bytes."""
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
def test_jitted_init_never_holds_an_unsharded_leaf(name, types, options, parts):
    params = big_structs(mesh_of(AXIS_TYPES[types]))
    tx = sharding.shard(optax_adamax.scale_by_adamax(**FORMATS[name]), params, **OPTIONS[options])
    compiled = jax.jit(tx.init).lower(params).compile()
    leaves = jax.tree.leaves(jax.eval_shape(tx.init, params))
    whole = [leaf.size * leaf.dtype.itemsize for leaf in leaves]
    # Each device stores its shards, the scalars, and a table with one pointer per leaf.
    table = 8 * len(whole)
    wanted = sum(size // parts if size > 8 else size for size in whole) + table
    assert bytes_on_a_device(compiled.memory_analysis()) == wanted
    assert wanted < max(whole) + table if parts == 8 else wanted < sum(whole)
    assert collectives(compiled) == []


def test_memory_analysis_reports_an_unsharded_leaf():
    """Without `shard`, jitted init creates an unsharded state on one device."""
    params = big_structs(mesh_of())
    naive = jax.jit(optax_adamax.scale_by_adamax().init).lower(params).compile()
    whole = 2 * sum(4 * np.prod(p.shape) for p in params.values())
    assert bytes_on_a_device(naive.memory_analysis()) >= whole


def test_copies_of_the_parameters_in_the_state_are_sharded():
    """z of schedule_free starts as a copy of the parameters."""
    params = random_like(big_structs(mesh_of()), 0)
    tx = optax.contrib.schedule_free(optax_adamax.adamax(1e-3, b1=0.0), 1e-3)
    sharded = sharding.shard(tx, params, zero1_axis="data")
    state = sharded.init(params)
    assert_same_bits(state.z, params)
    for leaf in jax.tree.leaves(state.z):
        assert {shard.data.size for shard in leaf.addressable_shards} == {leaf.size // 8}
    compiled = jax.jit(sharded.init).lower(params).compile()
    assert collectives(compiled) == []


@pytest.mark.parametrize(("name", "types", "options"), [*CASES, ("2 bytes", "mixed", "zero")])
def test_init_of_shapes_returns_shapes_with_shardings(name, types, options):
    """The result can be the target of a checkpoint; no array is created."""
    params = structs(mesh_of(AXIS_TYPES[types]))
    tx = sharding.shard(optax_adamax.adamaxw(1e-3, **FORMATS[name]), params, **OPTIONS[options])
    state = tx.init(params)
    assert jax.tree.map(lambda x: x.sharding, state) == tx.shardings
    shapes = jax.eval_shape(tx.init, params)
    assert jax.tree.map(shape_and_dtype, state) == jax.tree.map(shape_and_dtype, shapes)


def shape_and_dtype(x):
    return (x.shape, x.dtype.name)


@pytest.mark.skipif(
    jax.__version_info__ < (0, 10), reason="JAX 0.7 cannot compare shardings of abstract meshes"
)
def test_eval_shape_carries_the_specs_of_explicit_axes():
    """For automatic axes, `jax.eval_shape` of any function drops the specs (JAX 0.10.2)."""
    params = structs(mesh_of(AXIS_TYPES["explicit"]))
    tx = sharding.shard(optax_adamax.adamax(1e-3), params, zero1_axis="data")
    state = jax.eval_shape(tx.init, params)
    for leaf, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(tx.shardings), strict=True):
        assert leaf.sharding.is_equivalent_to(
            NamedSharding(leaf.sharding.mesh, wanted.spec), leaf.ndim
        )


@pytest.mark.parametrize(("name", "types", "options"), [*CASES, ("2 bytes", "mixed", "zero")])
def test_jitted_init_shards_every_leaf(name, types, options):
    params = random_like(structs(mesh_of(AXIS_TYPES[types])), 0)
    tx = sharding.shard(optax_adamax.adamax(1e-3, **FORMATS[name]), params, **OPTIONS[options])
    state = jax.jit(tx.init)(params)
    assert jax.tree.all(jax.tree.map(is_at, state, tx.shardings))


def test_init_accepts_numpy_parameters():
    """NumPy arrays have no shardings, so `init` uses the shardings that `shard` received."""
    shapes = {name: structs(mesh_of())[name] for name in ("wide", "bias")}
    params = {name: np.ones(p.shape, p.dtype) for name, p in shapes.items()}
    tx = sharding.shard(optax.trace(0.9), shapes, zero1_axis="data")
    assert jax.tree.all(jax.tree.map(is_at, tx.init(params), tx.shardings))
