"""`compat.optax` against the installed optax, step by step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peer_grid
import pytest
from peer_grid import Step, assert_same

from optax_adamax.compat import optax as compat_optax

OPTIONS = [
    ("adamax", {}),
    ("adamax", {"b1": 0.5, "b2": 0.9}),
    ("adamax", {"b1": 0.99, "b2": 1.0, "eps": 1e-3}),
    ("adamaxw", {}),
    ("adamaxw", {"weight_decay": 0.1, "mask": lambda p: {k: k > "o" for k in p}}),
]


def optax_run(tx, params, grads):
    """Runs optax, whose update needs standard dtype promotion."""
    params = jax.tree.map(jnp.asarray, params)
    steps = []
    with jax.numpy_dtype_promotion("standard"):
        state = tx.init(params)
        for g in grads:
            params, state = peer_grid.our_call(tx)(params, state, g)
            moments = optax.tree.get(state, "ScaleByAdamState")
            steps.append(jax.tree.map(np.asarray, Step(params, moments.mu, moments.nu)))
    return steps


def bias_fault(dtype, b1=0.9):
    """Returns the relative error of optax's 1 - b1**t, computed in float32."""
    t = np.arange(1, peer_grid.STEPS + 1)
    if dtype == np.float64:
        return np.zeros(len(t))
    power = np.asarray(jnp.power(np.float32(b1), t.astype(np.float32)), np.float64)
    return np.abs((1 - power) / (1 - b1**t) - 1)


@pytest.mark.parametrize(
    ("dtype", "named"), peer_grid.grid(OPTIONS, lambda named: " ".join([named[0], *named[1]]))
)
@pytest.mark.parametrize(
    "scheduled", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["rate", "schedule"]
)
def test_steps_equal_those_of_optax(dtype, scheduled, named):
    check_every_step(dtype, named, (lambda t: jnp.where(t < 20, 0.1, 0.01)) if scheduled else 0.1)


def check_every_step(dtype, named, learning_rate):
    # 2 ULPs per step in float32 and the error of optax's bias correction; at most 1.2 measured.
    name, options = named
    start, grads = peer_grid.parameters(dtype), peer_grid.gradients(dtype)
    with jax.enable_x64(dtype == np.float64):
        peer = optax_run(getattr(optax, name)(learning_rate, **options), start, grads)
        tx = getattr(compat_optax, name)(learning_rate, **options)
        run = peer_grid.our_run(tx, start, grads)
    fault = bias_fault(dtype, options.get("b1", 0.9))
    assert_same(start, run, peer, dtype, peer_fault=fault)


@pytest.mark.parametrize("name", ["adamax", "adamaxw"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_continued_from_optax_and_in_optax(dtype, name):
    params, grads = peer_grid.model_run(dtype)
    params, *grads = ({"Dense_0": tree["Dense_0"]} for tree in (params, *grads))
    half = peer_grid.STEPS // 2
    rate = lambda t: jnp.where(t < 30, 0.01, 0.001)  # noqa: E731
    with jax.enable_x64(dtype == np.float64), jax.numpy_dtype_promotion("standard"):
        theirs, tx = getattr(optax, name)(rate), getattr(compat_optax, name)(rate)
        start = jax.tree.map(jnp.asarray, params)
        whole, whole_state = peer_grid.train(theirs, start, theirs.init(start), grads)

        mine, state = peer_grid.train(theirs, start, theirs.init(start), grads[:half])
        state = compat_optax.load_state(state, mine, tx)
        mine, state = peer_grid.train(tx, mine, state, grads[half:])
        same_trees(mine, whole, dtype)
        dumped = compat_optax.dump_state(state, mine, theirs)
        assert jax.tree.structure(dumped) == jax.tree.structure(whole_state)
        same_trees(dumped, whole_state, dtype)

        mine, state = peer_grid.train(tx, start, tx.init(start), grads[:half])
        state = compat_optax.dump_state(state, mine, theirs)
        mine, state = peer_grid.train(theirs, mine, state, grads[half:])
        same_trees(mine, whole, dtype)
        same_trees(state, whole_state, dtype)


def same_trees(ours, theirs, dtype):
    ours, theirs = (dict(enumerate(jax.tree.leaves(x))) for x in (ours, theirs))
    peer_grid.assert_equal_trees(ours, theirs, dtype)


def test_other_state_of_optax_raises():
    params = {"w": jnp.ones(2)}
    tx = compat_optax.adamax(0.1)
    with pytest.raises(ValueError, match="must contain a ScaleByAdamState"):
        compat_optax.load_state(optax.sgd(0.1).init(params), params, tx)
    with pytest.raises(
        ValueError, match=r"for 'w' must have shape \(3,\), but its shape is \(2,\)"
    ):
        compat_optax.load_state(optax.adamax(0.1).init(params), {"w": jnp.ones(3)}, tx)
    with pytest.raises(ValueError, match=r"of the state, \['w'\], but it trains \['w', 'x'\]"):
        theirs = optax.adamax(0.1).init(params)
        compat_optax.load_state(theirs, {"w": jnp.ones(2), "x": jnp.ones(1)}, tx)
