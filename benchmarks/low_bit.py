"""Measures time, memory and passes of a step in every storage format, relative to optax.adamax.

    python -m benchmarks.low_bit [--one-thread] [--quick]

The step is an optimizer step on one leaf. Parameters and state are donated, and gradients are
arguments. Times are relative to float32 optax.adamax and measured in alternation. They vary more
between processes than within one process, so the benchmark runs several processes. Predictions are
printed next to the measurements: the bytes of the state from the dtypes, and the time from the
bytes of a single pass over parameters, state and gradients. Runs for two minutes.
"""

import argparse
import functools
import json
import multiprocessing
import os
import re
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from benchmarks import reporting, timing
from optax_adamax import adamax
from tests.oracle.formats import FORMATS, state_bytes

SIZE, ROUNDS, RUNS, SEED = 1 << 24, 20, 5, 0


def describe(step: timing.Step, ratio: dict[str, Any], size: int) -> dict[str, Any]:
    """Returns a row: the ratio of times, and bytes and passes from the compiled program."""
    entry = step.compiled.as_text().split("\nENTRY")[1]
    passes = re.findall(rf"= \w+\[{size}\]\S* fusion\(", entry)
    calls = re.findall(r" conditional\(", entry)
    return {
        "ratio": ratio,
        "state_bytes": sum(x.nbytes for x in jax.tree.leaves(step.carry[1]) if x.ndim) / size,
        "temporary_bytes": step.compiled.memory_analysis().temp_size_in_bytes,
        "passes": len(passes) + 2 * len(calls),
    }


def compare(steps: dict[str, timing.Step], size: int, rounds: int) -> dict[str, Any]:
    """Runs the steps in alternation, `rounds` times; the first one is the reference."""
    ratios = timing.ratios(timing.alternate(steps, rounds), next(iter(steps)))
    return {name: describe(step, ratios[name], size) for name, step in steps.items()}


def measure(candidates: dict[str, Callable[[], Any]], size: int, rounds: int) -> dict[str, Any]:
    """Compares the steps of transformations on one leaf; the first one is the reference."""
    gradient = jax.random.normal(jax.random.key(SEED), (size,)) * 0.01
    ones = jnp.ones_like(gradient)
    steps = {
        name: timing.Step(make(), ones, timing.batch_as_gradient, gradient)
        for name, make in candidates.items()
    }
    return compare(steps, size, rounds)


def one_run(size: int, rounds: int) -> dict[str, Any]:
    """Returns the rows of all formats from one process."""
    candidates: dict[str, Callable[[], Any]] = {"optax.adamax": lambda: optax.adamax(1e-3)}
    for m, v in FORMATS:
        candidates[f"{m}, {v}"] = functools.partial(adamax, 1e-3, m_dtype=m, v_dtype=v)
    return measure(candidates, size, rounds)


def merge_runs(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Merges the rows of all processes: the median and the range of their medians."""
    medians = {name: [run[name]["ratio"]["median"] for run in runs] for name in runs[0]}
    return {
        name: row | {"ratio": timing.median_and_range(np.array(medians[name]))}
        for name, row in runs[0].items()
    }


def main() -> None:
    """Measures all formats, prints the table and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a sixteenth of the size, few rounds")
    parser.add_argument(
        "--one-thread", action="store_true", help="run on one processor, and add to the results"
    )
    arguments = parser.parse_args()
    quick = arguments.quick
    if arguments.one_thread:
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # before XLA starts its threads
    size, rounds, count = (SIZE // 16, 8, 2) if quick else (SIZE, ROUNDS, RUNS)
    fresh = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=fresh, max_tasks_per_child=1) as pool:
        runs = pool.map(one_run, [size] * count, [rounds] * count)
        rows = merge_runs(list(tqdm(runs, total=count, desc="runs", disable=None)))
    widths = {"optax.adamax": 8} | {f"{m}, {v}": state_bytes(m, v) for m, v in FORMATS}
    for name, width in widths.items():
        # One pass reads the gradient, and reads and writes the parameter and the state.
        predicted = {"state_bytes": width, "ratio": (12 + 2 * width) / (12 + 2 * 8)}
        row = rows[name] = rows[name] | {"predicted": predicted}
        ratio = timing.format_ratio(row["ratio"])
        found = f"{row['state_bytes']:g} bytes (predicted {width})  ratio {ratio}"
        print(
            f"{name:20} {found} (predicted {predicted['ratio']:.2f})  {row['passes']} passes, "
            f"{row['temporary_bytes']} temporary bytes"
        )
    if quick:
        return
    path = reporting.RESULTS / "low_bit.json"
    made = reporting.provenance("benchmarks.low_bit", seeds=[SEED])
    results = {"provenance": made, "parameters": size, "rounds": rounds, "runs": count}
    results["rows"] = rows
    before = json.loads(path.read_text("utf-8")) if path.exists() else {}
    reporting.write_json(
        path, before | ({"one_thread": results} if arguments.one_thread else results)
    )


if __name__ == "__main__":
    main()
