"""Random sequences of operations preserve invariants, and earlier counterexamples stay fixed.

`python -m benchmarks.fuzz` runs `tests/oracle/state_machine.py` for longer.
"""

import pytest
from hypothesis import settings

from tests.oracle.formats import M_DTYPES
from tests.oracle.machine_programs import LONG, SIZE
from tests.oracle.state_machine import Run

Run.TestCase.settings = settings(
    max_examples=2000 if LONG else max(1, settings.default.max_examples // 8),
    stateful_step_count=12,
    deadline=None,
    derandomize=True,
)
test_random_operations_preserve_the_invariants = Run.TestCase


# Counterexamples that the state machine has found.


def replay(dtypes, policy, *steps):
    run = Run()
    run.start(dtypes, policy)
    for name, arguments in steps:
        getattr(run, name)(**arguments)
        run.state_is_valid()


@pytest.mark.parametrize(
    "dtypes", [("bfloat16", "float32"), ("int8", "float32"), ("int8", "bfloat16")]
)
def test_m_is_not_rounded_up_to_infinity(dtypes):
    largest = {"g": [0.0] * 7 + [3.4e38]}
    replay(
        dtypes,
        "propagate",
        ("change_hyperparameters", {"betas": (0.0, 1.0), "eps": 0.0}),
        ("update", largest),
        ("update", largest),
        ("update_with_zeros", {}),
    )


@pytest.mark.parametrize("m_dtype", M_DTYPES)
def test_v_is_not_rounded_up_to_infinity(m_dtype):
    """The error occurred for a shared scale of nearly 1, as after 692 steps."""
    gradient = [0.0] * 7 + [3.4e38]
    long_scan = ("long_scan", {"cycle": [[0.0] * SIZE], "betas": None})
    replay(
        (m_dtype, "bfloat16"),
        "propagate",
        *[long_scan] * 2,
        ("long_scan", {"cycle": [gradient], "betas": None}),
        ("update_with_zeros", {}),
    )
