# pyright: reportUnnecessaryTypeIgnoreComment=true
"""A user's program with types: pyright checks it, and every built package must run it.

"pyright: ignore" marks a mistake that the types reject. pyright also reports an unnecessary mark.
"""

from typing import Any, assert_type, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_adamax
from optax_adamax import sharding
from optax_adamax.compat import keras as compat_keras
from optax_adamax.compat import lucid as compat_lucid
from optax_adamax.compat import mlx as compat_mlx
from optax_adamax.compat import optax as compat_optax
from optax_adamax.compat import torch as compat_torch

Params = dict[str, jax.Array]


def loss(params: Params, x: jax.Array) -> jax.Array:
    return jnp.mean(jnp.square(x @ params["w"] + params["b"]))


def train(tx: optax.GradientTransformationExtraArgs, params: Params, steps: int) -> Params:
    """Returns the parameters after some steps."""

    @jax.jit
    def step(params: Params, state: optax.OptState) -> tuple[Params, optax.OptState]:
        gradients = jax.grad(loss)(params, jnp.eye(4))
        updates, state = tx.update(gradients, state, params)
        return cast(Params, optax.apply_updates(params, updates)), state

    state = tx.init(params)
    for _ in range(steps):
        params, state = step(params, state)
    return params


def optimizers() -> list[optax.GradientTransformationExtraArgs]:
    schedule = optax.cosine_decay_schedule(1e-2, 100)
    plain = assert_type(
        optax_adamax.adamax(schedule, b1=0.9, m_dtype=jnp.bfloat16, v_dtype="uint8"),
        optax.GradientTransformationExtraArgs,
    )
    decayed = assert_type(
        optax_adamax.adamaxw(1e-2, weight_decay=1e-3, nonfinite="skip_step"),
        optax.GradientTransformationExtraArgs,
    )
    core = assert_type(
        optax_adamax.scale_by_adamax(m_dtype="int8", v_dtype="uint8", eps_placement="denominator"),
        optax.GradientTransformationExtraArgs,
    )
    chained = optax.chain(core, optax.scale_by_learning_rate(1e-2))
    return [
        plain,
        decayed,
        chained,
        optax_adamax.limit_spikes(plain, max_norm_ratio=5.0, action="clip"),
        optax_adamax.pack_small_leaves(plain, max_size=16),
        compat_torch.adamax(lr=1e-2, betas=(0.9, 0.999), groups=[{"params": "b$", "lr": 0.1}, {}]),
        compat_keras.adamax(1e-2, clipnorm=1.0),
        compat_mlx.adamax(learning_rate=1e-2),
        compat_lucid.adamax(lr=1e-2),
        compat_optax.adamax(1e-2),
    ]


def convert_states(params: Params) -> None:
    tx = optax_adamax.scale_by_adamax(m_dtype="int8", v_dtype="uint8")
    state = tx.init(params)
    assert isinstance(state, optax_adamax.ScaleByAdamaxState)
    assert_type(state.count, jax.Array)
    floats = assert_type(optax_adamax.decode_state(state), optax_adamax.ScaleByAdamaxState)
    assert_type(optax_adamax.encode_state(floats, "bfloat16"), optax_adamax.ScaleByAdamaxState)
    description = assert_type(
        optax_adamax.describe_state(floats, all_processes=True), optax_adamax.StateDescription
    )
    assert_type(description.fits, bool)
    assert_type(description.leaves[0].shape, tuple[int, ...])
    parameter, m, v = optax_adamax.adamax_step(1.0, 0.1, 0.0, 0.0, t=1)
    assert_type((parameter, m, v), tuple[jax.Array, jax.Array, jax.Array])


def move(params: Params) -> None:
    moments: dict[str, Any] = {"step": 3, "exp_avg": np.ones((4, 4)), "exp_inf": np.ones((4, 4))}
    bias = {"step": 3, "exp_avg": np.ones(4), "exp_inf": np.ones(4)}
    state_dict = {"state": {0: moments, 1: bias}, "param_groups": [{"params": [0, 1]}]}
    layout: dict[compat_torch.Key, compat_torch.Entry] = {
        "fc.weight": ("w", (1, 0)),
        "fc.bias": "b",
    }
    tx, names = compat_torch.adamax(), ["fc.weight", "fc.bias"]
    state = compat_torch.load_state(state_dict, params, tx, layout, names=names)
    groups: list[dict[str, Any]] = [{"params": [0, 1]}]
    back = compat_torch.dump_state(state, params, groups, layout, names=names)
    assert_type(back, dict[str, Any])
    assert back["state"][0]["step"] == 3


def shard(params: Params) -> None:
    mesh = jax.make_mesh((1,), ("data",))
    params = jax.device_put(params, jax.NamedSharding(mesh, jax.P()))
    tx = assert_type(
        sharding.shard(optax_adamax.adamax(1e-2), params, zero1_axis="data"),
        sharding.ShardedTransformation,
    )
    chained: optax.GradientTransformationExtraArgs = tx
    state = chained.init(params)
    params, state = jax.jit(tx.apply_gradients)(params, state, params)
    for leaf in tx.unsharded:
        assert_type(leaf.path, str)
        assert_type(leaf.bytes, int)


def compensate(params: Params) -> None:
    tx = assert_type(
        optax_adamax.compensate_rounding(optax_adamax.adamax(1e-3), "int16"),
        optax.GradientTransformationExtraArgs,
    )
    narrow = {name: x.astype(jnp.bfloat16) for name, x in params.items()}
    masters = assert_type(optax_adamax.master_params(tx.init(narrow), narrow), Params)
    assert masters["w"].dtype == jnp.float32


def mistakes() -> None:
    """Makes mistakes that both the types and the program reject."""
    calls = [
        lambda: optax_adamax.adamax("1e-3"),  # pyright: ignore[reportArgumentType]
        lambda: optax_adamax.adamax(1e-3, nonfinite="ignore"),  # pyright: ignore[reportArgumentType]
        lambda: optax_adamax.adamax(1e-3, eps_placement="sum"),  # pyright: ignore[reportArgumentType]
        lambda: optax_adamax.adamax(1e-3, 0.9, 0.999, 1e-8, "max"),  # pyright: ignore[reportCallIssue]
        lambda: compat_torch.adamax(betas=0.9),  # pyright: ignore[reportArgumentType]
    ]
    for call in calls:
        try:
            call()
        except (TypeError, ValueError):
            continue
        raise AssertionError("A mistake was not rejected.")


def main() -> None:
    params = {"w": jnp.ones((4, 4)), "b": jnp.ones(4)}
    for tx in optimizers():
        assert loss(train(tx, params, 3), jnp.eye(4)) < loss(params, jnp.eye(4))
    convert_states(params)
    move(params)
    shard(params)
    compensate(params)
    mistakes()
    print(f"optax_adamax {optax_adamax.__version__} with jax {jax.__version__}: works")


if __name__ == "__main__":
    main()
