"""Finds the best learning rates in results/learning_rate.json, and the rates nearly as good."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

NEAR = 0.05  # a good rate reaches at least 1 - NEAR of the largest decrease of the loss


def summary(task: dict[str, Any], noise: str) -> dict[str, dict[str, Any]]:
    """Finds the lowest mean loss of each optimizer, its rate, and the rates nearly as good.

    A rate is nearly as good if its loss reaches 1 - `NEAR` of the decrease from the initial loss to
    the lowest loss of all optimizers. Losses are means over seeds. NaN is treated as infinity.
    """
    means = {
        name: np.nan_to_num(np.mean(row["held_out_loss"], 1), nan=np.inf)
        for name, row in task[noise].items()
    }
    lowest = min(losses.min() for losses in means.values())
    threshold = lowest + NEAR * (task["initial_loss"] - lowest)
    return {
        name: {
            "loss": losses.min(),
            "rate": task[noise][name]["rates"][losses.argmin()],
            "largest_update": max(task[noise][name]["largest_update"]),
            "good_rates": [
                r for r, x in zip(task[noise][name]["rates"], losses, strict=True) if x <= threshold
            ],
        }
        for name, losses in means.items()
    }


def format_rates(rates: Sequence[float]) -> str:
    """Formats the smallest and the largest of the good rates."""
    return f"{rates[0]:g} to {rates[-1]:g}" if rates else "none"


def print_table(tasks: dict[str, Any], noises: Iterable[str]) -> None:
    """Prints one block per task and noise, with one line per optimizer."""
    for name, task in tasks.items():
        for noise in noises:
            print(f"\n{name}, {noise}: initial loss {task['initial_loss']:.4g}")
            for optimizer, row in summary(task, noise).items():
                good = format_rates(row["good_rates"])
                print(f"  {optimizer:20} {row['loss']:.4g} at {row['rate']:g}; good: {good}")
