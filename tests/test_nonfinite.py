"""Policies for non-finite gradients change, skip and count exactly the documented elements."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.tree
import pytest
from nonfinite_runs import (
    BAD_STEPS,
    PARAMS,
    STEPS,
    adamaxw_of,
    assert_same,
    clean_gradients,
    every_policy,
    run,
    spoiled,
)
from parameters import formats

from optax_adamax import scale_by_adamax
from tests.oracle.formats import FORMATS, SOME_FORMATS

# One pair of full-precision formats and one of quantized formats; the others are slow.
ends_of_formats = pytest.mark.parametrize(
    "m_dtype, v_dtype", formats(SOME_FORMATS, SOME_FORMATS[::2])
)
every_format = pytest.mark.parametrize("m_dtype, v_dtype", formats(FORMATS, SOME_FORMATS))


@every_format
def test_run_with_skipped_steps_equals_the_run_without_them(m_dtype, v_dtype):
    """Parameters, moments, shared scale, count and schedule are equal."""
    gradients, _ = spoiled(clean_gradients())
    tx = adamaxw_of(m_dtype, v_dtype, nonfinite="skip_step")
    steps = run(tx, gradients)
    good = [g for t, g in enumerate(gradients) if t not in BAD_STEPS]
    for t in BAD_STEPS:
        updates, params, state = steps[t]
        assert not any(np.any(u) for u in jax.tree.leaves(updates))
        before = steps[t - 1][1:] if t else (PARAMS, tx.init(PARAMS))
        assert_same((params, state.inner_state), (before[0], before[1].inner_state))
    _, params, state = steps[-1]
    _, good_params, good_state = run(tx, good)[-1]
    assert_same((params, state.inner_state), (good_params, good_state.inner_state))
    assert int(optax.tree.get(state, "nonfinite_count")) == len(BAD_STEPS)
    assert optax.tree.get(state, "nonfinite_count").dtype == jnp.int32
    assert int(good_state.nonfinite_count) == 0


@ends_of_formats
def test_skipped_step_matches_apply_if_finite(m_dtype, v_dtype):
    gradients, _ = spoiled(clean_gradients())
    _, params, state = run(adamaxw_of(m_dtype, v_dtype, nonfinite="skip_step"), gradients)[-1]
    wrapped = optax.apply_if_finite(adamaxw_of(m_dtype, v_dtype), 100)
    _, expected, optax_state = run(wrapped, gradients)[-1]
    assert int(optax_state.total_notfinite) == int(state.nonfinite_count)
    # Inside the branch, XLA fuses other multiplications and additions (up to a few ULP).
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(close, params, expected)
    found, wanted = (s.inner_state[0] for s in (state, optax_state))
    exact = np.testing.assert_array_equal
    jax.tree.map(lambda x, y: (exact if x.dtype.itemsize < 4 else close)(x, y), found, wanted)


@every_format
def test_bad_element_equals_zero(m_dtype, v_dtype):
    """m and v of these elements decay, as with a zero gradient."""
    gradients, bad = spoiled(clean_gradients())
    zeros = jax.tree.map(lambda g, b: np.where(b, np.float32(0), g), gradients, bad)
    steps = run(adamaxw_of(m_dtype, v_dtype, nonfinite="zero"), gradients)
    expected = run(adamaxw_of(m_dtype, v_dtype), zeros)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)

    def same(x, y):
        (np.testing.assert_array_equal if x.dtype.itemsize < 4 else close)(x, y)

    for (u, params, state), (w, q, plain) in zip(steps, expected, strict=True):
        jax.tree.map(close, (u, params), (w, q))
        jax.tree.map(same, state.inner_state[0], plain[0])
    assert int(optax.tree.get(steps[-1][2], "nonfinite_count")) == len(BAD_STEPS) + 1
    assert int(optax.tree.get(steps[-1][2], "ScaleByAdamaxState").count) == STEPS


@every_policy
def test_complex_gradient_with_infinite_modulus_is_bad(policy):
    """A modulus can overflow although both parts are finite, and v stores the modulus."""
    tx = scale_by_adamax(nonfinite=policy)
    update = jax.jit(tx.update)
    good = np.array([1 + 2j, -1j, 3], np.complex64)
    _, before = update(good, tx.init(good))
    for bad in (complex(np.nan, 1), complex(1, -np.inf), complex(3e38, 3e38)):
        updates, after = update(np.array([good[0], bad, good[2]], np.complex64), before)
        assert int(after.nonfinite_count) == 1
        if policy == "zero":
            expected, zeroed = update(np.array([good[0], 0, good[2]], np.complex64), before)
            assert_same((updates, after.inner_state), (expected, zeroed.inner_state))
        else:
            assert not np.any(updates)
            assert_same(after.inner_state, before.inner_state)


@every_policy
@pytest.mark.parametrize(
    "dtype", ["float32", "bfloat16", pytest.param("float16", marks=pytest.mark.slow)]
)
def test_bad_element_of_a_large_leaf_is_found(policy, dtype):
    """On large leaves, `jnp.max` can ignore a NaN (jaxlib 0.10.2, CPU)."""
    size = 1 << 16
    tx = scale_by_adamax(nonfinite=policy)
    update, state = jax.jit(tx.update), tx.init(np.zeros(size, dtype))
    for bad in (np.nan, np.inf, -np.inf):
        for place in (0, 12345, size // 2, size - 1):
            g = np.ones(size, dtype)
            g[place] = bad
            updates, after = update(g, state)
            assert int(after.nonfinite_count) == 1 and np.asarray(updates)[place] == 0
            assert int(after.inner_state.count) == (policy == "zero")
    largest = np.full(size, jnp.finfo(dtype).max, dtype)
    assert int(update(largest, state)[1].nonfinite_count) == 0


@pytest.mark.parametrize("policy, count", [("zero", 4), ("skip_step", 1)])
def test_counter_counts_elements_or_steps(policy, count):
    tx = scale_by_adamax(nonfinite=policy)
    g = {"a": np.float32([np.nan, np.inf, 1, -np.inf]), "b": np.float32([[1, np.nan]])}
    _, state = jax.jit(tx.update)(g, tx.init(g))
    assert int(state.nonfinite_count) == count


@every_policy
def test_counter_saturates(policy):
    tx = scale_by_adamax(nonfinite=policy)
    bad, update = np.full(5, np.nan, np.float32), jax.jit(tx.update)
    state = tx.init(bad)._replace(nonfinite_count=np.int32(2**31 - 3))
    for _ in range(4):
        _, state = update(bad, state)
    assert int(state.nonfinite_count) == 2**31 - 1
