# %% [markdown]
# # Sharding: where the optimizer's state lives
#
# `optax_adamax.sharding` puts the state of any optax transformation where its parameters are,
# splits it further over the data-parallel devices (ZeRO-1), or keeps it in host memory. On 8 CPU
# devices, with a small network on the 1,797 real digits that ship with scikit-learn, you will see
#
# 1. where `jax.jit(tx.init)` leaves the state, and where `init_sharded` puts it;
# 2. ZeRO-1 before and after: each shard of each moment, and the bytes on each device;
# 3. the step: no communication but the gather of the updates, and the updates of one device;
# 4. the state in host memory, between the steps;
# 5. a run on 8 devices that goes on, from its checkpoint, on 4;
# 6. what it comes to for transformers of 8 and 70 billion parameters.
#
# It takes half a minute on two CPU cores. `python notebooks/sharding.py` does the same.

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
# Eight devices: four data-parallel groups of two, each of which holds the parameters once. The
# hidden layer is split over the two (`"model"`), biases and the last layer are whole on each.

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
    """The parameters as shapes with shardings."""
    return {
        name: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))
        for name, (shape, spec) in SHAPES.items()
    }


def parameters(mesh):
    """The same parameters on every mesh."""
    rng = np.random.default_rng(0)
    return {
        name: jax.device_put(
            rng.normal(size=p.shape).astype(p.dtype) / max(p.shape[0], 16) ** 0.5, p.sharding
        )
        for name, p in structs(mesh).items()
    }


params = parameters(mesh)
tx = optax_adamax.adamax(2e-3)

# %% [markdown]
# ## 1. Where the state is
#
# `tx.init` makes zeros, and zeros remember nothing of the parameters. Under `jax.jit` all of them
# are whole on one device:

# %%
naive = jax.jit(tx.init)(params)
beside = sharding.init_sharded(tx, params)
zero = sharding.init_sharded(tx, params, zero_axis="data")


def bytes_on_devices(tree):
    """Bytes of a tree on each of the 8 devices."""
    total = Counter({device.id: 0 for device in jax.devices()})
    for leaf in jax.tree.leaves(tree):
        for shard in leaf.addressable_shards:
            total[shard.device.id] += shard.data.nbytes
    return [total[device.id] for device in jax.devices()]


for name, state in (("jit(tx.init)", naive), ("init_sharded", beside), ("ZeRO-1", zero)):
    print(f"{name:13} bytes on each device: {bytes_on_devices(state)}")

# %% [markdown]
# `init_sharded` asks `state_shardings`, which asks `optax.tree.map_params` which leaves are like
# parameters: so it serves a whole chain, of any transformations. The rest, the step count, is on
# every device.

# %%
places = sharding.state_shardings(tx, params, zero_axis="data")
for path, place in jax.tree_util.tree_leaves_with_path(places):
    print(f"{jax.tree_util.keystr(path):12} {place.spec}")

# %% [markdown]
# ## 2. ZeRO-1, before and after
#
# With `zero_axis="data"` each moment is split once more, over the four groups that would each have
# held the same, along its largest dimension that is still free. The numbers are the devices that
# hold a shard.

# %%
COLOURS = plt.get_cmap("tab10").colors


def draw(ax, array, title):
    """The shards of an array, each with the devices that hold it."""
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


cases = {"jit(tx.init)": naive, "like its parameter": beside, "ZeRO-1": zero}
fig = plt.figure(figsize=(9, 5.2), layout="constrained")
left, right = fig.subfigures(1, 2, width_ratios=[3, 2])
for row, (case, state) in zip(left.subplots(3, 4), cases.items(), strict=True):
    for ax, name in zip(row, ("w1", "w2", "w3", "b1"), strict=True):
        draw(ax, state[0].m[name], f"m[{name!r}]  {SHAPES[name][0]}")
    row[0].set_ylabel(case, fontsize=9)

low_bit = optax_adamax.adamax(2e-3, m_dtype="int8", v_dtype="uint8")
bars = {
    "jit(tx.init)": naive,
    "like its parameter": beside,
    "ZeRO-1": zero,
    "ZeRO-1, 2 bytes": sharding.init_sharded(low_bit, params, zero_axis="data"),
}
ax = right.subplots()
for offset, (case, state) in enumerate(bars.items()):
    ax.bar(np.arange(8) + (offset - 1.5) / 5, bytes_on_devices(state), width=0.2, label=case)
ax.set(yscale="log", xlabel="device", ylabel="bytes of state", xticks=range(8))
ax.legend(fontsize=8)
fig.savefig(FOLDER / "sharding.png", dpi=150)
plt.show()

# %% [markdown]
# A leaf without such a dimension stays as it is. The report says which, and how many bytes of it
# each device holds (`b3`, of 10 elements, stands here as an example):

# %%
odd = {**structs(mesh), "b3": jax.ShapeDtypeStruct((10,), jnp.float32, sharding=places[0].count)}
for leaf in sharding.unsplit_leaves(tx, odd, zero_axis="data"):
    print(leaf)

# %% [markdown]
# ## 3. The step
#
# Without ZeRO a jitted step keeps the state beside the parameters by itself. With ZeRO,
# `keep_sharded` says where the state stays and where the updates go. The optimizer adds nothing to
# the communication of the step but the gather of the updates.

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
    """256 digits, split over the data-parallel groups."""
    chosen = np.random.default_rng(step).integers(0, len(labels), 256)
    place = NamedSharding(mesh, P("data"))
    return jax.device_put((images[chosen], labels[chosen]), place)


def make_step(tx):
    @functools.partial(jax.jit, donate_argnums=1)
    def step(params, state, x, y):
        value, gradients = jax.value_and_grad(loss)(params, x, y)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value

    return step


def collectives(function, *arguments):
    """How often the compiled program communicates, by kind."""
    text = jax.jit(function).lower(*arguments).compile().as_text()
    return Counter(re.findall(r" (all-gather|all-reduce|reduce-scatter|all-to-all)\(", text))


kept = sharding.keep_sharded(tx, params, zero_axis="data")
where = jax.tree.map(lambda p: p.sharding, params)
gradients_alone = jax.jit(jax.value_and_grad(loss), out_shardings=(None, where))
first = batch(0, mesh)
print("gradients alone   ", dict(collectives(gradients_alone, params, *first)))
print("a step            ", dict(collectives(make_step(tx), params, beside, *first)))
print("a step with ZeRO-1", dict(collectives(make_step(kept), params, zero, *first)))

# %% [markdown]
# The arithmetic is elementwise, so the same gradients give the same moments, however they are
# split. (They may differ in their last bit: XLA on CPU contracts `b1 * m + (1 - b1) * g` to one
# fused multiply-add in some programs, and in others not.)

# %%
gradients = [jax.grad(loss)(params, *batch(t, mesh)) for t in range(5)]
alone = jax.tree.map(np.asarray, gradients)
states = {"1 device": tx.init(params), "8 devices": beside, "8 devices, ZeRO-1": zero}
for t in range(5):
    states["1 device"] = jax.jit(tx.update)(alone[t], states["1 device"])[1]
    states["8 devices"] = jax.jit(tx.update)(gradients[t], states["8 devices"])[1]
    states["8 devices, ZeRO-1"] = jax.jit(kept.update)(gradients[t], states["8 devices, ZeRO-1"])[1]
reference = jax.tree.leaves(states["1 device"])
for name, state in states.items():
    leaves = zip(jax.tree.leaves(state), reference, strict=True)
    apart = max(np.abs(np.asarray(a) - np.asarray(b)).max() for a, b in leaves)
    print(f"{name:18} largest difference from the state of one device: {apart:.0e}")
    assert apart < 1e-8

# %% [markdown]
# ## 4. Host memory
#
# With `memory_kind="pinned_host"` the state rests in the memory of the host, and `keep_sharded`
# moves it to the devices and back within the step. The step donates it, or it would be there twice.


# %%
def train(tx, params, steps, **options):
    """Losses, parameters and state of a training run."""
    state = sharding.init_sharded(tx, params, **options)
    step = make_step(sharding.keep_sharded(tx, params, **options))
    losses = []
    for t in tqdm(range(steps)):
        params, state, value = step(params, state, *batch(t, params["w1"].sharding.mesh))
        losses.append(float(value))
    return losses, params, state


STEPS = 60
options = {"zero_axis": "data", "memory_kind": "pinned_host"}
losses, _, on_host = train(low_bit, params, STEPS, **options)
kinds = Counter(leaf.sharding.memory_kind for leaf in jax.tree.leaves(on_host))
print(f"loss {losses[0]:.3f} to {losses[-1]:.3f}; leaves of the state in {dict(kinds)}")
assert set(kinds) == {"pinned_host"} and losses[-1] < losses[0] / 5

# %% [markdown]
# ## 5. From 8 devices to 4
#
# `state_shardings` also says where a checkpoint is to be restored to. Half of the devices, another
# mesh, no ZeRO: the run goes on.

# %%
losses, params_8, state_8 = train(tx, params, STEPS, zero_axis="data")
fewer = jax.make_mesh((2, 2), ("data", "model"), (AxisType.Auto,) * 2, devices=jax.devices()[:4])
places_4 = sharding.state_shardings(tx, structs(fewer))
target = {
    "params": structs(fewer),
    "state": jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), state_8, places_4
    ),
}
with tempfile.TemporaryDirectory() as folder, ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(Path(folder) / "step", {"params": params_8, "state": state_8})
    checkpointer.wait_until_finished()
    restored = checkpointer.restore(Path(folder) / "step", target)

params_4, state_4 = restored["params"], restored["state"]
step_8, step_4 = make_step(kept), make_step(tx)
for t in range(STEPS, STEPS + 5):
    params_8, state_8, on_8 = step_8(params_8, state_8, *batch(t, mesh))
    params_4, state_4, on_4 = step_4(params_4, state_4, *batch(t, fewer))
    print(f"step {t}: loss {on_8:.6f} on 8 devices, {on_4:.6f} on 4")
    assert abs(float(on_8) - float(on_4)) < 1e-5

# %% [markdown]
# ## 6. At scale
#
# Nothing needs to be allocated to ask: shapes on an abstract mesh are enough. This is one layer of
# a transformer of 70 billion parameters on 512 devices, 64 data-parallel groups of 8.
# `python -m benchmarks.state_bytes` computes the whole model, and others.

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
plain = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), layer)
for name, transformation in (("8 bytes", tx), ("2 bytes", low_bit)):
    state = jax.eval_shape(transformation.init, plain)
    for zero_axis in (None, "data"):
        places = sharding.state_shardings(transformation, layer, zero_axis=zero_axis)
        shards = jax.tree.map(
            lambda x, s: int(np.prod(s.shard_shape(x.shape))) * x.dtype.itemsize, state, places
        )
        total = sum(jax.tree.leaves(shards))
        print(f"{name} a parameter, zero_axis={zero_axis!r}: {total / 1e6:8.2f} MB a device")
