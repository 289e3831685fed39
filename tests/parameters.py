"""Turns lists of storage formats into test parameters, most of them marked slow."""

import pytest

from tests.oracle.formats import STEP_VARIANTS


def formats(given, always=STEP_VARIANTS):
    """Returns all given tuples as parameters; tuples that are not in `always` are marked slow."""
    return [pytest.param(*x, marks=[] if x in always else pytest.mark.slow) for x in given]
