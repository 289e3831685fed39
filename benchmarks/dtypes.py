"""Compares v and the update in every parameter dtype: optax_adamax, optax and PyTorch.

    python -m benchmarks.dtypes

After one gradient of 1 and 2,000 gradients of 1e-6 with b2 = 0.999, v must be 0.999**2000 = 0.1352.
In a new optimizer, a gradient of exactly 0 must not change the parameter.
PyTorch is measured only if it is installed. Runs for half a minute.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from benchmarks import reporting
from optax_adamax import adamax

try:
    import torch
except ImportError:
    torch = None

DTYPES = ("float32", "float64", "bfloat16", "float16", "complex64")
STEPS, SMALL, LEARNING_RATE = 2000, 1e-6, 0.1
EXACT = 0.999**STEPS


def run_jax(make: Callable[[float], Any], name: str, dtype: str) -> tuple[float, float]:
    """Returns v after the decay, and a parameter of 1 after one zero gradient."""
    tx = make(LEARNING_RATE)
    params = jnp.ones(1, dtype)

    @jax.jit
    def step(params: Any, state: Any, g: Any) -> Any:
        updates, state = tx.update(g, state, params)
        return optax.apply_updates(params, updates), state

    moved, state = step(params, tx.init(params), jnp.ones(1, dtype))
    small = jnp.full(1, SMALL, dtype)
    for _ in range(STEPS):
        moved, state = step(moved, state, small)
    still, _ = step(params, tx.init(params), jnp.zeros(1, dtype))
    return _real(optax.tree.get(state, name)), _real(still)


def run_torch(dtype: str) -> tuple[float, float]:
    """Returns the same two values for torch.optim.Adamax.

    PyTorch stores a complex v as its real and imaginary components. The gradients are real, so the
    real component is returned.
    """

    def optimizer() -> tuple[Any, Any]:
        p = torch.nn.Parameter(torch.ones(1, dtype=getattr(torch, dtype)))
        return p, torch.optim.Adamax([p], lr=LEARNING_RATE)

    p, decayed = optimizer()
    for g in [1.0] + [SMALL] * STEPS:
        p.grad = torch.full_like(p, g)
        decayed.step()
    q, new = optimizer()
    q.grad = torch.zeros_like(q)
    new.step()
    v = decayed.state[p]["exp_inf"].flatten()[0]
    return float(v.real.double()), float(q.detach().real.double()[0])


def _real(x: Any) -> float:
    return float(np.asarray(x).reshape(-1)[0].real)


def main() -> None:
    """Runs all dtypes, prints the table and writes the JSON."""
    rows = []
    for dtype in tqdm(DTYPES, desc="dtypes"):
        with jax.enable_x64(dtype == "float64"):
            results = {
                "optax_adamax": run_jax(adamax, "v", dtype),
                "optax": run_jax(optax.adamax, "nu", dtype),
            }
        if torch is not None:
            results["torch"] = run_torch(dtype)
        for who, (v, p) in results.items():
            rows.append({"dtype": dtype, "who": who, "v": v, "parameter": p})
    provenance = reporting.provenance(
        "benchmarks.dtypes",
        dtype=", ".join(DTYPES),
        seeds=(),
        packages=() if torch is None else ("torch",),
    )
    results = {"provenance": provenance, "exact_v": EXACT, "rows": rows}
    reporting.write_json(reporting.RESULTS / "dtypes.json", results)
    for row in rows:
        print(
            f"{row['dtype']:10} {row['who']:12} v {row['v']:.4g}  parameter {row['parameter']:.4g}"
        )


if __name__ == "__main__":
    main()
