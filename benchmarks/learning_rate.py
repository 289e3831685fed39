"""Trains five tasks over a grid of learning rates, to compare how sensitive optimizers are to it.

  python -m benchmarks.learning_rate           prints the table, writes results/learning_rate.json
                                               and draws figures/learning_rate.png; about ten
                                               minutes on one CPU core
  python -m benchmarks.learning_rate --quick   runs a few steps of two tasks, as a smoke test

Each task is trained with its own gradients, and with heavy-tailed noise added to them. All runs of
a seed start from the same parameters and use the same batches and the same noise. The schedule is a
linear warm-up over a tenth of the steps, followed by a cosine decay to 0. The grid contains the
peak rates.
"""

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

import optax_adamax
from benchmarks import learning_rate_figure, reporting
from benchmarks.learning_rate_summary import print_table
from benchmarks.tasks import TASKS, Params, Task, text_fingerprint

SEEDS = (0, 1)
STEPS = {"character transformer": 150, "sparse embedding": 700}  # the others: 1,000
NOISES = {"own gradients": 0.0, "noise added": 1.0}  # relative to the rms of the leaf's gradient
ADAPTIVE_RATES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
SGD_RATES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)


Builder = Callable[[optax.Schedule, float], optax.GradientTransformation]


class Optimizer(NamedTuple):
    """Function that builds an optimizer from a schedule and b1, and its grid of peak rates."""

    build: Builder
    rates: Sequence[float] = ADAPTIVE_RATES


def sgd(schedule: optax.Schedule, b1: float) -> optax.GradientTransformation:
    """Builds SGD with momentum b1."""
    return optax.sgd(schedule, momentum=b1)


ADAMAX = "Adamax, float32"
OPTIMIZERS = {
    ADAMAX: Optimizer(optax_adamax.adamax),
    "Adamax, 2 bytes": Optimizer(partial(optax_adamax.adamax, m_dtype="int8", v_dtype="uint8")),
    "optax.adam": Optimizer(optax.adam),
    "optax.adamw": Optimizer(partial(optax.adamw, weight_decay=0.01)),
    "optax.sgd, momentum": Optimizer(sgd, SGD_RATES),
}


def student_t2(key: jax.Array, like: jax.Array) -> jax.Array:
    """Draws from Student's t distribution with two degrees of freedom, whose variance is infinite.

    Evaluates the quantile function at the midpoints of 2**23 equal intervals, so no number is
    larger than about 2,900.
    """
    p = jax.random.uniform(key, like.shape) + 2.0**-24
    return (2 * p - 1) * jax.lax.rsqrt(2 * p * (1 - p))


def with_noise(gradients: Params, key: jax.Array, scale: jax.Array) -> Params:
    """Adds noise of `scale` times the root mean square of each leaf's gradient."""
    keys = dict(zip(gradients, jax.random.split(key, len(gradients)), strict=True))
    return {
        name: g + scale * jnp.sqrt(jnp.mean(g**2)) * student_t2(keys[name], g)
        for name, g in gradients.items()
    }


def first_params(task: Task, seed: jax.Array) -> Params:
    """Returns the parameters from which all runs of a seed start."""
    return task.init(jax.random.fold_in(jax.random.key(seed), 0))


def trainer(task: Task, build: Builder) -> Callable[..., tuple[Params, jax.Array]]:
    """Returns a function of (noise scale, seeds, peak rates) that trains one run per pair.

    It returns the trained parameters and the largest |update| / learning rate of each run.
    """
    shape = optax.warmup_cosine_decay_schedule(0.0, 1.0, task.steps // 10, task.steps)

    def train(scale: jax.Array, seed: jax.Array, peak_rate: jax.Array) -> tuple[Params, jax.Array]:
        tx = build(lambda count: peak_rate * shape(count), task.b1)
        params, seed_key = first_params(task, seed), jax.random.fold_in(jax.random.key(seed), 1)

        def step(carry: tuple[Params, Any, jax.Array], t: jax.Array) -> tuple[Any, None]:
            params, state, largest = carry
            batch_key, noise_key = jax.random.split(jax.random.fold_in(seed_key, t))
            gradients = jax.grad(task.loss)(params, batch_key)
            noisy = partial(with_noise, key=noise_key, scale=scale)
            gradients = jax.lax.cond(scale > 0, noisy, lambda gradients: gradients, gradients)
            updates, state = tx.update(gradients, state, params)
            length = jnp.stack([jnp.abs(u).max() for u in jax.tree.leaves(updates)]).max()
            rate = peak_rate * shape(t)
            largest = jnp.maximum(largest, jnp.where(rate > 0, length / rate, 0.0))
            return (optax.apply_updates(params, updates), state, largest), None

        start = params, tx.init(params), jnp.float32(0)
        (params, _, largest), _ = jax.lax.scan(step, start, jnp.arange(task.steps))
        return params, largest

    # The inner vmap maps over rates only, so the batches and noise of a seed are drawn once.
    return jax.jit(jax.vmap(jax.vmap(train, (None, None, 0)), (None, 0, None)))


def measure(task: Task, optimizers: dict[str, Optimizer], progress: tqdm) -> dict[str, Any]:
    """Trains a task with every optimizer, rate and seed, without and with noise."""
    seeds = jnp.arange(task.seeds)
    evaluate = jax.jit(lambda params: jax.lax.map(task.held_out_loss, params))
    first = evaluate(jax.vmap(partial(first_params, task))(seeds))
    found: dict[str, Any] = {noise: {} for noise in NOISES}
    for name, optimizer in optimizers.items():
        train = trainer(task, optimizer.build)
        for noise, scale in NOISES.items():
            params, largest = train(scale, seeds, jnp.array(optimizer.rates))
            flat = jax.tree.map(lambda p: p.reshape(-1, *p.shape[2:]), params)
            losses = np.asarray(evaluate(flat), float).reshape(largest.shape)
            found[noise][name] = {
                "rates": list(optimizer.rates),
                "held_out_loss": losses.T.tolist(),  # by rate, then by seed
                "largest_update": np.asarray(largest, float).max(0).tolist(),
            }
            progress.update()
    return {
        "description": task.description,
        "steps": task.steps,
        "seeds": task.seeds,
        "b1": task.b1,
        "initial_loss": float(first.mean()),
        **found,
    }


def main() -> None:
    """Trains all runs, prints the table, and writes the JSON and the figure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a few steps; writes no files")
    quick = parser.parse_args().quick
    chosen = {name: make() for name, make in TASKS.items()}
    chosen["digits classifier, b1 = 0.99"] = chosen["digits classifier"]._replace(b1=0.99)
    for name, task in chosen.items():
        chosen[name] = task._replace(seeds=len(SEEDS), steps=STEPS.get(name, 1000))
    optimizers = OPTIMIZERS
    if quick:
        few = ("digits classifier", "sparse embedding")
        chosen = {name: chosen[name]._replace(seeds=1, steps=10) for name in few}
        optimizers = {name: Optimizer(x.build, x.rates[2:4]) for name, x in OPTIMIZERS.items()}
    tasks = {}
    with tqdm(total=len(chosen) * len(NOISES) * len(optimizers), unit="grid") as progress:
        for name, task in chosen.items():
            progress.set_description(name)
            tasks[name] = measure(task, optimizers, progress)
    print_table(tasks, NOISES)
    if quick:
        return
    about = reporting.provenance("benchmarks.learning_rate", seeds=SEEDS, packages=["scikit-learn"])
    about |= {"text": text_fingerprint()}
    results = {"provenance": about, "noises": NOISES, "tasks": tasks}
    reporting.write_json(reporting.RESULTS / "learning_rate.json", results)
    learning_rate_figure.draw(results)


if __name__ == "__main__":
    main()
