"""The buffers of pack_small_leaves: whole on each device, beside leaves that are split."""

from functools import cache

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import PartitionSpec as P

import optax_adamax
from optax_adamax import sharding
from sharding.common import (
    AXIS_TYPES,
    EXACT_PRODUCTS,
    ZERO,
    assert_same_bits,
    collectives,
    is_at,
    mesh_of,
    random_like,
    state_structs,
    structs,
)

# Of the parameters of `common`, "bias", "fsdp" (of one dtype) and "half" are small.
INNER = optax_adamax.adamax(**EXACT_PRODUCTS, m_dtype="int8", v_dtype="uint8")
PACKED = optax_adamax.pack_small_leaves(INNER, max_size=128)
WRAPPERS = {
    "alone": lambda tx: tx,
    "chain": lambda tx: optax.chain(optax.clip(1.0), tx),
    "masked": lambda tx: optax.masked(tx, {"wide": True, "fsdp": True, "bias": True, "half": True}),
    "MultiSteps": lambda tx: optax.MultiSteps(tx, 2).gradient_transformation(),
}


@pytest.mark.parametrize("name", WRAPPERS)
@pytest.mark.parametrize("zero_axis", [None, "data"])
def test_state_shardings(name, zero_axis):
    mesh = mesh_of()
    tx = WRAPPERS[name](PACKED)
    got = sharding.state_shardings(tx, structs(mesh), zero_axis=zero_axis)
    shapes = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), structs(mesh))
    assert jax.tree.structure(got) == jax.tree.structure(jax.eval_shape(tx.init, shapes))
    m = optax.tree.get(got, "m").ratio_int8
    assert set(m.buffers) == {"bfloat16", "float32"}
    assert all(leaf.spec == P() for leaf in m.buffers.values())
    assert set(m.unpacked) == {"['wide']"}
    assert m.unpacked["['wide']"].spec == (P(None, "model") if zero_axis is None else ZERO["wide"])
    if name == "MultiSteps":
        assert got.acc_grads["half"].spec == (
            P(None, "model") if zero_axis is None else ZERO["half"]
        )


def test_report_names_packing():
    report = sharding.unsplit_leaves(PACKED, structs(mesh_of()), zero_axis="data")
    assert [leaf.bytes for leaf in report] == [128, 86] * 2
    assert all(
        "buffers" in leaf.path and "buffer of pack_small_leaves" in leaf.reason for leaf in report
    )
    assert len(sharding.unsplit_leaves(PACKED, structs(mesh_of()))) == len(report)  # some are split
    whole = {"bias": structs(mesh_of())["bias"]}
    assert sharding.unsplit_leaves(PACKED, whole) == []


@cache
def step_on_one_device():
    """The first step, without anything of `sharding`."""
    params = random_like(structs(mesh_of(shape=(1, 1))), 99)
    gradients, params = jax.tree.map(np.asarray, (random_like(params, 0), params))
    return jax.jit(lambda g, p: PACKED.update(g, PACKED.init(p), p))(gradients, params)


@pytest.mark.parametrize("types", ["auto", "explicit"])
def test_step(types):
    params = random_like(structs(mesh_of(AXIS_TYPES[types])), 99)
    gradients = random_like(params, 0)
    kept = sharding.keep_sharded(PACKED, params, zero_axis="data")
    state = sharding.init_sharded(PACKED, params, zero_axis="data")
    got = jax.jit(kept.update)(gradients, state, params)
    assert_same_bits(got, step_on_one_device())
    updates, state = got
    assert all(is_at(u, params[k].sharding) for k, u in updates.items())
    wanted = sharding.state_shardings(PACKED, params, zero_axis="data")
    assert jax.tree.all(jax.tree.map(is_at, state, wanted))


def test_small_leaves_that_are_whole_are_not_communicated():
    params = {name: structs(mesh_of())[name] for name in ("bias", "wide")}
    params["scale"] = params["bias"].update(shape=(8,))  # which ZeRO could split
    state = state_structs(PACKED, params, zero_axis="data")
    update_params = jax.jit(sharding.make_update_params(PACKED, params, zero_axis="data"))
    found = collectives(update_params.lower(params, state, params).compile())
    assert [kind for kind, _ in found] == ["all-gather"]  # of "wide"


def test_a_checkpoint_fits_whatever_the_sharding(tmp_path):
    params = random_like(structs(mesh_of(AXIS_TYPES["explicit"])), 0)
    state = sharding.init_sharded(PACKED, params, zero_axis="data")
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        params = jax.tree.map(np.asarray, params)
        on_one_device = jax.jit(PACKED.init)(params)
        assert_same_bits(checkpointer.restore(tmp_path / "state", on_one_device), state)
        for other in (
            jax.jit(optax_adamax.pack_small_leaves(INNER, max_size=64).init)(params),
            jax.jit(PACKED.init)({**params, "bias": params["fsdp"], "fsdp": params["bias"]}),
        ):
            with pytest.raises(ValueError, match="tree structures do not match"):
                checkpointer.restore(tmp_path / "state", other)
