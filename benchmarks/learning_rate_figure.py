"""Draws figures/learning_rate.png from results/learning_rate.json.

python -m benchmarks.learning_rate_figure
"""

import json
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from benchmarks import reporting

# The optimizers: color, marker and line. Adamax is drawn last, above the others.
LOOKS = {
    "optax.sgd, momentum": ("#999999", "v", "-"),
    "optax.adamw": ("#E69F00", "s", "--"),
    "optax.adam": ("#D55E00", "o", "-"),
    "Adamax, 2 bytes": ("#56B4E9", "D", "--"),
    "Adamax, float32": ("#0072B2", "o", "-"),
}


def draw(results: dict[str, Any]) -> None:
    """Draws held-out loss against peak rate: one row per task, one column per kind of gradient."""
    plt.rcParams.update(reporting.STYLE)
    tasks, noises = results["tasks"], list(results["noises"])
    size = {"figsize": (8, 2.4 * len(tasks) + 0.6), "dpi": 110, "layout": "constrained"}
    fig, axes = plt.subplots(len(tasks), len(noises), sharex=True, sharey="row", **size)
    for row, (name, task) in enumerate(tasks.items()):
        for panel, noise in zip(axes[row], noises, strict=True):
            draw_panel(panel, task, noise)
            panel.set_title(f"{name}, {noise}", loc="left", size=10)
        set_limits(axes[row, 0], task, noises)
    axes[0, 0].set_xscale("log")
    for panel in axes[:, 0]:
        panel.set_ylabel("held-out loss")
    for panel in axes[-1]:
        panel.set_xlabel("peak learning rate")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    fig.legend(handles[::-1], labels[::-1], loc="outside upper center", ncols=3, frameon=False)
    reporting.FIGURES.mkdir(parents=True, exist_ok=True)
    fig.savefig(reporting.FIGURES / "learning_rate.png")
    plt.close(fig)


def draw_panel(panel: plt.Axes, task: dict[str, Any], noise: str) -> None:
    """Draws the mean loss over seeds, with a bar from the smallest to the largest loss."""
    for name, (color, marker, line) in LOOKS.items():
        found = task[noise][name]
        # Losses of diverged runs are above the panel.
        losses = np.nan_to_num(found["held_out_loss"], nan=1e30, posinf=1e30).clip(max=1e30)
        mean = losses.mean(1)
        bars = np.array([mean - losses.min(1), losses.max(1) - mean])
        bars[:, losses.max(1) > 10 * task["initial_loss"]] = 0  # would cross the panel
        look = {"color": color, "marker": marker, "ls": line, "ms": 4, "lw": 1.4, "elinewidth": 1}
        panel.errorbar(found["rates"], mean, bars, label=name, **look)


def set_limits(panel: plt.Axes, task: dict[str, Any], noises: list[str]) -> None:
    """Limits the loss axis to half of the largest decrease from the initial loss.

    If the initial loss is more than 20 times the lowest loss, the axis is logarithmic and ends
    above the initial loss.
    """
    losses = [x for noise in noises for row in task[noise].values() for x in row["held_out_loss"]]
    lowest, first = float(np.nanmin(losses)), task["initial_loss"]
    if first > 20 * lowest:
        panel.set(yscale="log", ylim=(0.8 * lowest, 1.5 * first))
    else:
        panel.set_ylim(lowest - 0.03 * (first - lowest), lowest + 0.5 * (first - lowest))


if __name__ == "__main__":
    draw(json.loads((reporting.RESULTS / "learning_rate.json").read_text("utf-8")))
