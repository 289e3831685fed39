"""Bad input: the exception, and the words that it must contain; nothing else happens."""

import re

import bad_inputs
import jax
import numpy as np
import pytest

NAMES, CALLS = zip(*((name, row) for name, *row in bad_inputs.ROWS), strict=True)
# Every process that runs tests must find the same names.
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
    assert jax.tree.structure(before) == jax.tree.structure(given)
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.array, given))


def test_what_is_given_is_good(given):
    """So the calls above fail for what the table says."""
    jax.eval_shape(given.plain.update, bad_inputs.gradients(), given.state)
    for tx, state in zip(given[2::2], given[3::2], strict=True):
        jax.eval_shape(tx.update, bad_inputs.REAL, state)
