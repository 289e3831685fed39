"""Bad input of `shard` and its methods raises an error that names the input and the remedy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import optax_adamax
from optax_adamax import sharding
from sharding.common import mesh_of, structs

TX = optax_adamax.adamax(1e-3)


def on(mesh, *spec):
    return jax.device_put(np.ones((8, 4), np.float32), NamedSharding(mesh, P(*spec)))


def two_meshes():
    other = mesh_of(devices=jax.devices()[::-1])
    return {"a": on(mesh_of()), "b": on(other)}


def good():
    return {"w": on(mesh_of(), "data")}


# Parameters, keyword arguments, exception, and a pattern of its message.
CASES = {
    "numpy": (lambda: {"w": np.ones(3)}, {}, TypeError, r"params\['w'\] must .* ndarray with no"),
    "number": (lambda: {"w": 1.0}, {}, TypeError, "float with no sharding.*jax.device_put"),
    "struct": (
        lambda: jax.ShapeDtypeStruct((3,), np.float32),
        {},
        TypeError,
        r"no sharding.*ShapeDtypeStruct\(shape, dtype, sharding=",
    ),
    "empty": (dict, {}, ValueError, "params must have at least one leaf"),
    "two meshes": (two_meshes, {}, ValueError, r"2 meshes: params\['a'\] on .*params\['b'\] on "),
    "mesh and device": (
        lambda: {"a": on(mesh_of()), "b": jnp.ones(3)},
        {},
        ValueError,
        "2 meshes.*Put them all on one with jax.device_put",
    ),
    "axis": (
        good,
        {"zero1_axis": "fsdp"},
        ValueError,
        r"zero1_axis is 'fsdp', but .* axes \('data', 'model'\). Write one",
    ),
    "one axis of two": (
        good,
        {"zero1_axis": ("data", "fsdp")},
        ValueError,
        r"zero1_axis is \('data', 'fsdp'\), but .* axes \('data', 'model'\). Write one",
    ),
    "an axis twice": (
        good,
        {"zero1_axis": ("data", "data")},
        ValueError,
        r"zero1_axis is \('data', 'data'\), but .* each once",
    ),
    **{
        f"axis {bad!r}": (good, {"zero1_axis": bad}, TypeError, "a mesh axis or a tuple of names")
        for bad in ((), 0, ["data"], ("data", 1))
    },
    "array as axis": (
        good,
        {"zero1_axis": jnp.arange(3)},
        TypeError,
        r"names, but an array of shape \(3,\) and dtype int32 was given",
    ),
    "axis without mesh": (
        lambda: jnp.ones(3),
        {"zero1_axis": "data"},
        ValueError,
        r"zero1_axis is 'data', but the parameters are not on a mesh. .*jax.device_put",
    ),
    "memory kind": (
        good,
        {"memory_kind": "tape"},
        ValueError,
        r"memory kinds: device, pinned_host.*Got memory kind: tape",
    ),
    "memory kind of another type": (
        good,
        {"memory_kind": 1},
        TypeError,
        "memory_kind must be None or a string such as 'pinned_host', but 1",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_arguments_raise(case):
    params, kwargs, exception, message = CASES[case]
    with pytest.raises(exception, match=message):
        sharding.shard(TX, params(), **kwargs)


@pytest.mark.parametrize("tx", ["adamax", TX.init, None])
def test_a_value_that_is_not_a_transformation_raises(tx):
    words = "must be an optax transformation, or .*, but .* was given. Write shard"
    with pytest.raises(TypeError, match=words):
        sharding.shard(tx, good())


@pytest.mark.parametrize("tx", [optax.lbfgs(), optax.sm3(1e-3)])
def test_a_state_that_optax_cannot_map_raises(tx):
    params = {name: structs(mesh_of())[name] for name in ("wide", "bias")}
    with pytest.raises(
        TypeError, match=r"optax.tree.map_params cannot find.*of your own"
    ) as caught:
        sharding.shard(tx, params)
    assert caught.value.__cause__ is not None


WRAPPERS = {
    "alone": lambda tx: tx,
    "chain": lambda tx: optax.chain(optax.clip(1.0), tx),
    "masked": lambda tx: optax.masked(tx, {"w": True}),
    "MultiSteps": lambda tx: optax.MultiSteps(tx, 2),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("zero1_axis", [None, "data"])
def test_a_packed_state_raises(wrapper, zero1_axis):
    packed = WRAPPERS[wrapper](optax_adamax.pack_small_leaves(TX))
    with pytest.raises(TypeError, match="pack_small_leaves, whose buffers cannot be sharded"):
        sharding.shard(packed, good(), zero1_axis=zero1_axis)


def test_errors_of_the_transformation_are_passed_on():
    params = jax.ShapeDtypeStruct((8,), np.int32, sharding=NamedSharding(mesh_of(), P()))
    with pytest.raises(TypeError, match="must be a float array, but its dtype is int32"):
        sharding.shard(TX, params)


def test_traced_parameters_raise():
    @jax.jit
    def inside(params):
        sharding.shard(TX, params)

    with pytest.raises(TypeError, match=r"params\['w'\] must be .* traced. Call shard outside of"):
        inside(good())


OTHER = {
    "another name": (
        {"b": np.ones((8, 4), np.float32)},
        r"\['b'\] of shape \(8, 4\), but shard was called without it",
    ),
    "another shape": (
        {"w": np.ones((4, 8), np.float32)},
        r"\['w'\] of shape \(4, 8\), but shard received shape \(8, 4\). Call shard with",
    ),
}


@pytest.mark.parametrize("case", OTHER)
def test_other_parameters_raise(case):
    other, message = OTHER[case]
    tx = sharding.shard(TX, good(), zero1_axis="data")
    with pytest.raises(ValueError, match=f"init received a leaf {message}"):
        tx.init(other)
    for name in ("update", "apply_gradients"):
        function, words = getattr(tx, name), f"^{name} received a leaf {message}"
        with pytest.raises(ValueError, match=words):
            function(other, tx.init(good()), good())
        with pytest.raises(ValueError, match=words):
            function(good(), tx.init(good()), other)


def test_init_with_a_part_of_the_parameters_raises():
    params = {"v": good()["w"], **good()}
    tx = sharding.shard(TX, params, zero1_axis="data")
    with pytest.raises(ValueError, match=r"lacks \['v'\]\. Call shard with the parameters"):
        tx.init(good())
    optax.tree.map_params(tx, lambda x: x, tx.init(params))  # calls init with an empty tree


def test_the_state_of_another_transformation_raises():
    tx = sharding.shard(TX, good(), zero1_axis="data")
    state = optax.adam(1e-3).init(good())
    words = r"received a state with the leaf \[0\].mu\['w'\], which is not in the state.* {}\(grad"
    for name in ("update", "apply_gradients"):
        with pytest.raises(ValueError, match=f"^{name} {words.format(name)}"):
            getattr(tx, name)(good(), state, good())


def test_swapped_arguments_raise_an_error_with_their_order():
    tx = sharding.shard(TX, good())
    with pytest.raises(ValueError, match=r"update\(gradients, state, params\), in this order"):
        tx.update(tx.init(good()), good(), good())
    with pytest.raises(ValueError, match=r"update\(gradients, state, params\), in this order"):
        tx.update(good(), good(), tx.init(good()))
