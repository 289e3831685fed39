"""Measures the overhead of updating small leaves, in Python and in a jitted step.

    python -m benchmarks.overhead [--quick]

1. A call of `update` on leaves of four elements, eager and traced. Times are relative to
   optax.adamax and measured in alternation.
2. A jitted step on one small leaf with donation. JAX on CPU runs short programs in the calling
   thread and longer ones in another thread. The change of thread costs more than the step, so the
   step is also measured with all programs in the calling thread ("all inline").
3. The number of traces while the learning rate, b2 and the count change. It must be 1.

Runs for a minute.
"""

import argparse
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.tree

from benchmarks import reporting, timing
from optax_adamax import adamax

LEAVES, ROUNDS, STEPS = (1, 10), 20, 20
SIZES, CALLS = (64, 256), 1000
REFERENCE = "optax.adamax"
CANDIDATES = {
    REFERENCE: lambda: optax.adamax(1e-3),
    "adamax": lambda: adamax(1e-3),
    "adamax, 4 bytes": lambda: adamax(1e-3, m_dtype="bfloat16", v_dtype="bfloat16"),
    "adamax, 2 bytes": lambda: adamax(1e-3, m_dtype="int8", v_dtype="uint8"),
}


def measure_update(leaves: int, rounds: int, *, traced: bool) -> dict[str, Any]:
    """Measures the time of an update call relative to optax.adamax."""
    params = [jnp.ones(4) for _ in range(leaves)]

    def runner(tx: optax.GradientTransformation) -> Any:
        state = tx.init(params)
        if traced:
            return lambda: jax.make_jaxpr(lambda g, s, p: tx.update(g, s, p))(params, state, params)
        return lambda: jax.block_until_ready(tx.update(params, state, params))

    return compare({name: runner(make()) for name, make in CANDIDATES.items()}, rounds)


def compare(runners: dict[str, Any], rounds: int, calls: int = 1) -> dict[str, Any]:
    """Returns seconds per call and ratios to the reference, for runners of `calls` calls each."""
    seconds = timing.alternate(runners, rounds)
    ratios = timing.ratios(seconds, REFERENCE)
    return {
        name: {"ratio": ratios[name], "seconds": timing.spread(seconds[name] / calls)}
        for name in runners
    }


def measure_jitted_step(size: int, rounds: int, calls: int, inline: bool) -> dict[str, Any]:
    """Measures a jitted step on one leaf; `inline` has an effect only in a new process."""
    jax.config.update("jax_cpu_enable_async_dispatch", not inline)
    ones = jnp.ones(size)

    def runner(step: timing.Step) -> Any:
        def run() -> None:
            for _ in range(calls):
                step.carry = step.step(*step.carry, step.batch)
            jax.block_until_ready(step.carry)

        return run

    steps = {
        name: timing.Step(make(), ones, timing.batch_as_gradient, ones)
        for name, make in CANDIDATES.items()
    }
    return compare({name: runner(step) for name, step in steps.items()}, rounds, calls)


def count_traces(steps: int) -> int:
    """Counts the traces of a step while learning rate, b2 and count change."""
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
    """Runs all measurements, prints them and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few rounds")
    quick = parser.parse_args().quick
    rounds = 3 if quick else ROUNDS
    results: dict[str, Any] = {
        "rounds": rounds,
        "traces": count_traces(STEPS),
        "steps": STEPS,
        "rows": {},
    }
    for leaves in LEAVES:
        for traced in (False, True):
            how = "traced" if traced else "outside jit"
            count = "1 leaf" if leaves == 1 else f"{leaves} leaves"
            rows = measure_update(leaves, rounds, traced=traced)
            results["rows"][f"{count}, {how}"] = rows
    fresh = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=fresh, max_tasks_per_child=1) as pool:
        for size in SIZES:
            for inline in (False, True):
                rows = pool.submit(measure_jitted_step, size, rounds, CALLS, inline).result()
                where = ", all inline" if inline else ""
                results["rows"][f"a jitted step on {size} elements{where}"] = rows
    for what, rows in results["rows"].items():
        for name, row in rows.items():
            milliseconds = 1e3 * row["seconds"]["median"]
            print(f"{what:40} {name:16} {timing.format_ratio(row['ratio'])}, {milliseconds:.3g} ms")
    print(f"{STEPS} steps with changing learning rate, b2 and count: traced {results['traces']}")
    if not quick:
        provenance = reporting.provenance("benchmarks.overhead")
        reporting.write_json(
            reporting.RESULTS / "overhead.json", {"provenance": provenance} | results
        )


if __name__ == "__main__":
    main()
