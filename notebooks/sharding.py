# %% [markdown]
# # Sharding the optimizer state
#
# `optax_adamax.sharding.shard` wraps any optax transformation and shards its state like the
# parameters, further over the data-parallel devices (ZeRO-1), or in host memory. On 8 CPU devices,
# with a small network on the 1,797 real digits that ship with scikit-learn, you will see
#
# 1. the shardings of a state from `jax.jit(adamax(...).init)`, and of a state from `shard`;
# 2. ZeRO-1: each shard of each moment, and the bytes on each device;
# 3. the step: one all-gather per parameter, and the same moments as on one device;
# 4. a state in host memory between the steps;
# 5. a run on 8 devices that continues from its checkpoint on 4;
# 6. the size of the state for one layer of a transformer with 70 billion parameters.
#
# It runs for half a minute on two CPU cores. `python notebooks/sharding.py` does the same.

# %%
import functools
import re
import tempfile
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from matplotlib.patches import Rectangle
from sklearn.datasets import load_digits
from tqdm import tqdm

import optax_adamax
from optax_adamax import sharding

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
FOLDER = Path(globals().get("__file__", "sharding.ipynb")).resolve().parent

# %% [markdown]
# The eight devices form four data-parallel groups of two. Each group stores the parameters once.
# The hidden layers and the first bias are sharded over the two devices of a group (`"model"`). The
# other parameters are replicated.

# %%
mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
SHAPES = {
    "w1": ((64, 256), P(None, "model")),
    "b1": ((256,), P("model")),
    "w2": ((256, 64), P("model", None)),
    "b2": ((64,), P()),
    "w3": ((64, 10), P()),
}


def structs(mesh):
    """Returns the parameters as shapes with shardings."""
    return {
        name: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))
        for name, (shape, spec) in SHAPES.items()
    }


def parameters(mesh):
    """Returns the same parameters for every mesh."""
    rng = np.random.default_rng(0)
    return {
        name: jax.device_put(
            rng.normal(size=p.shape).astype(p.dtype) / max(p.shape[0], 16) ** 0.5, p.sharding
        )
        for name, p in structs(mesh).items()
    }


params = parameters(mesh)
adamax = optax_adamax.adamax(2e-3)

# %% [markdown]
# ## 1. The shardings of a state
#
# `adamax.init` creates zeros, which do not depend on the parameters. Under `jax.jit` all of them
# are unsharded on one device. `shard` creates each array with its sharding:

# %%
like_parameters = sharding.shard(adamax, params)
zero1 = sharding.shard(adamax, params, zero1_axis="data")
states = {
    "jit(adamax.init)": jax.jit(adamax.init)(params),
    "like parameters": like_parameters.init(params),
    "ZeRO-1": zero1.init(params),
}


def bytes_on_devices(tree):
    """Returns the bytes of a tree on each of the 8 devices."""
    total = Counter({device.id: 0 for device in jax.devices()})
    for leaf in jax.tree.leaves(tree):
        for shard in leaf.addressable_shards:
            total[shard.device.id] += shard.data.nbytes
    return [total[device.id] for device in jax.devices()]


for name, state in states.items():
    print(f"{name:16} bytes on each device: {bytes_on_devices(state)}")

# %% [markdown]
# `shard` finds the leaves that belong to parameters with `optax.tree.map_params`, so it works for
# chains of any transformations. Other leaves, such as the step count, are replicated.

# %%
for path, place in jax.tree_util.tree_leaves_with_path(zero1.shardings):
    print(f"{jax.tree_util.keystr(path):12} {place.spec}")

# %% [markdown]
# ## 2. ZeRO-1
#
# Without ZeRO-1, each of the four groups stores the same moments. With `zero1_axis="data"`, each
# moment is sharded over the groups, along its largest unsharded dimension. The numbers in the
# figure are the devices that store a shard.

# %%
COLOURS = plt.get_cmap("tab10").colors


def draw(ax, array, title):
    """Draws the shards of an array, each with the devices that store it."""
    rows, columns = array.shape if array.ndim == 2 else (1, array.size)
    holders = {}
    for shard in array.addressable_shards:
        index = shard.index if array.ndim == 2 else (slice(None), *shard.index)
        corners = tuple(s.indices(n)[:2] for s, n in zip(index, (rows, columns), strict=True))
        holders.setdefault(corners, []).append(shard.device.id)
    for ((top, bottom), (left, right)), devices in holders.items():
        box = (left / columns, 1 - bottom / rows)
        width, height = (right - left) / columns, (bottom - top) / rows
        colour = COLOURS[devices[0]] if len(devices) == 1 else "0.85"
        ax.add_patch(Rectangle(box, width, height, facecolor=colour, edgecolor="white", lw=1.5))
        text = " ".join(map(str, sorted(devices)))
        rotation = 90 if width < 0.2 and len(devices) > 1 else 0
        centre = (box[0] + width / 2, box[1] + height / 2)
        ax.text(*centre, text, ha="center", va="center", fontsize=7, rotation=rotation)
    ax.set(xlim=(0, 1), ylim=(0, 1), xticks=[], yticks=[])
    ax.set_title(title, fontsize=8)


fig = plt.figure(figsize=(9, 5.2), layout="constrained")
left, right = fig.subfigures(1, 2, width_ratios=[3, 2])
for row, (case, state) in zip(left.subplots(3, 4), states.items(), strict=True):
    for ax, name in zip(row, ("w1", "w2", "w3", "b1"), strict=True):
        draw(ax, state[0].m[name], f"m[{name!r}]  {SHAPES[name][0]}")
    row[0].set_ylabel(case, fontsize=9)

low_bit = optax_adamax.adamax(2e-3, m_dtype="int8", v_dtype="uint8")
low_bit_zero1 = sharding.shard(low_bit, params, zero1_axis="data")
bars = {**states, "ZeRO-1, 2 bytes": low_bit_zero1.init(params)}
ax = right.subplots()
for offset, (case, state) in enumerate(bars.items()):
    ax.bar(np.arange(8) + (offset - 1.5) / 5, bytes_on_devices(state), width=0.2, label=case)
ax.set(yscale="log", xlabel="device", ylabel="bytes of state", xticks=range(8))
ax.legend(fontsize=8)
fig.savefig(FOLDER / "sharding.png", dpi=150)
plt.show()

# %% [markdown]
# A leaf without a divisible dimension is not sharded further. `unsharded` lists these leaves, their
# bytes on each device, and the reason (`b3`, of 10 elements, is an example):

# %%
replicated = NamedSharding(mesh, P())
odd = {**structs(mesh), "b3": jax.ShapeDtypeStruct((10,), jnp.float32, sharding=replicated)}
for leaf in sharding.shard(adamax, odd, zero1_axis="data").unsharded:
    print(leaf)

# %% [markdown]
# ## 3. The step
#
# `apply_gradients` returns the new parameters and the new state. The optimizer adds nothing to the
# communication of the step except ZeRO-1's all-gather, one for each parameter whose moments are
# sharded further: `w1`, `w2`, `w3` and `b2`.

# %%
digits = load_digits()
images = (digits.data / 16).astype(np.float32)
labels = digits.target.astype(np.int32)


def loss(params, x, y):
    hidden = jax.nn.relu(x @ params["w1"] + params["b1"])
    hidden = jax.nn.relu(hidden @ params["w2"] + params["b2"])
    logits = hidden @ params["w3"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def batch(step, mesh):
    """Returns 256 digits, sharded over the data-parallel groups."""
    chosen = np.random.default_rng(step).integers(0, len(labels), 256)
    place = NamedSharding(mesh, P("data"))
    return jax.device_put((images[chosen], labels[chosen]), place)


def make_step(tx):
    @functools.partial(jax.jit, donate_argnums=1)
    def step(params, state, x, y):
        value, gradients = jax.value_and_grad(loss)(params, x, y)
        params, state = tx.apply_gradients(gradients, state, params)
        return params, state, value

    return step


def collectives(function, *arguments):
    """Counts the collectives of the compiled program by kind."""
    text = jax.jit(function).lower(*arguments).compile().as_text()
    return Counter(re.findall(r" (all-gather|all-reduce|reduce-scatter|all-to-all)\(", text))


param_shardings = jax.tree.map(lambda p: p.sharding, params)
gradients_alone = jax.jit(jax.value_and_grad(loss), out_shardings=(None, param_shardings))
first = batch(0, mesh)
print("gradients alone   ", dict(collectives(gradients_alone, params, *first)))
for name, tx in (("like parameters", like_parameters), ("ZeRO-1", zero1)):
    found = collectives(make_step(tx), params, tx.init(params), *first)
    print(f"a step, {name:15}", dict(found))

# %% [markdown]
# The arithmetic is elementwise, so the same gradients give the same moments with every sharding.
# Only the last bit can differ: XLA on CPU contracts `b1 * m + (1 - b1) * g` to a fused multiply-add
# in some programs.

# %%
gradients = [jax.grad(loss)(params, *batch(t, mesh)) for t in range(5)]
alone = jax.tree.map(np.asarray, gradients)
reference, sharded, sharded_zero1 = (tx.init(params) for tx in (adamax, like_parameters, zero1))
for t in range(5):
    reference = jax.jit(adamax.update)(alone[t], reference)[1]
    sharded = jax.jit(like_parameters.update)(gradients[t], sharded)[1]
    sharded_zero1 = jax.jit(zero1.update)(gradients[t], sharded_zero1)[1]
reference = jax.tree.leaves(reference)
for name, state in (("like parameters", sharded), ("ZeRO-1", sharded_zero1)):
    leaves = zip(jax.tree.leaves(state), reference, strict=True)
    apart = max(np.abs(np.asarray(a) - np.asarray(b)).max() for a, b in leaves)
    print(f"{name:15} largest difference from the state of one device: {apart:.0e}")
    assert apart < 1e-8

# %% [markdown]
# ## 4. Host memory
#
# With `memory_kind="pinned_host"` the state is in host memory between the steps. Each step moves it
# to the devices and back. The step donates the state; without donation, two copies would exist.


# %%
def train(tx, params, steps, **options):
    """Returns losses, parameters and state of a training run."""
    tx = sharding.shard(tx, params, **options)
    state, step = tx.init(params), make_step(tx)
    losses = []
    for t in tqdm(range(steps)):
        params, state, value = step(params, state, *batch(t, params["w1"].sharding.mesh))
        losses.append(float(value))
    return losses, params, state


STEPS = 60
options = {"zero1_axis": "data", "memory_kind": "pinned_host"}
losses, _, on_host = train(low_bit, params, STEPS, **options)
kinds = Counter(leaf.sharding.memory_kind for leaf in jax.tree.leaves(on_host))
print(f"loss {losses[0]:.3f} to {losses[-1]:.3f}; leaves of the state in {dict(kinds)}")
assert set(kinds) == {"pinned_host"} and losses[-1] < losses[0] / 5

# %% [markdown]
# ## 5. From 8 devices to 4
#
# If its argument is a tree of shapes, `init` returns shapes with shardings, which are the target
# for restoring a checkpoint. The run continues on half of the devices, on another mesh, without
# ZeRO-1.

# %%
losses, params_8, state_8 = train(adamax, params, STEPS, zero1_axis="data")
fewer = jax.make_mesh((2, 2), ("data", "model"), (AxisType.Auto,) * 2, devices=jax.devices()[:4])
on_fewer = sharding.shard(adamax, structs(fewer))
target = {"params": structs(fewer), "state": on_fewer.init(structs(fewer))}
with tempfile.TemporaryDirectory() as folder, ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(Path(folder) / "step", {"params": params_8, "state": state_8})
    checkpointer.wait_until_finished()
    restored = checkpointer.restore(Path(folder) / "step", target)

params_4, state_4 = restored["params"], restored["state"]
step_8, step_4 = make_step(zero1), make_step(on_fewer)
for t in range(STEPS, STEPS + 5):
    params_8, state_8, on_8 = step_8(params_8, state_8, *batch(t, mesh))
    params_4, state_4, on_4 = step_4(params_4, state_4, *batch(t, fewer))
    print(f"step {t}: loss {on_8:.6f} on 8 devices, {on_4:.6f} on 4")
    assert abs(float(on_8) - float(on_4)) < 1e-5

# %% [markdown]
# ## 6. At scale
#
# Sizes can be computed from shapes on an abstract mesh, so nothing is allocated. The example is one
# layer of a transformer with 70 billion parameters on 512 devices, in 64 data-parallel groups of 8.
# `python -m benchmarks.state_bytes` computes the sizes for complete models.

# %%
large = AbstractMesh((64, 8), ("data", "model"))
layer = {
    "query": ((8192, 8192), P(None, "model")),
    "key": ((8192, 1024), P(None, "model")),
    "value": ((8192, 1024), P(None, "model")),
    "output": ((8192, 8192), P("model", None)),
    "gate": ((8192, 28672), P(None, "model")),
    "up": ((8192, 28672), P(None, "model")),
    "down": ((28672, 8192), P("model", None)),
}
layer = {
    name: jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(large, spec))
    for name, (shape, spec) in layer.items()
}
for name, transformation in (("8 bytes", adamax), ("2 bytes", low_bit)):
    for zero1_axis in (None, "data"):
        state = sharding.shard(transformation, layer, zero1_axis=zero1_axis).init(layer)
        total = sum(
            int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize
            for x in jax.tree.leaves(state)
        )
        print(f"{name} per parameter, {zero1_axis=}: {total / 1e6:8.2f} MB per device")
