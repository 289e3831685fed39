"""Shared by the tests of `limit_spikes`: gradients of a given norm, and compiled runs."""

import functools

import jax
import numpy as np
import optax
import pytest

from optax_adamax import limit_spikes

every_action = pytest.mark.parametrize("action", ["skip", "clip"])
PARAMS = {"a": np.ones(3, np.float32), "b": [np.ones((2, 2), np.float32), None]}
IDENTITY = optax.identity()


def gradient(norm, seed=0):
    """Returns float32 gradients of a given global norm."""
    rng = np.random.default_rng(seed)
    g = jax.tree.map(lambda p: rng.normal(size=p.shape), PARAMS)
    size = np.sqrt(sum(np.sum(x**2) for x in jax.tree.leaves(g)))
    return jax.tree.map(lambda x: np.asarray(x * norm / size, np.float32), g)


def norm_of(updates):
    return np.sqrt(sum(np.sum(np.float64(u) ** 2) for u in jax.tree.leaves(updates)))


def compiled(inner=IDENTITY, max_norm_ratio=5.0, *, max_norm=None, decay=0.99, action="skip"):
    return compiled_once(inner, max_norm_ratio, max_norm, decay, action)


@functools.cache
def compiled_once(inner, max_norm_ratio, max_norm, decay, action):
    tx = limit_spikes(inner, max_norm_ratio, max_norm=max_norm, decay=decay, action=action)
    return tx.init, jax.jit(tx.update)


def run(norms, max_norm_ratio=5.0, *, inner=IDENTITY, **options):
    """Returns whether each norm was counted as a spike, and the last state."""
    init, update = compiled(inner, max_norm_ratio, **options)
    state, spikes = init(PARAMS), []
    for t, norm in enumerate(norms):
        before = int(state.spike_count)
        updates, state = update(gradient(norm, t), state, PARAMS)
        spikes.append(int(state.spike_count) - before == 1)
        if spikes[-1] and options.get("action") != "clip":
            assert not any(np.any(u) for u in jax.tree.leaves(updates))
    return np.array(spikes), state
