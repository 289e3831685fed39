"""Shared by the protocol tests: a table of public transformations, and trees of parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.tree
import pytest

import optax_adamax

# A new transformation gets one row per storage format.
TRANSFORMATIONS = {
    "scale_by_adamax": ("scale_by_adamax", {}),
    "nesterov": (
        "scale_by_adamax",
        {"eps_placement": "denominator", "eps": 0.0, "nesterov": True},
    ),
    "no bias correction": (
        "scale_by_adamax",
        {"bias_correction": False, "m_dtype": "float32", "v_dtype": "float32"},
    ),
    "8 bits": ("scale_by_adamax", {"m_dtype": "int8", "v_dtype": "uint8", "nesterov": True}),
    "adamax": ("adamax", {"learning_rate": 0.1}),
    "16 bits": ("adamax", {"learning_rate": 0.1, "m_dtype": "bfloat16", "v_dtype": "bfloat16"}),
    "schedule": ("adamax", {"learning_rate": optax.linear_schedule(0.1, 0.0, 10)}),
    "adamaxw": ("adamaxw", {"learning_rate": 0.1, "weight_decay": 0.1}),
}

TREES = {
    "every kind of leaf": {
        "array": np.ones((4, 3), np.float32),
        "None": None,
        "MaskedNode": (optax.MaskedNode(), [np.ones((4, 3), np.float32)]),
        "no leaves": {"a": {}, "b": [], "c": ()},
        "empty array": np.ones((3, 0, 2), np.float32),
        "scalar array": np.ones((), np.float32),
        "NumPy scalar": np.float32(1.0),
        "Python float": 1.5,
        "weak type": jnp.asarray(1.5),
    },
    "an array": np.ones((4, 3), np.float32),
    "a Python float": 1.5,
    "nothing": (),
}

every_transformation = pytest.mark.parametrize("name", TRANSFORMATIONS)
every_tree = pytest.mark.parametrize("tree", TREES)


def fast_only(*names):
    """Returns all transformations as test parameters; those not in `names` are marked slow."""
    return [pytest.param(x, marks=[] if x in names else pytest.mark.slow) for x in TRANSFORMATIONS]


def build(name):
    constructor, options = TRANSFORMATIONS[name]
    return getattr(optax_adamax, constructor)(**options)


def types(tree):
    """Returns the tree with shape, dtype, weak type and sharding instead of each leaf."""
    return jax.tree.map(jax.typeof, tree)


def params_like(tx, state, params):
    """Returns the state leaves that belong to a parameter, each with its parameter."""
    pairs = []
    optax.tree.map_params(tx, lambda *pair: pairs.append(pair), state, params)
    return pairs
