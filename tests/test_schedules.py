"""b1 and b2 that change on the way, in each format, beside the float64 oracle."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parameters import formats

from optax_adamax import scale_by_adamax
from optax_adamax._hyperparameters import Hyperparameters
from optax_adamax._m_formats import M_FORMATS
from tests.oracle import reference
from tests.oracle.formats import FORMATS, step_bound, v_error

STEPS = 200


@functools.cache
def compiled(m_dtype, v_dtype):
    """The directions of gradients under b1 and b2, a row of each for a step."""

    def body(state, x):
        g, b1, b2 = x
        tx = scale_by_adamax(b1, b2, 0.0, m_dtype=m_dtype, v_dtype=v_dtype)
        u, state = tx.update(g, state)
        return state, u

    @jax.jit
    def run(xs):
        start = scale_by_adamax(m_dtype=m_dtype, v_dtype=v_dtype).init(xs[0][0])
        return jax.lax.scan(body, start, xs)[1]

    return run


def run(gradients, m_dtype, v_dtype, b1_at, b2_at):
    """Directions under traced b1 and b2."""
    xs = tuple(np.float32(x) for x in (gradients, b1_at, b2_at))
    return np.float64(compiled(m_dtype, v_dtype)(xs))


def exact(gradients, b1_at, b2_at):
    state, directions = reference.start(gradients.shape[1:]), []
    for g, b1, b2 in zip(gradients, b1_at, b2_at, strict=True):
        u, state = reference.step(g, state, b1=b1, b2=b2, eps=0.0)
        directions.append(u)
    return np.array(directions)


SCHEDULES = {
    "b2 rises": (np.full(STEPS, 0.9), np.linspace(0.92, 0.9999, STEPS)),
    "b2 leaps": (np.full(STEPS, 0.9), np.where(np.arange(STEPS) < 40, 0.92, 0.9999)),
    "b2 falls": (np.full(STEPS, 0.9), np.linspace(0.9999, 0.95, STEPS)),
    "b1 rises": (np.linspace(0.5, 0.98, STEPS), np.full(STEPS, 0.999)),
    "b1 falls": (np.linspace(0.98, 0.5, STEPS), np.full(STEPS, 0.999)),
}


def check_schedules(m_dtype, v_dtype):
    """Gradients that just do not set v, as those of the longest steps: none is cut."""
    for name, (b1_at, b2_at) in SCHEDULES.items():
        gradients = np.float32(np.cumprod(b2_at)[:, None] * np.float64([1e-3, 0.3, 1.0, 7.0]))
        u = run(gradients, m_dtype, v_dtype, b1_at, b2_at)
        expected = exact(np.float64(gradients), b1_at, b2_at)
        # m remembers the rounding of a few steps.
        error = v_error(v_dtype) + 4 * M_FORMATS[m_dtype].relative_error
        np.testing.assert_allclose(u, expected, rtol=error, err_msg=name)
        if name == "b2 leaps":
            bound = step_bound(np.arange(1, STEPS + 1), 0.9, b2_at)
            assert np.any(expected[:, 0] > 2.5 * bound)


@pytest.mark.parametrize("m_dtype, v_dtype", formats(FORMATS))
def test_steps_are_those_of_float64_under_schedules(m_dtype, v_dtype):
    check_schedules(m_dtype, v_dtype)


@pytest.mark.parametrize("m_dtype, v_dtype", [("bfloat16", "bfloat16"), ("int8", "bfloat16")])
def test_mutant_that_clips_at_the_bound_of_constants_is_seen(mutant, m_dtype, v_dtype):
    validated = Hyperparameters.validated

    def bounded(*arguments):
        return dataclasses.replace(validated(*arguments), is_bounded=True)

    mutant(Hyperparameters, "validated", bounded)
    with pytest.raises(AssertionError):
        check_schedules(m_dtype, v_dtype)


@pytest.mark.parametrize("b2", [0.92, 0.95, 0.99])
def test_int8_keeps_the_largest_ratios_of_constants(b2):
    """|m| / v is up to 4.6 at b2 = 0.92. What is rounded beyond the bound is cut: a bit is lost."""
    sizes = np.geomspace(0.1, 10, 32)
    gradients = np.float32(b2 ** np.arange(180.0)[:, None] * sizes)
    tx = scale_by_adamax(0.9, b2, 0.0, m_dtype="int8", v_dtype="uint8")
    start = tx.init(jnp.zeros(32))
    step = jax.jit(lambda: jax.lax.scan(lambda s, g: tx.update(g, s)[::-1], start, gradients))
    _, u = step()
    expected = exact(np.float64(gradients), np.full(180, 0.9), np.full(180, b2))
    np.testing.assert_allclose(np.mean(u[100:]), np.mean(expected[100:]), rtol=0.04)
    bound = step_bound(np.arange(1, 181)[:, None], 0.9, b2)
    assert np.all(np.abs(u) <= bound * (1 + 1e-5))


@pytest.mark.parametrize("b2", [0.9, 0.91, 0.5])
def test_int8_refuses_constants_beyond_its_ratio(b2):
    with pytest.raises(ValueError, match="requires b1 < b2"):
        scale_by_adamax(0.9, b2, m_dtype="int8")
    scale_by_adamax(0.9, b2, m_dtype="bfloat16")
