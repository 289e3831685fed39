"""States can be converted between storage formats, and states in another format raise."""

import functools

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from parameters import formats

from optax_adamax import (
    ScaleByAdamaxState,
    ScaledBfloat16,
    ScaledUint8,
    adamax,
    decode_state,
    encode_state,
    scale_by_adamax,
)
from tests.oracle.formats import FORMATS, SOME_FORMATS, STEP_VARIANTS, m_error, v_error

# None means float32 in these tests.
CASES = formats(
    [*FORMATS, (None, None), (None, "uint8"), ("int8", None)], [*STEP_VARIANTS, (None, None)]
)
PARAMS = {"a": np.ones((3, 5), np.float32), "b": {"c": np.ones((), np.float32), "n": None}}


@functools.cache
def trained(m_dtype=None, v_dtype=None, steps=20):
    """Returns a chain, its state after some steps, and the gradients of these steps."""
    tx = adamax(0.1, m_dtype=m_dtype, v_dtype=v_dtype)
    state, update = tx.init(PARAMS), jax.jit(tx.update)
    rng = np.random.default_rng(0)
    for _ in range(steps):
        g = jax.tree.map(lambda p: np.asarray(rng.standard_t(2, p.shape), np.float32), PARAMS)
        _, state = update(g, state)
    return tx, state


def moments(state):
    floats = jax.device_get(decode_state(state))[0]
    return jax.tree.leaves(floats.m), jax.tree.leaves(floats.v)


@pytest.mark.parametrize("m_dtype, v_dtype", CASES)
def test_decoded_states_agree_with_the_float32_run(m_dtype, v_dtype):
    _, state = trained(m_dtype, v_dtype)
    _, exact = trained()
    floats = decode_state(state)
    assert isinstance(floats, tuple) and isinstance(floats[0], ScaleByAdamaxState)
    assert jax.tree.structure(floats) == jax.tree.structure(exact)
    for m, v, exact_m, exact_v in zip(*moments(state), *moments(exact), strict=True):
        assert m.dtype == v.dtype == jnp.float32
        np.testing.assert_allclose(v, exact_v, rtol=v_error(v_dtype or "float32", scale_error=1e-6))
        assert np.all(np.abs(m - exact_m) <= m_error(m_dtype or "float32", exact_v, exact_v))


@pytest.mark.parametrize("m_dtype, v_dtype", CASES)
@pytest.mark.parametrize("other", SOME_FORMATS)
def test_conversion_during_a_run_changes_moments_by_one_rounding(m_dtype, v_dtype, other):
    """A converted state has the same moments except for one rounding, and the run continues."""
    _, state = trained(*other)
    tx, _ = trained(m_dtype, v_dtype)
    converted = encode_state(state, m_dtype, v_dtype)
    assert jax.tree.structure(converted) == jax.tree.structure(tx.init(PARAMS))
    assert int(converted[0].count) == 20
    for m, v, old_m, old_v in zip(*moments(converted), *moments(state), strict=True):
        np.testing.assert_allclose(v, old_v, rtol=v_error(v_dtype or "float32", scale_error=1e-6))
        assert np.all(np.abs(m - old_m) <= m_error(m_dtype or "float32", old_m, old_v))
    g = PARAMS
    u, after = jax.jit(tx.update)(g, converted)
    exact, _ = jax.jit(trained()[0].update)(g, decode_state(state))
    for x, y in zip(jax.tree.leaves(u), jax.tree.leaves(exact), strict=True):
        np.testing.assert_allclose(x, y, atol=0.1 * 0.25)
    assert jax.tree.map(jnp.result_type, after) == jax.tree.map(jnp.result_type, converted)


@pytest.mark.parametrize("m_dtype, v_dtype", CASES)
def test_conversion_to_the_same_format_changes_no_bit(m_dtype, v_dtype):
    _, state = trained(m_dtype, v_dtype)
    same = encode_state(state, m_dtype, v_dtype)
    jax.tree.map(np.testing.assert_array_equal, state, same)
    floats = decode_state(state)
    jax.tree.map(np.testing.assert_array_equal, floats, decode_state(floats))


@pytest.mark.parametrize("wanted", ["float32", "float64"])
@pytest.mark.parametrize("dtype", ["float64", "complex128", "float32"])
def test_conversion_to_another_width(dtype, wanted):
    few = {"m_dtype": "int8", "v_dtype": "uint8"} if dtype == "float32" else {}
    with jax.enable_x64(True):
        params = np.ones(3, dtype)
        converted = encode_state(scale_by_adamax(**few).init(params), wanted, wanted)
        expected = jax.eval_shape(scale_by_adamax(m_dtype=wanted, v_dtype=wanted).init, params)
        assert jax.tree.map(jax.typeof, converted) == jax.tree.map(jax.typeof, expected)


def test_conversion_of_a_chain_with_wrappers():
    def make(**formats):
        inner = optax.masked(adamax(0.1, **formats), {"a": True, "b": False})
        return optax.MultiSteps(optax.chain(optax.clip(1.0), inner), 2).gradient_transformation()

    params = {"a": np.ones(3, np.float32), "b": np.ones(2, np.float32)}
    float32, low = make(), make(m_dtype="int8", v_dtype="uint8")
    with jax.numpy_dtype_promotion("standard"):  # optax.MultiSteps needs it
        _, state = jax.jit(float32.update)(params, float32.init(params), params)
    converted = encode_state(state, "int8", "uint8")
    assert jax.tree.structure(converted) == jax.tree.structure(low.init(params))
    with jax.numpy_dtype_promotion("standard"):
        jax.jit(low.update)(params, converted, params)
    assert jax.tree.structure(decode_state(converted)) == jax.tree.structure(state)


def test_nan_moments_stay_nan_in_every_format():
    tx = scale_by_adamax()
    ones = np.ones(2, np.float32)
    _, state = jax.jit(tx.update)(np.float32([1, np.nan]), tx.init(ones))
    low = encode_state(state, "int8", "uint8")
    m = np.asarray(decode_state(low).m)
    assert np.asarray(low.m.ratio_int8)[1] == -128 and np.isfinite(m[0])
    assert np.isnan(m[1])
    u, _ = jax.jit(scale_by_adamax(m_dtype="int8", v_dtype="uint8").update)(ones, low)
    u = np.asarray(u)
    assert np.isfinite(u[0]) and np.isnan(u[1])


@pytest.mark.parametrize("m_dtype, v_dtype", [(None, "uint8"), ("int8", "bfloat16")])
def test_scaled_state_works_in_optax_and_flax(m_dtype, v_dtype):
    tx, state = trained(m_dtype, v_dtype)
    assert isinstance(optax.tree.get(state, "v"), (ScaledBfloat16, ScaledUint8))
    phase = optax.tree.get(state, "phase")
    assert phase.dtype == jnp.uint32 and int(phase) > 0
    moved = optax.tree.set(state, phase=np.uint32(7))
    assert int(moved[0].v.phase) == 7
    seen = []
    mapped = optax.tree.map_params(tx, lambda x: seen.append(x.shape) or x, state)
    assert sorted(seen) == [(), (), (3, 5), (3, 5)]
    jax.tree.map(np.testing.assert_array_equal, mapped, state)
    restored = flax.serialization.from_bytes(tx.init(PARAMS), flax.serialization.to_bytes(state))
    jax.tree.map(np.testing.assert_array_equal, restored, state)
    assert jax.tree.map(jnp.result_type, restored) == jax.tree.map(jnp.result_type, state)


@pytest.mark.parametrize("m_dtype, v_dtype", [(None, None), ("bfloat16", "uint8")])
def test_empty_trees_and_arrays_are_converted(m_dtype, v_dtype):
    tx = adamax(0.1, m_dtype=m_dtype, v_dtype=v_dtype)
    for params in ({}, {"a": np.zeros((0, 3), np.float32)}, [None]):
        _, state = jax.jit(tx.update)(params, tx.init(params))
        same = encode_state(decode_state(state), m_dtype, v_dtype)
        assert jax.tree.structure(same) == jax.tree.structure(state)


@pytest.mark.parametrize(
    "built, given, words",
    [
        (("int8", "uint8"), (None, None), "stores m as float32, but the transformation was built"),
        ((None, None), ("int8", None), "stores m as int8 in a RatioInt8"),
        ((None, "uint8"), (None, "bfloat16"), "stores v as bfloat16 in a ScaledBfloat16"),
        ((None, None), (None, "uint8"), "stores v as uint8 in a ScaledUint8"),
        ((None, "bfloat16"), (None, None), "encode_state(state, m_dtype=None, v_dtype='bfloat16')"),
        (("bfloat16", None), ("float32", None), "stores m as float32"),
        (("float32", None), ("bfloat16", None), "stores m as bfloat16"),
    ],
)
def test_state_of_another_format_raises(built, given, words):
    with pytest.raises(TypeError) as raised:
        scale_by_adamax(m_dtype=built[0], v_dtype=built[1]).update(
            PARAMS, scale_by_adamax(m_dtype=given[0], v_dtype=given[1]).init(PARAMS)
        )
    assert words in str(raised.value)


@pytest.mark.parametrize("betas", [(0.9, 0.9), (0.99, 0.9), (0.5, 0.0), (0.9, 0.91)])
def test_int8_m_without_a_bound_raises(betas):
    with pytest.raises(ValueError, match="requires b1 < b2"):
        scale_by_adamax(*betas, m_dtype="int8")
    scale_by_adamax(*betas, m_dtype="bfloat16", v_dtype="uint8")


@pytest.mark.parametrize(
    "m_dtype, v_dtype",
    [("int8", None), ("bfloat16", None), (None, "bfloat16"), (None, "uint8"), ("int8", "uint8")],
)
def test_quantized_moments_of_complex_parameters_need_a_wrapper(m_dtype, v_dtype):
    z = np.ones(3, np.complex64)
    with pytest.raises(TypeError, match="split_real_and_imaginary"):
        scale_by_adamax(m_dtype=m_dtype, v_dtype=v_dtype).init(z)
    with pytest.raises(TypeError, match="split_real_and_imaginary"):
        encode_state(scale_by_adamax().init(z), m_dtype, v_dtype)
    tx = scale_by_adamax(m_dtype=m_dtype, v_dtype=v_dtype)
    tx = optax.contrib.split_real_and_imaginary(tx)
    with jax.numpy_dtype_promotion("standard"):  # optax's wrapper needs it
        u, _ = jax.jit(tx.update)((3 + 4j) * z, tx.init(z))
    np.testing.assert_allclose(u, (1 + 1j) * np.ones(3), rtol=0.15)


@pytest.mark.parametrize("dtype", ["m_dtype", "v_dtype"])
def test_conversion_to_an_unknown_format_raises(dtype):
    with pytest.raises(ValueError, match=f"{dtype} must be None or one of"):
        encode_state(scale_by_adamax().init(PARAMS), **{dtype: "float16"})
