"""Loaded arrays have the sharding and the memory kind of the template."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from sharding.processes import run_together

from optax_adamax import sharding
from optax_adamax.compat import optax as compat_optax
from optax_adamax.compat import torch as compat_torch

ARRAYS = {"w": np.arange(32, dtype="f4").reshape(8, 4), "b": np.arange(4, dtype="f4")}
SAVED = {
    "state": {
        i: {"step": 5.0, "exp_avg": x * 0.01, "exp_inf": x} for i, x in enumerate(ARRAYS.values())
    },
    "param_groups": [{"lr": 0.1, "params": [0, 1]}],
}
FORMATS = [{}, {"m_dtype": "int8", "v_dtype": "uint8"}, {"m_dtype": "bfloat16"}]


def sharded_params(dtype=jnp.float32):
    mesh = jax.make_mesh((4, 2), ("x", "y"))
    specs = {"w": PartitionSpec("x", "y"), "b": PartitionSpec()}
    return {
        name: jax.device_put(jnp.zeros(x.shape, dtype), NamedSharding(mesh, specs[name]))
        for name, x in ARRAYS.items()
    }


def assert_placed_like(tree, template):
    for x, like in zip(*map(jax.tree.leaves, (tree, template)), strict=True):
        assert x.dtype == like.dtype
        if like.committed:
            assert x.sharding.is_equivalent_to(like.sharding, x.ndim), (x.sharding, like.sharding)
            assert x.sharding.memory_kind == like.sharding.memory_kind


@pytest.mark.parametrize("formats", FORMATS, ids=str)
def test_moments_have_the_shardings_of_the_parameters(formats):
    params, tx = sharded_params(), compat_torch.adamax(lr=0.1, **formats)
    state = compat_torch.load_state(SAVED, params, tx, names=["w", "b"])
    assert_placed_like(state, tx.init(params))
    assert len(optax.tree.get(state, "v" if not formats else "m")) >= 1
    theirs = optax.adamax(0.1).init(params)
    ours = compat_optax.adamax(0.1, **formats)
    assert_placed_like(compat_optax.load_state(theirs, params, ours), ours.init(params))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_parameters_have_dtype_and_sharding_of_the_template(dtype):
    params = sharded_params(dtype)
    loaded = compat_torch.load_params(ARRAYS, params)
    assert_placed_like(loaded, params)
    np.testing.assert_array_equal(np.asarray(loaded["w"], "f4"), ARRAYS["w"])
    structs = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), params
    )
    assert_placed_like(compat_torch.load_params(ARRAYS, structs), params)
    plain = {name: np.zeros(x.shape, np.float16) for name, x in ARRAYS.items()}
    loaded = compat_torch.load_params(ARRAYS, plain)
    assert {x.dtype for x in loaded.values()} == {jnp.dtype("float16")}
    one = jax.device_put(plain, jax.devices()[3])
    assert_placed_like(compat_torch.load_params(ARRAYS, one), one)


def test_sharded_state_is_loaded_and_its_rate_compared():
    params = sharded_params()
    tx = sharding.shard(compat_torch.adamax(lr=0.1), params)
    state = compat_torch.load_state(SAVED, params, tx, names=["w", "b"])  # without a warning
    assert_placed_like(state, tx.init(params))
    other = sharding.shard(compat_torch.adamax(lr=0.2), params)
    with pytest.warns(UserWarning, match="learning rate 0.2 instead of 0.1 for 'w'"):
        compat_torch.load_state(SAVED, params, other, names=["w", "b"])


def test_two_processes_load_and_dump_equally(tmp_path):
    config = {"processes": 2, "devices": 4, "out": str(tmp_path)}
    printed = run_together("../compat/worker_load.py", config, tmp_path, 240)
    assert all("done" in text for text in printed)
