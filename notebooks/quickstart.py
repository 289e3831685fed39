# %% [markdown]
# # Quickstart: a small convolutional network on handwritten digits
#
# `optax_adamax.adamax` trains a network on the 1,797 real digits that ship with scikit-learn. It is
# compared with `optax.adamax`, `optax.adam` and `optax.sgd` with momentum. You will see
#
# 1. a train step in plain JAX, jitted, with its state donated, and a learning-rate schedule;
# 2. how the peak learning rate of each optimizer is chosen on a validation set, with equal effort;
# 3. test accuracy over three seeds, and the loss curves;
# 4. a checkpoint that is saved during a run and resumed: the resumed run and an uninterrupted run
#    have equal bits.
#
# It runs for about a minute on two CPU cores. `python notebooks/quickstart.py` does the same; with
# `--write` it also writes the figure and `quickstart.json` in this folder.

# %%
import functools
import json
import os
import platform
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import orbax.checkpoint as ocp
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import tqdm

import optax_adamax

# A CPU is fast enough here, and repeats its results bit for bit. Another machine or number of
# threads can add numbers in another order.
jax.config.update("jax_platforms", "cpu")

STARTED = time.perf_counter()
FOLDER = Path(globals().get("__file__", "quickstart.ipynb")).resolve().parent
WRITE = "--write" in sys.argv

BATCH, EPOCHS = 50, 20
SEEDS, TUNING_SEEDS = (0, 1, 2), (100, 101, 102)
PEAK_RATES = (0.001, 0.003, 0.01, 0.03, 0.1)
OPTIMIZERS = {
    "optax_adamax.adamax": optax_adamax.adamax,
    "optax.adamax": optax.adamax,
    "optax.adam": optax.adam,
    "optax.sgd, momentum": functools.partial(optax.sgd, momentum=0.9),
}

# %% [markdown]
# ## The data
#
# The images have 8 x 8 pixels. 1,000 are for training, 297 for the choice of learning rates, and
# 500 for the test at the end. The fraction of each digit is the same in all three sets.

# %%
digits = load_digits()
images, labels = np.float32(digits.images[..., None] / 16), np.int32(digits.target)
split = functools.partial(train_test_split, random_state=0)
images, test_images, labels, test_labels = split(images, labels, test_size=500, stratify=labels)
images, valid_images, labels, valid_labels = split(images, labels, test_size=297, stratify=labels)
STEPS = EPOCHS * (len(images) // BATCH)
print(f"{len(images)} + {len(valid_images)} + {len(test_images)} images, {STEPS} steps per run")


def batches(seed: int) -> np.ndarray:
    """Returns the image indices of every step, (STEPS, BATCH), which depend only on the seed."""
    rng = np.random.default_rng(seed)
    return np.concatenate([rng.permutation(len(images)) for _ in range(EPOCHS)]).reshape(-1, BATCH)


# %% [markdown]
# ## The network
#
# The network has two convolutions, the second with stride 2, and a linear layer: 9,930 parameters.


# %%
def init_params(key: jax.Array) -> dict[str, jax.Array]:
    he_normal = jax.nn.initializers.he_normal()
    conv1, conv2, linear = jax.random.split(key, 3)
    return {
        "conv1": he_normal(conv1, (3, 3, 1, 16)),
        "conv1_bias": jnp.zeros(16),
        "conv2": he_normal(conv2, (3, 3, 16, 32)),
        "conv2_bias": jnp.zeros(32),
        "linear": he_normal(linear, (4 * 4 * 32, 10)),
        "linear_bias": jnp.zeros(10),
    }


def logits(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    for name, stride in (("conv1", 1), ("conv2", 2)):
        x = jax.lax.conv_general_dilated(
            x, params[name], (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        x = jax.nn.relu(x + params[f"{name}_bias"])
    return x.reshape(len(x), -1) @ params["linear"] + params["linear_bias"]


def cross_entropy(params: dict[str, jax.Array], x: jax.Array, y: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits(params, x), y).mean()


@jax.jit
def evaluate(
    params: dict[str, jax.Array], x: jax.Array, y: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns cross-entropy and accuracy."""
    return cross_entropy(params, x, y), (logits(params, x).argmax(-1) == y).mean()


# %% [markdown]
# ## The train step
#
# A step overwrites its `TrainState` (`donate_argnums`), so memory does not contain a second copy of
# parameters, m and v. The learning rate rises linearly over the first tenth of the steps, and then
# falls to zero along a cosine.


# %%
class TrainState(NamedTuple):
    step: jax.Array
    params: dict[str, jax.Array]
    opt_state: optax.OptState


def make_trainer(optimizer: str):
    """Returns a function that starts a run from a seed, and a train step for any peak rate."""
    shape = optax.warmup_cosine_decay_schedule(0.0, 1.0, STEPS // 10, STEPS)

    def init(seed: int) -> TrainState:
        params = init_params(jax.random.key(seed))
        return TrainState(
            jnp.zeros((), jnp.int32), params, OPTIMIZERS[optimizer](shape).init(params)
        )

    @functools.partial(jax.jit, donate_argnums=0)
    def train_step(state: TrainState, peak_rate: float, x: jax.Array, y: jax.Array):
        tx = OPTIMIZERS[optimizer](lambda step: peak_rate * shape(step))
        loss, grads = jax.value_and_grad(cross_entropy)(state.params, x, y)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return TrainState(state.step + 1, params, opt_state), loss

    return init, train_step


def train(train_step, state: TrainState, peak_rate: float, seed: int, stop: int = STEPS):
    """Trains from `state` to the step `stop`; returns the new state and the losses."""
    losses = []
    for batch in batches(seed)[int(state.step) : stop]:
        state, loss = train_step(state, peak_rate, images[batch], labels[batch])
        losses.append(loss)
    return state, np.array(losses)


# %% [markdown]
# ## Equal effort for every optimizer
#
# All optimizers use the same five peak rates, half a decade apart, and the same three seeds for
# each rate. The rate with the lowest mean cross-entropy on the validation set is chosen. The
# final runs use other seeds.

# %%
progress = functools.partial(tqdm, disable=None)  # no bar without a terminal
trainers = {optimizer: make_trainer(optimizer) for optimizer in OPTIMIZERS}
valid_loss, best_rate = {}, {}
for optimizer, (init, train_step) in trainers.items():
    for rate in progress(PEAK_RATES, f"tuning {optimizer}", leave=False):
        trained = [train(train_step, init(seed), rate, seed)[0].params for seed in TUNING_SEEDS]
        by_seed = [evaluate(params, valid_images, valid_labels)[0] for params in trained]
        valid_loss[optimizer, rate] = np.float64(by_seed)
    best = min(PEAK_RATES, key=lambda rate: valid_loss[optimizer, rate].mean())
    best_rate[optimizer] = best
    edge = ", at the edge of the grid" if best in (PEAK_RATES[0], PEAK_RATES[-1]) else ""
    loss = valid_loss[optimizer, best].mean()
    print(f"{optimizer:20} peak rate {best:g}{edge}: validation loss {loss:.4f}", flush=True)

# %% [markdown]
# ## Three seeds
#
# In float32 both implementations of Adamax compute the same updates, so their curves coincide.

# %%
final_state, loss_curves, accuracy = {}, {}, {}
for optimizer, rate in progress(best_rate.items(), "three seeds", leave=False):
    init, train_step = trainers[optimizer]
    runs = [train(train_step, init(seed), rate, seed) for seed in SEEDS]
    final_state[optimizer] = [state for state, _ in runs]
    loss_curves[optimizer] = np.array([losses.reshape(EPOCHS, -1).mean(1) for _, losses in runs])
    by_seed = [evaluate(state.params, test_images, test_labels)[1] for state, _ in runs]
    accuracy[optimizer] = np.float64(by_seed)

# %%
STYLE = {
    "optax_adamax.adamax": {"color": "#0072B2", "linewidth": 3.5},
    "optax.adamax": {"color": "#56C5FF", "linewidth": 1.6, "linestyle": (0, (3, 2))},
    "optax.adam": {"color": "#D55E00", "linewidth": 2},
    "optax.sgd, momentum": {"color": "#5B6770", "linewidth": 2},
}


def draw(axes: plt.Axes, x: np.ndarray, by_seed: np.ndarray, optimizer: str) -> None:
    """Draws the mean over the seeds as a line, and their range as a band."""
    label = f"{optimizer}: {accuracy[optimizer].mean():.1%}"
    axes.plot(x, by_seed.mean(0), label=label, **STYLE[optimizer])
    color = STYLE[optimizer]["color"]
    axes.fill_between(x, by_seed.min(0), by_seed.max(0), color=color, alpha=0.15, lw=0)


plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False})
fig, (left, right) = plt.subplots(
    1, 2, figsize=(11, 4.6), width_ratios=(4, 3), layout="constrained", dpi=110
)
for optimizer, best in best_rate.items():
    draw(left, np.arange(1, EPOCHS + 1), loss_curves[optimizer], optimizer)
    tuning = np.array([valid_loss[optimizer, rate] for rate in PEAK_RATES]).T
    draw(right, np.array(PEAK_RATES), tuning, optimizer)
    size, color = 5 + 2 * STYLE[optimizer]["linewidth"], STYLE[optimizer]["color"]
    right.plot(best, valid_loss[optimizer, best].mean(), "o", markersize=size, color=color)
left.set_title("Training loss", loc="left")
left.set(yscale="log", xlabel="epoch", xlim=(1, EPOCHS), xticks=(1, 5, 10, 15, 20))
left.legend(title="Optimizer, mean test accuracy", frameon=False, alignment="left")
right.set_title("Validation loss by peak rate (dot: chosen)", loc="left")
right.set(xscale="log", yscale="log", xlabel="peak learning rate")
right.set_xticks(PEAK_RATES, [f"{rate:g}" for rate in PEAK_RATES])
right.set_yticks((0.1, 0.2, 0.5), ("0.1", "0.2", "0.5"))
right.minorticks_off()
for axes in (left, right):
    axes.grid(axis="y", alpha=0.25)
caption = "Lines: mean of three seeds. Bands: from the lowest seed to the highest."
fig.supxlabel(caption, x=0.01, ha="left", size=10, color="#5B6770")
if WRITE:
    fig.savefig(FOLDER / "quickstart.png")

# %% [markdown]
# ## A checkpoint, resumed
#
# This run stops in the middle of an epoch and saves a checkpoint with Orbax. Then, as in a new
# process, all objects are created again, and the run continues from the checkpoint. At the end,
# parameters, m, v and the step count have the same bits as in the uninterrupted run above.

# %%
optimizer, seed, middle = "optax_adamax.adamax", SEEDS[0], STEPS // 2 + 7
with tempfile.TemporaryDirectory() as folder, ocp.StandardCheckpointer() as checkpointer:
    checkpoint = Path(folder).resolve() / f"step_{middle}"
    rate = best_rate[optimizer]
    init, train_step = trainers[optimizer]
    interrupted, _ = train(train_step, init(seed), rate, seed, stop=middle)
    checkpointer.save(checkpoint, interrupted)
    checkpointer.wait_until_finished()
    del init, train_step, interrupted

    init, train_step = make_trainer(optimizer)
    state = checkpointer.restore(checkpoint, jax.eval_shape(functools.partial(init, seed)))
    resumed, _ = train(train_step, state, rate, seed)

uninterrupted = final_state[optimizer][0]
assert jax.tree.structure(resumed) == jax.tree.structure(uninterrupted)
arrays = list(zip(jax.tree.leaves(resumed), jax.tree.leaves(uninterrupted), strict=True))
for array, other in arrays:
    assert np.asarray(array).tobytes() == np.asarray(other).tobytes()
print(f"resumed at step {middle} of {STEPS}; at the end all {len(arrays)} arrays have equal bits")

# %% [markdown]
# ## Results
#
# One test image is 0.2 %, so three seeds cannot rank optimizers that differ by half a percent or
# less. The training loss depends on the peak rate as much as on the optimizer. `quickstart.json`
# contains all results, the machine and the versions.


# %%
def processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def rounded(x: np.ndarray) -> float | list[float]:
    return np.round(np.float64(x), 6).tolist()


PACKAGES = ("jax", "jaxlib", "numpy", "optax", "optax_adamax", "orbax-checkpoint", "scikit-learn")
results = {
    "machine": f"{processor()}, {os.cpu_count()} cores",
    "versions": {"python": platform.python_version()} | {p: version(p) for p in PACKAGES},
    "dtype": "float32",
    "seeds": SEEDS,
    "tuning_seeds": TUNING_SEEDS,
    "images": {"train": len(images), "validation": len(valid_images), "test": len(test_images)},
    "steps": STEPS,
    "optimizers": {
        optimizer: {
            "peak_rate": rate,
            "validation_loss": {
                f"{r:g}": rounded(valid_loss[optimizer, r].mean()) for r in PEAK_RATES
            },
            "test_accuracy": rounded(accuracy[optimizer]),
            "test_accuracy_mean": rounded(accuracy[optimizer].mean()),
            "test_accuracy_deviation": rounded(accuracy[optimizer].std(ddof=1)),
            "last_training_loss": rounded(loss_curves[optimizer][:, -1]),
        }
        for optimizer, rate in best_rate.items()
    },
    "resumed_at_step": middle,
    "resumed_run_has_equal_bits": True,
    "seconds": round(time.perf_counter() - STARTED),
}
if WRITE:
    (FOLDER / "quickstart.json").write_text(json.dumps(results, indent=2) + "\n")

# %%
print(f"{'optimizer':20} {'peak rate':>9}  {'test accuracy':>15} {'last training loss':>19}")
for optimizer, rate in best_rate.items():
    percent, loss = 100 * accuracy[optimizer], loss_curves[optimizer][:, -1].mean()
    spread = percent.std(ddof=1)
    print(f"{optimizer:20} {rate:9g}  {percent.mean():6.2f} +- {spread:.2f} % {loss:19.1e}")
print("(means of three seeds, +- their standard deviation; losses are means of the last epoch)")
