"""A state in the memory of the host is converted there and back, as one on the device is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sharding.common import HOST_MEMORY

from optax_adamax import ScaleByAdamaxState, adamax, decode_state, encode_state

KINDS = ["pinned_host", "unpinned_host"]
CONVERSIONS = {
    "decoded": decode_state,
    "float32": encode_state,
    "other codes": lambda state: encode_state(state, "bfloat16", "bfloat16"),
    "the codes of v kept": lambda state: encode_state(state, "bfloat16", "uint8"),
    "the same": lambda state: encode_state(state, "int8", "uint8"),
}


def coded_state():
    v = jnp.array([[0.5, 3.0], [1e-6, 70.0]])
    floats = ScaleByAdamaxState(jnp.int32(3), {"w": -0.3 * v}, {"w": v})
    return (encode_state(floats, "int8", "uint8"), ())


def on_host(state, kind):
    if kind not in {memory.kind for memory in jax.devices()[0].addressable_memories()}:
        pytest.skip(f"this version of JAX has no {kind} on CPU")
    return jax.device_put(
        state, jax.sharding.SingleDeviceSharding(jax.devices()[0], memory_kind=kind)
    )


def kinds_of(state):
    return {x.sharding.memory_kind for x in jax.tree.leaves(state)}


def assert_same_bits(got, wanted):
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        assert x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("conversion", CONVERSIONS)
def test_conversion_stays_in_host_memory(conversion, kind):
    convert = CONVERSIONS[conversion]
    converted = convert(on_host(coded_state(), kind))
    assert kinds_of(converted) == {kind}
    assert_same_bits(converted, convert(coded_state()))


@pytest.mark.parametrize("kind", KINDS)
def test_floats_in_host_memory_are_encoded_there(kind):
    floats = decode_state(coded_state())
    encoded = encode_state(on_host(floats, kind), "int8", "uint8")
    assert kinds_of(encoded) == {kind}
    assert_same_bits(encoded, encode_state(floats, "int8", "uint8"))


@HOST_MEMORY
def test_conversion_of_host_memory_under_jit():
    hosted = on_host(coded_state(), "pinned_host")
    decoded = jax.jit(decode_state)(hosted)
    assert kinds_of(decoded) == {"pinned_host"}
    assert_same_bits(decoded, decode_state(coded_state()))


def test_a_state_of_numpy_arrays_is_converted():
    """As a checkpoint that was read without a target has it."""
    read = jax.tree.map(np.asarray, coded_state())
    assert_same_bits(decode_state(read), decode_state(coded_state()))
    assert_same_bits(
        encode_state(read, "bfloat16", "bfloat16"), CONVERSIONS["other codes"](coded_state())
    )


def test_a_converted_state_is_trained_on():
    tx = adamax(0.1, m_dtype="bfloat16", v_dtype="bfloat16")
    params = {"w": jnp.ones((2, 2))}
    state = encode_state(on_host(coded_state(), "pinned_host"), "bfloat16", "bfloat16")
    back = jax.device_put(state, params["w"].sharding)
    updates, _ = tx.update(params, back, params)
    assert bool(jnp.all(updates["w"] != 0))
