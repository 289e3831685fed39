"""Runs the state machine of tests/oracle/state_machine.py and records the number of examples.

    python -m benchmarks.fuzz [--examples 100000] [--minutes 25] [--seed 0] [--resume]

Stops after the given examples or minutes, whichever comes first, or prints the first
counterexample. --resume continues after the last seed in results/fuzz.json and adds to its totals.
"""

import argparse
import json
import os
import time
from typing import Any

import jax
from hypothesis import HealthCheck, seed, settings
from hypothesis.stateful import run_state_machine_as_test
from tqdm import tqdm

from benchmarks import reporting

BATCH, STEPS = 500, 12


def main() -> None:
    """Runs batches of examples, one seed per batch, and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--examples", type=int, default=100_000)
    parser.add_argument("--minutes", type=float, default=25.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true")
    given = parser.parse_args()
    before: dict[str, Any] = {"examples": 0, "rules": 0, "minutes": 0.0, "commits": []}
    if given.resume:
        before = json.loads((reporting.RESULTS / "fuzz.json").read_text("utf-8"))
        before.setdefault("commits", [before["provenance"]["commit"]])
        given.seed = before["provenance"]["seeds"][-1] + 1

    os.environ["OPTAX_ADAMAX_TEST_PROFILE"] = "long"  # all formats, and resharding
    jax.config.update("jax_num_cpu_devices", 8)
    from tests.oracle import state_machine as machine

    profile = settings(
        max_examples=BATCH,
        stateful_step_count=STEPS,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    start, next_seed = time.monotonic(), given.seed
    wanted = given.examples - before["examples"]
    with tqdm(total=wanted, desc="examples") as bar:
        while bar.n < wanted and time.monotonic() - start < 60 * given.minutes:
            seed(next_seed)(machine.Run)
            run_state_machine_as_test(machine.Run, settings=profile)
            next_seed += 1
            bar.update(machine.Run.examples - bar.n)
    made = reporting.provenance(
        "benchmarks.fuzz",
        dtype="all storage formats",
        seeds=range(0 if given.resume else given.seed, next_seed),
        packages=("hypothesis",),
    )
    results = {
        "provenance": made,
        "examples": before["examples"] + machine.Run.examples,
        "rules": before["rules"] + machine.Run.executed,
        "minutes": before["minutes"] + (time.monotonic() - start) / 60,
        "commits": [*before["commits"], made["commit"]],
        "counter_examples": 0,
    }
    reporting.write_json(reporting.RESULTS / "fuzz.json", results)
    print({name: results[name] for name in ("examples", "rules", "minutes")})


if __name__ == "__main__":
    main()
