"""Summarizes results/learning_rate.json: the best rates, and the rates nearly as good."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

NEAR = 0.05  # share of the largest decrease of the loss that a good rate may lack


def summary(task: dict[str, Any], noise: str) -> dict[str, dict[str, Any]]:
    """Finds the lowest mean loss of each optimizer, its rate, and the rates nearly as good.

    Nearly as good: the loss is above the lowest of all optimizers by at most `NEAR` of the
    decrease from the initial loss to it. Means are over seeds; a NaN counts as infinite.
    """
    means = {
        name: np.nan_to_num(np.mean(row["held_out_loss"], 1), nan=np.inf)
        for name, row in task[noise].items()
    }
    lowest = min(losses.min() for losses in means.values())
    enough = lowest + NEAR * (task["initial_loss"] - lowest)
    return {
        name: {
            "loss": losses.min(),
            "rate": task[noise][name]["rates"][losses.argmin()],
            "largest_update": max(task[noise][name]["largest_update"]),
            "good_rates": [
                r for r, x in zip(task[noise][name]["rates"], losses, strict=True) if x <= enough
            ],
        }
        for name, losses in means.items()
    }


def span(rates: Sequence[float]) -> str:
    """Writes the least and the largest of the good rates."""
    return f"{rates[0]:g} to {rates[-1]:g}" if rates else "none"


def print_table(tasks: dict[str, Any], noises: Iterable[str]) -> None:
    """Prints a block per task and noise, a line per optimizer."""
    for name, task in tasks.items():
        for noise in noises:
            print(f"\n{name}, {noise}: initial loss {task['initial_loss']:.4g}")
            for optimizer, row in summary(task, noise).items():
                good = span(row["good_rates"])
                print(f"  {optimizer:20} {row['loss']:.4g} at {row['rate']:g}; good: {good}")
