"""Each alias equals its documented chain for each keyword, also inside of wrappers."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_adamax import (
    adamax,
    adamaxw,
    compensate_rounding,
    limit_spikes,
    master_params,
    pack_small_leaves,
    scale_by_adamax,
)

# For each keyword, a value other than the default, which changes the updates.
KEYWORDS = {
    "learning_rate": lambda count: 0.3 / (1 + count),
    "b1": 0.6,
    "b2": 0.7,
    "eps": 0.5,
    "weight_decay": lambda count: 0.5 / (1 + count),
    "mask": {"a": False, "b": True, "c": False},
    "eps_placement": "denominator",
    "bias_correction": False,
    "nesterov": True,
    "m_dtype": "int8",
    "v_dtype": "uint8",
    "nonfinite": "zero",
}
# Arguments without which a keyword would not change the updates.
WITH = {"eps_placement": {"eps": 0.5}, "mask": {"weight_decay": 0.5}}
DEFAULTS = {"learning_rate": 0.1, "weight_decay": 1e-4, "mask": None}
CASES = [
    (alias, name)
    for alias in (adamax, adamaxw)
    for name in inspect.signature(alias).parameters
]  # fmt: skip
PARAMS = {"a": np.float32([0.5, -2.0, 1.0]), "b": np.float32([[3.0], [0.1]]), "c": np.float32(-1.0)}
GRADIENTS = [
    jax.tree.map(lambda p, t=t: np.asarray(np.cos(3 * p + t) * 4.0**-t, np.float32), PARAMS)
    for t in range(4)
]


def arguments(name):
    return {name: KEYWORDS[name]} | WITH.get(name, {})


def chain(alias, given):
    """Returns the documented chain of the alias."""
    values = DEFAULTS | given
    rule = {name: x for name, x in given.items() if name not in DEFAULTS}
    decay = optax.add_decayed_weights(values["weight_decay"], values["mask"])
    return optax.chain(
        scale_by_adamax(**rule),
        *[decay] * (alias is adamaxw),
        optax.scale_by_learning_rate(values["learning_rate"]),
    )


def train(tx, gradients=GRADIENTS, params=PARAMS):
    """Returns the parameters after each step, and the last state."""
    state, steps = tx.init(params), []
    with jax.numpy_dtype_promotion("standard"):
        for g in gradients:
            updates, state = tx.update(g, state, params)
            params = optax.apply_updates(params, updates)
            steps.append(params)
    return steps, state


def assert_same(tree, other):
    jax.tree.map(np.testing.assert_array_equal, tree, other)


def assert_close(tree, other):
    close = functools.partial(np.testing.assert_allclose, rtol=1e-6)
    jax.tree.map(close, tree, other)


@pytest.mark.parametrize("alias, name", CASES)
def test_alias_equals_its_chain_for_each_keyword(alias, name):
    given = arguments(name)
    gradients = GRADIENTS
    if name == "nonfinite":
        bad = GRADIENTS[1] | {"a": np.float32([1.0, np.nan, 1.0])}
        gradients = [GRADIENTS[0], bad, *GRADIENTS[2:]]
    tx = alias(**{"learning_rate": 0.1} | given)
    found, _ = train(tx, gradients)
    expected, _ = train(chain(alias, given), gradients)
    assert_same(found, expected)
    usual, _ = train(alias(**{"learning_rate": 0.1} | WITH.get(name, {})), gradients)
    with pytest.raises(AssertionError):
        assert_same(found, usual)


def test_schedule_of_the_weight_decay_of_some_parameters_counts_steps():
    given = {name: KEYWORDS[name] for name in ("weight_decay", "mask")}
    found, _ = train(adamaxw(0.1, **given))
    expected, _ = train(chain(adamaxw, given))
    assert_same(found, expected)


@pytest.mark.parametrize("alias", [adamax, adamaxw])
def test_skipped_step_of_an_alias_changes_no_parameter_and_no_schedule(alias):
    bad = GRADIENTS[1] | {"c": np.float32(np.inf)}
    given = {"learning_rate": KEYWORDS["learning_rate"]}
    steps, _ = train(alias(**given, nonfinite="skip_step"), [GRADIENTS[0], bad, *GRADIENTS[1:]])
    expected, _ = train(alias(**given))
    assert_same(steps[1], steps[0])
    assert_close(steps[2:], expected[1:])


# Each wrapper with each of its options, with values that do not change these gradients.
WRAPPERS = {
    "limit_spikes, ratio": lambda tx: limit_spikes(tx, max_norm_ratio=1e3),
    "limit_spikes, norm": lambda tx: limit_spikes(tx, max_norm=1e3),
    "limit_spikes, clip": lambda tx: limit_spikes(tx, 1e3, max_norm=1e3, decay=0.5, action="clip"),
    "pack_small_leaves": pack_small_leaves,
    "pack_small_leaves, max_size": lambda tx: pack_small_leaves(tx, max_size=2),
    "compensate_rounding": compensate_rounding,
    "compensate_rounding, int16": lambda tx: compensate_rounding(tx, "int16"),
}


@pytest.mark.parametrize(
    "wrapper, name",
    [
        (wrapper, name)
        for wrapper in WRAPPERS
        for name in inspect.signature(adamaxw).parameters
        if not (wrapper.startswith("pack") and name == "mask")  # a packed tree has other leaves
    ],
)
def test_wrapper_preserves_the_effect_of_each_keyword(wrapper, name):
    tx = adamaxw(**{"learning_rate": 0.1} | arguments(name))
    assert_same(train(WRAPPERS[wrapper](tx))[0], train(tx)[0])


@pytest.mark.parametrize("name", inspect.signature(adamaxw).parameters)
def test_master_params_equal_float32_parameters_for_each_keyword(name):
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
    tx = adamaxw(**{"learning_rate": 0.1} | arguments(name))
    steps, state = train(compensate_rounding(tx, "int16"), params=params)
    float32 = jax.tree.map(lambda p: p.astype(np.float32), params)
    expected = train(tx, params=float32)[0][-1]
    assert_close(master_params(state, steps[-1]), expected)
