"""Draws figures/quality.png from results/quality.json.

python -m benchmarks.quality_figure
"""

import json
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from benchmarks import reporting

# From top to bottom: the name in the results, the name in the figure, the color.
ROWS = {
    "optax.adamax, float32": ("8 bytes:\noptax.adamax", "#5B6770"),
    "4 bytes: bfloat16, bfloat16": ("4 bytes:\nbfloat16, bfloat16", "#56A9DD"),
    "3 bytes: int8, bfloat16": ("3 bytes:\nint8, bfloat16", "#2B8CCB"),
    "2 bytes: int8, uint8": ("2 bytes:\nint8, uint8", "#0072B2"),
    "naive bfloat16": ("4 bytes:\nnaive bfloat16", "#D55E00"),
}
LOSSES = {"held_out_loss": "held-out loss", "train_loss": "training loss"}
LOW, HIGH = -3.0, 5.0


def draw(results: dict[str, Any]) -> None:
    """Draws gaps to float32 state by seed, and their mean: a row per task, a column per loss."""
    plt.rcParams.update(reporting.STYLE)
    tasks = results["tasks"]
    size = {"figsize": (8, 2.3 * len(tasks) + 0.9), "dpi": 110, "layout": "constrained"}
    fig, axes = plt.subplots(len(tasks), len(LOSSES), sharex=True, sharey=True, **size)
    for row, (name, task) in zip(axes, tasks.items(), strict=True):
        for panel, (loss, title) in zip(row, LOSSES.items(), strict=True):
            draw_panel(panel, task[loss])
            panel.set_title(f"{name}: {title}", loc="left", size=11)
    axes[0, 0].set_yticks(-np.arange(len(ROWS)), [label for label, _ in ROWS.values()])
    axes[0, 0].set(xlim=(LOW, HIGH), ylim=(-len(ROWS) + 0.4, 0.6))
    fig.suptitle("Final loss minus final loss with float32 state", x=0.01, ha="left")
    fig.supxlabel(
        "Unit: seed-to-seed standard deviation of float32 (band). Right is worse.\n"
        "Dots: seeds, paired. Bars: mean and its standard error.",
        x=0.01,
        ha="left",
        size=10,
        color="#5B6770",
    )
    reporting.FIGURES.mkdir(parents=True, exist_ok=True)
    fig.savefig(reporting.FIGURES / "quality.png")


def draw_panel(panel: plt.Axes, found: dict[str, Any]) -> None:
    """Draws the gaps of one loss, one row per format; a mean outside the panel becomes a number."""
    deviation = found["float32_deviation"]
    reference = np.array(found["of_seeds"]["float32"])
    panel.axvspan(-1, 1, color="#E6E9EB", lw=0)
    panel.axvline(0, color="white", lw=1)
    for row, (name, (_, color)) in enumerate(ROWS.items()):
        gaps = (np.array(found["of_seeds"][name]) - reference) / deviation
        mean, error = found["gap"][name] / deviation, found["gap_error"][name] / deviation
        height = np.linspace(-0.25, 0.25, len(gaps)) - row
        panel.plot(gaps, height, ".", color=color, markersize=4, alpha=0.5)
        if mean < HIGH:
            panel.errorbar(mean, -row, xerr=error, fmt="|", color=color, markersize=18, capsize=3)
        else:
            arrow = {"arrowstyle": "->", "color": color}
            place = {"va": "center", "ha": "right", "color": color, "arrowprops": arrow}
            panel.annotate(f"{mean:+.0f}", (HIGH, -row), (HIGH - 0.8, -row), **place)
    panel.tick_params(left=False)


if __name__ == "__main__":
    draw(json.loads((reporting.RESULTS / "quality.json").read_text("utf-8")))
