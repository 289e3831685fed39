"""`shardings` and `unsharded` are correct for any optax transformation and for all options."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

import optax_adamax
from optax_adamax import sharding
from sharding.common import (
    AUTO,
    AXIS_TYPES,
    EXPLICIT,
    FORMATS,
    HOST_MEMORY,
    PARAMETERS,
    ZERO,
    mesh_of,
    structs,
)

REAL = ("wide", "fsdp", "bias")


def real_structs(mesh):
    return {name: leaf for name, leaf in structs(mesh).items() if name in REAL}


def weights(params):
    return jax.tree.map(lambda p: p.ndim > 1, params)


TRANSFORMATIONS = {
    "adamax": optax_adamax.adamax(1e-3),
    "adamaxw": optax_adamax.adamaxw(optax.cosine_decay_schedule(1e-3, 10)),
    "optax.adamax": optax.adamax(1e-3),
    "optax.adamw": optax.adamw(1e-3),
    "optax.amsgrad": optax.amsgrad(1e-3),
    "optax.lamb": optax.lamb(1e-3),
    "optax.lion": optax.lion(1e-3),
    "optax.rmsprop": optax.rmsprop(1e-3),
    "optax.rprop": optax.rprop(1e-3),
    "optax.sgd": optax.sgd(1e-3, momentum=0.9),
    "optax.contrib.ademamix": optax.contrib.ademamix(1e-3),
    "optax.contrib.prodigy": optax.contrib.prodigy(1e-3),
    "schedule_free": optax.contrib.schedule_free(optax_adamax.adamax(1e-3, b1=0.0), 1e-3),
    "chain": optax.chain(
        optax.clip_by_global_norm(1.0), optax_adamax.adamaxw(1e-3), optax.ema(0.9)
    ),
    "named_chain": optax.named_chain(("rule", optax_adamax.scale_by_adamax())),
    "inject_hyperparams": optax.inject_hyperparams(optax_adamax.adamax)(1e-3),
    "apply_if_finite": optax.apply_if_finite(optax_adamax.adamax(1e-3), 3),
    "multi_steps": optax.MultiSteps(optax_adamax.adamax(1e-3), 4).gradient_transformation(),
    "masked": optax.masked(optax_adamax.adamax(1e-3), weights),
    "partition": optax.partition(
        {True: optax_adamax.adamax(1e-3), False: optax.sgd(1e-2, momentum=0.9)}, weights
    ),
    "noise": optax.chain(optax.add_noise(0.1, 0.5, jax.random.key(0)), optax.adam(1e-3)),
}


def owner(path, state_leaf, params):
    """Returns the name of the parameter that a state leaf belongs to, read from its path."""
    for name, p in params.items():
        if jax.tree_util.keystr(path).endswith(f"[{name!r}]"):
            assert state_leaf.shape == p.shape
            return name
    return None


@pytest.mark.parametrize("name", TRANSFORMATIONS)
@pytest.mark.parametrize("zero1_axis", [None, "data"])
def test_state_of_any_transformation_is_sharded_like_its_parameters(name, zero1_axis):
    params = real_structs(mesh_of())
    tx = TRANSFORMATIONS[name]
    got = sharding.shard(tx, params, zero1_axis=zero1_axis).shardings
    shapes = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), params)
    state = jax.eval_shape(tx.init, shapes)
    assert jax.tree.structure(got) == jax.tree.structure(state)
    owners = set()
    leaves = zip(jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(got), strict=True)
    for (path, leaf), place in leaves:
        parameter = owner(path, leaf, params)
        owners.add(parameter)
        wanted = P()
        if parameter is not None:
            wanted = ZERO[parameter] if zero1_axis else PARAMETERS[parameter][2]
        assert place.mesh == mesh_of()
        assert place.is_equivalent_to(NamedSharding(mesh_of(), wanted), leaf.ndim), path
    masked_out = {"bias"} if name == "masked" else set()
    assert owners - {None} == {*REAL} - masked_out


@pytest.mark.parametrize("types", AXIS_TYPES)
@pytest.mark.parametrize("name", FORMATS)
def test_moments_in_every_format_are_sharded(name, types):
    mesh = mesh_of(AXIS_TYPES[types])
    tx = optax_adamax.scale_by_adamax(**FORMATS[name])
    got = sharding.shard(tx, structs(mesh), zero1_axis="data").shardings
    # The first field of the container of a quantized moment is the tree of its codes.
    moments = [x if isinstance(x, dict) else x[0] for x in (got.m, got.v)]
    for moment in moments:
        for parameter, spec in ZERO.items():
            ndim = len(PARAMETERS[parameter][0])
            assert moment[parameter].is_equivalent_to(NamedSharding(mesh, spec), ndim), parameter
    moment_leaves = 2 * len(PARAMETERS)
    others = [x for x in jax.tree.leaves(got) if x.spec == P()]
    replicated = 2 * sum(spec == P() for spec in ZERO.values())
    assert len(others) == len(jax.tree.leaves(got)) - moment_leaves + replicated


def test_arrays_and_structs_and_abstract_meshes_agree():
    mesh = mesh_of()
    abstract = AbstractMesh((4, 2), ("data", "model"))
    tx = optax_adamax.adamax(1e-3)
    arrays = jax.tree.map(
        lambda p: jax.device_put(np.zeros(p.shape, p.dtype), p.sharding), structs(mesh)
    )
    found = [
        sharding.shard(tx, params, zero1_axis="data").shardings
        for params in (arrays, structs(mesh), structs(abstract))
    ]
    specs = [jax.tree.map(lambda s: s.spec, shardings) for shardings in found]
    assert found[0] == found[1]
    assert specs[0] == specs[2]
    assert all(s.mesh == abstract for s in jax.tree.leaves(found[2]))


@pytest.mark.parametrize(
    ("shape", "spec", "wanted"),
    [
        ((8, 4), P(), P("data", None)),  # the largest
        ((4, 8), P(), P(None, "data")),
        ((8, 8), P(), P("data", None)),  # the first of equals
        ((9, 4), P(), P(None, "data")),  # the largest is not divisible
        ((8, 4), P("model"), P("model", "data")),  # the largest is sharded already
        ((8, 6), P("model"), None),  # no other dimension is divisible
        ((8, 4), P(("model", "data")), P(("model", "data"))),  # sharded over it already
        ((8, 4), P(None, "data"), P(None, "data")),
        ((2, 4, 16), P(None, None, "model"), P(None, "data", "model")),
        ((0, 3), P(), None),
        ((0, 4), P(), P(None, "data")),  # an empty dimension is not sharded
        ((3,), P(), None),
        ((), P(), None),
    ],
)
@pytest.mark.parametrize("axis_type", [AUTO, EXPLICIT])
def test_the_dimension_of_zero(shape, spec, wanted, axis_type):
    mesh = mesh_of((axis_type, axis_type))
    params = jax.ShapeDtypeStruct(shape, np.float32, sharding=NamedSharding(mesh, spec))
    tx = sharding.shard(optax.trace(0.9), params, zero1_axis="data")
    assert tx.shardings.trace.spec == (spec if wanted is None else wanted)
    assert len(tx.unsharded) == (wanted is None)


@pytest.mark.parametrize(
    ("shape", "spec", "wanted"),
    [
        ((16, 4), P(), P(("data", "model"), None)),
        ((4, 8), P(), P(None, ("data", "model"))),
        ((12, 4), P(), None),  # 12 is divisible by 4 and by 2, not by 8
        ((8, 4), P("data"), P("data", "model")),  # sharded over one of them already
        ((8, 5), P("model"), None),
        ((8, 4), P("data", "model"), P("data", "model")),
        ((8, 4), P(("data", "model")), P(("data", "model"))),
    ],
)
@pytest.mark.parametrize("axis_type", [AUTO, EXPLICIT])
def test_two_zero1_axes_shard_one_dimension(shape, spec, wanted, axis_type):
    mesh = mesh_of((axis_type, axis_type))
    params = jax.ShapeDtypeStruct(shape, np.float32, sharding=NamedSharding(mesh, spec))
    tx = sharding.shard(optax.trace(0.9), params, zero1_axis=("data", "model"))
    assert tx.shardings.trace.spec == (spec if wanted is None else wanted)
    assert len(tx.unsharded) == (wanted is None)


def test_unsharded_gives_path_bytes_and_reason():
    inner = optax_adamax.scale_by_adamax()
    report = sharding.shard(inner, structs(mesh_of()), zero1_axis="data").unsharded
    assert [leaf[:2] for leaf in report] == [("m/bias", 24), ("v/bias", 24)]
    assert report[0].reason == "no unsharded dimension of (6,) is divisible by 'data'"
    assert sharding.shard(inner, structs(mesh_of())).unsharded == ()


def test_unsharded_counts_the_bytes_of_one_device():
    mesh = mesh_of()
    params = jax.ShapeDtypeStruct((6, 10), np.float32, sharding=NamedSharding(mesh, P("model")))
    (leaf,) = sharding.shard(optax.trace(0.9), params, zero1_axis="data").unsharded
    assert leaf.bytes == 6 * 10 * 4 // 2


def test_leaves_of_another_shape():
    """optax.adafactor stores rows and columns instead of arrays like the parameters."""
    mesh = mesh_of()
    params = {"w": structs(mesh)["wide"]}
    tx = optax.adafactor(1e-3, min_dim_size_to_factor=8)
    replicated = NamedSharding(mesh, P())
    sharded = sharding.shard(tx, params)
    got = sharded.shardings[0]
    assert (got.v_row["w"], got.v_col["w"], got.v["w"]) == (replicated,) * 3
    report = {leaf.path: leaf for leaf in sharded.unsharded}
    assert report["0/v_col/w"].bytes == 40 * 4
    assert "the shape of its parameter is (24, 40)" in report["0/v_col/w"].reason
    sharded = sharding.shard(tx, params, zero1_axis="data")
    got = sharded.shardings[0]
    assert (got.v_row["w"].spec, got.v_col["w"].spec) == (P("data"), P("data"))
    assert [(leaf.path, leaf.bytes) for leaf in sharded.unsharded] == [("0/v/w", 4)]


def test_arrays_of_no_parameter_are_unsharded():
    def init(params):
        return {"table": jnp.zeros(64), "count": jnp.zeros((), jnp.int32)}

    tx = optax.GradientTransformation(init, lambda g, s, p=None: (g, s))
    params = structs(mesh_of())
    for zero1_axis in (None, "data"):
        (leaf,) = sharding.shard(tx, params, zero1_axis=zero1_axis).unsharded
        assert leaf == ("table", 256, "it does not belong to a parameter")


@pytest.mark.parametrize("kind", ["device", "pinned_host", "unpinned_host"])
def test_memory_kind(kind):
    params = structs(mesh_of())
    tx = optax_adamax.adamax(1e-3)
    got = sharding.shard(tx, params, zero1_axis="data", memory_kind=kind).shardings
    assert {s.memory_kind for s in jax.tree.leaves(got)} == {kind}
    specs = jax.tree.map(lambda s: s.spec, got)
    on_device = sharding.shard(tx, params, zero1_axis="data").shardings
    assert specs == jax.tree.map(lambda s: s.spec, on_device)


@pytest.mark.parametrize(
    "place",
    [
        NamedSharding(mesh_of(), P("data"), memory_kind="pinned_host"),
        SingleDeviceSharding(jax.devices()[0], memory_kind="pinned_host"),
    ],
    ids=["mesh", "one device"],
)
def test_state_has_the_memory_kind_of_its_parameters(place):
    params = jax.ShapeDtypeStruct((8, 4), np.float32, sharding=place)
    got = sharding.shard(optax_adamax.scale_by_adamax(), params).shardings
    for moment in (got.m, got.v):
        assert moment.memory_kind == "pinned_host" and moment.is_equivalent_to(place, 2)
    assert got.count.memory_kind == "device"


@HOST_MEMORY
def test_state_of_parameters_on_one_device_is_stored_in_host_memory():
    params = {"w": jnp.ones((4, 2)), "b": jnp.ones(2)}
    tx = sharding.shard(optax_adamax.scale_by_adamax(), params, memory_kind="pinned_host")
    state = tx.init(params)
    for leaf in jax.tree.leaves(state):
        assert leaf.sharding.device_set == {jax.devices()[0]}
        assert leaf.sharding.memory_kind == "pinned_host"
