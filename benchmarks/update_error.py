"""Measures errors of the update in each storage format, for constant and random gradients.

    python -m benchmarks.update_error [--quick]

Constant gradients: the mean of u over many steps with a gradient of 1. The exact u is 1.
Random gradients: the root mean square of u - u_exact, divided by the root mean square of u_exact,
for independent normal gradients. u_exact is the update with float32 state.
b1 and b2 have their defaults.
"""

import argparse
import itertools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import reporting
from optax_adamax import scale_by_adamax

STEPS, RANDOM_STEPS, ELEMENTS, SEED = 100_000, 2_000, 1_000, 0
M_DTYPES, V_DTYPES = ("float32", "bfloat16", "int8"), ("float32", "bfloat16", "uint8")
FORMATS = tuple(itertools.product(M_DTYPES, V_DTYPES))


def mean_of_constant(m_dtype: str, v_dtype: str, steps: int) -> float:
    """Returns the mean update for a constant gradient of 1; the exact mean is 1."""
    tx = scale_by_adamax(m_dtype=m_dtype, v_dtype=v_dtype)
    g = jnp.ones(())

    @jax.jit
    def run() -> jax.Array:
        def step(state: Any, _: None) -> tuple[Any, jax.Array]:
            u, state = tx.update(g, state)
            return state, u

        return jax.lax.scan(step, tx.init(g), length=steps)[1]

    return float(np.asarray(run(), np.float64).mean())


def random_updates(m_dtype: str, v_dtype: str, steps: int) -> np.ndarray:
    """Returns the updates for normal gradients after the first half of the steps."""
    tx = scale_by_adamax(m_dtype=m_dtype, v_dtype=v_dtype)

    @jax.jit
    def run() -> jax.Array:
        def step(state: Any, t: jax.Array) -> tuple[Any, jax.Array]:
            key = jax.random.fold_in(jax.random.key(SEED), t)
            u, state = tx.update(jax.random.normal(key, (ELEMENTS,)), state)
            return state, u

        return jax.lax.scan(step, tx.init(jnp.zeros(ELEMENTS)), jnp.arange(steps))[1]

    return np.asarray(run(), np.float64)[steps // 2 :]


def measure(
    steps: int, random_steps: int, formats: Iterable[tuple[str, str]] = FORMATS
) -> list[dict[str, Any]]:
    """Returns a row per pair of storage formats."""
    exact = random_updates("float32", "float32", random_steps)
    rows = []
    for m_dtype, v_dtype in formats:
        difference = random_updates(m_dtype, v_dtype, random_steps) - exact
        rows.append(
            {
                "m_dtype": m_dtype,
                "v_dtype": v_dtype,
                "constant_mean": mean_of_constant(m_dtype, v_dtype, steps),
                "random_rms": float(np.sqrt((difference**2).mean() / (exact**2).mean())),
            }
        )
        print(rows[-1])
    return rows


def main() -> None:
    """Measures all formats and writes the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a few steps; writes no files")
    quick = parser.parse_args().quick
    rows = measure(*(1000, 20) if quick else (STEPS, RANDOM_STEPS))
    results = {
        "provenance": reporting.provenance("benchmarks.update_error", seeds=[SEED]),
        "steps": STEPS,
        "rows": rows,
    }
    if not quick:
        reporting.write_json(reporting.RESULTS / "update_error.json", results)


if __name__ == "__main__":
    main()
