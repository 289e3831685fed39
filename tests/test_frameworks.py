"""Training in Flax, Equinox and Haiku gives the same losses and parameters as optax's Adamax."""

import functools
import warnings

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_adamax

with warnings.catch_warnings():  # flax 0.12.0 accesses names that JAX 0.8.0 deprecates
    warnings.simplefilter("ignore", DeprecationWarning)
    from flax import linen, nnx
    from flax.training.train_state import TrainState

RATE = 0.05
STEPS = 15
INPUTS = np.random.default_rng(0).normal(size=(32, 3)).astype(np.float32)
KEY = jax.random.key(0)
TARGETS = np.sin(INPUTS.sum(1, keepdims=True))


def squared_error(predictions):
    return jnp.mean((predictions - TARGETS) ** 2)


@functools.cache
def linen_model():
    model = linen.Sequential([linen.Dense(8), linen.tanh, linen.Dense(1, use_bias=False)])
    return model, jax.jit(model.init)(KEY, INPUTS)


def train_linen(tx):
    """Trains with flax.linen and a TrainState; returns losses and parameters."""
    model, params = linen_model()
    state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)

    @jax.jit
    def step(state):
        loss, gradients = jax.value_and_grad(
            lambda params: squared_error(state.apply_fn(params, INPUTS))
        )(state.params)
        return state.apply_gradients(grads=gradients), loss

    losses = []
    for _ in range(STEPS):
        state, loss = step(state)
        losses.append(loss)
    assert int(state.step) == STEPS
    return losses, state.params


@nnx.jit
def nnx_model():
    rngs = nnx.Rngs(0)
    last = nnx.Linear(8, 1, use_bias=False, rngs=rngs)
    return nnx.Sequential(nnx.Linear(3, 8, rngs=rngs), nnx.tanh, last)


def train_nnx(tx):
    """Trains with flax.nnx, where Optimizer wraps each state array in a variable."""
    model = nnx_model()
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        loss, gradients = nnx.value_and_grad(lambda model: squared_error(model(INPUTS)))(model)
        optimizer.update(model, gradients)
        return loss

    losses = [step(model, optimizer) for _ in range(STEPS)]
    return losses, nnx.to_pure_dict(nnx.state(model, nnx.Param))


@functools.cache
def equinox_model():
    return eqx.filter_jit(eqx.nn.MLP)(
        3, 1, 8, 1, activation=jnp.tanh, use_final_bias=False, key=KEY
    )


def train_equinox(tx):
    """Trains an Equinox model with non-array leaves; their gradients and state are None."""
    model = equinox_model()
    arrays, rest = eqx.partition(model, eqx.is_inexact_array)
    assert any(callable(leaf) for leaf in jax.tree.leaves(rest))
    state = tx.init(arrays)

    @eqx.filter_jit
    def step(model, state):
        loss, gradients = eqx.filter_value_and_grad(
            lambda model: squared_error(jax.vmap(model)(INPUTS))
        )(model)
        updates, state = tx.update(gradients, state, eqx.filter(model, eqx.is_inexact_array))
        return eqx.apply_updates(model, updates), state, loss

    losses = []
    for _ in range(STEPS):
        model, state, loss = step(model, state)
        losses.append(loss)
    return losses, eqx.filter(model, eqx.is_inexact_array)


@functools.cache
def haiku_network():
    network = hk.without_apply_rng(
        hk.transform(lambda x: hk.nets.MLP([8, 1], activation=jnp.tanh, with_bias=False)(x))
    )
    return network, jax.jit(network.init)(KEY, INPUTS)


def train_haiku(tx):
    """Trains with dm-haiku."""
    network, params = haiku_network()
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        loss, gradients = jax.value_and_grad(
            lambda params: squared_error(network.apply(params, INPUTS))
        )(params)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, loss

    losses = []
    for _ in range(STEPS):
        params, state, loss = step(params, state)
        losses.append(loss)
    return losses, params


FRAMEWORKS = [train_linen, train_nnx, train_equinox, train_haiku]


@pytest.mark.parametrize(
    ("train", "constructor"),
    [
        (train_linen, "adamax"),
        (train_nnx, "adamax"),
        *(pytest.param(x, "adamax", marks=pytest.mark.slow) for x in (train_equinox, train_haiku)),
        *(pytest.param(train, "adamaxw", marks=pytest.mark.slow) for train in FRAMEWORKS),
    ],
)
def test_training_agrees_with_optax(train, constructor):
    decay = {"weight_decay": 0.1} if constructor == "adamaxw" else {}
    losses, params = train(getattr(optax_adamax, constructor)(RATE, **decay))
    with jax.numpy_dtype_promotion("standard"):  # optax needs it
        optax_losses, optax_params = train(getattr(optax, constructor)(RATE, **decay))
    assert losses[-1] < losses[0] / 2
    np.testing.assert_allclose(losses, optax_losses, rtol=1e-5)
    for x, y in zip(*map(jax.tree.leaves, (params, optax_params)), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=STEPS * 2**-23 * (8 * RATE + 1))
