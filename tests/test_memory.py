"""A compiled train step with donation stores the stated bytes and allocates no temporaries."""

import functools

import pytest
from compiled import since_010, train_step
from parameters import formats

from optax_adamax import adamax
from tests.oracle.formats import FORMATS, state_bytes

SIZE = 1 << 20


@functools.cache
def account_of(m_dtype, v_dtype):
    step = train_step(adamax(1e-3, m_dtype=m_dtype, v_dtype=v_dtype), SIZE)
    return step.memory_analysis()


@pytest.mark.parametrize("m_dtype, v_dtype", formats(FORMATS))
def test_state_has_the_stated_bytes(m_dtype, v_dtype):
    account = account_of(m_dtype, v_dtype)
    state = SIZE * state_bytes(m_dtype, v_dtype)
    scalars = account.argument_size_in_bytes - SIZE * (4 + 4) - state
    assert 0 < scalars <= 8
    assert account.alias_size_in_bytes >= SIZE * 4 + state


@since_010
@pytest.mark.parametrize("m_dtype, v_dtype", formats(FORMATS))
def test_step_allocates_no_temporaries(m_dtype, v_dtype):
    assert account_of(m_dtype, v_dtype).temp_size_in_bytes < 4096
