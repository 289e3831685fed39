"""Time, memory and passes of one step in every storage format, beside float32 optax.adamax.

    python -m benchmarks.low_bit [--quick]

A train step that is only the optimizer: donated parameters and state, one leaf, gradients given.
Every figure is a ratio to optax.adamax in float32, measured in alternation within one run. What is
predicted: the bytes of the state, from the dtypes, and the time, from the bytes of a single pass
over parameters, state and gradients. Takes two minutes.
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

SIZE, ROUNDS, SEED = 1 << 24, 20, 0
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
        self.state_bytes = sum(x.nbytes for x in jax.tree.leaves(self.carry[1]) if x.ndim)
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
            "state_bytes": self.state_bytes / size,
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
    widths = {"optax.adamax": 8} | {f"{m}, {v}": WIDTH[m] + WIDTH[v] for m, v in FORMATS}
    for name, width in widths.items():
        # One pass: the gradient in; the parameter and the state in and out.
        predicted = {"state_bytes": width, "ratio": (12 + 2 * width) / (12 + 2 * 8)}
        row = rows[name] = rows[name] | {"predicted": predicted}
        ratio = "{:.2f} ({:.2f}-{:.2f})".format(row["ratio"], *row["ratio_quartiles"])
        found = f"{row['state_bytes']:g} bytes (predicted {width})  ratio {ratio}"
        print(
            f"{name:20} {found} (predicted {predicted['ratio']:.2f})  {row['passes']} passes, "
            f"{row['temporary_bytes']} temporary bytes"
        )
    if not quick:
        provenance = reporting.provenance("benchmarks.low_bit", dtype="float32", seeds=[SEED])
        results = {"provenance": provenance, "parameters": size, "rounds": rounds, "rows": rows}
        reporting.write_json(reporting.RESULTS / "low_bit.json", results)


if __name__ == "__main__":
    main()
