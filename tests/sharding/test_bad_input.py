"""Bad input is refused with what was given, why it cannot be, and what to write."""

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
FUNCTIONS = {
    "state_shardings": sharding.state_shardings,
    "unsplit_leaves": sharding.unsplit_leaves,
    "init_sharded": sharding.init_sharded,
    "keep_sharded": sharding.keep_sharded,
    "make_update_params": sharding.make_update_params,
}


def on(mesh, *spec):
    return jax.device_put(np.ones((8, 4), np.float32), NamedSharding(mesh, P(*spec)))


def two_meshes():
    other = mesh_of(devices=jax.devices()[::-1])
    return {"a": on(mesh_of()), "b": on(other)}


def good():
    return {"w": on(mesh_of(), "data")}


# Parameters, keyword arguments, exception, and what its message must say.
CASES = {
    "numpy": (lambda: {"w": np.ones(3)}, {}, TypeError, r"params\['w'\] is a ndarray with no shar"),
    "number": (lambda: {"w": 1.0}, {}, TypeError, "float with no sharding.*jax.device_put"),
    "struct": (
        lambda: jax.ShapeDtypeStruct((3,), np.float32),
        {},
        TypeError,
        r"no sharding.*ShapeDtypeStruct\(shape, dtype, sharding=",
    ),
    "empty": (dict, {}, ValueError, "params has no leaf"),
    "two meshes": (two_meshes, {}, ValueError, r"2 meshes: params\['a'\] on .*params\['b'\] on "),
    "mesh and device": (
        lambda: {"a": on(mesh_of()), "b": jnp.ones(3)},
        {},
        ValueError,
        "2 meshes.*Put them all on one with jax.device_put",
    ),
    "axis": (
        good,
        {"zero_axis": "fsdp"},
        ValueError,
        r"zero_axis is 'fsdp', but .* axes \('data', 'model'\): name one",
    ),
    "axes": (
        good,
        {"zero_axis": ("data", "model")},
        TypeError,
        r"zero_axis must be the name of one mesh axis, but \('data', 'model'\)",
    ),
    "axis without mesh": (
        lambda: jnp.ones(3),
        {"zero_axis": "data"},
        ValueError,
        r"zero_axis is 'data', but .* axes \(\)",
    ),
}


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("case", CASES)
def test_bad_parameters_and_axes(function, case):
    params, kwargs, exception, message = CASES[case]
    if function == "init_sharded" and case == "struct":
        message = "a ShapeDtypeStruct, from which no state can be made: give the parameters"
    with pytest.raises(exception, match=message):
        FUNCTIONS[function](TX, params(), **kwargs)


@pytest.mark.parametrize("function", ["state_shardings", "init_sharded", "keep_sharded"])
def test_bad_memory_kind(function):
    with pytest.raises(
        ValueError, match=r"memory kinds: device, pinned_host.*Got memory kind: tape"
    ):
        FUNCTIONS[function](TX, good(), memory_kind="tape")
    with pytest.raises(
        TypeError, match="memory_kind must be a string such as 'pinned_host', but 1"
    ):
        FUNCTIONS[function](TX, good(), memory_kind=1)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_no_transformation(function):
    with pytest.raises(TypeError, match="tx must be an optax transformation, but 'adamax'"):
        FUNCTIONS[function]("adamax", good())


@pytest.mark.parametrize("tx", [optax.lbfgs(), optax.sm3(1e-3)])
def test_state_that_optax_cannot_read(tx):
    params = {name: structs(mesh_of())[name] for name in ("wide", "bias")}
    with pytest.raises(TypeError, match=r"optax.tree.map_params cannot tell.*by hand") as caught:
        sharding.state_shardings(tx, params)
    assert caught.value.__cause__ is not None


def test_errors_of_the_transformation_itself_come_through():
    params = jax.ShapeDtypeStruct((8,), np.int32, sharding=NamedSharding(mesh_of(), P()))
    with pytest.raises(TypeError, match="dtype int32, which Adamax cannot train"):
        sharding.state_shardings(TX, params)


def test_traced_parameters():
    @jax.jit
    def inside(params):
        sharding.state_shardings(TX, params)

    with pytest.raises(TypeError, match=r"params\['w'\] is traced: call this outside of jax.jit"):
        inside(good())


def test_init_needs_arrays():
    with pytest.raises(TypeError, match=r"params\['bias'\] is a ShapeDtypeStruct.*call state_shar"):
        sharding.init_sharded(TX, structs(mesh_of()))
