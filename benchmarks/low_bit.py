"""Time, memory and passes of one step in every storage format, beside float32 optax.adamax.

    python -m benchmarks.low_bit [--quick]

A train step that is only the optimizer: donated parameters and state, one leaf, gradients given.
Every figure is a ratio to optax.adamax in float32, measured in alternation within one run. Takes
three minutes.
"""

import argparse
import functools
import re
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from benchmarks import reporting
from optax_adamax import adamax

SIZE, ROUNDS, SEED = 1 << 24, 40, 0
WIDTH = {"float32": 4, "bfloat16": 2, "int8": 1, "uint8": 1}
M_DTYPES, V_DTYPES = ("float32", "bfloat16", "int8"), ("float32", "bfloat16", "uint8")
FORMATS = [(m, v) for m in M_DTYPES for v in V_DTYPES]


class Candidate:
    """A compiled step with its own parameters and state."""

    def __init__(self, tx: optax.GradientTransformationExtraArgs, gradient: jax.Array):
        @functools.partial(jax.jit, donate_argnums=(0, 1))
        def step(params: Any, state: Any, gradient: jax.Array) -> Any:
            updates, state = tx.update(gradient, state, params)
            return optax.apply_updates(params, updates), state

        params = jnp.ones_like(gradient)
        self.carry = params, tx.init(params)
        self.compiled = step.lower(*self.carry, gradient).compile()
        self.seconds: list[float] = []

    def run(self, gradient: jax.Array) -> None:
        """Takes one step and remembers its time."""
        start = time.perf_counter()
        self.carry = jax.block_until_ready(self.compiled(*self.carry, gradient))
        self.seconds.append(time.perf_counter() - start)

    def describe(self, reference: "Candidate", size: int) -> dict[str, Any]:
        """Ratios to the reference round by round, and what the compiler says."""
        ratios = np.array(self.seconds[3:]) / np.array(reference.seconds[3:])
        entry = self.compiled.as_text().split("\nENTRY")[1]
        passes = re.findall(rf"= \w+\[{size}\]\S* fusion\(", entry)
        calls = re.findall(r" conditional\(", entry)
        return {
            "ratio": float(np.median(ratios)),
            "ratio_quartiles": [float(x) for x in np.quantile(ratios, (0.25, 0.75))],
            "temporary_bytes": self.compiled.memory_analysis().temp_size_in_bytes,
            "passes": len(passes) + 2 * len(calls),
        }


def measure(candidates: dict[str, Callable[[], Any]], size: int, rounds: int) -> dict[str, Any]:
    """Runs the candidates in turn, `rounds` times; the first one is the reference."""
    gradient = jax.random.normal(jax.random.key(SEED), (size,)) * 0.01
    built = {name: Candidate(make(), gradient) for name, make in candidates.items()}
    for _ in tqdm(range(rounds), desc="rounds"):
        for candidate in built.values():
            candidate.run(gradient)
    reference = next(iter(built.values()))
    return {name: x.describe(reference, size) for name, x in built.items()}


def main() -> None:
    """Measures all formats, prints the table and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a sixteenth of the size, few rounds")
    quick = parser.parse_args().quick
    size, rounds = (SIZE // 16, 8) if quick else (SIZE, ROUNDS)
    candidates: dict[str, Callable[[], Any]] = {"optax.adamax": lambda: optax.adamax(1e-3)}
    for m, v in FORMATS:
        make = functools.partial(adamax, 1e-3, m_dtype=m, v_dtype=v)
        candidates[f"{m}, {v}"] = make
    rows = measure(candidates, size, rounds)
    for m, v in FORMATS:
        rows[f"{m}, {v}"]["state_bytes"] = WIDTH[m] + WIDTH[v]
    rows["optax.adamax"]["state_bytes"] = 8
    for name, row in rows.items():
        ratio = "{:.2f} ({:.2f}-{:.2f})".format(row["ratio"], *row["ratio_quartiles"])
        memory = f"{row['passes']} passes, {row['temporary_bytes']} temporary bytes"
        print(f"{name:20} {row['state_bytes']} bytes  ratio {ratio}  {memory}")
    if not quick:
        provenance = reporting.provenance("benchmarks.low_bit", dtype="float32", seeds=[SEED])
        results = {"provenance": provenance, "parameters": size, "rounds": rounds, "rows": rows}
        reporting.write_json(reporting.RESULTS / "low_bit.json", results)


if __name__ == "__main__":
    main()
