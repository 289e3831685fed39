"""Measures times in alternation, because on a shared machine only ratios are reproducible."""

import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
from tqdm import tqdm

WARM_UP = 3


def alternate(runners: dict[str, Callable[[], object]], rounds: int) -> dict[str, np.ndarray]:
    """Returns the seconds of each runner in each round; a runner must wait for its results."""
    seconds: dict[str, list[float]] = {name: [] for name in runners}
    for _ in tqdm(range(WARM_UP + rounds), desc="rounds", leave=False, disable=None):
        for name, runner in runners.items():
            start = time.perf_counter()
            runner()
            seconds[name].append(time.perf_counter() - start)
    return {name: np.array(found[WARM_UP:]) for name, found in seconds.items()}


def spread(values: np.ndarray) -> dict[str, Any]:
    """Returns median and quartiles."""
    low, median, high = (float(x) for x in np.quantile(values, (0.25, 0.5, 0.75)))
    return {"median": median, "quartiles": [low, high]}


def median_and_range(medians: np.ndarray) -> dict[str, Any]:
    """Returns the median and the range of the medians of several runs."""
    return {
        "median": float(np.median(medians)),
        "runs": [float(medians.min()), float(medians.max())],
    }


def ratios(seconds: dict[str, np.ndarray], reference: str) -> dict[str, dict[str, Any]]:
    """Returns the times relative to the reference in the same round."""
    return {name: spread(found / seconds[reference]) for name, found in seconds.items()}


def format_ratio(ratio: dict[str, Any]) -> str:
    """Formats a median with its quartiles, or with the range of runs."""
    low, high = ratio["runs"] if "runs" in ratio else ratio["quartiles"]
    return f"{ratio['median']:.2f} ({low:.2f} to {high:.2f})"


class Step:
    """A compiled train step with its own parameters and state, which it donates.

    The step computes `gradient(params, batch)`. `compile_seconds` is the time from the first trace
    to the executable.
    """

    def __init__(
        self,
        tx: optax.GradientTransformation,
        params: Any,
        gradient: Callable[[Any, Any], Any],
        batch: Any,
    ):
        @functools.partial(jax.jit, donate_argnums=(0, 1))
        def step(params: Any, state: Any, batch: Any) -> Any:
            updates, state = tx.update(gradient(params, batch), state, params)
            return optax.apply_updates(params, updates), state

        self.batch = batch
        self.carry = jax.tree.map(jax.numpy.array, params), tx.init(params)
        start = time.perf_counter()
        self.compiled = step.lower(*self.carry, batch).compile()
        self.compile_seconds = time.perf_counter() - start
        self.step = step
        self.carry = step(*self.carry, batch)  # through jit, so its dispatch is timed as for users

    def __call__(self) -> None:
        self.carry = jax.block_until_ready(self.step(*self.carry, self.batch))


def batch_as_gradient(params: Any, batch: Any) -> Any:
    """Returns `batch`, which is the gradient in steps that run only the optimizer."""
    del params
    return batch
