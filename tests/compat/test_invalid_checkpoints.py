"""Checkpoints, names and layouts that do not fit raise errors that name the wrong entry."""

import copy
import pathlib

import numpy as np
import optax
import pytest
from small_checkpoints import NAMES, ORDER, PARAMS, entry, mlx_state, state_dict

from optax_adamax.compat import keras, mlx, torch


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


STEP = "The step of 'fc.weight' must be a "
FIRST_MOMENT = "The first moment of 'fc.weight' must be an array of floats"
BAD_STATE_DICTS = [
    (
        state_dict(exp_avg=np.ones((2, 3))),
        ValueError,
        r"norm of 'fc.weight' must have the same shape, .* \(2, 3\) and \(3, 2\)",
    ),
    (state_dict(exp_inf=np.ones(6)), ValueError, r"their shapes are \(3, 2\) and \(6,\)"),
    (
        state_dict(exp_inf=-np.ones((3, 2))),
        ValueError,
        "norm of 'fc/kernel' must not be negative",
    ),
    (state_dict(exp_avg=np.ones((3, 2), int)), TypeError, FIRST_MOMENT),
    (state_dict(exp_avg="moments"), TypeError, FIRST_MOMENT),
    (state_dict(exp_avg=None), TypeError, FIRST_MOMENT),
    (
        state_dict(exp_avg=1j * np.ones((3, 2))),
        TypeError,
        "for 'fc/kernel' must be real as its template",
    ),
    (state_dict(exp_avg_sq=np.ones((3, 2))), ValueError, "with the keys .*'exp_avg_sq'"),
    (
        without(state_dict(), "state", 0, "exp_inf"),
        ValueError,
        "with the keys 'step', 'exp_avg' was given",
    ),
    (
        without(state_dict(), "state", 0, "step"),
        ValueError,
        "with the keys 'exp_avg', 'exp_inf' was given",
    ),
    (
        without(state_dict(), "state", 0),
        ValueError,
        r"none for 'fc/kernel' \('fc.weight' in the source\)",
    ),
    (
        with_entry(state_dict(), 3.0, "state", 0),
        ValueError,
        "of 'fc.weight' must be a dict .* but 3.0 was given",
    ),
    (with_entry(state_dict(), entry(1), "state", 2), ValueError, r"but \[2\] are missing"),
    (state_dict(step="5"), TypeError, STEP + "number"),
    (state_dict(step=None), TypeError, STEP + "number"),
    (state_dict(step=True), TypeError, STEP + "number"),
    (state_dict(step=5 + 0j), TypeError, STEP + "number"),
    (state_dict(step=np.ones(2)), ValueError, STEP + r"whole .* shape is \(2,\)"),
    (state_dict(step=2.5), ValueError, STEP + "whole number"),
    (state_dict(step=-1), ValueError, STEP + "whole number"),
    (state_dict(step=np.nan), ValueError, STEP + "whole number"),
    (state_dict(step=np.inf), ValueError, STEP + "whole number"),
    (state_dict(step=2**31), ValueError, STEP + "whole number"),
    (state_dict(step=6.0), ValueError, "must have the same number of steps, .*'fc/kernel': 6"),
    (
        without(state_dict(), "param_groups"),
        ValueError,
        "but a dict with the keys 'state' was given",
    ),
    (
        {**state_dict(), "state": {str(k): x for k, x in state_dict()["state"].items()}},
        ValueError,
        r"numbers of all parameters with moments, but \['0', '1'\] are missing",
    ),
    (
        {"fc.weight": np.ones(2)},
        ValueError,
        "must be the state_dict of an optimizer, with the keys 'state' and 'param_groups'",
    ),
    (5, TypeError, "must be the state_dict of an optimizer, but 5 was given"),
    ("model.pt", TypeError, "the name of a file was given: 'model.pt'. Read the file"),
    (pathlib.Path("model.pt"), TypeError, "the name of a file was given"),
    (without(state_dict(), "param_groups", 0, "params"), ValueError, "the entry 'params'"),
]


@pytest.mark.parametrize(("bad", "error", "match"), BAD_STATE_DICTS)
def test_invalid_state_dict_raises_with_its_entry(bad, error, match):
    with pytest.raises(error, match=match):
        torch.load_state(bad, PARAMS, torch.adamax(), NAMES, names=ORDER)


BAD_NAMES = [
    (None, None, r"but they have only the numbers \[0, 1\]\. .* as `names`"),
    (NAMES, None, "give their names as `names`"),
    (NAMES, ["fc.weight"], r"with \[2\] names, but \[1\] were given"),
    ({**NAMES, "fc.extra": "fc/bias"}, ORDER, r"but \['fc.extra'\] are not in"),
    ({**NAMES, "fc.bias": "fc/kernel"}, ORDER, "but 'fc/kernel' was given twice"),
    (
        {**NAMES, "fc.bias": "fc/base"},
        ORDER,
        r"but 'fc/base' is not one. .* \['fc/bias', 'fc/kernel'\]",
    ),
    (
        {**NAMES, "fc.weight": ("fc/kernel", (0, 2))},
        ORDER,
        r"must be a permutation, but \(0, 2\) was given",
    ),
    (
        {**NAMES, "fc.weight": "fc/kernel"},
        ORDER,
        r"for 'fc/kernel', but it makes one of shape \(3, 2\) of \['fc.weight'\]",
    ),
    ({"fc.weight": NAMES["fc.weight"]}, ORDER, r"but \['fc.bias'\] have none"),
]


@pytest.mark.parametrize(("names", "order", "match"), BAD_NAMES)
def test_invalid_layout_or_names_raise(names, order, match):
    with pytest.raises(ValueError, match=match):
        torch.load_state(state_dict(), PARAMS, torch.adamax(), names, names=order)


def test_numbers_are_not_taken_for_indices_of_a_list():
    params = [PARAMS["fc"]["kernel"].T, PARAMS["fc"]["bias"]]
    with pytest.raises(ValueError, match=r"only the numbers \[0, 1\]"):
        torch.load_state(state_dict(), params, torch.adamax())
    state = torch.load_state(state_dict(), params, torch.adamax(), {0: "0", 1: "1"})
    np.testing.assert_array_equal(state[0].v[1], state_dict()["state"][1]["exp_inf"])


def test_dumping_without_a_name_raises():
    state = torch.adamax().init(PARAMS)
    with pytest.raises(ValueError, match=r"but \['fc/bias'\] have none"):
        torch.dump_state(state, PARAMS, [{"params": [0]}], {0: "fc/kernel"})
    with pytest.raises(TypeError, match="must contain a ScaleByAdamaxState"):
        torch.dump_state(optax.adam(1.0).init(PARAMS), PARAMS, [{"params": [0, 1]}], {0: "fc/bias"})


BAD_MLX_STATES = [
    (without(mlx_state(), "step"), ValueError, "must have the entry 'step'"),
    (mlx_state(step="now"), TypeError, "The step of 'fc.bias' must be a number"),
    (
        with_entry(mlx_state(), np.ones(4), "fc", "weight", "m"),
        ValueError,
        "norm of 'fc.weight' must have the same shape",
    ),
    (without(mlx_state(), "fc", "weight", "v"), ValueError, r"but \['fc.weight.v'\] are missing"),
    (
        with_entry(mlx_state(), np.ones(3), "fc", "bias", "vr"),
        ValueError,
        r"\['fc.bias.vr'\] are unknown",
    ),
    (without(mlx_state(), "fc", "weight"), ValueError, r"but \['fc.weight'\] are not in"),
    (
        mlx_state(extra={"m": np.ones(1), "v": np.ones(1)}),
        ValueError,
        r"but \['extra'\] have none",
    ),
]


@pytest.mark.parametrize(("bad", "error", "match"), BAD_MLX_STATES)
def test_invalid_state_of_mlx_raises_with_its_entry(bad, error, match):
    with pytest.raises(error, match=match):
        mlx.load_state(bad, PARAMS, mlx.adamax(0.1), NAMES)


def keras_variables():
    """Returns the variables of an optimizer with an average and a constant rate."""
    weights = [np.ones((3, 2)), np.ones(3)]
    moments = [np.ones((3, 2))] * 2 + [np.ones(3)] * 2
    return [np.asarray(5), np.asarray(0.001), *weights, *moments]


BAD_KERAS_VARIABLES = [
    (keras_variables()[:-2], ValueError, "must have 8 variables, .* but 6 were given"),
    (
        with_entry(keras_variables(), np.ones(1), 7),
        ValueError,
        r"The norm of 'fc.bias' must have .* its shape is \(1,\)",
    ),
    (
        with_entry(keras_variables(), np.ones(1), 3),
        ValueError,
        r"The average of 'fc.bias' must have .* its shape is \(1,\)",
    ),
    (with_entry(keras_variables(), "now", 0), TypeError, r"variables\[0\] \(iteration\) must be"),
    (with_entry(keras_variables(), 2.5, 0), ValueError, r"variables\[0\] \(iteration\) must be"),
    ({"0": 5, "2": 0.1}, ValueError, "must be numbered from 0 on, but '1' is not in"),
]


@pytest.mark.parametrize(("bad", "error", "match"), BAD_KERAS_VARIABLES)
def test_invalid_variables_of_keras_raise_with_their_kind(bad, error, match):
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
            r"for 'fc/kernel', but it makes one of shape \(3, 2\) of \['fc.weight'\]",
        ),
        ({"fc.bias": np.ones(3)}, "but .'fc.weight'. are not in"),
        ({"fc.weight": np.ones((3, 2)), "fc.bias": np.ones(3), "x": np.ones(1)}, r"\['x'\]"),
    ],
)
def test_invalid_parameters_raise_with_their_name(theirs, match):
    with pytest.raises(ValueError, match=match):
        torch.load_params(theirs, PARAMS, NAMES)


def test_missing_parameters_raise_with_their_path():
    with pytest.raises(ValueError, match=r"does not lead to .*'fc/bias'"):
        torch.load_params({"a": np.ones((2, 3))}, PARAMS, {"a": "fc/kernel"})
    with pytest.raises(ValueError, match=r"must have a name for every parameter, .*'fc/bias'"):
        torch.dump_params(PARAMS, {"a": "fc/kernel"})
