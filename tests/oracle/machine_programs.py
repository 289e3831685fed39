"""Compiled programs and input strategies for `state_machine.py`.

b1, b2 and eps are arguments of the programs, so each storage format and policy is compiled once.
"""

import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

from optax_adamax import decode_state, encode_state, scale_by_adamax
from tests.oracle.formats import FORMATS, SOME_FORMATS, v_range

SIZE = 8
POLICIES = ["propagate", "zero", "skip_step"]
BETAS = [(0.9, 0.999), (0.9, 0.99), (0.0, 1.0), (0.5, 0.999), (0.95, 0.999)]
LONG = os.environ.get("OPTAX_ADAMAX_TEST_PROFILE") == "long"
USED = FORMATS if LONG else SOME_FORMATS  # fewer formats, because each is compiled
CYCLE = 256  # steps of a long scan

# Below SMALLEST, float32 results can be subnormal. Above LARGEST, they can overflow.
SMALLEST, LARGEST = 1e-36, 1e38

SIZES = [1e-42, 1e-30, 1e-8, 1e-3, 0.3, 1.0, 7.0, 1e3, 1e6, 1e30, 3.4e38]
finite_numbers = st.sampled_from([0.0] + [sign * x for x in SIZES for sign in (1.0, -1.0, 0.77)])
any_number = st.one_of(finite_numbers, finite_numbers, st.sampled_from([np.nan, np.inf, -np.inf]))
vectors = st.lists(finite_numbers, min_size=SIZE, max_size=SIZE)
bad_vectors = st.lists(any_number, min_size=SIZE, max_size=SIZE)
formats = st.sampled_from(USED)
cycles = st.lists(vectors, min_size=1, max_size=5)


def core_of(state, policy):
    return state if policy == "propagate" else state.inner_state


def limits(v_dtype):
    """Returns the range in which v is compared with the model."""
    low, high = v_range(v_dtype)
    return max(low, SMALLEST), min(high, LARGEST)


@functools.cache
def programs(dtypes, policy):
    """Returns init, update and a scan of updates; the last two receive hyperparameters."""

    def build(b1, b2, eps):
        m, v = dtypes
        return scale_by_adamax(b1, b2, eps, m_dtype=m, v_dtype=v, nonfinite=policy)

    def update(g, state, hyperparameters):
        return build(*hyperparameters).update(g, state)

    def scan(gradients, state, hyperparameters):
        """Returns the updates and m of each step; `hyperparameters` has one row per step."""

        def body(state, x):
            g, hyperparameters = x
            u, state = update(g, state, hyperparameters)
            return state, (u, decode_state(core_of(state, policy)).m)

        state, outputs = jax.lax.scan(body, state, (gradients, hyperparameters))
        return outputs, state

    return build(0.9, 0.999, 1e-8).init, jax.jit(update), jax.jit(scan)


@functools.cache
def state_types(dtypes, policy):
    """Returns the structure of the state, and the shape and dtype of each leaf."""
    state = jax.eval_shape(programs(dtypes, policy)[0], jnp.zeros(SIZE))
    return jax.tree.structure(state), [(x.shape, x.dtype) for x in jax.tree.leaves(state)]


decode = jax.jit(decode_state)
encode = jax.jit(encode_state, static_argnums=(1, 2))


@functools.cache
def shardings():
    """Returns a sharding over eight devices, one element each, and a replicated one."""
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    return jax.NamedSharding(mesh, jax.P("x")), jax.NamedSharding(mesh, jax.P())
