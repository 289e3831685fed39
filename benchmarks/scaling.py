"""Measures how step times grow with the size of one leaf and with the number of small leaves.

    python -m benchmarks.scaling [--quick]

Parameters and state are float32 and donated. Gradients are arguments for one leaf, and computed in
the step for many leaves, as in `benchmarks.packing`. Slopes of log time over log size are fitted by
least squares to the upper half of the sizes. A slope of 1 means that time is proportional to size.
Runs for three minutes and needs 4 GB of memory.
"""

import argparse
from typing import Any

import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from tqdm import tqdm

from benchmarks import packing, reporting, timing
from benchmarks.packing import PACKED, REFERENCE
from optax_adamax import adamax

PARAMETERS = tuple(10**k for k in range(3, 9))
LEAVES = (1, 3, 10, 30, 100, 300, 1000, 3000)
ROUNDS = 20
ONE_LEAF = {REFERENCE: lambda: optax.adamax(1e-3), "adamax": lambda: adamax(1e-3)}


def measure_one_leaf(size: int, rounds: int) -> dict[str, Any]:
    """Measures seconds, ratio and peak memory of a step on one leaf."""
    gradient = jnp.full(size, 0.01)
    steps = {
        name: timing.Step(make(), jnp.ones(size), timing.batch_as_gradient, gradient)
        for name, make in ONE_LEAF.items()
    }
    found = {}
    for name, step in steps.items():
        memory = step.compiled.memory_analysis()
        peak = memory.argument_size_in_bytes + memory.temp_size_in_bytes
        peak += memory.output_size_in_bytes - memory.alias_size_in_bytes
        found[name] = {"peak_bytes": peak}
    return _with_times(found, timing.alternate(steps, rounds))


def measure_many_leaves(count: int, rounds: int) -> dict[str, Any]:
    """Measures seconds and ratio of a step on small leaves, and its compile time."""
    names = (REFERENCE, "adamax", PACKED)
    steps = {name: packing.build(name, count, packing.SIZE) for name in names}
    found = {name: {"compile_seconds": step.compile_seconds} for name, step in steps.items()}
    return _with_times(found, timing.alternate(steps, rounds))


def _with_times(found: dict[str, Any], seconds: dict[str, np.ndarray]) -> dict[str, Any]:
    ratios = timing.ratios(seconds, REFERENCE)
    return {
        name: {"seconds": timing.spread(seconds[name]), "ratio": ratios[name]} | row
        for name, row in found.items()
    }


def slopes(curve: dict[str, dict[str, Any]], quantity: str) -> dict[str, float]:
    """Returns the log-log slope of each candidate over the upper half of the sizes."""
    sizes = list(curve)[len(curve) // 2 :]
    x = np.log([int(size) for size in sizes])

    def value(row: dict[str, Any]) -> float:
        return row[quantity]["median"] if quantity == "seconds" else row[quantity]

    return {
        name: float(np.polyfit(x, np.log([value(curve[size][name]) for size in sizes]), 1)[0])
        for name in curve[sizes[0]]
    }


def draw(results: dict[str, Any]) -> None:
    """Draws time and memory against parameters, and time and compile time against leaves."""
    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    panels = [
        ("parameters", "seconds", "parameters in one leaf", "seconds per step"),
        ("parameters", "peak_bytes", "parameters in one leaf", "peak memory, bytes"),
        ("leaves", "seconds", "leaves of 64 elements", "seconds per step"),
        ("leaves", "compile_seconds", "leaves of 64 elements", "seconds of compilation"),
    ]
    figure, grid = plt.subplots(2, 2, figsize=(7.5, 6), layout="constrained")
    for axes, (curve, quantity, label, title) in zip(grid.flat, panels, strict=True):
        rows = results[curve]
        for name, style in zip(next(iter(rows.values())), ("o-", "s--", "^-"), strict=False):
            found = [row[name][quantity] for row in rows.values()]
            y = [value["median"] if isinstance(value, dict) else value for value in found]
            axes.loglog([int(size) for size in rows], y, style, label=name, markersize=4)
        axes.set(xlabel=label, ylabel=title)
        axes.legend(fontsize="small")
    figure.savefig(reporting.FIGURES / "scaling.png", dpi=130)
    plt.close(figure)


def main() -> None:
    """Runs all measurements, prints them, and writes the JSON and the figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes, few rounds")
    quick = parser.parse_args().quick
    parameters, leaves = (PARAMETERS[:3], LEAVES[:4]) if quick else (PARAMETERS, LEAVES)
    rounds = 5 if quick else ROUNDS
    results: dict[str, Any] = {"rounds": rounds}
    packing.build(REFERENCE, 2, packing.SIZE)  # initializes JAX
    for name, sizes, run in (
        ("parameters", parameters, measure_one_leaf),
        ("leaves", leaves, measure_many_leaves),
    ):
        results[name] = {str(n): run(n, rounds) for n in tqdm(sizes, desc=name, leave=False)}
    results["slopes"] = {
        "step, parameters": slopes(results["parameters"], "seconds"),
        "peak memory, parameters": slopes(results["parameters"], "peak_bytes"),
        "step, leaves": slopes(results["leaves"], "seconds"),
        "compilation, leaves": slopes(results["leaves"], "compile_seconds"),
    }
    for curve in ("parameters", "leaves"):
        for size, rows in results[curve].items():
            cells = [f"{name} {timing.format_ratio(row['ratio'])}" for name, row in rows.items()]
            print(f"{size:>10} {curve:10} ", "  ".join(cells))
    for name, row in results["slopes"].items():
        print(f"slope of {name}:", "  ".join(f"{k} {x:.2f}" for k, x in row.items()))
    if not quick:
        provenance = reporting.provenance("benchmarks.scaling")
        results = {"provenance": provenance} | results
        reporting.write_json(reporting.RESULTS / "scaling.json", results)
        reporting.FIGURES.mkdir(exist_ok=True)
        draw(results)


if __name__ == "__main__":
    main()
