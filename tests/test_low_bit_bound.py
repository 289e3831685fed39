"""Updates with quantized state stay within the step bound for gradients of any size.

A non-finite gradient makes the updates of its own element NaN permanently. Others stay finite.
"""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from low_bit_runs import scan
from parameters import formats

from tests.oracle.formats import FORMATS, LOW_BIT, step_bound


def check_step_bound(gradients, m_dtype, v_dtype, betas=(0.9, 0.999), **rule):
    b1, b2 = betas
    rule = {"eps_placement": "max"} | rule
    _, u, _ = scan(gradients, b1=b1, b2=b2, eps=0.0, m_dtype=m_dtype, v_dtype=v_dtype, **rule)
    t = np.arange(1, len(gradients) + 1)[:, None]
    assert np.all(np.abs(u) <= step_bound(t, *betas) * (1 + 1e-6))
    return u


# Three tests use gradients of shape (42, 3), so they share the compiled program of a format.
SIZES = [0.0, 1e-45, 1e-38, 1e-20, 2**-34, 1e-8, 1e-3, 1.0, 5e3, 1e9, 1e30, 3.4e38]


# Each b2 and each placement of eps occurs once. MIXED_RULES has the other two combinations.
BOUND_RULES = [((0.9, 0.999), "max"), ((0.9, 0.99), "denominator")]
MIXED_RULES = [((0.9, 0.999), "denominator"), ((0.9, 0.99), "max")]


@pytest.mark.parametrize(
    "rules", [BOUND_RULES, pytest.param(MIXED_RULES, marks=pytest.mark.slow)], ids=["each", "mixed"]
)
@pytest.mark.parametrize("m_dtype, v_dtype", formats(LOW_BIT))
@given(
    st.lists(
        st.tuples(st.sampled_from(SIZES), st.floats(-1, 1, width=32)), min_size=42, max_size=42
    ),
    st.integers(0, 1),
)
def test_updates_are_within_the_bound(rules, m_dtype, v_dtype, gradients, index):
    sequence = np.array([size * x for size, x in gradients])
    betas, placement = rules[index]
    columns = np.stack([sequence, -sequence, sequence[::-1]], axis=1)
    check_step_bound(columns, m_dtype, v_dtype, betas, eps_placement=placement)


@pytest.mark.parametrize("m_dtype, v_dtype", formats(LOW_BIT))
def test_updates_are_within_the_bound_at_the_largest_numbers(m_dtype, v_dtype):
    """7.5 v exceeds float32, and so does v if it is rounded up (found by Hypothesis)."""
    sequences = np.zeros((42, 3), np.float32)
    sequences[:4, :2] = np.transpose([[3.4e38, 0.0, 3.4e38, 0.0], [0.0, 0.0, 3.4e38, -3.4e38]])
    u = check_step_bound(sequences, m_dtype, v_dtype)
    assert np.all(u[sequences != 0] != 0)


@pytest.mark.parametrize("m_dtype, v_dtype", formats(FORMATS))
def test_updates_are_within_the_bound_at_the_smallest_numbers(m_dtype, v_dtype):
    """v (1 - b1^t) is subnormal and flushed to zero (found by Hypothesis)."""
    sequences = [[0.0] * zeros + [2.0**-126] * 3 + [0.0] * (39 - zeros) for zeros in (0, 5, 39)]
    check_step_bound(np.transpose(sequences), m_dtype, v_dtype)


@pytest.mark.parametrize("m_dtype, v_dtype", formats(LOW_BIT))
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nonfinite_gradient_gives_nan_updates_of_its_element_only(m_dtype, v_dtype, bad):
    gradients = np.float32(np.random.default_rng(0).normal(size=(50, 4)))
    gradients[10, 1] = bad
    _, u, _ = scan(gradients, m_dtype=m_dtype, v_dtype=v_dtype)
    assert np.all(np.isfinite(u[:10])) and np.all(np.isnan(u[10:, 1]))
    assert np.all(np.isfinite(u[:, [0, 2, 3]]))
