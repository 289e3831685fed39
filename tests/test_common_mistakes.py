"""The documentation shows the messages that the most likely mistakes of a new user raise."""

import re

import common_mistakes
import flax.serialization
import jax
import jax.numpy as jnp
import optax
import pytest

from optax_adamax import adamax, compensate_rounding, encode_state


def test_the_page_shows_the_messages_that_the_mistakes_raise():
    page = common_mistakes.PAGE.read_text("utf-8")
    assert all(mark in page for mark in common_mistakes.MARKS)
    with jax.numpy_dtype_promotion("standard"):
        assert common_mistakes.with_table(page) == page, "run python tests/common_mistakes.py"


def test_every_message_says_what_was_given_and_what_to_write():
    given = common_mistakes.names()
    with jax.numpy_dtype_promotion("standard"):
        found = [common_mistakes.message(x, given) for x in common_mistakes.MISTAKES]
    assert len(found) == 10 and {error for error, _ in found} <= {"TypeError", "ValueError"}
    assert all(len(words) < 400 and "Array(" not in words for _, words in found)


HALF = {"w": jnp.ones(2, jnp.bfloat16)}
QUANTIZED = adamax(0.1, v_dtype="uint8")
COMPENSATED = compensate_rounding(adamax(0.1))
# The messages in the table of other errors, and programs that raise them.
OTHER_ERRORS = {
    "The field names of the state dict and the named tuple do not match": lambda: (
        flax.serialization.from_bytes(
            adamax(0.1).init(HALF), flax.serialization.to_bytes(optax.adamax(0.1).init(HALF))
        )
    ),
    "The gradients must have the tree of the parameters given to init": lambda: adamax(0.1).update(
        {}, adamax(0.1).init(HALF)
    ),
    "of the state must be an array of dtype": lambda: encode_state(
        jax.tree.map(lambda x: x.astype(jnp.float32), QUANTIZED.init(HALF))
    ),
    "m_dtype='int8' stores m / v, so it requires b1 < b2": lambda: adamax(
        0.1, b1=0.9, b2=0.9, m_dtype="int8"
    ),
    "Moments of complex parameters must be in full precision": lambda: QUANTIZED.init(
        jnp.ones(2, jnp.complex64)
    ),
    "An update with quantized m or v was differentiated": lambda: jax.grad(
        lambda g: QUANTIZED.update(g, QUANTIZED.init(g))[0]
    )(1.0),
    "must be bfloat16, as in init, but its dtype is float32": lambda: COMPENSATED.update(
        HALF, COMPENSATED.init(HALF), {"w": jnp.ones(2)}
    ),
    "Found multiple values for 'ScaleByAdamaxState'": lambda: optax.tree.get(
        [adamax(0.1).init(HALF)] * 2, "ScaleByAdamaxState"
    ),
    "compensate_rounding needs the parameters": lambda: COMPENSATED.update(
        HALF, COMPENSATED.init(HALF)
    ),
}


def test_messages_on_the_page_exist():
    page = common_mistakes.PAGE.read_text("utf-8")
    table = page[page.index("## Other errors") :]
    assert set(re.findall(r"^\| `([^`]* [^`]*)`[^:]*? \|", table, re.M)) == set(OTHER_ERRORS)


@pytest.mark.parametrize("words", OTHER_ERRORS)
def test_message_on_the_page_is_raised(words):
    with pytest.raises((TypeError, ValueError, KeyError)) as raised:
        OTHER_ERRORS[words]()
    assert words in str(raised.value)
