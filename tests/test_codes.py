"""Decoding and encoding a code returns the same code, and NaN stays NaN."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_adamax._m_formats import M_FORMATS
from optax_adamax._v_formats import V_FORMATS


@functools.cache
def coder(m_dtype):
    """Returns the compiled encode and decode of a format of m."""
    m_format = M_FORMATS[m_dtype]
    return jax.jit(lambda *xs: m_format.encode(*xs)), jax.jit(lambda *xs: m_format.decode(*xs))


@pytest.mark.parametrize("v_dtype", ["bfloat16", "uint8"])
def test_all_codes_of_v_are_fixed_points(v_dtype):
    v_format = V_FORMATS[v_dtype]
    codes = np.arange(256, dtype=np.uint8)
    if v_dtype == "bfloat16":
        codes = np.arange(0x3F80, 0x4080, dtype=np.uint16).view(jnp.bfloat16)
    v = jax.jit(lambda x: v_format.decode(x))(codes)
    assert np.all(np.diff(v) > 0)
    np.testing.assert_array_equal(jax.jit(lambda x: v_format.encode(x))(v), codes)


def test_range_of_uint8_v_holds_for_every_phase():
    """The stored value is between v / 2 and v, depending on the phase."""
    v_format = V_FORMATS["uint8"]
    lowest, highest = (float(v_format.decode(jnp.uint8(code))) for code in (0, 255))
    assert v_format.range == (2 * lowest, highest)


def test_all_codes_of_m_are_fixed_points():
    codes = np.arange(-127, 128, dtype=np.int8)
    (encode, decode), v = coder("int8"), np.float32(3.0)
    m = np.asarray(decode(codes, v))
    assert np.all(np.diff(m) > 0) and m[127] == 0
    assert float(m[-1]) == 3 * M_FORMATS["int8"].largest_ratio
    for rounding_bits in (0, 1 << 31):
        again = encode(m * np.float32(1.0001), v, np.uint32(rounding_bits))
        np.testing.assert_array_equal(again, codes)
    assert np.isnan(M_FORMATS["int8"].decode(jnp.int8(-128), jnp.float32(3.0)))


def test_bfloat16_m_is_a_fixed_point_for_any_rounding_bits():
    encode, _ = coder("bfloat16")
    m = np.arange(65536, dtype=np.uint16).view(jnp.bfloat16).astype(np.float32)
    m = m[np.isfinite(m) & (np.abs(m) >= 2.0**-126)]
    for rounding_bits in (0, 1 << 31, 2**32 - 1):
        again = np.asarray(encode(m, m, np.uint32(rounding_bits)))
        np.testing.assert_array_equal(again.astype(np.float32), m)


@pytest.mark.parametrize("bad", [0x7FFFFFFF, 0x7F800001, -1, 0x7F800000, -(1 << 23)])
def test_nan_and_infinity_never_become_a_number(bad):
    """Adding rounding bits to 0x7FFFFFFF, the NaN of NVIDIA GPUs, would overflow."""
    m, one = np.int32([bad]).view(np.float32), np.float32(1.0)
    for encode, decode in (coder("bfloat16"), coder("int8")):
        for rounding_bits in (0, 2**32 - 1):
            assert np.isnan(decode(encode(m, one, np.uint32(rounding_bits)), one))
