"""Outliers, subnormals, a loss scale and silence, in each format, beside the float64 oracle."""

import json
from pathlib import Path

import numpy as np
import pytest

from optax_adamax._v_formats import V_FORMATS
from tests.oracle import scenarios
from tests.oracle.formats import SOME_FORMATS, V_DTYPES, v_error

ROOT = Path(__file__).parent.parent
# In 10^5 steps a float32 v is multiplied as often.
V_ERROR = {dtype: v_error(dtype, frame=0) for dtype in V_DTYPES} | {"float32": 2e-3}

PEAKS = {"one gradient of 1e30": 1e30, "one gradient of 3e38": 3e38}


def check(row):
    """What holds in every format; where uint8 saturates, what is lost and what is not."""
    scenario, v_dtype = row["scenario"], row["v_dtype"]
    assert row["finite"], row
    assert row["largest_step"] <= 1 + 1e-5, row
    if "1e-40" in scenario:  # v is subnormal, and taken for 0: there is no step
        assert row["v_lowest"] is None and row["largest_step"] == 0
        return
    tolerance = V_ERROR[v_dtype]
    below = v_dtype == "uint8" and scenario == "no gradient for 10^5 steps"  # v stays at its floor
    above = PEAKS.get(scenario, 0) > V_FORMATS[v_dtype].range[1]  # v saturates
    assert above or 1 - tolerance <= row["v_lowest"], row
    assert below or row["v_highest"] <= 1 + tolerance, row
    assert row["m_error"] <= {"float32": 1e-6, "bfloat16": 0.004, "int8": 0.3}[row["m_dtype"]], row
    # After the event the steps are those of float64 again, or smaller errors than one code of m.
    assert row["step_error_last"] <= 0.05, row


@pytest.mark.parametrize("form", SOME_FORMATS)
def test_shortened(form):
    for row in scenarios.saturation([form], 1000):
        check(row)


def test_as_the_readme_says():
    """The committed figures, of every format and the full silence."""
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


@pytest.mark.parametrize("form", SOME_FORMATS)
def test_an_outlier_is_forgotten_at_the_rate_of_b2(form):
    """v falls by b2 a step after it; in uint8 from the top of its range."""
    g = np.ones((3000, 1), np.float32)
    g[100] = 1e30 if form[1] != "uint8" else 1e8
    u, _, v = (np.float64(x)[:, 0] for x in scenarios.compiled(*form)(g))
    rates = np.log(v[2500] / v[200]) / 2300
    np.testing.assert_allclose(rates, np.log(0.999), rtol=0.08)
    assert u[99] == pytest.approx(1, abs=0.08) and abs(u[2500]) < 0.01
