"""Formats as parameters of tests."""

import pytest

from tests.oracle.formats import WAYS


def formats(given, always=WAYS):
    """All tuples that are given; those beyond `always` only repeat the others: they are slow."""
    return [pytest.param(*x, marks=[] if x in always else pytest.mark.slow) for x in given]
