"""Runs of the installed Keras on its JAX backend."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from peer_grid import Step

keras = pytest.importorskip("keras")
keras.config.dtype_policy()  # Keras makes it at the first use, from the floatx of that moment.


@contextlib.contextmanager
def keras_mode(dtype):
    """Sets Keras' dtype, and allows the mixed dtypes and ranks that Keras needs."""
    before = keras.config.floatx()
    keras.config.set_floatx(np.dtype(dtype).name)
    try:
        with (
            jax.numpy_dtype_promotion("standard"),
            jax.numpy_rank_promotion("allow"),
            jax.enable_x64(dtype == np.float64),
        ):
            yield
    finally:
        keras.config.set_floatx(before)


class KerasRun:
    """A run of Keras: `steps`, `averages` and `accumulators` after each call."""

    def __init__(self, params, grads, *, compiled=True, exclude=None, **options):
        dtype = next(iter(params.values())).dtype
        with keras_mode(dtype):
            optimizer = keras.optimizers.Adamax(**options)
            if exclude is not None:
                optimizer.exclude_from_weight_decay(var_names=exclude)
            values = [keras.Variable(p, name=k, dtype=dtype.name) for k, p in params.items()]
            optimizer.build(values)
            state = [v.value for v in optimizer.variables]
            values = [v.value for v in values]
            call = optimizer.stateless_apply
            call = jax.jit(call) if compiled else call
            self.steps, self.averages, self.accumulators = [], [], []
            for g in grads:
                values, state = call(state, [jnp.asarray(g[k]) for k in params], values)
                kept = {
                    id(v): np.asarray(x) for v, x in zip(optimizer.variables, state, strict=True)
                }
                p = dict(zip(params, map(np.asarray, values), strict=True))
                m, u = (self.named(params, vs, kept) for vs in (optimizer._m, optimizer._u))
                self.steps.append(Step(p, m, u))
                if optimizer.use_ema:
                    averages = optimizer._model_variables_moving_average
                    self.averages.append(self.named(params, averages, kept))
                if optimizer.gradient_accumulation_steps:
                    sums = optimizer._accumulated_gradients
                    self.accumulators.append(self.named(params, sums, kept))

    def named(self, params, variables, values):
        """Returns the values of Keras variables by the names of the parameters."""
        return {k: values[id(v)] for k, v in zip(params, variables, strict=True)}
