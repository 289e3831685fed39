"""States in and out of `compat` where no peer is needed: bad entries, formats, places, names."""

import copy
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from optax_adamax.compat import keras, lucid, mlx, torch

PARAMS = {"fc": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}}
ORDER = ["fc.weight", "fc.bias"]
NAMES = {"fc.weight": ("fc/kernel", (1, 0)), "fc.bias": "fc/bias"}


def entry(*shape, step=5.0):
    x = np.linspace(-1, 1, int(np.prod(shape))).reshape(shape).astype(np.float32)
    return {"step": step, "exp_avg": 0.1 * x, "exp_inf": np.abs(x)}


def state_dict(**changes):
    """One of two parameters; keyword arguments replace the entries of the first."""
    return {
        "state": {0: entry(3, 2) | changes, 1: entry(3)},
        "param_groups": [{"lr": 2e-3, "params": [0, 1]}],
    }


def without(tree, *path):
    tree = copy.deepcopy(tree)
    inner = tree
    for key in path[:-1]:
        inner = inner[key]
    del inner[path[-1]]
    return tree


def with_entry(tree, value, *path):
    tree = copy.deepcopy(tree)
    inner = tree
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return tree


FIRST = r"state\[0\] \('fc.weight'\)"
BAD_STATE_DICTS = [
    (
        state_dict(exp_avg=np.ones((2, 3))),
        ValueError,
        FIRST + r": 'exp_avg' and .* shapes \(2, 3\) and",
    ),
    (state_dict(exp_inf=np.ones(6)), ValueError, FIRST + r": .* shapes \(3, 2\) and \(6,\)"),
    (
        state_dict(exp_inf=-np.ones((3, 2))),
        ValueError,
        r"norm of \['fc.weight'\] has negative elements",
    ),
    (state_dict(exp_avg=np.ones((3, 2), int)), TypeError, r"\['exp_avg'\] must hold floats"),
    (state_dict(exp_avg="moments"), TypeError, FIRST + r"\['exp_avg'\] must hold floats"),
    (state_dict(exp_avg=None), TypeError, FIRST + r"\['exp_avg'\] must hold floats"),
    (state_dict(exp_avg=1j * np.ones((3, 2))), TypeError, "The array for 'fc/kernel' is complex"),
    (state_dict(exp_avg_sq=np.ones((3, 2))), ValueError, FIRST + r" has \['exp_avg_sq'\]"),
    (without(state_dict(), "state", 0, "exp_inf"), ValueError, FIRST + r" has no \['exp_inf'\]"),
    (without(state_dict(), "state", 0, "step"), ValueError, FIRST + r" has no \['step'\]"),
    (without(state_dict(), "state", 0), ValueError, r"'fc/kernel' \(there 'fc.weight'\)"),
    (with_entry(state_dict(), 3.0, "state", 0), TypeError, FIRST + " must be a dict"),
    (with_entry(state_dict(), entry(1), "state", 2), ValueError, r"state\[2\]"),
    (state_dict(step="5"), TypeError, FIRST + r"\['step'\] must be a number"),
    (state_dict(step=None), TypeError, FIRST + r"\['step'\] must be a number"),
    (state_dict(step=True), TypeError, FIRST + r"\['step'\] must be a number"),
    (state_dict(step=5 + 0j), TypeError, FIRST + r"\['step'\] must be a number"),
    (state_dict(step=np.ones(2)), ValueError, FIRST + r"\['step'\] must be a scalar"),
    (state_dict(step=2.5), ValueError, FIRST + r"\['step'\] must be a whole number"),
    (state_dict(step=-1), ValueError, FIRST + r"\['step'\] must be a whole number"),
    (state_dict(step=np.nan), ValueError, FIRST + r"\['step'\] must be a whole number"),
    (state_dict(step=np.inf), ValueError, FIRST + r"\['step'\] must be a whole number"),
    (state_dict(step=2**31), ValueError, FIRST + r"\['step'\] must be a whole number"),
    (state_dict(step=6.0), ValueError, "different numbers of steps, .*'fc/kernel': 6"),
    (without(state_dict(), "param_groups"), ValueError, "no 'param_groups'"),
    ({"fc.weight": np.ones(2)}, ValueError, "state_dict of an optimizer, not of a model"),
    (5, TypeError, "The state_dict of an optimizer was expected, but a int"),
    ("model.pt", TypeError, "the name of a file was given: 'model.pt'. Read the file"),
    (pathlib.Path("model.pt"), TypeError, "the name of a file was given"),
    (without(state_dict(), "param_groups", 0, "params"), ValueError, "the entry 'params'"),
]


@pytest.mark.parametrize(("bad", "error", "match"), BAD_STATE_DICTS)
def test_a_bad_state_dict_names_its_entry(bad, error, match):
    with pytest.raises(error, match=match):
        torch.load_state(bad, PARAMS, torch.adamax(), NAMES, names=ORDER)


@pytest.mark.parametrize("step", [5, 5.0, np.int64(5), np.float32(5), jnp.asarray(5)])
def test_a_good_state_dict_is_read(step):
    good = state_dict(step=step)
    state = torch.load_state(good, PARAMS, torch.adamax(), NAMES, names=ORDER)
    moments = optax.tree.get(state, "ScaleByAdamaxState")
    assert (int(moments.count), moments.count.dtype) == (5, np.int32)
    np.testing.assert_array_equal(moments.m["fc"]["kernel"], good["state"][0]["exp_avg"].T)
    np.testing.assert_array_equal(moments.v["fc"]["bias"], good["state"][1]["exp_inf"])


BAD_NAMES = [
    (None, None, r"numbers for its parameters, \[0, 1\]: give .* as `names`"),
    (NAMES, None, "give the names in this order as `names`"),
    (NAMES, ["fc.weight"], r"names has \[1\] names, but the groups have \[2\] parameters"),
    ({**NAMES, "fc.extra": "fc/bias"}, ORDER, r"layout has entries for \['fc.extra'\]"),
    ({**NAMES, "fc.bias": "fc/kernel"}, ORDER, "both go to 'fc/kernel'"),
    (
        {**NAMES, "fc.bias": "fc/base"},
        ORDER,
        r"'fc/base', but there is no such .* \['fc/bias', 'fc/kernel'\]",
    ),
    (
        {**NAMES, "fc.weight": ("fc/kernel", (0, 2))},
        ORDER,
        r"axes \(0, 2\), which are no permutation",
    ),
    (
        {**NAMES, "fc.weight": "fc/kernel"},
        ORDER,
        r"shape \(3, 2\) of \['fc.weight'\] for .* 'fc/kernel'",
    ),
    ({"fc.weight": NAMES["fc.weight"]}, ORDER, r"no place for the moments of \['fc.bias'\]"),
]


@pytest.mark.parametrize(("names", "order", "match"), BAD_NAMES)
def test_bad_names_name_themselves(names, order, match):
    with pytest.raises(ValueError, match=match):
        torch.load_state(state_dict(), PARAMS, torch.adamax(), names, names=order)


def test_numbers_can_be_names():
    names = {0: ("fc/kernel", (1, 0)), 1: "fc/bias"}
    by_number = torch.load_state(state_dict(), PARAMS, torch.adamax(), names)
    by_name = torch.load_state(state_dict(), PARAMS, torch.adamax(), NAMES, names=ORDER)
    jax.tree.map(np.testing.assert_array_equal, by_number, by_name)


def test_dumping_needs_names_for_everything_trained():
    state = torch.adamax().init(PARAMS)
    with pytest.raises(ValueError, match=r"no place for the moments of \['fc/bias'\]"):
        torch.dump_state(state, PARAMS, [{"params": [0]}], {0: "fc/kernel"})
    with pytest.raises(ValueError, match="no ScaleByAdamaxState in this state"):
        torch.dump_state(optax.adam(1.0).init(PARAMS), PARAMS, [{"params": [0, 1]}], {0: "fc/bias"})


def mlx_state(**changes):
    moments = {"m": np.ones((3, 2)), "v": np.ones((3, 2))}
    bias = {"m": np.ones(3), "v": np.ones(3)}
    return {"step": 5, "learning_rate": 0.1, "fc": {"weight": moments, "bias": bias}} | changes


BAD_MLX_STATES = [
    (without(mlx_state(), "step"), ValueError, "There is no 'step'"),
    (mlx_state(step="now"), TypeError, "'step' must be a number"),
    (
        with_entry(mlx_state(), np.ones(4), "fc", "weight", "m"),
        ValueError,
        r"'fc/kernel' orders axes as \(1, 0\), but",
    ),
    (without(mlx_state(), "fc", "weight", "v"), ValueError, "There is no 'fc.weight.v'"),
    (
        with_entry(mlx_state(), np.ones(3), "fc", "bias", "vr"),
        ValueError,
        "'fc.bias.vr' is not part",
    ),
    (without(mlx_state(), "fc", "weight"), ValueError, "layout has entries for .*fc.weight"),
    (
        mlx_state(extra={"m": np.ones(1), "v": np.ones(1)}),
        ValueError,
        r"no place for .*\['extra'\]",
    ),
]


@pytest.mark.parametrize(("bad", "error", "match"), BAD_MLX_STATES)
def test_a_bad_state_of_mlx_names_its_entry(bad, error, match):
    with pytest.raises(error, match=match):
        mlx.load_state(bad, PARAMS, mlx.adamax(0.1), NAMES)


def test_a_good_state_of_mlx_is_read_nested_or_flat():
    tx = mlx.adamax(0.1)
    nested = mlx.load_state(mlx_state(), PARAMS, tx, NAMES)
    flat = {"step": 5, "learning_rate": 0.1}
    for name in ("weight", "bias"):
        flat |= {f"fc.{name}.{f}": x for f, x in mlx_state()["fc"][name].items()}
    jax.tree.map(np.testing.assert_array_equal, nested, mlx.load_state(flat, PARAMS, tx, NAMES))


def keras_variables():
    """Of an optimizer with an average, and a rate that is no schedule."""
    weights = [np.ones((3, 2)), np.ones(3)]
    moments = [np.ones((3, 2))] * 2 + [np.ones(3)] * 2
    return [np.asarray(5), np.asarray(0.001), *weights, *moments]


BAD_KERAS_VARIABLES = [
    (keras_variables()[:-2], ValueError, "There are 6 variables"),
    (
        with_entry(keras_variables(), np.ones(1), 7),
        ValueError,
        r"The norm of 'fc.bias' has shape \(1,\)",
    ),
    (
        with_entry(keras_variables(), np.ones(1), 3),
        ValueError,
        r"The average of 'fc.bias' has shape \(1,\)",
    ),
    (with_entry(keras_variables(), "now", 0), TypeError, r"variables\[0\] \(iteration\) must be"),
    (with_entry(keras_variables(), 2.5, 0), ValueError, r"variables\[0\] \(iteration\) must be"),
    ({"0": 5, "2": 0.1}, ValueError, "there is no '1'"),
]


@pytest.mark.parametrize(("bad", "error", "match"), BAD_KERAS_VARIABLES)
def test_bad_variables_of_keras_name_themselves(bad, error, match):
    tx = keras.adamax(use_ema=True)
    good = keras.load_state(keras_variables(), PARAMS, tx, NAMES, names=ORDER)
    assert good.iteration == 5
    with pytest.raises(error, match=match):
        keras.load_state(bad, PARAMS, tx, NAMES, names=ORDER)


@pytest.mark.parametrize(
    ("theirs", "match"),
    [
        (
            {"fc.weight": np.ones((2, 3)), "fc.bias": np.ones(3)},
            r"shape \(3, 2\) of \['fc.weight'\] for .* 'fc/kernel'",
        ),
        ({"fc.bias": np.ones(3)}, "layout has entries for"),
        ({"fc.weight": np.ones((3, 2)), "fc.bias": np.ones(3), "x": np.ones(1)}, r"\['x'\]"),
    ],
)
def test_bad_parameters_name_themselves(theirs, match):
    with pytest.raises(ValueError, match=match):
        torch.load_params(theirs, PARAMS, NAMES)


def test_parameters_for_which_there_is_nothing_are_named():
    with pytest.raises(ValueError, match=r"nothing for the parameters .*'fc/bias'"):
        torch.load_params({"a": np.ones((2, 3))}, PARAMS, {"a": "fc/kernel"})
    with pytest.raises(ValueError, match=r"layout does not lead to .*'fc/bias'"):
        torch.dump_params(PARAMS, {"a": "fc/kernel"})


def test_names_of_flax_modules():
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
    with pytest.raises(ValueError, match=r"\['Dense_7'\]"):
        torch.flax_names(params, {"Dense_7": "fc"})


FORMATS = [
    ({}, 0.0, 0.0),
    ({"m_dtype": "float32", "v_dtype": "float32"}, 0.0, 0.0),
    ({"m_dtype": "bfloat16", "v_dtype": "bfloat16"}, 2**-8, 2**-8),
    ({"m_dtype": "bfloat16"}, 2**-8, 0.0),
    ({"m_dtype": "int8", "v_dtype": "uint8"}, 0.25, 0.06),
]


@pytest.mark.parametrize(("formats", "m_error", "v_error"), FORMATS, ids=str)
def test_every_storage_format_is_filled_and_read(formats, m_error, v_error):
    # Elements are away from zero: the 8-bit formats have a floor, which is not looked at here.
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


def test_moments_are_placed_where_the_parameters_are():
    mesh = jax.make_mesh((2,), ("x",), devices=jax.devices()[:2])
    sharding = NamedSharding(mesh, PartitionSpec("x", None))
    params = jax.tree.map(jnp.asarray, PARAMS)
    params["fc"]["kernel"] = jax.device_put(params["fc"]["kernel"], sharding)
    state = torch.load_state(state_dict(), params, torch.adamax(), NAMES, names=ORDER)
    moments = optax.tree.get(state, "ScaleByAdamaxState")
    for tree in (moments.m, moments.v):
        assert tree["fc"]["kernel"].sharding.is_equivalent_to(sharding, 2)


def test_a_parameter_called_count_is_no_counter():
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
