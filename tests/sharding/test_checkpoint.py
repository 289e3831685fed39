"""Checkpoints of sharded states resume exactly on other meshes and in other memory kinds."""

from functools import cache, partial

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import serialization

import optax_adamax
from optax_adamax import sharding
from optax_adamax.compat import optax as compat_optax
from sharding.common import (
    AXIS_TYPES,
    FORMATS,
    HOST_MEMORY,
    PARAMETERS,
    assert_same_bits,
    each_format,
    exact_adamaxw,
    is_at,
    mesh_of,
    random_like,
    state_structs,
    structs,
)
from sharding.processes import run_alone

# Two leaves that ZeRO-1 shards, with different dtypes; and for optax, one that it cannot shard.
# test_checkpoint_is_restored_on_other_meshes covers leaves of all kinds.
TRAINED = ("wide", "half")
OF_OPTAX = ("wide", "bias")


def some_structs(mesh, names=TRAINED):
    return {name: structs(mesh)[name] for name in names}


@cache
def compiled(tx, mesh, options, names):
    sharded = sharding.shard(tx, some_structs(mesh, names), **dict(options))
    return jax.jit(sharded.apply_gradients)


def train(tx, params, state, steps, **options):
    """Returns the training state after more steps; the count is the seed of the gradients."""
    options = tuple((k, v) for k, v in options.items() if v is not None)
    step = compiled(tx, params["wide"].sharding.mesh, options, tuple(params))
    for _ in range(steps):
        seed = int(optax.tree.get(state, "count"))
        params, state = step(random_like(params, seed), state, params)
    return {"params": params, "state": state}


@cache
def start(tx, names=TRAINED, steps=3, **options):
    """Returns the training state after the first steps on eight devices."""
    params = random_like(some_structs(mesh_of(), names), 99)
    state = sharding.shard(tx, params, **options).init(params)
    return train(tx, params, state, steps, **options)


def target(tx, mesh, names=TRAINED, **options):
    """Returns shapes and shardings of the tree to restore."""
    params = some_structs(mesh, names)
    return {"params": params, "state": state_structs(tx, params, **options)}


def save(path, tree):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, tree)


def restore(path, tree):
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(path, tree)


def assert_in_place(tree, wanted):
    assert jax.tree.all(jax.tree.map(lambda x, w: is_at(x, w.sharding), tree, wanted))


@each_format
def test_checkpoint_of_8_devices_resumes_on_4_with_another_sharding(name, tmp_path):
    tx = exact_adamaxw(name)
    before = start(tx, zero1_axis="data")
    save(tmp_path / "saved", before)
    mesh = mesh_of(AXIS_TYPES["explicit"], (2, 2), jax.devices()[4:])
    after = restore(tmp_path / "saved", target(tx, mesh))
    assert_same_bits(after, before)
    assert_in_place(after, target(tx, mesh))
    undisturbed = train(tx, **before, steps=2, zero1_axis="data")
    assert_same_bits(train(tx, **after, steps=2), undisturbed)


MESHES = {
    "the same": lambda: mesh_of(),
    "one device": lambda: mesh_of(shape=(1, 1)),
    "other devices": lambda: mesh_of(devices=jax.devices()[::-1]),
    "another shape": lambda: mesh_of(shape=(1, 8)),
}


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("options", [{}, {"zero1_axis": "data"}])
def test_checkpoint_is_restored_on_other_meshes(mesh, options, tmp_path):
    tx = exact_adamaxw("2 bytes")
    params = random_like(structs(mesh_of()), 99)
    state = sharding.shard(tx, params, zero1_axis="data").init(params)
    before = {"params": params, "state": state}
    save(tmp_path / "saved", before)
    wanted = target(tx, MESHES[mesh](), tuple(PARAMETERS), **options)
    after = restore(tmp_path / "saved", wanted)
    assert_same_bits(after, before)
    assert_in_place(after, wanted)


@HOST_MEMORY
@pytest.mark.parametrize(("source", "destination"), [("pinned_host", None), (None, "pinned_host")])
def test_checkpoint_resumes_in_another_memory_kind(source, destination, tmp_path):
    tx = exact_adamaxw("2 bytes")
    before = start(tx, zero1_axis="data", memory_kind=source)
    save(tmp_path / "saved", before)
    wanted = target(tx, mesh_of(), zero1_axis="data", memory_kind=destination)
    after = restore(tmp_path / "saved", wanted)
    assert_same_bits(after, before)
    assert_in_place(after, wanted)
    undisturbed = train(tx, **before, steps=2, zero1_axis="data", memory_kind=source)
    continued = train(tx, **after, steps=2, zero1_axis="data", memory_kind=destination)
    assert_same_bits(continued, undisturbed)


@pytest.mark.parametrize("name", ["float32", "2 bytes"])
def test_flax_checkpoint_resumes_on_another_mesh(name):
    tx = exact_adamaxw(name)
    before = start(tx, zero1_axis="data")
    saved = serialization.to_bytes(before)
    mesh = mesh_of(shape=(2, 2))
    wanted = target(tx, mesh)
    after = serialization.from_bytes(wanted, saved)
    after = jax.device_put(after, jax.tree.map(lambda x: x.sharding, wanted))
    assert_same_bits(after, before)
    undisturbed = train(tx, **before, steps=2, zero1_axis="data")
    assert_same_bits(train(tx, **after, steps=2), undisturbed)


def test_torn_flax_bytes_raise():
    tx = exact_adamaxw("2 bytes")
    state = jax.jit(tx.init)({"w": np.ones((3, 2), np.float32), "b": np.ones(2, np.float32)})
    saved = serialization.to_bytes(state)
    for length in range(len(saved)):
        with pytest.raises(ValueError):  # raised by msgpack or by Flax
            serialization.from_bytes(state, saved[:length])
    assert_same_bits(serialization.from_bytes(state, saved), state)


@pytest.mark.slow
def test_torn_orbax_checkpoints_raise_or_are_intact(tmp_path):
    """If one file is halved, deleted or zeroed, restoring raises or returns the same bits."""
    outcomes = run_alone("worker_torn.py", tmp_path)
    assert {o for o in outcomes.values() if o not in ("rejected", "same")} == set()
    rejected = [case for case, outcome in outcomes.items() if outcome == "rejected"]
    for damage in ("halved", "deleted", "zeroed"):
        assert f"manifest.ocdbt {damage}" in rejected
        assert any(case.startswith("d/") and case.endswith(damage) for case in rejected)


@pytest.mark.parametrize("name", ["4 bytes", "2 bytes"])
def test_float32_checkpoint_is_converted_to_another_format(name, tmp_path):
    """The checkpoint is restored in float32, and converted on the devices where it is stored."""
    exact = exact_adamaxw("float32")
    before = start(exact, zero1_axis="data")
    save(tmp_path / "saved", before)
    mesh = mesh_of(shape=(2, 2))
    after = restore(tmp_path / "saved", target(exact, mesh))
    encode = partial(optax_adamax.encode_state, **FORMATS[name])
    shardings = sharding.shard(exact_adamaxw(name), after["params"]).shardings
    state = jax.jit(encode, out_shardings=shardings)(after["state"])
    assert_same_bits(state, jax.jit(encode)(jax.tree.map(np.asarray, before["state"])))
    train(exact_adamaxw(name), after["params"], state, steps=1)


@pytest.mark.parametrize(
    ("source", "destination"),
    [("float32", "4 bytes"), ("2 bytes", "float32"), ("2 bytes", "4 bytes")],
)
def test_restoring_another_format_raises(source, destination, tmp_path):
    save(tmp_path / "saved", start(exact_adamaxw(source), zero1_axis="data"))
    with pytest.raises(ValueError, match="structures do not match"):
        restore(tmp_path / "saved", target(exact_adamaxw(destination), mesh_of()))


OPTAX_ADAMAX = optax.adamax(0.05)


@pytest.mark.parametrize("name", [pytest.param("float32", marks=pytest.mark.slow), "4 bytes"])
def test_optax_checkpoint_continues_with_this_package(name, tmp_path):
    """A sharded run of optax.adamax continues with this package on half of the devices."""
    with jax.numpy_dtype_promotion("standard"):  # optax needs it
        before = start(OPTAX_ADAMAX, OF_OPTAX, steps=4)
        save(tmp_path / "saved", before)
        undisturbed = train(OPTAX_ADAMAX, **before, steps=3)
    mesh = mesh_of(shape=(2, 2))
    after = restore(tmp_path / "saved", target(OPTAX_ADAMAX, mesh, OF_OPTAX))
    tx = optax_adamax.adamax(0.05, **FORMATS[name])
    sharded = sharding.shard(tx, after["params"], zero1_axis="data")
    state = compat_optax.load_state(after["state"], after["params"], sharded)
    assert jax.tree.all(jax.tree.map(is_at, state, sharded.shardings))
    continued = train(tx, after["params"], state, steps=3, zero1_axis="data")
    # Errors of three steps of 0.05: float32 rounds m, v and two divisions, bfloat16 rounds m and v.
    # The three sums with the parameter are rounded, too.
    uncertain = 3 * 0.05 * (4 * 2.0**-24 if name == "float32" else 2 * 2.0**-8)
    for k in OF_OPTAX:
        parts = (continued["params"][k], undisturbed["params"][k], before["params"][k])
        found, wanted, old = (np.asarray(x) for x in parts)
        assert np.abs(wanted - old).max() > 0.02
        assert np.all(np.abs(found - wanted) <= 3 * np.spacing(np.abs(wanted)) + uncertain)
