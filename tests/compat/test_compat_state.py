"""States in and out of `compat` without a source framework: formats, shardings, names."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from small_checkpoints import NAMES, ORDER, PARAMS, entry, mlx_state, state_dict

from optax_adamax.compat import lucid, mlx, torch


@pytest.mark.parametrize("step", [5, 5.0, np.int64(5), np.float32(5), jnp.asarray(5)])
def test_valid_state_dict_loads(step):
    good = state_dict(step=step)
    state = torch.load_state(good, PARAMS, torch.adamax(), NAMES, names=ORDER)
    moments = optax.tree.get(state, "ScaleByAdamaxState")
    assert (int(moments.count), moments.count.dtype) == (5, np.int32)
    np.testing.assert_array_equal(moments.m["fc"]["kernel"], good["state"][0]["exp_avg"].T)
    np.testing.assert_array_equal(moments.v["fc"]["bias"], good["state"][1]["exp_inf"])


def test_numbers_in_layout_equal_names():
    names = {0: ("fc/kernel", (1, 0)), 1: "fc/bias"}
    by_number = torch.load_state(state_dict(), PARAMS, torch.adamax(), names)
    by_name = torch.load_state(state_dict(), PARAMS, torch.adamax(), NAMES, names=ORDER)
    jax.tree.map(np.testing.assert_array_equal, by_number, by_name)


def test_nested_and_flat_states_of_mlx_load_equally():
    tx = mlx.adamax(0.1)
    nested = mlx.load_state(mlx_state(), PARAMS, tx, NAMES)
    flat = {"step": 5, "learning_rate": 0.1}
    for name in ("weight", "bias"):
        flat |= {f"fc.{name}.{f}": x for f, x in mlx_state()["fc"][name].items()}
    jax.tree.map(np.testing.assert_array_equal, nested, mlx.load_state(flat, PARAMS, tx, NAMES))


def test_flax_names_equal_those_of_the_framework():
    params = {
        "params": {
            "Block_0": {"Dense_0": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}},
            "Conv_0": {"kernel": jnp.ones((5, 6, 2, 3))},
            "Conv_1": {"kernel": jnp.ones((5, 2, 3))},
            "LayerNorm_0": {"scale": jnp.ones(3)},
            "Embed_0": {"embedding": jnp.ones((7, 3))},
        }
    }
    modules = {"Block_0": "blocks.0", "Block_0/Dense_0": "blocks.0.fc", "Conv_0": "conv"}
    expected = {
        "blocks.0.fc.weight": ("params/Block_0/Dense_0/kernel", (1, 0)),
        "blocks.0.fc.bias": "params/Block_0/Dense_0/bias",
        "conv.weight": ("params/Conv_0/kernel", (2, 3, 1, 0)),
        "Conv_1.weight": ("params/Conv_1/kernel", (2, 1, 0)),
        "LayerNorm_0.weight": "params/LayerNorm_0/scale",
        "Embed_0.weight": "params/Embed_0/embedding",
    }
    modules.pop("Block_0")
    assert torch.flax_names(params, modules) == expected
    assert lucid.flax_names(params, modules) == expected
    expected["conv.weight"] = ("params/Conv_0/kernel", (1, 2, 3, 0))
    expected["Conv_1.weight"] = ("params/Conv_1/kernel", (1, 2, 0))
    assert mlx.flax_names(params, modules) == expected
    both = {"Block_0": "blocks.0", "Block_0/Dense_0": "fc"}
    params["params"]["Block_0"]["Dense_1"] = {"bias": jnp.ones(3)}
    nested = torch.flax_names(params, both)
    assert nested["fc.bias"] == "params/Block_0/Dense_0/bias"
    assert nested["blocks.0.Dense_1.bias"] == "params/Block_0/Dense_1/bias"
    with pytest.raises(ValueError, match=r"but \['Dense_7'\] are not"):
        torch.flax_names(params, {"Dense_7": "fc"})


FORMATS = [
    ({}, 0.0, 0.0),
    ({"m_dtype": "float32", "v_dtype": "float32"}, 0.0, 0.0),
    ({"m_dtype": "bfloat16", "v_dtype": "bfloat16"}, 2**-8, 2**-8),
    ({"m_dtype": "bfloat16"}, 2**-8, 0.0),
    ({"m_dtype": "int8", "v_dtype": "uint8"}, 0.25, 0.06),
]


@pytest.mark.parametrize(("formats", "m_error", "v_error"), FORMATS, ids=str)
def test_storage_formats_round_trip(formats, m_error, v_error):
    # Elements are not close to zero, because 8-bit formats round small elements to a floor.
    rng = np.random.default_rng(8)
    v = 10.0 ** rng.uniform(-5, 3, (3, 2)).astype(np.float32)
    m = v * rng.uniform(0.1, 1.0, (3, 2)).astype(np.float32)
    theirs = state_dict(exp_avg=m, exp_inf=v)
    theirs["state"][1] = {"step": 5.0, "exp_avg": m[:, 0], "exp_inf": v[:, 0]}
    tx = torch.adamax(**formats)
    state = torch.load_state(theirs, PARAMS, tx, NAMES, names=ORDER)
    assert jax.tree.map(lambda x: x.dtype, state) == jax.tree.map(
        lambda x: x.dtype, jax.eval_shape(tx.init, PARAMS)
    )
    how = {"layout": NAMES, "names": ORDER}
    dumped = torch.dump_state(state, PARAMS, theirs["param_groups"], **how)
    for i in (0, 1):
        for field, error in (("exp_avg", m_error), ("exp_inf", v_error)):
            expected = theirs["state"][i][field]
            np.testing.assert_allclose(dumped["state"][i][field], expected, rtol=error)
    again = torch.load_state(dumped, PARAMS, tx, **how)
    jax.tree.map(np.testing.assert_array_equal, again, state)


def test_moments_have_the_sharding_of_a_parameter():
    mesh = jax.make_mesh((2,), ("x",), devices=jax.devices()[:2])
    sharding = NamedSharding(mesh, PartitionSpec("x", None))
    params = jax.tree.map(jnp.asarray, PARAMS)
    params["fc"]["kernel"] = jax.device_put(params["fc"]["kernel"], sharding)
    state = torch.load_state(state_dict(), params, torch.adamax(), NAMES, names=ORDER)
    moments = optax.tree.get(state, "ScaleByAdamaxState")
    for tree in (moments.m, moments.v):
        assert tree["fc"]["kernel"].sharding.is_equivalent_to(sharding, 2)


def test_parameter_named_count_is_no_counter():
    params = {"count": jnp.zeros(2), "fc": {"m": jnp.zeros(2)}}
    names = {0: "count", 1: "fc/m"}
    theirs = {"state": {0: entry(2), 1: entry(2)}, "param_groups": [{"params": [0, 1]}]}
    tx = torch.adamax(lambda step: 0.1)
    state = torch.load_state(theirs, params, tx, names)
    np.testing.assert_array_equal(state[0].m["count"], theirs["state"][0]["exp_avg"])
    assert int(state[1].count) == 5


MODULES = ["torch", "keras", "mlx", "lucid", "optax"]


@pytest.mark.parametrize(
    "names", [", ".join(MODULES), *(pytest.param(name, marks=pytest.mark.slow) for name in MODULES)]
)
def test_no_framework_is_imported(names):
    code = (
        "import sys, optax_adamax; "
        "assert not [m for m in sys.modules if m.startswith('optax_adamax.compat')]; "
        f"from optax_adamax.compat import {names}; "
        "assert not {'torch', 'keras', 'mlx', 'tensorflow'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
