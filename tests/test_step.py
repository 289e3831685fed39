"""adamax_step: one step as a pure function."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_adamax import adamax_step, scale_by_adamax
from tests.oracle import reference

TEACHING = [
    ((1.0, 0.1, 0.0, 0.0, 1), (0.998, 0.01, 0.1)),
    (
        ([1.0, 2.0, 3.0], [0.1, 0.2, 0.3], [0.0] * 3, [0.0] * 3, 1),
        ([0.998, 1.998, 2.998], [0.01, 0.02, 0.03], [0.1, 0.2, 0.3]),
    ),
    ((0.5, 0.05, 0.02, 0.15, 5), (0.49925, 0.023, 0.14985)),
]


@pytest.mark.parametrize("given, expected", TEACHING)
@pytest.mark.parametrize("kind", [lambda x: x, np.asarray, jnp.asarray], ids=["py", "np", "jnp"])
def test_teaching_problem(given, expected, kind):
    *arrays, t = given
    answer = adamax_step(*(kind(x) for x in arrays), t)
    for value, wanted in zip(answer, expected, strict=True):
        np.testing.assert_allclose(np.round(value, 5), wanted, rtol=1e-7)


def test_scalar_moments_stand_for_arrays_of_zeros():
    parameter, m, v = adamax_step([1, 2, 3], [0.1, 0.2, 0.3], 0, 0, t=1)
    np.testing.assert_allclose(parameter, [0.998, 1.998, 2.998], rtol=1e-6)
    assert parameter.dtype == m.dtype == v.dtype == jnp.float32
    assert m.shape == v.shape == (3,)


@pytest.mark.parametrize(
    "rule",
    [{}, {"eps": 0.5}, {"eps": 0.5, "eps_placement": "max"}, {"nesterov": True},
     {"bias_correction": False}],
    ids=str,
)  # fmt: skip
def test_is_the_oracle_and_the_transformation(rule):
    placement = {"eps_placement": "denominator", **rule}
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        p, m, v = jnp.ones(5), jnp.zeros(5), jnp.zeros(5)
        oracle_p, oracle = np.ones(5), reference.start((5,))
        tx = scale_by_adamax(**placement)
        state = tx.init(p)
        step = jax.jit(functools.partial(adamax_step, learning_rate=0.1, **rule))
        for t in range(1, 20):
            g = rng.standard_t(2, 5)
            p, m, v = step(p, g, m, v, t)
            direction, oracle = reference.step(g, oracle, **placement)
            oracle_p = oracle_p - 0.1 * direction
            _, state = jax.jit(tx.update)(jnp.asarray(g), state)
            np.testing.assert_allclose(p, oracle_p, rtol=1e-12)
            np.testing.assert_array_equal(m, state.m)
            np.testing.assert_array_equal(v, state.v)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "complex64"])
def test_parameter_keeps_its_dtype_and_moments_are_wide(dtype):
    parameter, m, v = adamax_step(
        jnp.ones(2, dtype), jnp.full(2, 0.5, dtype), 0.0, 0.0, 1, learning_rate=0.5
    )
    assert parameter.dtype == dtype
    np.testing.assert_allclose(np.asarray(parameter).real.astype(float), 0.5, rtol=1e-6)
    assert m.dtype == (np.complex64 if dtype == "complex64" else np.float32)
    assert v.dtype == np.float32


@pytest.mark.parametrize(
    "arguments, error, words",
    [
        (dict(t=0), ValueError, "t must be in [1, inf)"),
        (dict(t="1"), TypeError, "t must be a real number"),
        (dict(learning_rate=-1.0), ValueError, "learning_rate must be in [0, inf)"),
        (
            dict(grad=[0.1, 0.2]),
            ValueError,
            "grad must have the shape of parameter, (3,), but its shape is (2,)",
        ),
        (
            dict(m=[0.1, 0.2]),
            ValueError,
            "m must be a scalar or have the shape of parameter, (3,), but its shape is (2,)",
        ),
        (
            dict(v=[[0.1, 0.2, 0.3]]),
            ValueError,
            "v must be a scalar or have the shape of parameter, (3,), but its shape is (1, 3)",
        ),
        (dict(parameter="three"), TypeError, "parameter must be a number or an array"),
        (dict(grad=None), TypeError, "grad must be a number or an array"),
        (dict(b1=1.0), ValueError, "b1 must be in [0, 1)"),
    ],
)
def test_bad_input(arguments, error, words):
    good = dict(parameter=[1.0, 2.0, 3.0], grad=[0.1, 0.2, 0.3], m=0.0, v=0.0, t=1)
    with pytest.raises(error) as raised:
        adamax_step(**{**good, **arguments})
    assert words in str(raised.value)
