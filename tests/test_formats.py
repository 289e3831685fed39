"""A new storage format is a class with `decode` and `encode`, and a row in a table."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_adamax import decode_state, encode_state, scale_by_adamax
from optax_adamax._m_formats import M_FORMATS
from optax_adamax._v_formats import V_FORMATS, VFormat
from tests.oracle import reference


class ScaledUint16(NamedTuple):
    scaled_uint16: Any
    phase: jax.Array


class Uint16V(VFormat):
    """The upper bits of a float32 without its sign, rounded to nearest."""

    dtype = np.dtype(np.uint16)
    container = ScaledUint16
    range = (2.0**-120, 2.0**127)
    relative_error = 2.0**-9

    def decode(self, w):
        return jax.lax.bitcast_convert_type(w.astype(jnp.int32) << 15, jnp.float32)

    def encode(self, w):
        bits = jax.lax.bitcast_convert_type(w, jnp.int32)
        return ((bits + (1 << 14)) >> 15).astype(self.dtype)


@pytest.fixture
def uint16(monkeypatch):
    monkeypatch.setitem(V_FORMATS, "uint16", Uint16V())


def test_new_format_needs_decode_and_encode_only(uint16):
    rng = np.random.default_rng(0)
    gradients = np.float32(rng.standard_t(2, (300, 16)) * 10.0 ** rng.uniform(-5, 3, 16))
    tx = scale_by_adamax(b2=0.95, eps=0.0, v_dtype="uint16")
    state, update = tx.init(gradients[0]), jax.jit(tx.update)
    for g in gradients:
        u, state = update(g, state)
    assert isinstance(state.v, ScaledUint16) and state.v.scaled_uint16.dtype == np.uint16
    expected, moments = reference.run(gradients, b2=0.95, eps=0.0)
    np.testing.assert_allclose(decode_state(state).v, moments.v, rtol=2.0**-9 + 1e-6)
    np.testing.assert_allclose(u, expected[-1], rtol=2.0**-8, atol=1e-5)
    back = encode_state(decode_state(state), v_dtype="uint16")
    np.testing.assert_allclose(decode_state(back).v, moments.v, rtol=2.0**-8)
    assert optax.tree.get(state, "phase") == state.v.phase
    with pytest.raises(TypeError, match="stores v as uint16 in a ScaledUint16"):
        scale_by_adamax(v_dtype="uint8").update(gradients[0], state)


@pytest.mark.parametrize("table", [M_FORMATS, V_FORMATS])
def test_no_two_formats_can_be_taken_for_each_other(table):
    """A checkpoint is told by the names of fields: those of coded moments differ."""
    fields = [
        format.container._fields[0] for format in table.values() if format.container is not None
    ]
    assert len(set(fields)) == len(fields)
    for name, format in table.items():
        assert name == (None if format.dtype is None else format.dtype.name)
