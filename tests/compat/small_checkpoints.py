"""Small checkpoints of one layer, as the source frameworks write them."""

import jax.numpy as jnp
import numpy as np

from optax_adamax.compat import torch

PARAMS = {"fc": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}}
ORDER = ["fc.weight", "fc.bias"]
NAMES = {"fc.weight": ("fc/kernel", (1, 0)), "fc.bias": "fc/bias"}


def entry(*shape, step=5.0):
    x = np.linspace(-1, 1, int(np.prod(shape))).reshape(shape).astype(np.float32)
    return {"step": step, "exp_avg": 0.1 * x, "exp_inf": np.abs(x)}


def state_dict(**changes):
    """Returns PyTorch's state dict of two parameters; changes are for the first."""
    return {
        "state": {0: entry(3, 2) | changes, 1: entry(3)},
        "param_groups": [{"lr": 2e-3, "params": [0, 1]}],
    }


def mlx_state(**changes):
    """Returns the state of MLX's optimizer."""
    moments = {"m": np.ones((3, 2)), "v": np.ones((3, 2))}
    bias = {"m": np.ones(3), "v": np.ones(3)}
    return {"step": 5, "learning_rate": 0.1, "fc": {"weight": moments, "bias": bias}} | changes


def load_one_parameter(layout, m=None, v=None, shape=(2, 3), **options):
    """Returns the state of a weight, which was (3, 2) in PyTorch, moved by a layout."""
    m = np.ones((3, 2), "f4") if m is None else m
    state_dict = {
        "state": {0: {"step": 5.0, "exp_avg": m, "exp_inf": np.ones_like(m) if v is None else v}},
        "param_groups": [{"params": [0]}],
    }
    params, tx = {"w": jnp.zeros(shape)}, torch.adamax()
    return torch.load_state(state_dict, params, tx, layout, names=["w"], **options)
