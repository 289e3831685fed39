"""Compiles a train step with donated buffers, and counts the copies and loops in its program."""

import functools
import re

import jax
import jax.numpy as jnp
import optax
import pytest

since_010 = pytest.mark.skipif(
    jax.__version_info__ < (0, 10), reason="XLA CPU before jaxlib 0.10 copies donated buffers"
)


def train_step(tx, size, dtype=jnp.float32, gradient_dtype=None):
    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, g):
        u, state = tx.update(g, state, params)
        return optax.apply_updates(params, u), state

    params = jax.ShapeDtypeStruct((size,), dtype)
    g = jax.ShapeDtypeStruct((size,), gradient_dtype or dtype)
    return step.lower(params, jax.eval_shape(tx.init, params), g).compile()


def copies(executable, size):
    """Counts copies of arrays with `size` elements."""
    return len(re.findall(rf"= \w+\[{size}\]\S* copy\(", executable.as_text()))


def passes(executable, size):
    """Counts loops that write arrays with `size` elements, outside conditional branches."""
    entry = executable.as_text().split("\nENTRY")[1]
    return len(re.findall(rf"= \w+\[{size}\]\S* fusion\(", entry))
