"""The state and the hyperparameters can be reached, set, saved and restored through wrappers."""

import pickle

import flax.serialization
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
    composed,
    moments,
    run,
)

import optax_adamax
from tests.oracle import reference


def test_masked_leaves_have_no_state_and_pass_through():
    tx = optax.masked(optax_adamax.scale_by_adamax(), WEIGHTS)
    updates, state = tx.update(GRADIENTS[0], tx.init(PARAMS))
    assert isinstance(state.inner_state.m["b"], optax.MaskedNode)
    assert isinstance(state.inner_state.v["b"], optax.MaskedNode)
    np.testing.assert_array_equal(updates["b"], GRADIENTS[0]["b"])


@pytest.mark.parametrize("name", ["adamax", "adamaxw", "scale_by_adamax"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_hyperparameters_raise(name, dtype):
    """inject_hyperparams casts them to the dtype of the parameters, which rounds 0.999 to 1."""
    rate = {} if name == "scale_by_adamax" else {"learning_rate": RATE}
    tx = optax.inject_hyperparams(getattr(optax_adamax, name))(**rate)
    with pytest.raises(TypeError, match=r"hyperparam_dtype=jnp\.float32"):
        tx.init(jnp.zeros(3, dtype))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_v_decays_with_injected_hyperparameters(dtype):
    tx = optax.inject_hyperparams(optax_adamax.adamax, hyperparam_dtype=jnp.float32)(RATE)
    params = jnp.zeros(1, dtype)
    gradients = np.full((2001, 1), 1e-6, dtype)
    gradients[0] = 1

    def step(state, gradient):
        return tx.update(gradient, state, params)[1], None

    with jax.numpy_dtype_promotion("standard"):
        state, _ = jax.lax.scan(step, tx.init(params), gradients)
    _, expected = reference.run(np.asarray(gradients, np.float64))
    np.testing.assert_allclose(expected.v, 0.135, rtol=2e-3)
    np.testing.assert_allclose(optax.tree.get(state, "v"), expected.v, rtol=2e-4)


def test_injected_hyperparameters_can_be_set_during_a_run():
    tx = optax.inject_hyperparams(optax_adamax.scale_by_adamax)()
    g = np.random.default_rng(0).normal(size=(8, 5)).astype(np.float32)
    params, update = np.zeros(5, np.float32), jax.jit(tx.update)
    state, expected = tx.init(params), reference.start(5)
    for t, gradient in enumerate(g):
        b1, b2, eps = (0.9, 0.999, 1e-8) if t < 4 else (0.5, 0.7, 1e-2)
        state = optax.tree.set(state, b1=b1, b2=b2, eps=eps)
        updates, state = update(gradient, state, params)
        direction, expected = reference.step(gradient, expected, b1, b2, eps)
        np.testing.assert_allclose(updates, direction, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(optax.tree.get(state, "v"), expected.v, rtol=1e-6)


@pytest.mark.parametrize("name", ["adamax", "decay mask", "masked", "MultiSteps", "partition"])
def test_map_params_reaches_only_m_and_v(name):
    tx = COMPOSITIONS[name](optax_adamax)
    tx = getattr(tx, "gradient_transformation", lambda: tx)()
    state = tx.init(PARAMS)
    marked = optax.tree.map_params(tx, lambda x: "m or v", state, transform_non_params=type)
    for path, leaf in jax.tree_util.tree_leaves_with_path(marked):
        keys = {getattr(key, "name", None) for key in path}
        assert (leaf == "m or v") == bool(keys & {"m", "v", "acc_grads"}), path


def test_state_is_read_and_set_by_name():
    _, state = run(composed("inject_hyperparams"))
    assert int(optax.tree.get(state, "ScaleByAdamaxState").count) == STEPS
    zero = optax.tree.set(state, m=jax.tree.map(jnp.zeros_like, PARAMS))
    assert all(not np.any(leaf) for leaf in moments(zero, "m"))
    jax.tree.map(np.testing.assert_array_equal, moments(zero, "v"), moments(state, "v"))


SERIALIZERS = {
    "state dict": lambda state, empty: flax.serialization.from_state_dict(
        empty, flax.serialization.to_state_dict(state)
    ),
    "bytes": lambda state, empty: flax.serialization.from_bytes(
        empty, flax.serialization.to_bytes(state)
    ),
    "pickle": lambda state, empty: pickle.loads(pickle.dumps(state)),
}


@pytest.mark.parametrize("serializer", SERIALIZERS)
@pytest.mark.parametrize("name", ["adamaxw", "schedule", "masked", "inject_hyperparams"])
def test_resumed_run_equals_an_uninterrupted_run(serializer, name):
    tx = composed(name)
    expected, last = run(tx)
    half, state = run(tx, gradients=GRADIENTS[:10])
    restored = SERIALIZERS[serializer](state, tx.init(PARAMS))
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    rest, resumed = run(tx, half[-1], GRADIENTS[10:], state=restored)
    jax.tree.map(np.testing.assert_array_equal, (rest[-1], resumed), (expected[-1], last))
    jax.tree.map(lambda x, y: np.testing.assert_equal(x.dtype, y.dtype), resumed, last)
