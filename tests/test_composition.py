"""Compositions with optax train like the same compositions with optax's own Adamax."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import optax.tree
import pytest
from compositions import (
    COMPOSITIONS,
    GRADIENTS,
    PARAMS,
    RATE,
    STEPS,
    WEIGHTS,
    moments,
    run,
)

import optax_adamax
from tests.oracle import reference

SOME_NAN = [
    jax.tree.map(lambda g, t=t: g * np.float32(np.nan if t in (3, 4, 11) else 1), gradients)
    for t, gradients in enumerate(GRADIENTS)
]
PLATEAU = [{"value": jnp.float32(1.0)}] * STEPS


def assert_like_optax(compose, *, same_gradients=True, **arguments):
    """Checks that `compose(package)` trains equally with this package and with optax.

    For equal gradients, m and v are equal bit for bit. Updates differ by a few float32 ULP because
    of the bias correction, and parameters by the rounding of their sums.
    """
    with jax.numpy_dtype_promotion("standard"):
        found, state = run(compose(optax_adamax), **arguments)
        expected, optax_state = run(compose(optax), **arguments)
    assert len(found) == len(expected) == STEPS
    for step, (p, q) in enumerate(zip(found, expected, strict=True), start=1):
        for x, y in zip(jax.tree.leaves(p), jax.tree.leaves(q), strict=True):
            atol = step * 2**-23 * (8 * RATE + np.abs(y).max())
            np.testing.assert_allclose(x, y, rtol=0, atol=atol)
    start = arguments.get("params", PARAMS)
    assert max(jax.tree.leaves(jax.tree.map(lambda x, y: np.abs(x - y).max(), p, start))) > RATE
    for name, optax_name in (("m", "mu"), ("v", "nu")):
        pairs = list(zip(moments(state, name), moments(optax_state, optax_name), strict=True))
        assert pairs
        for x, y in pairs:
            np.testing.assert_allclose(x, y, rtol=0 if same_gradients else 1e-5)
    return state


# Other compositions also have these masks and more injected hyperparameters.
REPEATED = ("decay mask function", "add_decayed_weights", "inject_hyperparams")
REPEATED += ("inject_hyperparams adamaxw",)


@pytest.mark.parametrize(
    "name",
    [pytest.param(x, marks=pytest.mark.slow if x in REPEATED else ()) for x in COMPOSITIONS],
)
def test_composition_trains_like_optax(name):
    assert_like_optax(COMPOSITIONS[name])


def test_coupled_decay_trains_like_optax():
    decay = optax.add_decayed_weights(0.1, mask=WEIGHTS)
    assert_like_optax(lambda o: optax.chain(decay, o.adamax(RATE)), same_gradients=False)


def test_apply_if_finite_trains_like_optax():
    state = assert_like_optax(
        lambda o: optax.apply_if_finite(o.adamax(RATE), 5), gradients=SOME_NAN
    )
    assert int(state.total_notfinite) == 3 and int(optax.tree.get(state, "count")) == STEPS - 3


def test_reduce_on_plateau_trains_like_optax():
    state = assert_like_optax(
        lambda o: optax.chain(
            o.adamax(RATE), optax.contrib.reduce_on_plateau(factor=0.5, patience=5)
        ),
        extra=PLATEAU,
    )
    assert state[1].scale == 0.125


def test_lookahead_trains_like_optax():
    assert_like_optax(
        lambda o: optax.lookahead(o.adamax(RATE), sync_period=5, slow_step_size=0.5),
        params=optax.LookaheadParams.init_synced(PARAMS),
    )


def test_schedule_free_trains_like_optax():
    @functools.cache
    def compose(o):
        return optax.contrib.schedule_free(o.adamax(RATE, b1=0.0), RATE)

    state = assert_like_optax(compose)
    with jax.numpy_dtype_promotion("standard"):
        trajectory, optax_state = run(compose(optax))
        averages = [
            optax.contrib.schedule_free_eval_params(s, trajectory[-1]) for s in (state, optax_state)
        ]
    for x, y in zip(*map(jax.tree.leaves, averages), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)
        assert not np.allclose(x, trajectory[-1]["b" if x.ndim == 1 else "w"], atol=1e-3)


def complex_gradients(steps=STEPS):
    parts = np.random.default_rng(5).standard_t(2, (2, steps, 6)).astype(np.float32)
    return parts[0] + 1j * parts[1]


def test_split_complex_parameters_are_two_real_runs():
    """Eager runs are equal bit for bit; compiled runs can differ because XLA fuses operations."""
    z = complex_gradients()
    tx = optax_adamax.adamax(RATE)
    split = optax.contrib.split_real_and_imaginary(tx)
    with jax.numpy_dtype_promotion("standard"):
        found, state = run(split, z[0], z[1:], compiler=lambda f: f)
        parts = [run(tx, part[0], part[1:], compiler=lambda f: f)[0] for part in (z.real, z.imag)]
    for x, real, imag in zip(found, *parts, strict=True):
        np.testing.assert_array_equal(x.real, real)
        np.testing.assert_array_equal(x.imag, imag)
    assert {leaf.dtype for leaf in moments(state, "v")} == {np.dtype(np.float32)}


def test_complex_parameters_use_the_modulus_by_default():
    z = complex_gradients()
    trajectory, state = run(optax_adamax.adamax(RATE), z[0], z[1:])
    directions, expected = reference.run(z[1:])
    np.testing.assert_allclose(trajectory[-1], z[0] - RATE * directions.sum(0), rtol=1e-5)
    (v,) = moments(state, "v")
    assert v.dtype == np.float32
    np.testing.assert_allclose(v, expected.v, rtol=1e-6)
