"""Trains the recipes of docs/guide/deep_vaes.md for 3,000 steps with three seeds.

python -m benchmarks.deep_vaes [--quick]
"""

import argparse
import contextlib
import io
import re
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

from benchmarks import reporting
from benchmarks.update_docs import ROOT
from optax_adamax import compensate_rounding, limit_spikes

PAGE = ROOT / "docs" / "guide" / "deep_vaes.md"
SEEDS = (3, 4, 5)
STEPS, WINDOW = 3000, 50  # a point of a curve is the mean of WINDOW steps
OURS = "as on this page"
STYLES = {OURS: ("#0072B2", "-"), "nothing skipped": ("#D55E00", "-")}


def run_page() -> dict[str, Any]:
    """Runs the code of the page and returns the names it defines."""
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text("utf-8"), re.M | re.S)
    names: dict[str, Any] = {}
    with contextlib.redirect_stdout(io.StringIO()):
        exec(compile("\n".join(blocks), PAGE.name, "exec"), names)
    return names


def measure(recipe: dict[str, Any], steps: int, window: int) -> dict[str, Any]:
    """Returns the mean losses per window and seed, of each recipe and of its variants."""

    def start(seed: int) -> Any:
        return recipe["init"](jax.random.key(seed))

    def start_bfloat16(seed: int) -> Any:
        return jax.tree.map(lambda p: p.astype(jnp.bfloat16), start(seed))

    bad = steps // 3
    plain = optax.adamaxw(recipe["rate"], weight_decay=0.01)
    vdvae = {
        OURS: (recipe["vdvae"], start_bfloat16),
        "optax.adamaxw, float32": (
            compensate_rounding(limit_spikes(plain, max_norm=800.0)),
            start,
        ),
        "nothing skipped": (compensate_rounding(recipe["inner"]), start_bfloat16),
    }
    plain = optax.adamax(recipe["nvae_rate"](steps), eps=1e-3)
    nvae = {
        OURS: recipe["nvae"](steps),
        "optax.adamax, float32": optax.chain(optax.add_decayed_weights(3e-4), plain),
    }
    return {
        "window": window,
        "bad_batch": bad,
        "VDVAE": {
            name: [
                window_means(recipe["train_vdvae"](tx, of(seed), steps, bad), window)
                for seed in SEEDS
            ]
            for name, (tx, of) in vdvae.items()
        },
        "NVAE": {
            name: [
                window_means(recipe["train_nvae"](tx, start(seed), steps), window) for seed in SEEDS
            ]
            for name, tx in nvae.items()
        },
    }


def window_means(run: tuple[Any, jax.Array], window: int) -> list[float]:
    """Returns the mean loss of each window."""
    _, losses = run
    return [float(f"{x:.5g}") for x in np.asarray(losses).reshape(-1, window).mean(axis=1)]


def draw(results: dict[str, Any]) -> None:
    """Draws the mean loss over seeds and the range of the seeds, one panel per recipe."""
    plt.rcParams.update(reporting.STYLE)
    window = results["window"]
    fig, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained", dpi=110)
    for panel, recipe in zip(axes, ("VDVAE", "NVAE"), strict=True):
        for name, seeds in results[recipe].items():
            losses = np.array(seeds)
            steps = window * (np.arange(losses.shape[1]) + 0.5)
            color, style = STYLES.get(name, ("black", "--"))
            panel.fill_between(steps, losses.min(0), losses.max(0), color=color, alpha=0.2, lw=0)
            panel.plot(steps, losses.mean(0), style, color=color, label=name)
        panel.set(title=recipe, xlabel="step", yscale="log", ylim=(1, 100))
        panel.legend(frameon=False, loc="upper right")
    axes[0].axvline(results["bad_batch"], color="#B0B7BC", lw=1, zorder=0)
    axes[0].annotate("a bad batch", (results["bad_batch"], 1.1), (4, 0), textcoords="offset points")
    axes[0].set_ylabel("negative ELBO, nats per dimension")
    reporting.FIGURES.mkdir(parents=True, exist_ok=True)
    fig.savefig(reporting.FIGURES / "deep_vaes.png")
    plt.close(fig)


def main() -> None:
    """Trains all runs, prints the last losses, and writes the JSON and the figure."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    found = measure(run_page(), *((60, 10) if quick else (STEPS, WINDOW)))
    for recipe in ("VDVAE", "NVAE"):
        for name, seeds in found[recipe].items():
            print(f"{recipe}, {name}: last loss {np.mean([x[-1] for x in seeds]):.3f}")
    if quick:
        return
    about = reporting.provenance("benchmarks.deep_vaes", dtype="bfloat16", seeds=SEEDS)
    reporting.write_json(reporting.RESULTS / "deep_vaes.json", {"provenance": about} | found)
    draw(found)


if __name__ == "__main__":
    main()
