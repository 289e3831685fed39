"""The workarounds for XLA have their effect and are still needed.

If a test `..._is_needed` fails, the workaround is obsolete: remove it and its tests.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compiled import copies, since_010, train_step
from parameters import formats

from optax_adamax import _xla, adamax, compensate_rounding
from optax_adamax.wrappers import _residual
from tests.oracle.formats import LOW_BIT

SIZE = 2 * _xla.MIN_BRANCH_SIZE


def copies_and_temporaries(tx):
    """Returns the number of copied arrays and the bytes of temporaries per parameter."""
    step = train_step(tx, SIZE)
    return copies(step, SIZE), step.memory_analysis().temp_size_in_bytes // SIZE


@since_010
@pytest.mark.parametrize("rule", [{}, {"nesterov": True}, {"eps_placement": "denominator"}])
@pytest.mark.parametrize("m_dtype, v_dtype", [*formats(LOW_BIT), ("float32", "bfloat16")])
def test_step_copies_nothing_and_has_no_temporaries(m_dtype, v_dtype, rule):
    tx = adamax(1e-3, m_dtype=m_dtype, v_dtype=v_dtype, **rule)
    assert copies_and_temporaries(tx) == (0, 0)


@since_010
@pytest.mark.slow
def test_evaluate_moments_is_needed(mutant):
    mutant(_xla, "evaluate_moments", lambda moments, g, m, v, t, **_: moments(g, m, v))
    found = [
        copies_and_temporaries(adamax(1e-3, m_dtype=m_dtype, v_dtype=v_dtype))
        for m_dtype, v_dtype in [("bfloat16", "bfloat16"), ("int8", "uint8")]
    ]
    assert found != [(0, 0), (0, 0)], "XLA avoids copies without the branch"


@since_010
def test_write_after_is_needed(mutant):
    mutant(_residual, "write_after", lambda first, x, t: x)
    with jax.numpy_dtype_promotion("standard"):
        step = train_step(compensate_rounding(optax.sgd(1e-3)), SIZE, jnp.bfloat16)
    copied = step.memory_analysis().temp_size_in_bytes // SIZE
    assert copied > 1, "XLA copies only the old residual without write_after"


def test_products_are_rounded_before_they_are_added():
    rng = np.random.default_rng(0)
    x, y = (jnp.asarray(rng.normal(size=1 << 12), jnp.float32) for _ in range(2))
    exact = np.float32(0.1) * np.asarray(x) + np.float32(0.9) * np.asarray(y)

    @jax.jit
    def pinned(x, y, t):
        return _xla.without_fma(jnp.float32(0.1) * x, t) + _xla.without_fma(jnp.float32(0.9) * y, t)

    np.testing.assert_array_equal(pinned(x, y, jnp.int32(1)), exact)


def test_without_fma_is_needed():
    rng = np.random.default_rng(0)
    x, y = (jnp.asarray(rng.normal(size=1 << 12), jnp.float32) for _ in range(2))
    exact = np.float32(0.1) * np.asarray(x) + np.float32(0.9) * np.asarray(y)
    contracted = jax.jit(lambda x, y: jnp.float32(0.1) * x + jnp.float32(0.9) * y)(x, y)
    assert np.any(np.asarray(contracted) != exact), "XLA on CPU does not use FMA"


def test_all_finite_checks_every_element_without_temporaries():
    def temporaries(function):
        x = jax.ShapeDtypeStruct((SIZE,), jnp.float32)
        return jax.jit(function).lower(x).compile().memory_analysis().temp_size_in_bytes

    find = jax.jit(_xla.all_finite)
    assert find(jnp.full(SIZE, 3e38))
    for bad in (np.nan, np.inf, -np.inf):
        for place in (0, SIZE // 3, SIZE - 1):
            assert not find(jnp.ones(SIZE).at[place].set(bad))
    if jax.__version_info__ >= (0, 10):
        assert temporaries(_xla.all_finite) < SIZE
        with_mask = temporaries(lambda x: jnp.all(jnp.isfinite(x)))
        assert with_mask >= SIZE, "XLA does not write the mask of isfinite to memory"
