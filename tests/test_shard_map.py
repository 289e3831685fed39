"""`update` works inside `jax.shard_map`, where types state the axes over which values vary."""

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


FLOAT32, _, QUANTIZED = SOME_FORMATS
CASES = [(*dtypes, size) for dtypes in FORMATS for size in (16, _xla.MIN_BRANCH_SIZE)]
# Only quantized moments of large leaves are computed in a branch.
ALWAYS = [(*dtypes, 16) for dtypes in SOME_FORMATS] + [(*QUANTIZED, _xla.MIN_BRANCH_SIZE)]


@pytest.mark.parametrize("m_dtype, v_dtype, size", formats(CASES, ALWAYS))
def test_replicated_state_accepts_gradients_that_vary(m_dtype, v_dtype, size):
    """Such gradients occur if they are averaged over devices later or not at all."""
    tx = scale_by_adamax(m_dtype=m_dtype, v_dtype=v_dtype)
    state, g = first_state(tx, (1, size)), gradients(size)

    def step(g, state):
        return tx.update(g, state)[0]

    found = shard_map(step, (P("x"), P()), P("x"))(g, state)
    alone = jax.jit(tx.update)
    expected = [np.asarray(alone(row[None], state)[0])[0] for row in g[:2]]
    np.testing.assert_allclose(np.asarray(found)[:2], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("m_dtype, v_dtype", formats(SOME_FORMATS, [FLOAT32, QUANTIZED]))
@pytest.mark.parametrize("policy", ["zero", "skip_step"])
def test_nonfinite_policy_is_applied_on_all_devices(policy, m_dtype, v_dtype):
    """Moments are sharded and the counts are replicated, so all devices must skip the same step."""
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
