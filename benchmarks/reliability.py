"""Measures errors against float64 in extreme scenarios, and costs of non-finite policies.

    python -m benchmarks.reliability [--quick]

Runs for several minutes.
"""

import argparse
import functools
from typing import Any

import optax

from benchmarks import low_bit, reporting
from optax_adamax import adamax, limit_spikes
from tests.oracle.formats import FORMATS, SOME_FORMATS
from tests.oracle.scenarios import LONG, SEED, ZERO_STEPS, long_run, saturation


def measure_costs(size: int, rounds: int) -> list[dict[str, Any]]:
    """Measures step time relative to nonfinite="propagate", and temporary bytes, per policy."""
    rows = []
    for m_dtype, v_dtype in SOME_FORMATS:
        make = functools.partial(adamax, 1e-3, m_dtype=m_dtype, v_dtype=v_dtype)
        candidates = {
            policy: functools.partial(make, nonfinite=policy)
            for policy in ("propagate", "zero", "skip_step")
        }
        for action in ("clip", "skip"):
            candidates[f"limit_spikes, {action}"] = functools.partial(
                limit_spikes, make(), 5.0, action=action
            )
        candidates["optax.apply_if_finite"] = functools.partial(
            optax.apply_if_finite, make(), max_consecutive_errors=10
        )
        for policy, row in low_bit.measure(candidates, size, rounds).items():
            del row["passes"]  # does not count loops inside branches
            rows.append({"policy": policy, "m_dtype": m_dtype, "v_dtype": v_dtype, **row})
    return rows


def main() -> None:
    """Runs all measurements, prints them and writes the JSON files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="shorter runs, no JSON")
    quick = parser.parse_args().quick
    rows = saturation(FORMATS, ZERO_STEPS // 100 if quick else ZERO_STEPS)
    long_rows = long_run(FORMATS, LONG // 100 if quick else LONG)
    cost_rows = measure_costs(1 << 18 if quick else 1 << 23, 8 if quick else 40)
    for row in rows + long_rows + cost_rows:
        print(row)
    if not quick:
        provenance = reporting.provenance("benchmarks.reliability", seeds=[SEED])
        for name, results in {
            "reliability": {"rows": rows},
            "reliability_long": {"rows": long_rows},
            "reliability_costs": {"parameters": 1 << 23, "rows": cost_rows},
        }.items():
            path = reporting.RESULTS / f"{name}.json"
            reporting.write_json(path, {"provenance": provenance, **results})


if __name__ == "__main__":
    main()
