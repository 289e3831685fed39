"""Trains bfloat16 parameters with optax.adamax and with this package, and counts bytes.

    python -m benchmarks.readme_figure [--quick]

Trains two tasks of `benchmarks.tasks`, each with the peak learning rate that `benchmarks.quality`
found for float32 parameters. Losses are computed in float32 from the stored parameters. Gradients
have the dtype of the parameters. Bytes are computed from shapes and dtypes. Writes
results/readme_figure.json and figures/readme.png.
"""

import argparse
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from tqdm import tqdm

from benchmarks import reporting
from benchmarks.tasks import TASKS, Task
from optax_adamax import adamax, compensate_rounding

RATES = {"sparse embedding": 0.1, "digits classifier": 0.1}
SEEDS, WINDOW = (0, 1, 2), 50  # a point of a curve is the mean of WINDOW steps
SIZE = 1 << 20  # elements of the parameter whose bytes are counted
PARTS = ("weights", "gradients", "residual", "state")


class Way(NamedTuple):
    """One configuration: dtype of parameters and gradients, and an optimizer."""

    dtype: Any
    make: Callable[[Any], optax.GradientTransformation]


def two_bytes(rate: optax.ScalarOrSchedule) -> optax.GradientTransformation:
    return adamax(rate, m_dtype="int8", v_dtype="uint8")


def four_bytes(rate: optax.ScalarOrSchedule) -> optax.GradientTransformation:
    return adamax(rate, m_dtype="bfloat16", v_dtype="bfloat16")


FLOAT32, BFLOAT16 = "float32, optax.adamax", "bfloat16, optax.adamax"
OURS = "bfloat16, int8 residual, 2-byte state"
WAYS = {
    FLOAT32: Way(jnp.float32, optax.adamax),
    "float32, 4-byte state": Way(jnp.float32, four_bytes),
    "float32, 2-byte state": Way(jnp.float32, two_bytes),
    BFLOAT16: Way(jnp.bfloat16, optax.adamax),
    "bfloat16, int16 residual, float32 state": Way(
        jnp.bfloat16, lambda rate: compensate_rounding(adamax(rate), "int16")
    ),
    "bfloat16, int8 residual, 4-byte state": Way(
        jnp.bfloat16, lambda rate: compensate_rounding(four_bytes(rate))
    ),
    OURS: Way(jnp.bfloat16, lambda rate: compensate_rounding(two_bytes(rate))),
}
COLORS = {FLOAT32: "#5B6770", BFLOAT16: "#D55E00", OURS: "#0072B2"}


def bytes_of(way: Way) -> dict[str, float]:
    """Returns the bytes per parameter of each part, from shapes and dtypes."""
    params = jax.ShapeDtypeStruct((SIZE,), way.dtype)
    state = jax.eval_shape(way.make(1e-3).init, params)

    def count(tree: Any) -> int:
        return round(sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree)) / SIZE)

    residual = count(getattr(state, "residual", ()))
    weights = count(params)
    parts = weights, weights, residual, count(state) - residual
    return dict(zip(PARTS, parts, strict=True))


def train(task: Task, way: Way, rate: float) -> Callable[[jax.Array], tuple[jax.Array, jax.Array]]:
    """Returns a function of the seed to the loss of each step and the final held-out loss."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, task.steps // 10, task.steps)
    tx = way.make(schedule)

    def cast(tree: Any, dtype: Any) -> Any:
        return jax.tree.map(lambda x: x.astype(dtype), tree)

    @jax.jit
    def run(seed: jax.Array) -> tuple[jax.Array, jax.Array]:
        key = jax.random.key(seed)
        params = cast(task.init(jax.random.fold_in(key, 0)), way.dtype)

        def step(carry: Any, t: jax.Array) -> tuple[Any, jax.Array]:
            params, state = carry
            step_key = jax.random.fold_in(jax.random.fold_in(key, 1), t)
            loss, gradients = jax.value_and_grad(task.loss)(cast(params, jnp.float32), step_key)
            updates, state = tx.update(cast(gradients, way.dtype), state, params)
            return (optax.apply_updates(params, updates), state), loss

        (params, _), losses = jax.lax.scan(step, (params, tx.init(params)), jnp.arange(task.steps))
        return losses, task.held_out_loss(cast(params, jnp.float32))

    return run


def measure(task: Task, rate: float, window: int, bar: tqdm) -> dict[str, Any]:
    """Returns the losses of each configuration in the figure, one row per seed."""
    found = {}
    for name in COLORS:
        run = train(task, WAYS[name], rate)
        losses, held_out = zip(*(run(seed) for seed in SEEDS), strict=True)
        curves = np.asarray(losses)[:, : task.steps // window * window]
        curves = curves.reshape(len(SEEDS), -1, window).mean(-1)
        found[name] = {"loss": curves.tolist(), "held_out_loss": [float(x) for x in held_out]}
        bar.update()
    return {"peak_rate": rate, "steps": task.steps, "window": window, "ways": found}


def draw(results: dict[str, Any]) -> None:
    """Draws one panel of losses per task, and a panel with the bytes per parameter."""
    plt.rcParams.update(reporting.STYLE)
    size = {"figsize": (9.6, 3.5), "dpi": 130, "layout": "constrained"}
    count = len(results["tasks"])
    fig, (*panels, bars) = plt.subplots(1, 1 + count, width_ratios=[1.2] * count + [1], **size)
    for panel, (name, task) in zip(panels, results["tasks"].items(), strict=True):
        for way, color in list(COLORS.items())[::-1]:
            curves = np.array(task["ways"][way]["loss"])
            steps = task["window"] * (0.5 + np.arange(curves.shape[1]))
            line = "--" if way == FLOAT32 else "-"
            panel.plot(steps, curves.mean(0), line, color=color, lw=1.8)
            panel.fill_between(steps, curves.min(0), curves.max(0), color=color, alpha=0.2, lw=0)
        panel.set_title(f"{name}: training loss", loc="left", size=10)
        panel.set_xlabel("step")
        late = np.array([task["ways"][way]["loss"] for way in COLORS])[..., curves.shape[1] // 4 :]
        panel.set_ylim(0.995 * late.min(), 1.02 * late.max())
        if late.max() > 5 * late.min():
            panel.set_yscale("log")
            panel.set_ylim(0.7 * late.min(), 10 * late.max())
    left = np.zeros(len(COLORS))
    rows = [name.replace(", ", "\n") for name in COLORS]
    for part, alpha in zip(PARTS, (0.8, 0.6, 0.45, 0.3), strict=True):
        widths = [results["bytes"][name][part] for name in COLORS]
        bars.barh(rows, widths, left=left, color=list(COLORS.values()), alpha=alpha, height=0.6)
        for y, (x, width) in enumerate(zip(left, widths, strict=True)):
            if width:
                bars.text(x + width / 2, y, part[0], ha="center", va="center", size=9)
        left += widths
    for y, total in enumerate(left):
        bars.text(total + 0.3, y, f"{total:.0f}", va="center", weight="bold")
    bars.invert_yaxis()
    bars.set_xlim(0, 18)
    bars.set_title("bytes per parameter", loc="left", size=10)
    bars.tick_params(axis="y", length=0)
    fig.savefig(reporting.FIGURES / "readme.png")
    plt.close(fig)


def main() -> None:
    """Trains all runs, counts bytes, writes the JSON and draws the figure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a few steps; writes no files")
    quick = parser.parse_args().quick
    tasks = {}
    with tqdm(total=len(RATES) * len(COLORS)) as bar:
        for name, rate in RATES.items():
            task = TASKS[name]()
            task = task._replace(steps=20) if quick else task
            tasks[name] = measure(task, rate, 5 if quick else WINDOW, bar)
            for way, found in tasks[name]["ways"].items():
                tqdm.write(f"{name}, {way}: held out {np.mean(found['held_out_loss']):.4f}")
    results = {
        "provenance": reporting.provenance(
            "benchmarks.readme_figure", dtype="float32, bfloat16", seeds=SEEDS,
            packages=["scikit-learn"],
        ),
        "bytes": {name: bytes_of(way) for name, way in WAYS.items()},
        "tasks": tasks,
    }  # fmt: skip
    if not quick:
        reporting.write_json(reporting.RESULTS / "readme_figure.json", results)
        draw(results)


if __name__ == "__main__":
    main()
