"""What the tests of `compensate_rounding` share."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_adamax import compensate_rounding

residuals = pytest.mark.parametrize("residual_dtype", ["int8", "int16"])
UNIT = {"int8": 2.0**-15, "int16": 2.0**-24}  # the largest relative error of one step
VALUES = np.arange(65536, dtype=np.uint16).view(jnp.bfloat16)


def wide(x):
    return np.asarray(x).astype(np.float64)


ORDER = np.unique(wide(VALUES[~np.isnan(VALUES.astype(np.float32))]))


def neighbours(x):
    """The next numbers of bfloat16 below and above, in float64; inf is the one after the last."""
    at = np.searchsorted(ORDER, x)
    return ORDER[np.maximum(at - 1, 0)], ORDER[np.minimum(at + 1, len(ORDER) - 1)]


def take(tx, params, state, gradient):
    with jax.numpy_dtype_promotion("standard"):  # apply_updates adds float32 to 16 bits
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state


def stepper(tx, compiled=True):
    def step(params, state, gradient):
        return take(tx, params, state, gradient)

    return jax.jit(step) if compiled else step


def adding(residual_dtype):
    """The gradient is the update."""
    return compensate_rounding(optax.identity(), residual_dtype)
