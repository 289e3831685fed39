"""Quantized state is reproducible: eager, compiled, batched, sharded and resumed runs are equal."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from low_bit_runs import heavy_tails, scan
from parameters import formats

from optax_adamax import scale_by_adamax
from tests.oracle.formats import FORMATS, LOW_BIT, SOME_FORMATS

ROUNDED_M = [x for x in LOW_BIT if x[0] != "float32"]


@functools.cache
def optimizer(m_dtype, v_dtype):
    return scale_by_adamax(m_dtype=m_dtype, v_dtype=v_dtype)


def run_python(update, state, gradients):
    for g in gradients:
        _, state = update(g, state)
    return state


def check_resumed_run(m_dtype, v_dtype, resume):
    """Checks that a run continues with the same bits after `resume(state)` in its middle."""
    gradients, tx = heavy_tails(400, size=64), optimizer(m_dtype, v_dtype)
    step = jax.jit(tx.update)
    half = run_python(step, tx.init(gradients[0]), gradients[:200])
    expected, resumed = (run_python(step, s, gradients[200:]) for s in (half, resume(half)))
    jax.tree.map(np.testing.assert_array_equal, expected, resumed)


@pytest.mark.parametrize("m_dtype, v_dtype", formats(LOW_BIT, SOME_FORMATS))
def test_resumed_run_equals_an_uninterrupted_run(m_dtype, v_dtype):
    check_resumed_run(
        m_dtype, v_dtype, lambda s: jax.tree.map(lambda x: jnp.asarray(np.array(x)), s)
    )


@pytest.mark.parametrize("m_dtype, v_dtype", formats(ROUNDED_M, SOME_FORMATS))
def test_codes_are_equal_in_eager_jit_scan_vmap_and_sharded_runs(m_dtype, v_dtype):
    gradients = heavy_tails(60, size=64)
    tx = optimizer(m_dtype, v_dtype)
    start = tx.init(gradients[0])
    eager = run_python(tx.update, start, gradients)
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    sharded = jax.NamedSharding(mesh, jax.P("x"))
    others = {
        "jit": run_python(jax.jit(tx.update), start, gradients),
        "scan": scan(gradients, m_dtype=m_dtype, v_dtype=v_dtype)[0],
        "sharded": run_python(
            jax.jit(tx.update),
            tx.init(jax.device_put(gradients[0], sharded)),
            [jax.device_put(g, sharded) for g in gradients],
        ),
    }
    for state in others.values():
        jax.tree.map(np.testing.assert_array_equal, eager, state)
    columns = gradients.reshape(60, 8, 8)
    mapped = jax.jit(jax.vmap(tx.init))(columns[0])
    mapped = run_python(jax.jit(jax.vmap(tx.update)), mapped, columns)
    mapped = jax.tree.map(np.asarray, mapped)
    codes = jax.tree.map(lambda x: x.reshape(64) if x.ndim == 2 else x[0], mapped)
    jax.tree.map(np.testing.assert_array_equal, eager, codes)


@pytest.mark.parametrize("v_dtype", ["bfloat16", "uint8"])
def test_change_of_b2_applies_from_the_next_step(v_dtype):
    gradients = heavy_tails(500)
    rule, zero = {"v_dtype": v_dtype, "eps": 0.0}, np.zeros((1, 32))
    state, _, v = scan(gradients, **rule)
    large = v[-1] > 1e-8
    for b2 in (0.5, 0.99, 1.0):
        others = [scan(zero, state, b2_at=[b2], **rule)]
        if b2 == 0.5:
            others.append(scan(zero, state, b2=b2, **rule))
        for _, _, after in others:
            np.testing.assert_allclose(after[0][large], b2 * v[-1][large], rtol=2e-5)


@pytest.mark.parametrize("m_dtype, v_dtype", FORMATS)
def test_state_has_the_bytes_of_its_dtypes(m_dtype, v_dtype):
    width = {"float32": 4, "bfloat16": 2, "int8": 1, "uint8": 1}
    params = {"a": np.zeros((300, 10), np.float32), "b": np.zeros(7, np.float32)}
    state = jax.eval_shape(scale_by_adamax(m_dtype=m_dtype, v_dtype=v_dtype).init, params)
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    extra = 4 + 4 * (v_dtype in ("bfloat16", "uint8"))
    assert size == 3007 * (width[m_dtype] + width[v_dtype]) + extra


@pytest.mark.parametrize("v_dtype", ["bfloat16", "uint8"])
def test_mutant_that_resumes_without_phase_is_detected(v_dtype):
    def drop_phase(state):
        return state._replace(v=state.v._replace(phase=jnp.zeros((), jnp.uint32)))

    with pytest.raises(AssertionError):
        check_resumed_run("int8", v_dtype, drop_phase)
