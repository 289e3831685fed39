"""Inside of `jax.shard_map`, whose types say over which axes a value differs between devices."""

import functools

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from parameters import formats

from optax_adamax import _xla, adamax, scale_by_adamax
from tests.oracle.formats import FORMATS, SOME_FORMATS

MESH = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))


def shard_map(function, in_specs, out_specs):
    return jax.jit(jax.shard_map(function, mesh=MESH, in_specs=in_specs, out_specs=out_specs))


def gradients(size=16):
    return np.random.default_rng(0).normal(size=(8, size)).astype(np.float32)


def first_state(tx, shape):
    return jax.jit(tx.init)(np.zeros(shape, np.float32))


FLOAT32, _, CODED = SOME_FORMATS
CASES = [(*form, size) for form in FORMATS for size in (16, _xla.MIN_BRANCH_SIZE)]
# Where nothing is rounded, a large leaf is computed as a small one is.
ALWAYS = [(*form, 16) for form in SOME_FORMATS] + [(*CODED, _xla.MIN_BRANCH_SIZE)]


@pytest.mark.parametrize("m_dtype, v_dtype, size", formats(CASES, ALWAYS))
def test_a_state_that_is_the_same_meets_gradients_that_are_not(m_dtype, v_dtype, size):
    """As where the mean over devices was forgotten or is taken later: each device has its own."""
    tx = scale_by_adamax(m_dtype=m_dtype, v_dtype=v_dtype)
    state, g = first_state(tx, (1, size)), gradients(size)

    def step(g, state):
        return tx.update(g, state)[0]

    found = shard_map(step, (P("x"), P()), P("x"))(g, state)
    alone = jax.jit(tx.update)
    expected = [np.asarray(alone(row[None], state)[0])[0] for row in g[:2]]
    np.testing.assert_allclose(np.asarray(found)[:2], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("m_dtype, v_dtype", formats(SOME_FORMATS, [FLOAT32, CODED]))
@pytest.mark.parametrize("policy", ["zero", "skip_step"])
def test_all_devices_agree_on_what_is_not_finite(policy, m_dtype, v_dtype):
    """Parameters and moments are split; the count is one for all, and so is a step's fate."""
    tx = adamax(0.1, m_dtype=m_dtype, v_dtype=v_dtype, nonfinite=policy)
    g = gradients()
    g[3, 5] = np.nan
    state = first_state(tx, (8, 16))
    specs = jax.tree.map(lambda x: P("x") if x.ndim else P(), state)
    step = shard_map(lambda g, s: tx.update(g, s), (P("x"), specs), (P("x"), specs))
    u, new = step(g, state)
    expected, alone = jax.jit(tx.update)(g, state)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6)
    jax.tree.map(close, (u, new), (expected, alone))
    assert int(new.nonfinite_count) == 1
    assert np.all(np.asarray(u) == 0) == (policy == "skip_step")
