# %% [markdown]
# # Coming from PyTorch, Keras, MLX, Lucid or optax
#
# You have a model that trains with the Adamax of another framework, and you move to JAX. This
# notebook shows how to build the same optimizer in JAX and how to continue from its checkpoint.
#
# `optax_adamax.compat` has a module per framework. Its constructor has the arguments of the
# framework, in the same order and with the same defaults: `torch.optim.Adamax(params, lr=2e-3)`
# becomes `compat.torch.adamax(lr=2e-3)`. `load_state` converts the framework's optimizer state.
# Its argument `layout` is your function that converts weights, or a mapping of names to paths. The
# page "Moving from a framework" has the calls for PyTorch, Keras, MLX, Lucid and optax.
#
# `dump_state` is the inverse of each `load_state`. Below, a network is trained in PyTorch and saved
# in the middle of the run, and the run continues in JAX from the file. The notebook runs for one or
# two minutes on two CPU cores. PyTorch must be installed
# (`pip install -e '.[notebooks,peers,test]'`).

# %%
import copy
import io
import json
import os
import platform
from importlib.metadata import version
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import torch
from sklearn.datasets import load_digits
from tqdm import tqdm

from optax_adamax.compat import torch as compat_torch

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_enable_x64", True)  # for the comparison in float64 below
torch.manual_seed(0)

FOLDER = Path(globals().get("__file__", "coming_from.ipynb")).resolve().parent
STEPS, SAVED_AT, BATCH = 600, 300, 50
OPTIONS = {"lr": 0.01, "betas": (0.9, 0.999), "weight_decay": 1e-4}

digits = load_digits()
images = np.float32(digits.images / 16)
labels = np.int64(digits.target)
batches = np.random.default_rng(0).integers(0, len(images), (STEPS, BATCH))

# %% [markdown]
# ## The run in PyTorch
#
# The network has two convolutions, a mean over the image, a layer norm and a linear layer. The data
# are the handwritten digits of scikit-learn. After 300 steps, model and optimizer are saved to a
# file.


# %%
class TorchNet(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = torch.nn.Conv2d(1, 16, 3, padding=1)
        self.conv2 = torch.nn.Conv2d(16, 32, 3, stride=2, padding=1)
        self.norm = torch.nn.LayerNorm(32)
        self.linear = torch.nn.Linear(32, 10)

    def forward(self, x):
        x = torch.relu(self.conv1(x[:, None]))
        x = torch.relu(self.conv2(x)).mean((2, 3))
        return self.linear(self.norm(x))


def train_torch(model, optimizer, start, stop):
    """Trains for steps `start` to `stop` and returns their losses."""
    losses = []
    dtype = next(model.parameters()).dtype
    for batch in tqdm(batches[start:stop], "PyTorch"):
        logits = model(torch.from_numpy(images[batch]).to(dtype))
        loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels[batch]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return np.array(losses)


def restore_torch(checkpoint, dtype=torch.float32):
    """Returns the model and the optimizer of a checkpoint."""
    model = TorchNet().to(dtype)
    model.load_state_dict(checkpoint["model"])
    optimizer = torch.optim.Adamax(model.parameters(), **OPTIONS)
    optimizer.load_state_dict(copy.deepcopy(checkpoint["optimizer"]))
    return model, optimizer


model = TorchNet()
optimizer = torch.optim.Adamax(model.parameters(), **OPTIONS)
before_saving = train_torch(model, optimizer, 0, SAVED_AT)

file = io.BytesIO()  # instead of a file on disk
names = compat_torch.names_of(optimizer, model)
saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "names": names}
torch.save(saved, file)
file.seek(0)
checkpoint = torch.load(file)
print(f"step {SAVED_AT}: loss {before_saving[-20:].mean():.4f}")

# %% [markdown]
# ## The same network in JAX
#
# The same network in Flax needs two arguments, because some defaults differ: PyTorch's padding of a
# strided convolution is not `"SAME"`, and its layer norm has another epsilon.


# %%
class FlaxNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(16, (3, 3), padding=1, name="conv1")(x[..., None]))
        x = nn.relu(nn.Conv(32, (3, 3), strides=2, padding=1, name="conv2")(x)).mean((1, 2))
        return nn.Dense(10, name="linear")(nn.LayerNorm(epsilon=1e-5, name="norm")(x))


net = FlaxNet()


def cross_entropy(params, x, y):
    return optax.softmax_cross_entropy_with_integer_labels(net.apply(params, x), y).mean()


# %% [markdown]
# ## Continue in JAX
#
# `flax_names` returns the layout: for each PyTorch array, its path in Flax and the order of its
# axes. A state dict of a PyTorch optimizer contains numbers instead of names, so the names were
# saved, too.

# %%
template = net.init(jax.random.key(0), images[:1])
layout = compat_torch.flax_names(template)
for name, entry in layout.items():
    print(f"{name:13} -> {entry}")

# %%
tx = compat_torch.adamax(**OPTIONS)  # torch.optim.Adamax(model.parameters(), **OPTIONS)


def restore_jax(checkpoint, template):
    """Returns parameters and optimizer state of the PyTorch checkpoint."""
    params = compat_torch.load_params(checkpoint["model"], template, layout)
    names = checkpoint["names"]
    state = compat_torch.load_state(checkpoint["optimizer"], params, tx, layout, names=names)
    return params, state


@jax.jit
def train_step(params, state, x, y):
    loss, grads = jax.value_and_grad(cross_entropy)(params, x, y)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state, loss


def train_jax(params, state, start, stop):
    """Trains for steps `start` to `stop`; returns parameters, state and losses."""
    losses = []
    dtype = jax.tree.leaves(params)[0].dtype
    for batch in tqdm(batches[start:stop], "JAX"):
        x, y = jnp.asarray(images[batch], dtype), jnp.asarray(labels[batch])
        params, state, loss = train_step(params, state, x, y)
        losses.append(loss.item())
    return params, state, np.array(losses)


params, state = restore_jax(checkpoint, template)
print(f"the step count is {int(optax.tree.get(state, 'count'))}")
params, state, in_jax = train_jax(params, state, SAVED_AT, STEPS)

# %% [markdown]
# Two more runs are for comparison. In the first, PyTorch continues from its own checkpoint, which
# gives the expected result. In the second, each parameter of the checkpoint is changed by one ULP
# before. It shows how close two runs can be, because training amplifies rounding errors in every
# framework.

# %%
in_torch = train_torch(*restore_torch(checkpoint), SAVED_AT, STEPS)

perturbed = copy.deepcopy(checkpoint)
for name, array in perturbed["model"].items():
    perturbed["model"][name] = torch.nextafter(array, torch.tensor(torch.inf))
in_torch_perturbed = train_torch(*restore_torch(perturbed), SAVED_AT, STEPS)

# %% [markdown]
# In float64, rounding errors are negligible. A remaining difference would be a difference between
# the optimizers.

# %%
float64_template = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), template)
_, _, in_jax_64 = train_jax(*restore_jax(checkpoint, float64_template), SAVED_AT, STEPS)
in_torch_64 = train_torch(*restore_torch(checkpoint, torch.float64), SAVED_AT, STEPS)

differences = {
    "JAX, float32": np.abs(in_jax - in_torch),
    "PyTorch, perturbed, float32": np.abs(in_torch_perturbed - in_torch),
    "JAX, float64": np.abs(in_jax_64 - in_torch_64),
}
for name, difference in differences.items():
    print(f"{name:27} first step {difference[0]:.1e}, at most {difference.max():.1e}")
assert differences["JAX, float64"].max() < 1e-12
assert differences["JAX, float32"].max() < 1e-5

# %%
STYLE = {
    "PyTorch": {"color": "#D55E00", "linewidth": 2.5},
    "JAX": {"color": "#0072B2", "linewidth": 2.5},
    "PyTorch only": {"color": "#1C1F22", "linewidth": 1, "linestyle": (0, (1, 2))},
    "PyTorch, perturbed": {"color": "#8A949C", "linewidth": 1.5},
}
WINDOW = 10


def smooth(losses):
    """Returns means over WINDOW steps, and the last step of each window."""
    means = np.convolve(losses, np.full(WINDOW, 1 / WINDOW), "valid")
    return np.arange(WINDOW, len(losses) + 1), means


plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False})
fig, (top, bottom) = plt.subplots(
    2, 1, figsize=(9, 6.4), height_ratios=(5, 2), sharex=True, layout="constrained", dpi=110
)
steps, across = smooth(np.concatenate([before_saving, in_jax]))
_, without = smooth(np.concatenate([before_saving, in_torch]))
top.plot(steps[steps <= SAVED_AT], across[steps <= SAVED_AT], label="PyTorch", **STYLE["PyTorch"])
top.plot(
    steps[steps >= SAVED_AT],
    across[steps >= SAVED_AT],
    label="JAX, from its checkpoint",
    **STYLE["JAX"],
)
top.plot(steps, without, label="PyTorch only", **STYLE["PyTorch only"])
top.set(yscale="log", ylabel="training loss")
top.set_title("One training run, started in PyTorch and continued in JAX", loc="left")
top.legend(frameon=False)

after = np.arange(SAVED_AT + 1, STEPS + 1)
floor = np.finfo(np.float32).eps * 1e-3  # drawn for equal losses, because the axis is logarithmic
for name, key in (("PyTorch, perturbed", "PyTorch, perturbed, float32"), ("JAX", "JAX, float32")):
    label = "JAX" if name == "JAX" else "PyTorch, parameters changed by one ULP"
    drawn = np.maximum(differences[key], floor)
    bottom.plot(after, drawn, label=label, **STYLE[name] | {"linewidth": 1.2})
bottom.set(yscale="log", xlabel="step", xlim=(0, STEPS), ylabel="difference")
bottom.set_title("Difference of the loss from the run in PyTorch only", loc="left", size=11)
bottom.legend(frameon=False, loc="upper left")
for axes in (top, bottom):
    axes.axvline(SAVED_AT, color="#8A949C", linewidth=1, linestyle="--", zorder=0)
    axes.grid(axis="y", alpha=0.25)
top.annotate(
    "the checkpoint", (SAVED_AT, across.max()), (6, -4), textcoords="offset points", va="top"
)
caption = (
    f"float32, Adamax, batches of {BATCH}. Above: means of {WINDOW} steps. "
    f"Below: each step; equal losses are drawn at {floor:.0e}."
)
fig.supxlabel(caption, x=0.01, ha="left", size=10, color="#5B6770")
fig.savefig(FOLDER / "coming_from.png")

# %% [markdown]
# ## Back to PyTorch
#
# `dump_params` and `dump_state` use the same layout. From the end of the JAX run, PyTorch and JAX
# both train for twenty more steps.

# %%
arrays = compat_torch.dump_params(params, layout, to_array=torch.from_numpy)
back = compat_torch.dump_state(
    state,
    params,
    checkpoint["optimizer"]["param_groups"],
    layout,
    names=checkpoint["names"],
    to_array=torch.from_numpy,
)
end_in_torch = train_torch(*restore_torch({"model": arrays, "optimizer": back}), 0, 20)
_, _, end_in_jax = train_jax(params, state, 0, 20)
back_difference = np.abs(end_in_torch - end_in_jax).max()
print(f"the losses of twenty more steps differ by {back_difference:.1e} at most")
assert back_difference < 1e-5

# %% [markdown]
# ## Errors
#
# A missing or extra entry, a wrong shape or a step that is not a number raises an error that names
# the entry.

# %%
damaged = copy.deepcopy(checkpoint["optimizer"])
damaged["state"][2]["exp_inf"] = torch.ones(3)
try:
    compat_torch.load_state(damaged, params, tx, layout, names=checkpoint["names"])
except ValueError as error:
    print(error)

# %% [markdown]
# `coming_from.json` contains all numbers of this page, the machine and the versions.


# %%
def processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    found = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return found[0] if found else platform.machine()


PACKAGES = ("flax", "jax", "jaxlib", "numpy", "optax", "optax_adamax", "scikit-learn", "torch")
results = {
    "machine": f"{processor()}, {os.cpu_count()} cores",
    "versions": {"python": platform.python_version()} | {p: version(p) for p in PACKAGES},
    "steps": STEPS,
    "saved_at": SAVED_AT,
    "seed": 0,
    "options": OPTIONS,
    "loss_before_saving": round(float(before_saving[-20:].mean()), 6),
    "loss_at_the_end": {
        "JAX": round(float(in_jax[-20:].mean()), 6),
        "PyTorch": round(float(in_torch[-20:].mean()), 6),
    },
    "largest_difference_of_the_loss": {
        name: float(f"{difference.max():.1e}") for name, difference in differences.items()
    },
    "largest_difference_back_in_torch": float(f"{back_difference:.1e}"),
}
with open(FOLDER / "coming_from.json", "w") as file:
    file.write(json.dumps(results, indent=2) + "\n")
