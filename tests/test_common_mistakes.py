"""The documentation shows the messages that the most likely mistakes of a new user raise."""

import common_mistakes
import jax


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
