"""Shared by the tests of `compensate_rounding`: parameters, gradients and compiled runs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_adamax import compensate_rounding, master_params

residuals = pytest.mark.parametrize("residual_dtype", ["int8", "int16"])
UNIT = {"int8": 2.0**-15, "int16": 2.0**-24}  # the largest relative error of one step
VALUES = np.arange(65536, dtype=np.uint16).view(jnp.bfloat16)


def wide(x):
    return np.asarray(x).astype(np.float64)


ORDER = np.unique(wide(VALUES[~np.isnan(VALUES.astype(np.float32))]))


def neighbours(x):
    """Returns the next bfloat16 numbers below and above, in float64; infinity is the last."""
    at = np.searchsorted(ORDER, x)
    return ORDER[np.maximum(at - 1, 0)], ORDER[np.minimum(at + 1, len(ORDER) - 1)]


def take(tx, params, state, gradient, cast=True):
    """Takes a step; without `cast`, p + u is added as it is, as in `equinox.apply_updates`."""
    with jax.numpy_dtype_promotion("standard"):  # apply_updates adds float32 to bfloat16
        updates, state = tx.update(gradient, state, params)
        if not cast:
            return jax.tree.map(lambda p, u: p + u, params, updates), state
        return optax.apply_updates(params, updates), state


def stepper(tx, compiled=True, cast=True):
    def step(params, state, gradient):
        return take(tx, params, state, gradient, cast)

    return jax.jit(step) if compiled else step


def adding(residual_dtype, **options):
    """Returns a transformation whose updates are the gradients."""
    return compensate_rounding(optax.identity(), residual_dtype, **options)


STEPS = 12
# Powers of two: their products are exact, so no program rounds them in another way.
SGD = optax.sgd(2.0**-10, momentum=0.5)


def parameters():
    rng = np.random.default_rng(0)
    return {
        "a": jnp.asarray(rng.normal(size=(8, 16)), jnp.bfloat16),
        "b": jnp.asarray(rng.normal(size=8), jnp.bfloat16),
        "c": jnp.asarray(rng.normal(size=8), jnp.float32),
    }


def gradients(params=None, steps=STEPS, seed=1):
    rng = np.random.default_rng(seed)
    params = parameters() if params is None else params
    return [
        jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), p.dtype), params)
        for _ in range(steps)
    ]


@functools.cache
def optimizer(residual_dtype="int8"):
    return compensate_rounding(SGD, residual_dtype)


@functools.cache
def compiled(tx):
    @jax.jit
    def step(params, state, g):
        updates, state = tx.update(g, state, params)
        return optax.apply_updates(params, updates), state

    return step


def run(tx, params, sequence, state=None):
    """Returns parameters and state after a compiled step per gradient."""
    step = compiled(tx)
    # apply_updates adds float32 to bfloat16, which JAX's strict modes reject.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        state = tx.init(params) if state is None else state
        for g in sequence:
            params, state = step(params, state, g)
    return params, state


@functools.cache
def expected(residual_dtype="int8"):
    """Returns the run with which the other runs are compared."""
    return run(optimizer(residual_dtype), parameters(), gradients())


def assert_equal(tree, other):
    jax.tree.map(np.testing.assert_array_equal, tree, other)


def assert_same_masters(run, other):
    assert_equal(*(master_params(state, params) for params, state in (run, other)))
