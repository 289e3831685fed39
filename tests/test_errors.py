"""Bad input raises the documented exception, and changes nothing."""

import re

import bad_inputs
import bad_states
import jax
import numpy as np
import pytest

ROWS = bad_inputs.ROWS + bad_states.ROWS
NAMES, CALLS = zip(*((name, row) for name, *row in ROWS), strict=True)
# pytest-xdist requires the same names in every process.
NAMES = [re.sub(r" at 0x\w+", "", name) for name in NAMES]


@pytest.fixture(scope="module")
def given():
    return bad_inputs.given()


@pytest.mark.parametrize("call, error, words", CALLS, ids=NAMES)
def test_bad_input(given, call, error, words):
    before = jax.tree.map(np.array, given)
    with pytest.raises(error) as raised:
        call(given)
    assert words in str(raised.value)
    assert len(str(raised.value)) < 600 and "Array(" not in str(raised.value)
    assert jax.tree.structure(before) == jax.tree.structure(given)
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.array, given))


def test_given_states_are_valid(given):
    """Ensures that the calls above fail because of their bad input."""
    jax.eval_shape(given.plain.update, bad_inputs.gradients(), given.state)
    for tx, state in zip(given[2::2], given[3::2], strict=True):
        jax.eval_shape(tx.update, bad_inputs.REAL, state)
