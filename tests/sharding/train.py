"""Runs the program of the guide "Sharding and ZeRO" for several hosts; see `test_processes.py`."""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from optax_adamax import adamax, sharding


def loss(params, x, y):
    return jnp.mean((x @ params["w"] + params["b"] - y) ** 2)


def train(steps):
    mesh = jax.make_mesh((jax.device_count(),), ("data",), (AxisType.Auto,))
    replicated, sharded = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
    init = jax.jit(lambda: {"w": jnp.zeros((8, 1)), "b": jnp.zeros(1)}, out_shardings=replicated)
    params = init()
    tx = sharding.shard(adamax(0.05, m_dtype="int8", v_dtype="uint8"), params, zero1_axis="data")
    state = tx.init(params)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, x, y):
        error, gradients = jax.value_and_grad(loss)(params, x, y)
        params, state = tx.apply_gradients(gradients, state, params)
        return params, state, error

    rng = np.random.default_rng(jax.process_index())  # each process reads its own data
    for _ in range(steps):
        x = rng.normal(size=(16, 8)).astype(np.float32)
        y = x.sum(axis=1, keepdims=True) + 1
        batch = [jax.make_array_from_process_local_data(sharded, part) for part in (x, y)]
        params, state, error = step(params, state, *batch)
    return error


if __name__ == "__main__":
    coordinator, processes, index = sys.argv[1:]
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(coordinator, int(processes), int(index))
    print(f"process {index} of {processes}: loss {train(100):.5f}")
