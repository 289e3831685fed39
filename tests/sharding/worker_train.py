"""Trains in one or more processes on given gradients; see `test_processes.py`.

Usage: worker_train.py CONFIG INDEX, with CONFIG in JSON.
"""

import json
import pickle
import sys
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import optax_adamax
from optax_adamax import sharding
from sharding.common import (
    AUTO,
    EXACT_PRODUCTS,
    FORMATS,
    OPTIONS,
    mesh_of,
    random_like,
    step_of,
    structs,
)

STEPS = 5


def connect(config, index):
    """Configures JAX and connects this process to the others, each with its own CPU devices."""
    jax.config.update("jax_num_cpu_devices", config["devices"])
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_numpy_rank_promotion", "raise")
    if config["processes"] > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(
            f"127.0.0.1:{config['port']}", config["processes"], index, initialization_timeout=60
        )


def gathered(tree):
    """Returns NumPy arrays of a tree of arrays that span processes."""
    return jax.tree.map(np.asarray, multihost_utils.process_allgather(tree, tiled=True))


def transformation(name, config):
    usual = {"learning_rate": 1e-2}
    hyperparameters = EXACT_PRODUCTS if config["exact_products"] else usual
    return optax_adamax.adamaxw(**hyperparameters, weight_decay=2.0**-6, **FORMATS[name])


def train(name, options, config):
    """Returns the updates of all steps, and the last parameters and state."""
    mesh = mesh_of((AUTO, AUTO), config["mesh"])
    shapes = {name: structs(mesh)[name] for name in config["parameters"]}
    if name == "float32":
        place = NamedSharding(mesh, P(None, "model"))
        shapes["complex"] = jax.ShapeDtypeStruct((8, 6), np.complex64, sharding=place)
    params = random_like(shapes, 99)
    tx = sharding.shard(transformation(name, config), params, **OPTIONS[options])
    state = tx.init(params)

    step, history = step_of(tx), []
    for t in range(STEPS):
        params, state, updates = step(params, state, random_like(params, t))
        history.append(updates)
    return history, params, state


def main(config, index):
    connect(config, index)
    assert len(jax.local_devices()) == config["devices"]
    assert len(jax.devices()) == config["devices"] * config["processes"]
    for name, options in config["runs"]:
        history, params, state = train(name, options, config)
        if "checkpoint" in config:
            save(Path(config["checkpoint"]) / name, {"params": params, "state": state})
        result = gathered((history, params, state))
        if index == 0:
            (Path(config["out"]) / f"{name}.pickle").write_bytes(pickle.dumps(result))
    if config["processes"] > 1:
        jax.distributed.shutdown()


def save(path, tree):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, tree)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), int(sys.argv[2]))
