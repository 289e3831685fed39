"""Compares bfloat16 parameters alone, with residuals, and with float32 master parameters.

    python -m benchmarks.compensation [--quick]

1. 100,000 steps of a constant gradient. The exact result is known.
2. The four tasks of `benchmarks.quality`, at the peak learning rates that it chose (run it first):
   final losses of the master parameters, paired by seed with float32 training. Models with bfloat16
   parameters have bfloat16 gradients; losses are computed in float32 from the stored parameters.
3. Bytes per parameter and time of an optimizer step; parameters and state are donated, gradients
   are arguments.

Runs for about twenty minutes on two CPU cores.
"""

import argparse
import json
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from benchmarks import low_bit, reporting, timing
from benchmarks.quality import compare
from benchmarks.tasks import TASKS, Params, Task
from optax_adamax import adamax, compensate_rounding, master_params

SEEDS = tuple(range(10))  # the transformer uses the first five
CONSTANT_STEPS, CONSTANT_RATE = 100_000, 1e-3
SIZE, LEAVES, ROUNDS = 1 << 24, 16, 20
REFERENCE, CLAIMED = "float32", "bfloat16, int8 residual"
LOSSES = ("held_out_loss", "train_loss")
CLAIM = (
    "bfloat16 parameters with one byte of residual and 2 bytes of state end within one "
    "seed-to-seed standard deviation of the float32 runs on all four tasks."
)


def store(x: jax.Array) -> jax.Array:
    """Rounds x to bfloat16; a cast alone may not, because XLA can remove a cast and its inverse."""
    return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7).astype(jnp.bfloat16)


def to_float32(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


def with_float32_masters(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Adds a float32 copy of every parameter to the state, the usual alternative to residuals."""

    def init(params: optax.Params) -> optax.OptState:
        return to_float32(params), inner.init(to_float32(params))

    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        masters, inner_state = state
        updates, inner_state = inner.update(to_float32(updates), inner_state, masters)
        masters = optax.apply_updates(masters, updates)
        moves = jax.tree.map(
            lambda m, p: store(m).astype(jnp.float32) - p.astype(jnp.float32), masters, params
        )
        return moves, (masters, inner_state)

    return optax.GradientTransformation(init, update)


class Arm(NamedTuple):
    """One configuration: parameter dtype, optimizer, and a function to its master parameters."""

    dtype: Any
    build: Callable[[optax.ScalarOrSchedule], optax.GradientTransformation]
    masters: Callable[[Any, Any], Any] = lambda state, params: to_float32(params)


def two_bytes(rate: optax.ScalarOrSchedule) -> optax.GradientTransformation:
    return adamax(rate, m_dtype="int8", v_dtype="uint8")


ARMS = {
    REFERENCE: Arm(jnp.float32, optax.adamax),
    "float32, 2-byte state": Arm(jnp.float32, two_bytes),
    "bfloat16, plain": Arm(jnp.bfloat16, two_bytes),
    CLAIMED: Arm(
        jnp.bfloat16,
        lambda rate: compensate_rounding(two_bytes(rate), "int8"),
        master_params,
    ),
    "bfloat16, int16 residual": Arm(
        jnp.bfloat16,
        lambda rate: compensate_rounding(two_bytes(rate), "int16"),
        master_params,
    ),
    "bfloat16, float32 masters": Arm(
        jnp.bfloat16,
        lambda rate: with_float32_masters(optax.adamax(rate)),
        lambda state, params: state[0],
    ),
}


def constant_gradient(arm: Arm, steps: int) -> dict[str, float]:
    """Returns stored and master parameter after `steps` steps from 0 with a gradient of 1."""
    tx = arm.build(CONSTANT_RATE)
    params = jnp.zeros((), arm.dtype)

    @jax.jit
    def run(params: jax.Array, state: Any) -> Any:
        def step(carry: Any, _: None) -> tuple[Any, None]:
            params, state = carry
            updates, state = tx.update(jnp.float32(1), state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, state), length=steps)[0]

    params, state = run(params, tx.init(params))
    return {"stored": float(params), "master": float(arm.masters(state, params))}


def trainer(task: Task, arm: Arm) -> Callable[..., Params]:
    """Returns a function of (parameters, seed, peak rate) that trains to master parameters."""

    @jax.jit
    def train(params: Params, seed: jax.Array, peak_rate: jax.Array) -> Params:
        schedule = optax.warmup_cosine_decay_schedule(0.0, 1.0, task.steps // 10, task.steps)
        tx = arm.build(lambda count: peak_rate * schedule(count))
        key = jax.random.fold_in(jax.random.key(seed), 1)
        cast = store if arm.dtype == jnp.bfloat16 else lambda x: x

        def step(carry: tuple[Params, Any], t: jax.Array) -> tuple[tuple[Params, Any], None]:
            params, state = carry
            gradients = jax.grad(task.loss)(to_float32(params), jax.random.fold_in(key, t))
            updates, state = tx.update(jax.tree.map(cast, gradients), state, params)
            return (optax.apply_updates(params, updates), state), None

        params = jax.tree.map(cast, params)
        carry, _ = jax.lax.scan(step, (params, tx.init(params)), jnp.arange(task.steps))
        return arm.masters(carry[1], carry[0])

    return train


def final_losses(task: Task, seeds: tuple[int, ...], rate: float, bar: tqdm) -> dict[str, Any]:
    """Returns the final losses of every arm, and their gaps to float32, paired by seed."""
    evaluate = jax.jit(lambda params: [getattr(task, loss)(params) for loss in LOSSES])
    init = jax.jit(lambda seed: task.init(jax.random.fold_in(jax.random.key(seed), 0)))
    losses: dict[str, dict[str, list[float]]] = {loss: {} for loss in LOSSES}
    for name, arm in ARMS.items():
        train = trainer(task, arm)
        found = []
        for seed in seeds:
            found.append([float(x) for x in evaluate(train(init(seed), seed, rate))])
            bar.update()
        for loss, values in zip(LOSSES, zip(*found, strict=True), strict=True):
            losses[loss][name] = list(values)
    compared = {loss: compare(values) | {"of_seeds": values} for loss, values in losses.items()}
    return {"peak_rate": rate, "steps": task.steps, "seeds": len(seeds), **compared}


def best_rate(task: str) -> float:
    """Returns the peak rate that `benchmarks.quality` chose for float32 state."""
    path = reporting.RESULTS / "quality.json"
    if not path.exists():
        raise SystemExit("Run python -m benchmarks.quality first: it chooses the learning rates.")
    tuning = json.loads(path.read_text("utf-8"))["tasks"][task]["held_out_loss_by_peak_rate"]
    losses = {float(rate): loss for rate, loss in tuning["float32"].items()}
    return min(losses, key=lambda rate: np.nan_to_num(losses[rate], nan=np.inf))


def step_bytes(arm: Arm, size: int) -> dict[str, float]:
    """Returns the bytes per parameter of a compiled step with `LEAVES` leaves."""
    tx = arm.build(1e-3)

    def step(params: Any, state: Any, gradients: Any) -> Any:
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    leaf = jax.ShapeDtypeStruct((size // LEAVES,), arm.dtype)
    params = [leaf] * LEAVES
    step = jax.jit(step, donate_argnums=(0, 1))
    compiled = step.lower(params, jax.eval_shape(tx.init, params), params).compile()
    memory = compiled.memory_analysis()
    return {
        "bytes_per_parameter": memory.argument_size_in_bytes / size,
        "temporary_bytes_per_parameter": memory.temp_size_in_bytes / size,
    }


def step_times(size: int, rounds: int) -> dict[str, dict[str, Any]]:
    """Returns step times on one leaf relative to float32, measured in alternation."""
    normal = jax.random.normal(jax.random.key(0), (size,)) * 0.01
    steps = {}
    for name, arm in ARMS.items():  # the first is REFERENCE
        g = normal.astype(arm.dtype)
        steps[name] = timing.Step(arm.build(1e-3), jnp.ones_like(g), timing.batch_as_gradient, g)
    return low_bit.compare(steps, size, rounds)


def main() -> None:
    """Runs all measurements, prints the tables and writes the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a few steps; writes no files")
    quick = parser.parse_args().quick
    size, rounds, steps = (1 << 18, 8, 1000) if quick else (SIZE, ROUNDS, CONSTANT_STEPS)
    chosen: dict[str, tuple[Task, tuple[int, ...], float]] = {}
    for name, make in TASKS.items():
        task = make()
        if quick:
            chosen[name] = task._replace(steps=10), SEEDS[:2], 0.01
        else:
            chosen[name] = task, SEEDS[: 5 if "transformer" in name else 10], best_rate(name)
    ends = {name: constant_gradient(arm, steps) for name, arm in ARMS.items()}
    rows = {name: step_bytes(arm, size) for name, arm in ARMS.items()}
    for name, row in step_times(size, rounds).items():
        rows[name]["ratio"] = row["ratio"]
        print(f"{name:28} {ends[name]}  {rows[name]}")
    tasks: dict[str, Any] = {}
    with tqdm(total=sum(len(ARMS) * len(seeds) for _, seeds, _ in chosen.values())) as bar:
        for name, (task, seeds, rate) in chosen.items():
            bar.set_description(name)
            tasks[name] = final_losses(task, seeds, rate, bar)
    holds = True
    for name, task in tasks.items():
        for loss in LOSSES:
            found = task[loss]
            deviation = found["float32_deviation"]
            print(f"{name}, {loss}: {found['float32_mean']:.6f}, deviation {deviation:.6f}")
            for arm, gap in found["gap"].items():
                print(f"  {arm:28} {gap / deviation:+8.2f} deviations")
            holds &= abs(found["gap"][CLAIMED]) <= deviation
    print(f"{CLAIM}\nThis run {'confirms' if holds else 'does not confirm'} it.")
    if quick:
        return
    results = {
        "provenance": reporting.provenance(
            "benchmarks.compensation", dtype="bfloat16", seeds=SEEDS, packages=["scikit-learn"]
        ),
        "constant_gradient": {"steps": steps, "rate": CONSTANT_RATE, "ends": ends},
        "step": {"parameters": size, "leaves": LEAVES, "rounds": rounds, "rows": rows},
        "tasks": tasks,
        "claim": CLAIM,
        "holds": bool(holds),
    }
    reporting.write_json(reporting.RESULTS / "compensation.json", results)


if __name__ == "__main__":
    main()
