"""First and second derivatives of float32 runs agree with float64; quantized state rejects them."""

import functools

import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import optax
import pytest
from parameters import formats

from optax_adamax import adamax, scale_by_adamax
from tests.oracle import reference
from tests.oracle.formats import LOW_BIT

GRADIENTS = np.float64([[0.3, -1.0, 0.2], [0.5, 0.4, -0.7], [-0.2, 0.1, 0.9]])
WEIGHTS = np.float64([[1.0, 2.0, 3.0], [-1.0, 0.5, 2.0], [0.3, -2.0, 1.0]])


def loss(x, **rule):
    """Returns a weighted sum of three updates; x is b1, b2, eps and a factor of the gradients."""
    tx = scale_by_adamax(x[0], x[1], x[2], **rule)
    state, total = tx.init(np.zeros(3, np.float32)), jnp.float32(0)
    for g, weight in zip(np.float32(GRADIENTS), np.float32(WEIGHTS), strict=True):
        u, state = tx.update(jnp.sin(x[3] * g), state)
        total = total + jnp.vdot(weight, u)
    return total


def scanned_loss(x):
    """Returns the same sum, computed by `jax.lax.scan`."""
    tx = scale_by_adamax(x[0], x[1], x[2])

    def step(state, inputs):
        g, weight = inputs
        u, state = tx.update(jnp.sin(x[3] * g), state)
        return state, jnp.vdot(weight, u)

    inputs = np.float32(GRADIENTS), np.float32(WEIGHTS)
    return jnp.sum(jax.lax.scan(step, tx.init(np.zeros(3, np.float32)), inputs)[1])


def exact_loss(x, **rule):
    u, _ = reference.run(np.sin(x[3] * GRADIENTS), b1=x[0], b2=x[1], eps=x[2], **rule)
    return np.sum(WEIGHTS * u)


def differences(function, x, h):
    """Returns central differences of a function with outputs of any shape, a row per input."""
    steps = h * np.eye(len(x))
    return np.array([(function(x + d) - function(x - d)) / (2 * h) for d in steps])


RULES = [{}, {"eps_placement": "denominator"}, {"nesterov": True}, {"bias_correction": False}]


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_derivatives_agree_with_float64(rule):
    x = np.array([0.9, 0.8, 0.01, 1.1])
    gradient = jax.jit(jax.grad(lambda x: loss(x, **rule)))(np.float32(x))
    expected = differences(lambda x: exact_loss(x, **rule), x, 1e-6)
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-4)


HESSIANS = [jax.jit(jax.hessian(loss)), jax.jit(jax.hessian(scanned_loss))]


@pytest.mark.parametrize(
    ("b1", "hessian"),
    [
        pytest.param(0.5, HESSIANS[0], marks=pytest.mark.slow),
        (0.5, HESSIANS[1]),
        (0.0, HESSIANS[0]),
        (0.0, HESSIANS[1]),
    ],
    ids=["0.5-unrolled", "0.5-scan", "0.0-unrolled", "0.0-scan"],
)
def test_second_derivatives_agree_with_float64(b1, hessian):
    """b1 = 0 is included, because the derivative of b1^t contains 0^0 at t = 1."""
    x = np.array([b1, 0.8, 0.01, 1.1])
    hessian = hessian(np.float32(x))
    expected = differences(lambda x: differences(exact_loss, x, 1e-4), x, 1e-4)
    np.testing.assert_allclose(hessian, expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("m_dtype, v_dtype", LOW_BIT)
def test_derivatives_through_quantized_state_raise(m_dtype, v_dtype):
    x = np.float32([0.9, 0.999, 1e-8, 1.0])
    low = functools.partial(loss, m_dtype=m_dtype, v_dtype=v_dtype)
    for derivative in (jax.grad, jax.jacfwd):
        with pytest.raises(TypeError, match="rounding has no useful derivative"):
            jax.eval_shape(derivative(low), x)


def test_derivatives_of_an_eager_quantized_step_raise():
    tx, one = scale_by_adamax(m_dtype="int8", v_dtype="uint8"), np.float32(1)
    state = tx.init(one)
    words = r"rounding has no useful derivative.*stop_gradient.*implicit_diff=False in jaxopt"
    with pytest.raises(TypeError, match=words):
        jax.grad(lambda g: tx.update(g, state)[0])(one)


@pytest.mark.parametrize("m_dtype, v_dtype", formats(LOW_BIT))
def test_stop_gradient_allows_derivatives_in_the_parameters(m_dtype, v_dtype):
    """The error message proposes this, as in first-order meta-learning."""
    tx = scale_by_adamax(m_dtype=m_dtype, v_dtype=v_dtype)

    def adapted(p):
        u, _ = tx.update(jax.lax.stop_gradient(2 * p), tx.init(p))
        return jnp.sum((p - 0.1 * u) ** 2)

    p = np.float32([1.0, -2.0])
    gradient = jax.jit(jax.grad(adapted))(p)
    np.testing.assert_allclose(gradient, 2 * (p - np.float32(0.1) * np.sign(p)), rtol=0.02)


# Derivatives of ten training steps, in the hyperparameters and in the initial parameters.

RATE = 0.05


def ten_steps(learning_rate, b1, b2, eps, gradient):
    """Returns the parameters after ten steps with the gradients `gradient(t)`, starting from 1."""
    tx = adamax(learning_rate, b1, b2, eps)

    def step(carry, t):
        params, state = carry
        updates, state = tx.update(gradient(t), state, params)
        return (optax.apply_updates(params, updates), state), None

    params = jax.tree.map(jnp.ones_like, gradient(0))
    return jax.lax.scan(step, (params, tx.init(params)), jnp.arange(10))[0][0]


# v decays after the first spike and is set by the gradient at the second.
SPIKE = np.array([3.0, -2.0, 0.5, 0.1, -0.2, 0.3, 1.5, -2.9, 0.4, 0.0])
HYPERPARAMETERS = (RATE, 0.9, 0.95, 1e-2)


@pytest.mark.parametrize("index", range(4), ids=["learning_rate", "b1", "b2", "eps"])
def test_vmap_over_a_hyperparameter_equals_single_runs(index):
    values = np.array([0.3, 0.5, 0.9], np.float32)
    gradients = jnp.asarray(SPIKE, jnp.float32)

    @jax.jit
    def final(value):
        before, after = HYPERPARAMETERS[:index], HYPERPARAMETERS[index + 1 :]
        return ten_steps(*before, value, *after, lambda t: gradients[t])

    together = jax.vmap(final)(values)
    np.testing.assert_allclose(together, [final(value) for value in values], rtol=1e-6)
    assert len(np.unique(together)) == len(values)


@functools.cache
def final_and_derivative():
    """Returns the end of ten steps as a function of the hyperparameters, and its derivative."""
    gradients = jnp.asarray(SPIKE)

    def final(hyperparameters):
        return ten_steps(*hyperparameters, lambda t: gradients[t])

    return jax.jit(final), jax.jit(jax.grad(final))


@pytest.mark.parametrize(
    "at",
    [HYPERPARAMETERS, (RATE, 0.9, 0.999, 1e-8), (RATE, 0.0, 0.95, 1e-2), (RATE, 0.9, 0.95, 0.0)],
    ids=["usual", "default", "b1=0", "eps=0"],
)
def test_derivative_in_the_hyperparameters_agrees_with_differences(at):
    """Differences are one-sided, of second order, because some values are at an end of a range."""
    with jax.enable_x64(True):
        final, derive = final_and_derivative()
        derivative = np.asarray(derive(np.array(at)))
        for index, step in enumerate([1e-5, 1e-5, -1e-5, 1e-6]):
            one, two = (float(final(at + k * step * np.eye(4)[index])) for k in (1, 2))
            difference = (4 * one - 3 * float(final(np.array(at))) - two) / (2 * step)
            assert derivative[index] != 0
            np.testing.assert_allclose(derivative[index], difference, rtol=1e-6)


def test_derivative_in_the_hyperparameters_is_finite():
    """For zero gradients the derivative is 0, because the parameters never change."""

    def loss(hyperparameters, gradient):
        dtypes = ("float32", "bfloat16", "complex64")
        gradients = {dtype: gradient.astype(dtype) for dtype in dtypes}
        with jax.numpy_dtype_promotion("standard"):
            final = ten_steps(*hyperparameters, lambda t: gradients)
            return sum(jnp.abs(leaf) for leaf in jax.tree.leaves(final)).astype(jnp.float32)

    at = np.float32([(RATE, b1, 0.999, eps) for b1 in (0.0, 0.9) for eps in (0.0, 1e-8)])
    derivative = jax.jit(jax.vmap(jax.grad(loss), in_axes=(0, None)))
    np.testing.assert_array_equal(derivative(at, np.float32(0)), 0)
    moved = np.asarray(derivative(at, np.float32(1)))
    assert np.all(np.isfinite(moved)) and np.all(moved[:, 0] != 0)


def test_derivative_in_the_initial_parameters_agrees_with_differences():
    """The gradients of the ten steps depend on the parameters."""

    def final_loss(params):
        tx = adamax(RATE)
        state = tx.init(params)

        def step(carry, _):
            params, state = carry
            updates, state = tx.update(jax.grad(loss)(params), state, params)
            return (optax.apply_updates(params, updates), state), None

        (params, _), _ = jax.lax.scan(step, (params, state), length=10)
        return loss(params)

    def loss(params):
        return jnp.sum(jnp.cos(3 * params) + params**2)

    with jax.enable_x64(True):
        start = np.array([1.0, -0.4, 0.0, 2.0])
        jax.test_util.check_grads(jax.jit(final_loss), (start,), order=1, modes=["rev"], rtol=1e-6)
