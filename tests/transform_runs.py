"""Shared by the tests of `scale_by_adamax`: compiled runs and parameters of tests."""

import jax
import numpy as np
import pytest

# float64 needs jax.enable_x64, which also changes the default dtypes of constants.
every_dtype = pytest.mark.parametrize(
    "dtypes", [("float32", "bfloat16", "float16", "complex64"), ("float64",)], ids=["x32", "x64"]
)
eager_and_jit = pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])


def run(tx, gradients):
    """Returns all updates and the last state of a compiled run; gradients have a row per step."""
    steps = [
        jax.tree.map(lambda g, t=t: g[t], gradients)
        for t in range(len(jax.tree.leaves(gradients)[0]))
    ]
    state, update, directions = tx.init(steps[0]), jax.jit(tx.update), []
    for g in steps:
        u, state = update(g, state)
        directions.append(u)
    return jax.tree.map(lambda *u: np.stack(u), *directions), jax.device_get(state)
