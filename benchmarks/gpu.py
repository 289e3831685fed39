"""Measures step times and bandwidth of every storage format on a GPU.

    python -m benchmarks.gpu [--quick]

The step updates one large leaf. Parameters and state are donated, and gradients are arguments. A
round runs `STEPS` steps before it waits, so the time of the host is hidden. A single pass reads and
writes parameters, m and v, and reads the gradient. The bandwidth is relative to the bandwidth of a
copy, a donated `x + 1` of the same size. Runs for less than five minutes. Without a GPU, only
`--quick` runs.
"""

import argparse
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from benchmarks import reporting, timing
from optax_adamax import adamax
from tests.oracle.formats import FORMATS, state_bytes

SIZE, ROUNDS, STEPS = 1 << 28, 20, 10
REFERENCE, COPY = "optax.adamax", "copy"


class Copy:
    """Adds 1 to an array, several times per call, and waits once, at the end."""

    def __init__(self, size: int):
        self.step = jax.jit(lambda x: x + 1, donate_argnums=0)
        self.x = jnp.zeros(size)

    def __call__(self) -> None:
        for _ in range(STEPS):
            self.x = self.step(self.x)
        jax.block_until_ready(self.x)


class Steps(timing.Step):
    """Runs several steps per call and waits once, at the end."""

    def __call__(self) -> None:
        for _ in range(STEPS):
            self.carry = self.step(*self.carry, self.batch)
        jax.block_until_ready(self.carry)


def measure(size: int, rounds: int, formats: list[tuple[str, str]]) -> dict[str, Any]:
    """Returns seconds, ratio to optax.adamax and fraction of the copy bandwidth per format.

    Each format is measured together with the reference only, to limit the memory.
    """
    rows: dict[str, Any] = {}
    gradient = jnp.full(size, 0.01)
    for m, v in tqdm(formats, desc="formats", leave=False):
        name = f"{m}, {v}"
        step = Steps(
            adamax(1e-3, m_dtype=m, v_dtype=v), jnp.ones(size), timing.batch_as_gradient, gradient
        )
        optax_step = Steps(optax.adamax(1e-3), jnp.ones(size), timing.batch_as_gradient, gradient)
        runners = {REFERENCE: optax_step, name: step, COPY: Copy(size)}
        seconds = timing.alternate(runners, rounds)
        ratios = timing.ratios(seconds, REFERENCE)
        for found, width in ((REFERENCE, 8), (name, state_bytes(m, v))):
            bytes_ratio = (12 + 2 * width) / 8
            fraction = bytes_ratio * seconds[COPY] / seconds[found]
            rows[found] = {
                "ratio": ratios[found],
                "bytes_per_parameter": 12 + 2 * width,
                "fraction_of_copy": timing.spread(fraction),
                "seconds": float(np.median(seconds[found])) / STEPS,
            }
        rows[COPY] = {"bytes_per_second": float(8 * size * STEPS / np.median(seconds[COPY]))}
        del step, optax_step, runners
    return rows


def main() -> None:
    """Measures all formats, prints the rows and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small, on any device; no JSON")
    quick = parser.parse_args().quick
    if jax.default_backend() != "gpu" and not quick:
        print("not measured: JAX found no GPU")
        return
    size, rounds = (1 << 16, 2) if quick else (SIZE, ROUNDS)
    rows = measure(size, rounds, FORMATS[:1] + FORMATS[-1:] if quick else FORMATS)
    copied = rows.pop(COPY)["bytes_per_second"]
    print(f"copy: {copied / 1e9:.0f} GB/s")
    for name, row in rows.items():
        fraction = timing.format_ratio(row["fraction_of_copy"])
        print(f"{name:20} ratio {timing.format_ratio(row['ratio'])}  fraction of copy {fraction}")
    if not quick:
        provenance = reporting.provenance("benchmarks.gpu")
        results = {"provenance": provenance, "parameters": size, "rounds": rounds}
        results |= {"copy_bytes_per_second": copied, "rows": rows}
        reporting.write_json(reporting.RESULTS / "gpu.json", results)


if __name__ == "__main__":
    main()
