"""Compares the final losses of training with quantized and with float32 state.

  python -m benchmarks.quality           prints the tables, writes results/quality.json and draws
                                         figures/quality.png; 15 to 30 minutes on two CPU cores
  python -m benchmarks.quality --quick   runs a few steps of some tasks, as a smoke test

All runs of a seed start from the same parameters and use the same batches, so losses are compared
in pairs. The peak learning rates of Adamax and Adam are the best of five with float32 state. All
storage formats use the peak rate of Adamax.
"""

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

import optax_adamax
from benchmarks import quality_figure, reporting
from benchmarks.tasks import TASKS, Params, Task, text_fingerprint

SEEDS, TUNING_SEED = tuple(range(20)), 100  # each task uses the first `Task.seeds`
PEAK_RATES = (0.003, 0.01, 0.03, 0.1, 0.3)
LOSSES = ("held_out_loss", "train_loss")
CLAIM = (
    "With 2 bytes of state per parameter, the mean gap to float32 state is within one "
    "seed-to-seed standard deviation of the float32 runs on all tasks."
)

Builder = Callable[[optax.Schedule, float], optax.GradientTransformation]


def naive_bfloat16(schedule: optax.Schedule, b1: float) -> optax.GradientTransformation:
    """Returns optax.adamax with m and v rounded to bfloat16 after each step."""
    inner = optax.adamax(schedule, b1)

    def is_moment(x: jax.Array) -> bool:
        return jnp.issubdtype(x.dtype, jnp.floating)

    def store(x: jax.Array) -> jax.Array:
        # A cast alone does not round, because XLA can remove a cast to bfloat16 and back.
        rounded = jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
        return rounded.astype(jnp.bfloat16)

    def init(params: optax.Params) -> optax.OptState:
        return jax.tree.map(lambda x: store(x) if is_moment(x) else x, inner.init(params))

    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        state = jax.tree.map(lambda x: x.astype(jnp.float32) if is_moment(x) else x, state)
        updates, state = inner.update(updates, state, params)
        return updates, jax.tree.map(lambda x: store(x) if is_moment(x) else x, state)

    return optax.GradientTransformation(init, update)


REFERENCE, CLAIMED = "float32", "2 bytes: int8, uint8"
NAIVE, ADAM = "naive bfloat16", "optax.adam, float32"
OPTIMIZERS: dict[str, Builder] = {
    REFERENCE: optax_adamax.adamax,
    # The same equations in another program: the gap is due to float32 rounding alone.
    "optax.adamax, float32": optax.adamax,
    "4 bytes: bfloat16, bfloat16": partial(
        optax_adamax.adamax, m_dtype="bfloat16", v_dtype="bfloat16"
    ),
    "3 bytes: int8, bfloat16": partial(optax_adamax.adamax, m_dtype="int8", v_dtype="bfloat16"),
    CLAIMED: partial(optax_adamax.adamax, m_dtype="int8", v_dtype="uint8"),
    NAIVE: naive_bfloat16,
    ADAM: optax.adam,
}


def trainer(task: Task, build: Builder) -> Callable[..., Params]:
    """Returns a jitted function of (parameters, seed, peak rate) to trained parameters."""

    @jax.jit
    def train(params: Params, seed: jax.Array, peak_rate: jax.Array) -> Params:
        schedule = optax.warmup_cosine_decay_schedule(0.0, 1.0, task.steps // 10, task.steps)
        tx = build(lambda count: peak_rate * schedule(count), task.b1)
        key = jax.random.fold_in(jax.random.key(seed), 1)

        def step(carry: tuple[Params, Any], t: jax.Array) -> tuple[tuple[Params, Any], None]:
            params, state = carry
            gradients = jax.grad(task.loss)(params, jax.random.fold_in(key, t))
            updates, state = tx.update(gradients, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, tx.init(params)), jnp.arange(task.steps))[0][0]

    return train


def measure(
    task: Task, optimizers: Sequence[str], rates: Sequence[float], progress: tqdm
) -> dict[str, Any]:
    """Chooses the peak rates, then trains every seed with every optimizer."""
    evaluate = jax.jit(lambda params: [getattr(task, loss)(params) for loss in LOSSES])
    init = jax.jit(lambda seed: task.init(jax.random.fold_in(jax.random.key(seed), 0)))
    tuning: dict[str, dict[float, float]] = {}
    losses: dict[str, dict[str, list[float]]] = {loss: {} for loss in LOSSES}
    for name in optimizers:
        train = trainer(task, OPTIMIZERS[name])

        def run(seed: int, rate: float, train: Callable[..., Params] = train) -> list[float]:
            found = [float(x) for x in evaluate(train(init(seed), seed, rate))]
            progress.update()
            return found

        tuned_as = ADAM if name == ADAM else REFERENCE
        if name == tuned_as:
            tuning[name] = {rate: run(TUNING_SEED, rate)[0] for rate in rates}
        rate = min(rates, key=lambda rate, of=tuning[tuned_as]: np.nan_to_num(of[rate], nan=np.inf))
        of_seeds = [run(seed, rate) for seed in SEEDS[: task.seeds]]
        for loss, values in zip(LOSSES, zip(*of_seeds, strict=True), strict=True):
            losses[loss][name] = list(values)
    return {
        "description": task.description,
        "steps": task.steps,
        "seeds": task.seeds,
        "b1": task.b1,
        "held_out_loss_by_peak_rate": tuning,
        **{loss: compare(values) | {"of_seeds": values} for loss, values in losses.items()},
    }


def compare(of_seeds: dict[str, list[float]]) -> dict[str, Any]:
    """Returns the means of the paired gaps to float32 state, and their standard errors."""
    reference = np.array(of_seeds[REFERENCE])
    gaps = {name: np.array(x) - reference for name, x in of_seeds.items() if name != REFERENCE}
    return {
        "float32_mean": reference.mean(),
        "float32_deviation": reference.std(ddof=1),
        "gap": {name: gap.mean() for name, gap in gaps.items()},
        "gap_error": {name: gap.std(ddof=1) / len(gap) ** 0.5 for name, gap in gaps.items()},
    }


def check_claim(tasks: dict[str, Any]) -> dict[str, Any]:
    """Returns the gap of 2-byte state in seed-to-seed deviations, and whether it is within one."""
    ratios = {
        loss: {
            name: task[loss]["gap"][CLAIMED] / task[loss]["float32_deviation"]
            for name, task in tasks.items()
        }
        for loss in LOSSES
    }
    within = [abs(ratio) <= 1 for by_task in ratios.values() for ratio in by_task.values()]
    return {"claim": CLAIM, "gap_in_deviations": ratios, "holds": all(within)}


def print_table(tasks: dict[str, Any], loss: str) -> None:
    """Prints one block per task, with one line per optimizer."""
    print(f"\nGap of the {loss.replace('_', ' ')} to {REFERENCE} state: mean +- standard error,")
    print(f"and the mean in seed-to-seed standard deviations of {REFERENCE}")
    for name, task in tasks.items():
        found = task[loss]
        deviation = found["float32_deviation"]
        print(f"\n{name}, {task['steps']} steps, {task['seeds']} seeds")
        print(f"  {REFERENCE:28} {found['float32_mean']:.6f}, deviation {deviation:.6f}")
        for optimizer, gap in found["gap"].items():
            error = found["gap_error"][optimizer]
            print(f"  {optimizer:28} {gap:+.6f} +- {error:.6f} {gap / deviation:+8.2f}")


def main() -> None:
    """Trains all runs, prints the tables, and writes the JSON and the figure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a few steps; writes no files")
    quick = parser.parse_args().quick
    optimizers = (REFERENCE, CLAIMED, NAIVE, ADAM) if quick else tuple(OPTIMIZERS)
    rates = PEAK_RATES[:1] if quick else PEAK_RATES
    chosen = {name: make() for name, make in TASKS.items()}
    chosen["digits classifier, b1 = 0.99"] = chosen["digits classifier"]._replace(b1=0.99)
    if quick:
        chosen = {name: task._replace(steps=10, seeds=2) for name, task in chosen.items()}
    runs = sum(len(optimizers) * task.seeds + 2 * len(rates) for task in chosen.values())
    tasks = {}
    with tqdm(total=runs, unit="run") as progress:
        for name, task in chosen.items():
            progress.set_description(name)
            tasks[name] = measure(task, optimizers, rates, progress)
    for loss in LOSSES:
        print_table(tasks, loss)
    if quick:
        return
    found = check_claim(tasks)
    print(f"\n{CLAIM}\nThis run {'confirms' if found['holds'] else 'does not confirm'} it.")
    about = reporting.provenance(
        "benchmarks.quality", dtype="float32", seeds=SEEDS, packages=["scikit-learn"]
    )
    about |= {"tuning_seed": TUNING_SEED, "text": text_fingerprint()}
    results = {"provenance": about, "tasks": tasks} | found
    reporting.write_json(reporting.RESULTS / "quality.json", results)
    quality_figure.draw(results)


if __name__ == "__main__":
    main()
