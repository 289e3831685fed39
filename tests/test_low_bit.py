"""Quantized v has a bounded error and quantized m is unbiased, after any number of steps.

`benchmarks/mutants/rounding.toml` has mutants that these checks detect.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from low_bit_runs import STEPS, exact_v, heavy_tails, scan
from parameters import formats

from optax_adamax import _xla
from optax_adamax._m_formats import M_FORMATS
from optax_adamax._numerics import float32_bits, hash_uint32
from optax_adamax._v_formats import V_FORMATS
from tests.oracle import reference
from tests.oracle.formats import LOW_BIT, SOME_FORMATS

ROUNDED_M = [x for x in LOW_BIT if x[0] != "float32"]


def assert_v_is_near(v, exact, v_dtype):
    """Checks v while the exact v is in the range of the format and has not been above it.

    Returns the fraction of elements and steps that were checked.
    """
    low, high = V_FORMATS[v_dtype].range
    within = (exact > low) & (np.maximum.accumulate(exact) < high)
    error = np.abs(v[within] / exact[within] - 1)
    assert np.all(error <= V_FORMATS[v_dtype].relative_error + 1e-4), error.max()
    return within.mean()


def check_v_error(v_dtype, b2=0.999, steps=STEPS):
    gradients = heavy_tails(steps)
    _, _, v = scan(gradients, b2=b2, eps=0.0, v_dtype=v_dtype)
    assert assert_v_is_near(v, exact_v(gradients, b2), v_dtype) > 0.5


@pytest.mark.parametrize("v_dtype", ["bfloat16", "uint8"])
@pytest.mark.parametrize(
    "b2", [0.5, 0.999, 1.0, *(pytest.param(b2, marks=pytest.mark.slow) for b2 in (0.9, 1 - 1e-6))]
)
def test_v_has_a_bounded_error(v_dtype, b2):
    check_v_error(v_dtype, b2)


@pytest.mark.parametrize(
    "m_dtype, v_dtype",
    formats(
        [x for x in LOW_BIT if x[1] != "float32"], [("bfloat16", "bfloat16"), ("int8", "uint8")]
    ),
)
def test_v_has_a_bounded_error_while_b2_changes(m_dtype, v_dtype):
    """b2 is traced and rises from 0.9 to 0.9999 in 20,000 steps."""
    steps = 20_000
    gradients = heavy_tails(steps, size=16)
    b2 = np.linspace(0.9, 0.9999, steps).astype(np.float32)

    _, _, v = scan(gradients, b2_at=b2, eps=0.0, m_dtype=m_dtype, v_dtype=v_dtype)
    assert assert_v_is_near(v, exact_v(gradients, b2), v_dtype) > 0.5


@pytest.mark.parametrize("v_dtype", ["bfloat16", "uint8"])
@given(
    st.lists(
        st.tuples(
            st.floats(0, 1e3, width=32),
            st.one_of(st.floats(0.25, 1, width=32), st.sampled_from([0.999, 0.0, 1.0, 2**-7])),
        ),
        min_size=1,
        max_size=30,
    )
)
def test_v_has_a_bounded_error_for_any_schedule_of_b2(v_dtype, steps):
    gradients, b2 = (np.float32(x) for x in zip(*steps, strict=True))
    padding = np.zeros(30 - len(gradients), np.float32)
    gradients, b2 = np.append(gradients, padding)[:, None], np.append(b2, padding + 1)
    _, _, v = scan(gradients, b2_at=b2, eps=0.0, v_dtype=v_dtype)
    assert_v_is_near(v, exact_v(gradients, b2), v_dtype)


def test_bfloat16_v_is_rounded_once():
    """Each stored number is the exact v, divided by the shared scale and rounded to bfloat16."""
    gradients = heavy_tails(STEPS)
    state, _, _ = scan(gradients, eps=0.0, v_dtype="bfloat16")
    w = exact_v(gradients, 0.999)[-1] * 2.0 ** (float(state.v.phase) / 2**32 - 1)
    ulp = 2.0 ** (np.floor(np.log2(np.maximum(w, 1e-30))) - 7)
    stored = np.asarray(state.v.scaled_bfloat16, np.float64)
    assert np.all(np.abs(stored - w)[w > 1e-30] <= ulp[w > 1e-30])


# Tests of m.


def check_updates_vanish(m_dtype, v_dtype):
    """Checks that updates vanish and uint8 v reaches its smallest code after the last gradient."""
    rng = np.random.default_rng(1)
    gradients = np.zeros((30_000, 256), np.float32)
    gradients[:100] = rng.normal(size=(100, 256)) * 10.0 ** rng.uniform(-5, 2, 256)
    state, u, _ = scan(gradients, eps=0.0, m_dtype=m_dtype, v_dtype=v_dtype)
    expected, _ = reference.run(gradients[:200], eps=0.0)
    resolution = M_FORMATS[m_dtype].resolution
    assert np.abs(u[199]).max() <= 1.5 * np.abs(expected[199]).max() + 4 * resolution
    assert np.abs(u[600:]).max() <= (1e-15 if m_dtype == "bfloat16" else 0)
    if v_dtype == "uint8":
        assert np.all(np.asarray(state.v.scaled_uint8) == 0)


@pytest.mark.parametrize("m_dtype, v_dtype", formats(ROUNDED_M, SOME_FORMATS))
def test_updates_vanish_after_the_last_gradient(m_dtype, v_dtype):
    check_updates_vanish(m_dtype, v_dtype)


def check_rounding_of_m_is_unbiased(m_dtype):
    """Checks that the stored values of a fixed m have its mean, for any m between two codes."""
    m = np.float32(np.random.default_rng(0).uniform(-1, 1, 500) ** 5)
    m_format, one, steps = M_FORMATS[m_dtype], np.float32(1.0), 20_000

    def error(t):
        bits = _xla.add_above_packed(hash_uint32(t), float32_bits(jnp.abs(m)))
        return m_format.decode(m_format.encode(m, one, bits), one) - m

    counts = np.arange(1, steps + 1, dtype=np.uint32)
    bias = jax.jit(lambda: jax.lax.scan(lambda x, t: (x + error(t), None), 0 * m, counts)[0])()
    bias = np.asarray(bias)
    spacing = np.maximum(np.abs(m) * m_format.relative_error, m_format.resolution)
    # Four standard deviations of the mean of this number of random roundings.
    assert np.all(np.abs(bias / steps) <= 4 * 0.5 / np.sqrt(steps) * spacing)


@pytest.mark.parametrize("m_dtype", ["bfloat16", "int8"])
def test_rounding_of_m_is_unbiased(m_dtype):
    check_rounding_of_m_is_unbiased(m_dtype)
