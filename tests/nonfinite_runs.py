"""Shared by the tests of non-finite gradients: gradients with bad elements, and compiled runs."""

import functools

import jax
import numpy as np
import optax
import pytest

from optax_adamax import adamax, adamaxw
from tests.oracle.formats import SOME_FORMATS

every_policy = pytest.mark.parametrize("policy", ["zero", "skip_step"])
some_pairs = pytest.mark.parametrize(
    "policy, m_dtype, v_dtype",
    [
        ("zero", *SOME_FORMATS[1]),
        ("skip_step", *SOME_FORMATS[2]),
        *(pytest.param("zero", *x, marks=pytest.mark.slow) for x in SOME_FORMATS[::2]),
        *(pytest.param("skip_step", *x, marks=pytest.mark.slow) for x in SOME_FORMATS[:2]),
    ],
)

STEPS, BAD_STEPS = 24, (0, 3, 4, 11, 23)
PARAMS = {
    "a": np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4),
    "b": [None],
    "c": np.ones((), np.float32),
}
SCHEDULE = optax.exponential_decay(0.05, 5, 0.7)


def clean_gradients(seed=0):
    rng = np.random.default_rng(seed)
    return [
        jax.tree.map(lambda p: np.asarray(rng.standard_t(3, p.shape), np.float32), PARAMS)
        for _ in range(STEPS)
    ]


def spoiled(gradients):
    """Returns gradients with bad elements of all kinds in BAD_STEPS, and their places."""
    bad = [jax.tree.map(lambda g: np.zeros(g.shape, bool), g) for g in gradients]
    for i, t in enumerate(BAD_STEPS):
        bad[t]["a"][i % 3, 1] = True
    bad[4]["c"] = np.array(True)
    kinds = [np.float32(x) for x in (np.nan, np.inf, -np.inf)]
    return [
        jax.tree.map(lambda g, b, t=t: np.where(b, kinds[t % 3], g), g, b)
        for t, (g, b) in enumerate(zip(gradients, bad, strict=True))
    ], bad


@functools.cache
def compiled(tx):
    @jax.jit
    def step(params, state, g):
        updates, state = tx.update(g, state, params)
        return updates, optax.apply_updates(params, updates), state

    return step


def run(tx, gradients, params=PARAMS, state=None):
    """Returns the updates, parameters and states of all steps of a compiled run."""
    step = compiled(tx)
    state, steps = tx.init(params) if state is None else state, []
    for g in gradients:
        updates, params, state = step(params, state, g)
        steps.append((updates, params, state))
    return steps


@functools.cache
def adamax_with(policy):
    return adamax(0.1, nonfinite=policy)


def assert_same(tree, other):
    jax.tree.map(np.testing.assert_array_equal, tree, other)


@functools.cache
def adamaxw_of(m_dtype, v_dtype, **options):
    return adamaxw(SCHEDULE, weight_decay=0.1, m_dtype=m_dtype, v_dtype=v_dtype, **options)
