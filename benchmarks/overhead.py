"""What an update costs in Python, outside `jax.jit`; and how often a step is traced.

    python -m benchmarks.overhead [--quick]

Time of a call of `update` on leaves of four elements, in alternation with optax.adamax, outside
of `jit` and while it is traced. Then a jitted step over changes of the learning rate, b2 and the
count: it must be traced once. Takes half a minute.
"""

import argparse
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.tree

from benchmarks import reporting, timing
from optax_adamax import adamax

LEAVES, ROUNDS, STEPS = (1, 10), 20, 20
REFERENCE = "optax.adamax"
CANDIDATES = {
    REFERENCE: lambda: optax.adamax(1e-3),
    "adamax": lambda: adamax(1e-3),
    "adamax, 2 bytes": lambda: adamax(1e-3, m_dtype="int8", v_dtype="uint8"),
}


def python_time(leaves: int, rounds: int, *, traced: bool) -> dict[str, Any]:
    """Time of one update call as a ratio to that of optax.adamax."""
    params = [jnp.ones(4) for _ in range(leaves)]

    def runner(tx: optax.GradientTransformation) -> Any:
        state = tx.init(params)
        if traced:
            return lambda: jax.make_jaxpr(lambda g, s, p: tx.update(g, s, p))(params, state, params)
        return lambda: jax.block_until_ready(tx.update(params, state, params))

    runners = {name: runner(make()) for name, make in CANDIDATES.items()}
    seconds = timing.alternate(runners, rounds)
    ratios = timing.ratios(seconds, REFERENCE)
    return {
        name: {"ratio": ratios[name], "seconds": timing.spread(seconds[name])} for name in runners
    }


def traces(steps: int) -> int:
    """How often a step is traced while learning rate, b2 and count change."""
    inject = optax.inject_hyperparams(adamax, hyperparam_dtype=jnp.float32)
    tx = inject(learning_rate=1e-3, b2=0.999)
    params, traced = jnp.ones(4), 0

    @jax.jit
    def step(params: jax.Array, state: Any) -> Any:
        nonlocal traced
        traced += 1
        updates, state = tx.update(params, state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for i in range(steps):
        values = {"learning_rate": jnp.float32(1e-3 / (i + 1)), "b2": jnp.float32(1 - 1e-3 * i)}
        state = state._replace(hyperparams=state.hyperparams | values)
        params, state = step(params, state)
    return traced


def main() -> None:
    """Measures, prints and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few rounds")
    quick = parser.parse_args().quick
    rounds = 3 if quick else ROUNDS
    results: dict[str, Any] = {
        "rounds": rounds,
        "traces": traces(STEPS),
        "steps": STEPS,
        "rows": {},
    }
    for leaves in LEAVES:
        for traced in (False, True):
            how = "traced" if traced else "outside jit"
            count = "1 leaf" if leaves == 1 else f"{leaves} leaves"
            rows = python_time(leaves, rounds, traced=traced)
            results["rows"][f"{count}, {how}"] = rows
            for name, row in rows.items():
                seconds = row["seconds"]["median"]
                print(
                    f"{count:>9}, {how:12} {name:16} {timing.text(row['ratio'])}, "
                    f"{1e3 * seconds:.2f} ms"
                )
    print(f"{STEPS} steps with changing learning rate, b2 and count: traced {results['traces']}")
    if not quick:
        provenance = reporting.provenance("benchmarks.overhead")
        reporting.write_json(
            reporting.RESULTS / "overhead.json", {"provenance": provenance} | results
        )


if __name__ == "__main__":
    main()
