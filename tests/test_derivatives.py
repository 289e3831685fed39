"""Derivatives of a run: right in float32, of the second order too, and refused in few bits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parameters import formats

from optax_adamax import scale_by_adamax
from oracle import reference
from oracle.formats import LOW_BIT

GRADIENTS = np.float64([[0.3, -1.0, 0.2], [0.5, 0.4, -0.7], [-0.2, 0.1, 0.9]])
WEIGHTS = np.float64([[1.0, 2.0, 3.0], [-1.0, 0.5, 2.0], [0.3, -2.0, 1.0]])


def loss(x, **rule):
    """What the updates of three steps add up to; x is b1, b2, eps and a factor of the gradients."""
    tx = scale_by_adamax(x[0], x[1], x[2], **rule)
    state, total = tx.init(np.zeros(3, np.float32)), jnp.float32(0)
    for g, weight in zip(np.float32(GRADIENTS), np.float32(WEIGHTS), strict=True):
        u, state = tx.update(jnp.sin(x[3] * g), state)
        total = total + jnp.vdot(weight, u)
    return total


def scanned_loss(x):
    """The same by `jax.lax.scan`."""
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
    """Central differences, for x of any shape of output."""
    steps = h * np.eye(len(x))
    return np.array([(function(x + d) - function(x - d)) / (2 * h) for d in steps])


RULES = [{}, {"eps_placement": "denominator"}, {"nesterov": True}, {"bias_correction": False}]


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_derivatives_are_those_of_float64(rule):
    x = np.array([0.9, 0.8, 0.01, 1.1])
    gradient = jax.jit(jax.grad(lambda x: loss(x, **rule)))(np.float32(x))
    expected = differences(lambda x: exact_loss(x, **rule), x, 1e-6)
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-4)


HESSIANS = [jax.jit(jax.hessian(loss)), jax.jit(jax.hessian(scanned_loss))]


@pytest.mark.parametrize("hessian", HESSIANS, ids=["unrolled", "scan"])
@pytest.mark.parametrize("b1", [0.5, 0.0])
def test_second_derivatives_are_those_of_float64(b1, hessian):
    """At b1 = 0 too, where b1^(t-1) is 0^0 at t = 1."""
    x = np.array([b1, 0.8, 0.01, 1.1])
    hessian = hessian(np.float32(x))
    expected = differences(lambda x: differences(exact_loss, x, 1e-4), x, 1e-4)
    np.testing.assert_allclose(hessian, expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("m_dtype, v_dtype", formats(LOW_BIT))
def test_derivatives_in_few_bits_are_refused(m_dtype, v_dtype):
    x = np.float32([0.9, 0.999, 1e-8, 1.0])
    low = functools.partial(loss, m_dtype=m_dtype, v_dtype=v_dtype)
    for derivative in (jax.grad, jax.jacfwd):
        with pytest.raises(TypeError, match="rounding has no derivative"):
            jax.eval_shape(derivative(low), x)


def test_derivatives_in_few_bits_are_refused_without_a_compiler():
    tx, one = scale_by_adamax(m_dtype="int8", v_dtype="uint8"), np.float32(1)
    state = tx.init(one)
    with pytest.raises(TypeError, match="rounding has no derivative"):
        jax.grad(lambda g: tx.update(g, state)[0])(one)


@pytest.mark.parametrize("m_dtype, v_dtype", formats(LOW_BIT))
def test_parameters_may_be_differentiated_behind_stop_gradient(m_dtype, v_dtype):
    """As in meta-learning of the first order, which the error proposes."""
    tx = scale_by_adamax(m_dtype=m_dtype, v_dtype=v_dtype)

    def adapted(p):
        u, _ = tx.update(jax.lax.stop_gradient(2 * p), tx.init(p))
        return jnp.sum((p - 0.1 * u) ** 2)

    p = np.float32([1.0, -2.0])
    gradient = jax.jit(jax.grad(adapted))(p)
    np.testing.assert_allclose(gradient, 2 * (p - np.float32(0.1) * np.sign(p)), rtol=0.02)
