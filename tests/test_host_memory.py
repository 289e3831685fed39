"""Converting a state in host memory gives a state in host memory with the same bits."""

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
    "v in the same codes": lambda state: encode_state(state, "bfloat16", "uint8"),
    "the same": lambda state: encode_state(state, "int8", "uint8"),
}


def quantized_state():
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
def test_converted_state_is_in_host_memory(conversion, kind):
    convert = CONVERSIONS[conversion]
    converted = convert(on_host(quantized_state(), kind))
    assert kinds_of(converted) == {kind}
    assert_same_bits(converted, convert(quantized_state()))


@pytest.mark.parametrize("kind", KINDS)
def test_encoded_floats_are_in_host_memory(kind):
    floats = decode_state(quantized_state())
    encoded = encode_state(on_host(floats, kind), "int8", "uint8")
    assert kinds_of(encoded) == {kind}
    assert_same_bits(encoded, encode_state(floats, "int8", "uint8"))


@HOST_MEMORY
def test_jitted_conversion_is_in_host_memory():
    hosted = on_host(quantized_state(), "pinned_host")
    decoded = jax.jit(decode_state)(hosted)
    assert kinds_of(decoded) == {"pinned_host"}
    assert_same_bits(decoded, decode_state(quantized_state()))


def test_numpy_state_is_converted():
    """Checkpoints restored without a target contain NumPy arrays."""
    read = jax.tree.map(np.asarray, quantized_state())
    assert_same_bits(decode_state(read), decode_state(quantized_state()))
    assert_same_bits(
        encode_state(read, "bfloat16", "bfloat16"), CONVERSIONS["other codes"](quantized_state())
    )


def test_converted_state_can_be_trained():
    tx = adamax(0.1, m_dtype="bfloat16", v_dtype="bfloat16")
    params = {"w": jnp.ones((2, 2))}
    state = encode_state(on_host(quantized_state(), "pinned_host"), "bfloat16", "bfloat16")
    back = jax.device_put(state, params["w"].sharding)
    updates, _ = tx.update(params, back, params)
    assert bool(jnp.all(updates["w"] != 0))
