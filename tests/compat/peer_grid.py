"""Gradients, runs and tolerances for the comparisons with the source frameworks.

A run is a list with one `Step` for each call of an optimizer.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

SHAPE = (3, 4)
STEPS = 50
KINDS = ("normal", "tiny", "huge", "decades", "fading", "sparse", "zeros", "spike")
# Without tiny and zero gradients: in float16 their eps is 0, so every framework divides 0 by 0.
IN_FLOAT16 = ("normal", "fading", "spike")


class Step(NamedTuple):
    """Parameters, first moment and infinity norm after a call: dicts of NumPy arrays."""

    p: dict[str, Any]
    m: dict[str, Any]
    v: dict[str, Any]


def label(value):
    return value.__name__ if isinstance(value, type) else str(value)


def grid(options, label=label):
    """Returns all options in float64, which shows every error, and in float32 (most are slow)."""
    few = (options[0], options[-1])
    return [
        pytest.param(
            dtype,
            o,
            marks=pytest.mark.slow if dtype is np.float32 and o not in few else (),
            id=f"{dtype.__name__}-{label(o)}",
        )
        for dtype in (np.float32, np.float64)
        for o in options
    ]


def gradients(dtype, seed=0, kinds=KINDS):
    """Returns gradients of every kind: for each step, a dict from kind to array."""
    rng = np.random.default_rng(seed)
    draws = iter(rng.standard_t(3, (8, STEPS, *SHAPE)))
    made = {
        "normal": next(draws),
        "tiny": next(draws) * 1e-30,
        "huge": next(draws) * 1e30,
        "decades": next(draws) * 10.0 ** rng.uniform(-8, 8, SHAPE),
        "fading": next(draws) * 0.5 ** np.arange(STEPS)[:, None, None],
        "sparse": next(draws) * (rng.random((STEPS, *SHAPE)) < 0.05),
        "zeros": next(draws),
        "spike": next(draws),
    }
    made["zeros"][:10] = 0.0
    made["zeros"][:, 0] = 0.0
    made["spike"][7] *= 1e6 if dtype != np.float16 else 1e3
    return [{k: made[k][i].astype(dtype) for k in kinds} for i in range(STEPS)]


def parameters(dtype, seed=1, kinds=KINDS):
    """Returns parameters for `gradients`."""
    rng = np.random.default_rng(seed)
    return {kind: rng.standard_normal(SHAPE).astype(dtype) for kind in kinds}


@functools.cache
def our_call(tx):
    """Returns a compiled call from parameters, state and gradients to new parameters and state."""

    @jax.jit
    def call(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return call


def our_run(tx, params, grads):
    """Runs this package from the start."""
    call, params = our_call(tx), jax.tree.map(jnp.asarray, params)
    state = tx.init(params)
    steps = []
    for g in grads:
        params, state = call(params, state, g)
        steps.append(jax.tree.map(np.asarray, Step(params, *our_moments(state))))
    return steps


def our_moments(state):
    """Returns m and v of a state as two dicts, merged from all groups."""
    merged = ({}, {})
    for _, node in optax.tree.get_all_with_path(state, "ScaleByAdamaxState"):
        for tree, into in zip((node.m, node.v), merged, strict=True):
            into.update({k: x for k, x in tree.items() if not isinstance(x, optax.MaskedNode)})
    return merged


def our_step(tx, params, grads, moments, t):
    """Runs the t-th call of this package, from the moments of a source framework."""
    params = jax.tree.map(jnp.asarray, params)
    state = tx.init(params)
    like = optax.tree.get(state, "ScaleByAdamaxState")
    m, v = (
        jax.tree.map(lambda x, y: jnp.asarray(x, y.dtype), theirs, mine)
        for theirs, mine in ((moments.m, like.m), (moments.v, like.v))
    )
    state = optax.tree.set(state, m=m, v=v, count=jnp.asarray(t - 1, jnp.int32))
    params, state = our_call(tx)(params, state, grads)
    return jax.tree.map(np.asarray, Step(params, *our_moments(state)))


def errors(start, run, peer, dtype, *, peer_fault=0.0, m=None):
    """Returns the largest difference in ULPs per step, for each of "p", "m" and "v" and each kind.

    For p, the ULP is taken at the largest magnitude of p and of its steps so far. For m, it is
    taken at its largest magnitude, which decays by a tenth per step as m does. For v, it is taken
    at v.

    Args:
      start: the parameters before the first step.
      run: the steps of this package.
      peer: the steps of the source framework.
      dtype: defines the ULP.
      peer_fault: a known relative error of the source framework per step, not counted in p.
      m: the first moment before the first step, if it is not 0.
    """
    unit = float(jnp.finfo(dtype).eps)
    faults = np.broadcast_to(peer_fault, len(peer))
    worst = {}
    for kind in start:
        p = _wide(start[kind])
        m_scale = 0.0 if m is None else np.abs(_wide(m[kind]))
        p_scale, allowed = np.abs(p), 0.0
        for t, (ours, theirs) in enumerate(zip(run, peer, strict=True), 1):
            a = Step(*(_wide(x[kind]) for x in ours))
            b = Step(*(_wide(x[kind]) for x in theirs))
            p_scale = np.maximum(p_scale, np.maximum(np.abs(b.p), np.abs(b.p - p)))
            m_scale = np.maximum(np.abs(b.m), 0.9 * m_scale)
            allowed = allowed + faults[t - 1] * np.abs(b.p - p)
            p = b.p
            excess = {"p": np.abs(a.p - b.p) - allowed, "m": abs(a.m - b.m), "v": abs(a.v - b.v)}
            for name, scale in zip("pmv", (p_scale, m_scale, np.abs(b.v)), strict=True):
                error = excess[name] / np.where(excess[name] == 0, 1, unit * scale) / t
                worst[name, kind] = np.maximum(worst.get((name, kind), 0.0), np.max(error))
    return worst


def _wide(x):
    return np.asarray(x).astype(np.longdouble)


def assert_same(start, run, peer, dtype, *, ulps=2.0, **how):
    """Asserts equal parameters and moments: float64 to 1e-12, other dtypes to `ulps` per step."""
    if dtype == np.float64:
        ulps = 1e-12 / np.finfo(dtype).eps / len(peer)
    found = errors(start, run, peer, dtype, **how)
    wrong = {key: float(e) for key, e in found.items() if not e <= ulps}
    assert not wrong, f"ULPs per step, more than the allowed {ulps:g}: {wrong}"


# Shapes of the parameters of a model in Flax's layout.
MODEL = {
    "Dense_0": {"kernel": (3, 4), "bias": (4,)},
    "Conv_0": {"kernel": (3, 2, 2, 5), "bias": (5,)},
    "LayerNorm_0": {"scale": (5,), "bias": (5,)},
    "Embed_0": {"embedding": (7, 2)},
}


def model_run(dtype, seed=5):
    """Returns parameters of MODEL and gradients for STEPS steps."""
    rng = np.random.default_rng(seed)

    def draw():
        is_shape = lambda x: isinstance(x, tuple)  # noqa: E731
        return jax.tree.map(
            lambda shape: rng.standard_normal(shape).astype(dtype), MODEL, is_leaf=is_shape
        )

    return draw(), [draw() for _ in range(STEPS)]


def train(tx, params, state, grads):
    """Returns parameters and state after these calls of this package."""
    params = jax.tree.map(jnp.asarray, params)
    for g in grads:
        params, state = our_call(tx)(params, state, g)
    return params, state


def assert_equal_trees(ours, theirs, dtype, *, ulps=2.0):
    """Asserts equal dicts: float64 to 1e-12, else to `ulps` per step of the largest element."""
    assert ours.keys() == theirs.keys()
    limit = 1e-12 if dtype == np.float64 else ulps * STEPS * float(jnp.finfo(dtype).eps)
    for name, x in ours.items():
        x, y = _wide(x), _wide(theirs[name])
        np.testing.assert_allclose(x, y, rtol=0, atol=limit * np.abs(y).max(), err_msg=name)
