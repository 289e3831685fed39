"""`describe_state` agrees with NumPy counts of the decoded state, and gives advice."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from parameters import formats

from optax_adamax import (
    ScaleByAdamaxState,
    adamax,
    compensate_rounding,
    decode_state,
    describe_state,
    encode_state,
    pack_small_leaves,
    scale_by_adamax,
    unpack_state,
)
from optax_adamax._m_formats import M_FORMATS
from optax_adamax._v_formats import V_FORMATS
from tests.oracle.formats import SOME_FORMATS, state_bytes

# The other two formats combine properties of the first and the last format; they are slow tests.
FORMATS = formats([*SOME_FORMATS, ("int8", "float32")], SOME_FORMATS[::2])
LOW, HIGH = V_FORMATS["uint8"].range
MAGNITUDES = [0.0, 1e-38, LOW / 10, 10 * LOW, 1e-3, 1.0, 0.9 * HIGH, 1.2 * HIGH, 1e3 * HIGH, 1e38]

GRADIENTS = {
    "all": np.float32([MAGNITUDES, MAGNITUDES[::-1]]),
    "fits": np.resize(np.float32([0.0, -0.5, 2.0, 1.0]), (2, 10)),
    "one": np.float32(-3.0),
    "none": np.zeros((0, 4), np.float32),
}


@functools.cache
def optimizer(m_dtype, v_dtype):
    return adamax(0.1, m_dtype=m_dtype, v_dtype=v_dtype)


@functools.cache
def trained(m_dtype, v_dtype, steps=2):
    """Returns the state of a chain after steps with gradients of every magnitude and shape."""
    tx = optimizer(m_dtype, v_dtype)
    state = tx.init(GRADIENTS)
    for _ in range(steps):
        _, state = jax.jit(tx.update)(GRADIENTS, state)
    return state


def by_path(description):
    return {leaf.path: leaf for leaf in description.leaves}


@pytest.mark.parametrize("m_dtype, v_dtype", FORMATS)
def test_counts_agree_with_the_decoded_state(m_dtype, v_dtype):
    state = trained(m_dtype, v_dtype)
    floats = decode_state(state)[0]
    low, high = V_FORMATS[v_dtype].range
    eps = 1e-8
    described = by_path(describe_state(state))
    assert set(described) == {"all", "fits", "one", "none"}
    for name in floats.m:
        leaf = described[name]
        m, v = (np.asarray(x, np.float64).ravel() for x in (floats.m[name], floats.v[name]))
        nonzero = (m != 0) | (v > max(low, eps * (1 + V_FORMATS[v_dtype].relative_error)))
        n = max(1, m.size)
        assert leaf.shape == floats.m[name].shape
        assert leaf.bytes == m.size * state_bytes(m_dtype, v_dtype)
        assert (leaf.m_dtype, leaf.v_dtype) == (m_dtype, v_dtype)
        wanted = (v[nonzero].min(), v[nonzero].max()) if nonzero.any() else (np.nan, np.nan)
        np.testing.assert_allclose((leaf.v_min, leaf.v_max), wanted, rtol=1e-6)
        np.testing.assert_allclose(
            leaf.underflow_fraction, (nonzero & (v <= low)).sum() / n, rtol=1e-6
        )
        np.testing.assert_allclose(
            leaf.saturated_fraction, (nonzero & (v >= high)).sum() / n, rtol=1e-6
        )
        np.testing.assert_allclose(leaf.no_gradient_fraction, (~nonzero).sum() / n, rtol=1e-6)
        assert leaf.nonfinite_fraction == 0
    assert bool(describe_state(state).fits) == (v_dtype != "uint8")
    assert described["fits"].advice == described["none"].advice == ""
    assert described["fits"].no_gradient_fraction == 1 / 4


def test_saturated_uint8_v_is_advised_on():
    leaf = by_path(describe_state(trained("int8", "uint8")))["all"]
    assert leaf.saturated_fraction == pytest.approx(3 / 10)  # the last three magnitudes
    assert 'Write v_dtype="bfloat16"' in leaf.advice and "optax.scale" in leaf.advice
    assert "upper end of uint8" in leaf.advice
    assert leaf.m_saturated_fraction > 0 and "m_dtype" not in leaf.advice  # v is the cause
    state = encode_state(trained("float32", "float32"), "bfloat16", "bfloat16")
    assert describe_state(state).fits


def state_of(m, v, *formats):
    return encode_state(ScaleByAdamaxState(jnp.int32(5), {"w": m}, {"w": v}), *formats)


@pytest.mark.parametrize("m_dtype, v_dtype", FORMATS)
def test_gradients_below_the_range_underflow(m_dtype, v_dtype):
    v = np.full(1000, LOW / 100, np.float32)
    (leaf,) = describe_state(state_of(v, v, m_dtype, v_dtype), eps=0.0).leaves
    if v_dtype == "uint8":
        assert leaf.underflow_fraction == 1 and "lower end of uint8" in leaf.advice
    else:
        assert leaf.underflow_fraction == leaf.no_gradient_fraction == 0 and not leaf.advice


def test_gradient_that_is_rounded_to_the_smallest_code_underflows():
    v = np.full(1000, 1e-30, np.float32)
    (leaf,) = describe_state(state_of(v, v, "int8", "uint8")).leaves
    assert leaf.no_gradient_fraction == 1
    (leaf,) = describe_state(state_of(v, v, "int8", "bfloat16"), eps=0.0).leaves
    assert leaf.no_gradient_fraction == 0


def test_less_than_a_percent_below_the_range_is_not_advised_on():
    v = np.where(np.arange(1000) < 9, np.float32(LOW / 10), np.float32(1))
    (leaf,) = describe_state(state_of(v, v, "int8", "uint8")).leaves
    assert leaf.underflow_fraction == pytest.approx(9 / 1000) and not leaf.advice


def test_one_element_above_the_range_is_advised_on():
    v = np.where(np.arange(1000) < 1, np.float32(2 * HIGH), np.float32(1))
    (leaf,) = describe_state(state_of(v, v, "int8", "uint8")).leaves
    assert leaf.saturated_fraction == pytest.approx(1 / 1000)
    assert "upper end of uint8, in 0.1% of the elements" in leaf.advice


def test_v_at_the_upper_end_is_saturated():
    v = np.float32([V_FORMATS["bfloat16"].range[1], 1.0])
    (leaf,) = describe_state(state_of(v, v, "int8", "bfloat16")).leaves
    assert leaf.v_max == V_FORMATS["bfloat16"].range[1] and leaf.saturated_fraction == 0.5


def test_m_above_the_largest_int8_code_is_saturated():
    """Such an m occurs for b1 > b2, or in the state of another optimizer."""
    v = np.ones(1000, np.float32)
    m = np.float32(([7.0, 7.4, 8.0, -100.0] + [1.0] * 6) * 100)
    (leaf,) = describe_state(state_of(m, v, "int8", "bfloat16")).leaves
    assert leaf.m_saturated_fraction == pytest.approx(0.3)  # 7.4 is rounded to the largest code
    assert 'Write m_dtype="bfloat16"' in leaf.advice
    for m_dtype in ("bfloat16", "float32"):
        assert describe_state(state_of(m, v, m_dtype, "bfloat16")).fits


@pytest.mark.parametrize("v_dtype", ["float32", "bfloat16", "uint8"])
def test_the_largest_code_of_m_is_recognized_above_every_v(v_dtype):
    """Rounding makes m / v of the largest code differ slightly from the ratio of that code."""
    v = np.geomspace(1e-3, 1e3, 1000, dtype=np.float32)
    (leaf,) = describe_state(state_of(100 * v, v, "int8", v_dtype)).leaves
    assert leaf.m_saturated_fraction == 1
    (leaf,) = describe_state(state_of(6.5 * v, v, "int8", "float32")).leaves
    assert leaf.m_saturated_fraction == 0


@pytest.mark.parametrize("m_dtype", ["float32", "bfloat16"])
def test_ratio_that_overflows_is_not_saturated_without_a_largest_ratio(m_dtype):
    m, v = np.float32([10.0, 1.0]), np.float32([1.5e-38, 1.0])
    assert describe_state(state_of(m, v, m_dtype, "float32")).fits


def test_float32_v_that_decayed_to_zero_is_advised_on():
    """No storage format is wider, so the advice names only the scale of the gradients."""
    m, v = np.float32([1e-3, 1.0]), np.float32([0.0, 1.0])
    (leaf,) = describe_state(state_of(m, v, "float32", "float32")).leaves
    assert leaf.underflow_fraction == 0.5
    assert leaf.advice == (
        "v reaches 0, the lower end of float32, in 50% of the elements. Put optax.scale before the "
        "optimizer."
    )


@pytest.mark.parametrize("phase", [0, 2**31, 2**32 - 2**23])  # before a step of 0.0014 * 2**32
@pytest.mark.parametrize("v_dtype", ["bfloat16", "uint8"])
def test_saturated_v_is_advised_on_at_every_shared_scale(v_dtype, phase):
    tx = scale_by_adamax(v_dtype=v_dtype)
    state = tx.init({"w": np.ones(2, np.float32)})
    state = state._replace(v=state.v._replace(phase=jnp.uint32(phase)))
    _, state = jax.jit(tx.update)({"w": np.float32([3e38, 1.0])}, state)
    (leaf,) = describe_state(state).leaves
    assert leaf.saturated_fraction == 0.5 and f"upper end of {v_dtype}" in leaf.advice


@pytest.mark.parametrize("m_dtype, v_dtype", FORMATS)
def test_nonfinite_moments_are_advised_on(m_dtype, v_dtype):
    tx = optimizer(m_dtype, v_dtype)
    gradients = GRADIENTS | {"all": np.resize(np.float32([1, np.nan, 2, 0]), (2, 10))}
    _, state = jax.jit(tx.update)(gradients, tx.init(gradients))
    leaf = by_path(describe_state(state))["all"]
    assert leaf.nonfinite_fraction == leaf.no_gradient_fraction == 0.25
    assert leaf.v_max == pytest.approx(2, rel=V_FORMATS[v_dtype].relative_error)
    assert 'nonfinite="zero"' in leaf.advice


def test_infinite_gradient_with_float32_m_and_uint8_v_counts_as_nonfinite():
    """m is infinite and v saturates, so m / v is infinite but m is not saturated."""
    tx = scale_by_adamax(v_dtype="uint8")
    gradients = {"w": np.float32([np.inf, 1.0])}
    _, state = jax.jit(tx.update)(gradients, tx.init(gradients))
    (leaf,) = describe_state(state).leaves
    assert leaf.nonfinite_fraction == 0.5 and leaf.m_saturated_fraction == 0
    assert leaf.advice.startswith("50% of the elements are NaN or infinite. Write nonfinite=")


@pytest.mark.parametrize("m_dtype, v_dtype", FORMATS)
def test_a_new_state_has_no_gradients(m_dtype, v_dtype):
    state = scale_by_adamax(m_dtype=m_dtype, v_dtype=v_dtype).init({"w": GRADIENTS["all"]})
    description = describe_state(state)
    (leaf,) = description.leaves
    assert leaf.no_gradient_fraction == 1 and np.isnan(leaf.v_min) and np.isnan(leaf.v_max)
    assert description.fits and "-" in str(description)


@pytest.mark.parametrize("eps", [1e-3, 1.09e-3, 1.2e-3])  # v is rounded below and above eps
def test_eps_in_v_is_not_a_gradient(eps):
    tx = scale_by_adamax(eps=eps, v_dtype="uint8")
    gradients = {"w": np.float32([0.0, 1.0])}
    _, state = jax.jit(tx.update)(gradients, tx.init(gradients))
    assert describe_state(state, eps=eps).leaves[0].no_gradient_fraction == 0.5
    assert describe_state(state).leaves[0].no_gradient_fraction == 0


def test_packed_state_is_described_like_an_unpacked_state():
    shapes = {"a": (2, 3), "b": 4, "c": (40, 40)}
    params = {name: np.ones(shape, np.float32) for name, shape in shapes.items()}
    tx = pack_small_leaves(optimizer("int8", "uint8"))
    state = jax.jit(tx.init)(params)
    unpacked = jax.jit(unpack_state)(state, params)
    packed, unpacked = describe_state(state), describe_state(unpacked)
    assert [leaf.path for leaf in unpacked.leaves] == ["a", "b", "c"]
    assert packed.bytes == unpacked.bytes == 2 * 1610 + 8  # count and phase
    assert sorted(leaf.shape for leaf in packed.leaves) == [(10,), (40, 40)]
    assert sum(leaf.bytes for leaf in packed.leaves) == 2 * 1610


def test_bytes_include_residuals_and_other_transformations():
    params = {"w": jnp.ones((3, 5), jnp.bfloat16)}
    tx = compensate_rounding(adamax(lambda _: 0.1, m_dtype="int8", v_dtype="uint8"))
    description = describe_state(tx.init(params))
    assert description.leaves[0].bytes == 2 * 15
    # m, v and residual; the counts of Adamax, its schedule and the residual; the phase
    assert description.bytes == 3 * 15 + 4 * 4
    tx = optax.chain(optax.add_noise(0.1, 0.5, jax.random.key(0)), adamax(0.1))
    with jax.numpy_dtype_promotion("standard"):
        description = describe_state(tx.init({"w": jnp.ones(4)}))
    assert description.bytes == 2 * 16 + 4 + 4 + 8  # the count and the key of the noise


def test_groups_with_different_formats_are_described_separately():
    """Each state of optax.partition has its own leaves and its own formats."""
    params = {"b": np.ones(3, np.float32), "w": np.ones(3, np.float32)}
    groups = {"exact": adamax(0.1), "coded": adamax(0.1, m_dtype="int8", v_dtype="uint8")}
    tx = optax.partition(groups, {"b": "exact", "w": "coded"})
    _, state = jax.jit(tx.update)(params, tx.init(params), params)
    leaves = by_path(describe_state(state))
    assert {path: leaf.v_dtype for path, leaf in leaves.items()} == {"b": "float32", "w": "uint8"}


def test_complex_parameters_are_described():
    tx = scale_by_adamax()
    gradients = {"w": np.complex64([3 + 4j, 0.0])}
    _, state = jax.jit(tx.update)(gradients, tx.init(gradients))
    (leaf,) = describe_state(state).leaves
    assert leaf.m_dtype == "complex64" and leaf.no_gradient_fraction == 0.5
    assert leaf.v_max == pytest.approx(5)


def test_moments_in_half_precision_are_described_as_stored():
    state = scale_by_adamax().init({"w": np.ones(4, np.float32)})
    halves = state._replace(**{f: {"w": jnp.ones(4, jnp.float16)} for f in ("m", "v")})
    (leaf,) = describe_state(halves).leaves
    assert (leaf.m_dtype, leaf.v_dtype, leaf.bytes, leaf.v_max) == ("float16", "float16", 16, 1)


def test_a_state_without_adamax_raises():
    with pytest.raises(TypeError, match="must contain a ScaleByAdamaxState, but this tuple"):
        describe_state(optax.sgd(0.1).init({"w": jnp.ones(2)}))


def test_every_format_has_a_range_for_the_description():
    assert all(format.range[0] < format.range[1] for format in V_FORMATS.values())
    assert all(format.largest_ratio > 1 for format in M_FORMATS.values())
