"""v, m and updates agree with float64 after outliers, subnormals, a loss scale and zero gradients.

Every storage format is checked on the scenarios of `tests/oracle/scenarios.py`.
"""

import json
from pathlib import Path

import numpy as np
import pytest

from optax_adamax._v_formats import V_FORMATS
from tests.oracle import scenarios
from tests.oracle.formats import SOME_FORMATS, V_DTYPES, v_error

ROOT = Path(__file__).parent.parent
# float32 v is multiplied by b2 in each of 10^5 steps, and each product is rounded.
V_ERROR = {dtype: v_error(dtype, scale_error=0) for dtype in V_DTYPES} | {"float32": 2e-3}

PEAKS = {"one gradient of 1e30": 1e30, "one gradient of 3e38": 3e38}


def check(row):
    """Checks a row of the comparison; bounds on v do not apply outside the uint8 range."""
    scenario, v_dtype = row["scenario"], row["v_dtype"]
    assert row["finite"], row
    assert row["largest_step"] <= 1 + 1e-5, row
    if "1e-40" in scenario:  # v is subnormal and flushed to 0, so the update is 0
        assert row["v_lowest"] is None and row["largest_step"] == 0
        return
    tolerance = V_ERROR[v_dtype]
    below = v_dtype == "uint8" and scenario == "no gradient for 10^5 steps"  # v underflows
    above = PEAKS.get(scenario, 0) > V_FORMATS[v_dtype].range[1]  # v saturates
    assert above or 1 - tolerance <= row["v_lowest"], row
    assert below or row["v_highest"] <= 1 + tolerance, row
    assert row["m_error"] <= {"float32": 1e-6, "bfloat16": 0.004, "int8": 0.3}[row["m_dtype"]], row
    # Long after the event, updates differ from float64 by less than one code of m.
    assert row["step_error_last"] <= 0.05, row


@pytest.mark.parametrize("dtypes", SOME_FORMATS)
def test_short_scenarios_agree_with_float64(dtypes):
    for row in scenarios.saturation([dtypes], 1000):
        check(row)


def test_committed_results_agree_with_float64():
    """The JSON files contain every format, and 10^5 steps without gradients."""
    folder = ROOT / "benchmarks" / "results"
    rows, long_rows = (
        json.loads((folder / name).read_text("utf-8"))["rows"]
        for name in ("reliability.json", "reliability_long.json")
    )
    assert len(rows) == 5 * 9 and len(long_rows) == 9
    for row in rows:
        check(row)
    for row in long_rows:
        assert row["steps"] == 1_000_000
        assert row["v_error"] <= V_ERROR[row["v_dtype"]], row
        assert row["m_error"] <= 0.02, row


@pytest.mark.parametrize("dtypes", SOME_FORMATS)
def test_v_decays_by_b2_after_an_outlier(dtypes):
    """uint8 v starts near the top of its range."""
    g = np.ones((3000, 1), np.float32)
    g[100] = 1e30 if dtypes[1] != "uint8" else 1e8
    u, _, v = (np.float64(x)[:, 0] for x in scenarios.compiled(*dtypes)(g))
    rates = np.log(v[2500] / v[200]) / 2300
    np.testing.assert_allclose(rates, np.log(0.999), rtol=0.08)
    assert u[99] == pytest.approx(1, abs=0.08) and abs(u[2500]) < 0.01
