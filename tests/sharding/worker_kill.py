"""Trains with checkpoints in the background, and resumes from the last checkpoint.

It can be killed at any moment. It prints one line per event, with a digest of parameters and state:
`torn NAME OUTCOME`, `resumed STEP DIGEST`, `stepping` after the first step, `saving STEP DIGEST`,
`saved STEP`, `done STEP DIGEST`.
Usage: worker_kill.py FOLDER STEPS
"""

import hashlib
import itertools
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import optax_adamax
from optax_adamax import sharding
from sharding.common import AUTO, mesh_of

INTERVAL = 64  # steps from one checkpoint to the next
SIZES = (64, 256, 256, 8)
TX = optax_adamax.adamaxw(
    optax.cosine_decay_schedule(1e-2, 10_000), m_dtype="int8", v_dtype="uint8"
)


def say(*words):
    print(*words, flush=True)


def digest(tree):
    """Returns a short hash of all bits of a tree."""
    total = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        total.update(np.asarray(leaf).tobytes())
    return total.hexdigest()[:16]


def shapes(mesh):
    place = NamedSharding(mesh, P())
    layers = itertools.pairwise(SIZES)
    return [jax.ShapeDtypeStruct(shape, np.float32, sharding=place) for shape in layers]


def first_parameters(mesh):
    rng = np.random.default_rng(0)
    return [
        jax.device_put(rng.normal(size=p.shape).astype(p.dtype) / p.shape[0] ** 0.5, p.sharding)
        for p in shapes(mesh)
    ]


def batch_of(step, mesh):
    """Returns the batch of a step, which is the same in a resumed run."""
    x = np.random.default_rng(step).normal(size=(256, SIZES[0])).astype(np.float32)
    return jax.device_put(x, NamedSharding(mesh, P("data")))


def loss(params, x):
    *hidden, last = params
    h = x
    for w in hidden:
        h = jnp.tanh(h @ w)
    return jnp.mean((h @ last - x[:, : SIZES[-1]]) ** 2)


def try_torn(folder, target):
    """Tries to restore unfinished checkpoints of a killed run, and prints each outcome."""
    for torn in sorted(folder.glob("*tmp*/default*")):
        try:
            with ocp.StandardCheckpointer() as checkpointer:
                tree = checkpointer.restore(torn, target)
        except Exception:  # Orbax raises `Exception` itself for a damaged chunk
            say("torn", torn.parent.name, "rejected")
        else:
            say("torn", torn.parent.name, digest(tree))


def main(folder, steps):
    jax.config.update("jax_num_cpu_devices", 2)
    # With a cache on disk, the step is compiled once for all runs of the worker.
    jax.config.update("jax_compilation_cache_dir", str(folder.parent / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    mesh = mesh_of((AUTO, AUTO), (2, 1))
    tx = sharding.shard(TX, shapes(mesh), zero1_axis="data")
    target = {"params": shapes(mesh), "state": tx.init(shapes(mesh))}
    try_torn(folder, target)
    options = ocp.CheckpointManagerOptions(max_to_keep=2, save_interval_steps=INTERVAL)
    with ocp.CheckpointManager(folder, options=options) as manager:
        now = manager.latest_step()
        if now is None:
            now, params = 0, first_parameters(mesh)
            tree = {"params": params, "state": tx.init(params)}
        else:
            tree = manager.restore(now, args=ocp.args.StandardRestore(target))
        start = now
        say("resumed", start, digest(tree))

        @jax.jit
        def step(tree, x):
            gradients = jax.grad(loss)(tree["params"], x)
            params, state = tx.apply_gradients(gradients, tree["state"], tree["params"])
            return {"params": params, "state": state}

        writing = None
        while now < steps:
            tree = jax.block_until_ready(step(tree, batch_of(now, mesh)))
            if now == start:
                say("stepping")
            now += 1
            if manager.should_save(now):
                say("saving", now, digest(tree))
                manager.save(now, args=ocp.args.StandardSave(tree))  # waits for the previous save
                if writing is not None:
                    say("saved", writing)
                writing = now
    say("done", now, digest(tree))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
