"""Shared by the tests of quantized state: gradients, compiled runs, and v in float64."""

import functools
import os

import jax
import numpy as np

from optax_adamax import decode_state, scale_by_adamax

LONG = os.environ.get("OPTAX_ADAMAX_TEST_PROFILE") == "long"
STEPS = 100_000 if LONG else 3_000


def scan(gradients, state=None, b2_at=None, **rule):
    """Runs scale_by_adamax(**rule), with b2 = b2_at[t] if given.

    Returns the last state, and the updates and v of all steps in float64.
    """
    gradients = np.float32(gradients)
    start, run = _compiled(tuple(sorted(rule.items())), b2_at is not None)
    b2 = np.float32(np.zeros(len(gradients)) if b2_at is None else b2_at)
    state, outputs = run(start(gradients[0]) if state is None else state, (gradients, b2))
    return state, *(np.asarray(x, np.float64) for x in outputs)


@functools.cache
def _compiled(rule, traced_b2):
    def body(state, x):
        g, b2 = x
        tx = scale_by_adamax(**dict(rule), **({"b2": b2} if traced_b2 else {}))
        u, state = tx.update(g, state)
        return state, (u, decode_state(state).v)

    return scale_by_adamax(**dict(rule)).init, jax.jit(functools.partial(jax.lax.scan, body))


def exact_v(gradients, b2):
    """Returns v_t = max(b2_t v_{t-1}, |g_t|) of all steps in float64."""
    v, steps = np.zeros(gradients.shape[1:]), []
    for g, b in zip(
        np.abs(np.float64(gradients)), np.broadcast_to(b2, len(gradients)), strict=True
    ):
        v = np.maximum(np.float64(b) * v, g)
        steps.append(v)
    return np.array(steps)


def heavy_tails(steps, size=32, seed=0, decades=(-7, 1)):
    """Returns heavy-tailed gradients over many decades.

    A third of them are exact zeros, and a quarter of the elements is zero in the second half.
    """
    rng = np.random.default_rng(seed)
    g = rng.standard_t(2, (steps, size)) * 10.0 ** rng.uniform(*decades, size)
    g[rng.random(g.shape) < 1 / 3] = 0
    g[steps // 2 :, : size // 4] = 0
    return g.astype(np.float32)
