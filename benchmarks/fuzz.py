"""Runs the machine of tests/test_fuzz.py for long, and writes how much of it was run.

    python -m benchmarks.fuzz [--examples 100000] [--minutes 25] [--seed 0]

It stops at whichever comes first, and at the first counter-example, which it shows.
"""

import argparse
import os
import sys
import time
from pathlib import Path

import jax
from hypothesis import HealthCheck, seed, settings
from hypothesis.stateful import run_state_machine_as_test
from tqdm import tqdm

from benchmarks import reporting

BATCH, STEPS = 500, 12


def main() -> None:
    """Runs batches of examples, each with the next seed, and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--examples", type=int, default=100_000)
    parser.add_argument("--minutes", type=float, default=25.0)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()

    os.environ["OPTAX_ADAMAX_TEST_PROFILE"] = "long"  # all formats, and resharding
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    jax.config.update("jax_num_cpu_devices", 8)
    import test_fuzz

    profile = settings(
        max_examples=BATCH,
        stateful_step_count=STEPS,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    start, next_seed = time.monotonic(), given.seed
    with tqdm(total=given.examples, desc="examples") as bar:
        while bar.n < given.examples and time.monotonic() - start < 60 * given.minutes:
            seed(next_seed)(test_fuzz.Run)
            run_state_machine_as_test(test_fuzz.Run, settings=profile)
            next_seed += 1
            bar.update(test_fuzz.Run.examples - bar.n)
    results = {
        "provenance": reporting.provenance(
            "benchmarks.fuzz",
            dtype="all storage formats",
            seeds=range(given.seed, next_seed),
            packages=("hypothesis",),
        ),
        "examples": test_fuzz.Run.examples,
        "rules": test_fuzz.Run.executed,
        "minutes": (time.monotonic() - start) / 60,
        "counter_examples": 0,
    }
    reporting.write_json(reporting.RESULTS / "fuzz.json", results)
    print({name: results[name] for name in ("examples", "rules", "minutes")})


if __name__ == "__main__":
    main()
