"""Measures steps and compilation for many small leaves, with and without `pack_small_leaves`.

    python -m benchmarks.packing [--quick]

The train step computes the gradients of a sum of squares. Parameters and state are donated. Step
times are measured in alternation. Compile times include tracing, lowering and XLA.
Runs for three minutes.
"""

import argparse
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from tqdm import tqdm

from benchmarks import reporting, timing
from optax_adamax import adamax, pack_small_leaves

COUNTS, SIZE, ROUNDS, COMPILATIONS = (150, 1000), 64, 40, 3
SIZES = (16, 64, 256, 1024, 4096, 16384, 65536)  # with COUNTS[0] leaves
REFERENCE, PACKED = "optax.adamax", "pack_small_leaves(adamax)"
CANDIDATES: dict[str, Callable[[], optax.GradientTransformation]] = {
    REFERENCE: lambda: optax.adamax(1e-3),
    "adamax": lambda: adamax(1e-3),
    PACKED: lambda: pack_small_leaves(adamax(1e-3), max_size=1 << 20),
    "pack_small_leaves(optax.adamax)": lambda: pack_small_leaves(optax.adamax(1e-3), 1 << 20),
    "optax.flatten(optax.adamax)": lambda: optax.flatten(optax.adamax(1e-3)),
}


def gradient(params: dict[str, jax.Array], target: jax.Array) -> Any:
    """Returns the gradient of the summed squared distance of every leaf to the target."""
    return jax.grad(lambda p: sum(jnp.sum((x - target) ** 2) for x in p.values()))(params)


def build(name: str, count: int, size: int) -> timing.Step:
    """Returns a compiled step on `count` leaves of `size` elements."""
    params = {f"leaf {i}": np.full(size, i, np.float32) for i in range(count)}
    return timing.Step(CANDIDATES[name](), params, gradient, jnp.ones(size))


def compare(count: int, rounds: int, compilations: int) -> dict[str, Any]:
    """Returns step and compile times of every candidate, relative to optax.adamax."""
    build(REFERENCE, 2, SIZE)  # initializes JAX
    steps: dict[str, timing.Step] = {}
    compiling: dict[str, list[float]] = {name: [] for name in CANDIDATES}
    for _ in tqdm(range(compilations), desc=f"{count} leaves", leave=False):
        for name in CANDIDATES:
            steps[name] = build(name, count, SIZE)
            compiling[name].append(steps[name].compile_seconds)
    found = timing.ratios(timing.alternate(steps, rounds), REFERENCE)
    built = timing.ratios({k: np.array(x) for k, x in compiling.items()}, REFERENCE)
    return {name: {"step": found[name], "compile": built[name]} for name in CANDIDATES}


def compare_sizes(count: int, sizes: tuple[int, ...], rounds: int) -> dict[str, Any]:
    """Measures the time of the packed step relative to the unpacked step for each leaf size."""
    found = {}
    for size in tqdm(sizes, desc="sizes", leave=False):
        steps = {name: build(name, count, size) for name in ("adamax", PACKED)}
        found[str(size)] = timing.ratios(timing.alternate(steps, rounds), "adamax")[PACKED]
    return found


def draw(results: dict[str, Any]) -> None:
    """Draws the time of the packed step relative to the unpacked step, against leaf size."""
    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    sizes = results["by_size"]
    x = [int(size) for size in sizes]
    low, high = zip(*(ratio["quartiles"] for ratio in sizes.values()), strict=True)
    figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
    axes.fill_between(x, low, high, alpha=0.25)
    axes.plot(x, [ratio["median"] for ratio in sizes.values()], marker="o")
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set(xscale="log", xlabel=f"elements of each of {COUNTS[0]} leaves", ylim=(0, None))
    axes.set_ylabel("time of a step, packed / unpacked")
    figure.savefig(reporting.FIGURES / "packing.png", dpi=150)
    plt.close(figure)


def main() -> None:
    """Runs all measurements, prints them, and writes the JSON and the figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few leaves, few rounds")
    quick = parser.parse_args().quick
    counts, sizes = ((50,), SIZES[1:3]) if quick else (COUNTS, SIZES)
    rounds, compilations = (5, 1) if quick else (ROUNDS, COMPILATIONS)
    results: dict[str, Any] = {
        "elements": SIZE,
        "rounds": rounds,
        "by_count": {str(count): compare(count, rounds, compilations) for count in counts},
        "by_size": compare_sizes(counts[0], sizes, rounds),
    }
    for count, rows in results["by_count"].items():
        for name, row in rows.items():
            step, built = timing.format_ratio(row["step"]), timing.format_ratio(row["compile"])
            print(f"{count:>5} leaves  {name:32} step {step}  compilation {built}")
    for size, ratio in results["by_size"].items():
        print(f"{counts[0]} leaves of {size:>6}: packed / unpacked {timing.format_ratio(ratio)}")
    if not quick:
        provenance = reporting.provenance("benchmarks.packing")
        results = {"provenance": provenance} | results
        reporting.write_json(reporting.RESULTS / "packing.json", results)
        reporting.FIGURES.mkdir(exist_ok=True)
        draw(results)


if __name__ == "__main__":
    main()
