"""Updates have the wider dtype, so small updates take effect, and large updates saturate."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from parameters import formats

from optax_adamax import adamax, adamaxw, decode_state, encode_state, scale_by_adamax
from tests.oracle import reference
from tests.oracle.formats import LOW_BIT, SOME_FORMATS, v_error


@pytest.mark.parametrize("rate", [1e-6, 1e-7])
@pytest.mark.parametrize("optimizer", [adamax, adamaxw])
def test_small_learning_rates_take_effect_with_float16_gradients(optimizer, rate):
    """After 5,000 steps, the change of float32 parameters is exact within 0.02 %."""
    decay = {"weight_decay": 0.1} if optimizer is adamaxw else {}
    tx = optimizer(rate, **decay)
    g = np.float16([0.5, -0.25])

    def step(carry, _):
        params, state = carry
        u, state = tx.update(g, state, params)
        return (optax.apply_updates(params, u), state), u.dtype == jnp.float32

    params = np.float32([1e-3, -1e-3])
    run = jax.jit(lambda: jax.lax.scan(step, (params, tx.init(params)), length=5_000))
    (end, _), updates_are_float32 = run()
    assert np.asarray(updates_are_float32).all()
    expected = np.float64(params)
    for _ in range(5_000):  # the update of a constant gradient is its sign
        decayed = expected * decay.get("weight_decay", 0)
        expected = expected - rate * (np.sign(np.float64(g)) * (1 - 3e-8) + decayed)
    distance = np.float64(params) - expected
    np.testing.assert_allclose(np.float64(params) - np.float64(end), distance, rtol=2e-4)


@pytest.mark.parametrize("m_dtype, v_dtype", SOME_FORMATS)
@pytest.mark.parametrize("p", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("g", ["float16", "bfloat16", "float32"])
def test_updates_have_the_wider_dtype(m_dtype, v_dtype, g, p):
    tx = scale_by_adamax(m_dtype=m_dtype, v_dtype=v_dtype)
    params, grads = np.ones(3, p), np.ones(3, g)
    state = jax.eval_shape(tx.init, params)

    def dtype(*arguments):
        return jax.eval_shape(tx.update, grads, state, *arguments)[0].dtype

    wider = "float32" if "float32" in (g, p) else g
    assert dtype(params) == wider and dtype() == g


def test_update_has_the_dtype_of_its_own_parameter():
    params = {"a": np.ones(2, jnp.bfloat16), "b": np.ones(2, np.float32)}
    g = jax.tree.map(lambda p: np.ones(2, jnp.bfloat16), params)
    state = jax.eval_shape(scale_by_adamax().init, params)
    u, _ = jax.eval_shape(scale_by_adamax().update, g, state, params)
    assert (u["a"].dtype, u["b"].dtype) == (jnp.bfloat16, np.float32)


def test_update_too_large_for_float8_saturates():
    """For b1 > b2 no bound applies, so an update can exceed the range of its dtype."""
    tx = scale_by_adamax(0.0, 1.0, 0.0, eps_placement="denominator")
    u, _ = tx.update(jnp.float8_e4m3fn([448.0, -2.0]), tx.init(jnp.zeros(2, jnp.float8_e4m3fn)))
    assert u.dtype == jnp.float8_e4m3fn and np.all(np.float32(u) == [1, -1])
    tx = scale_by_adamax(0.999, 0.99, 0.0)  # |m| / v can grow without limit
    state = tx.init(jnp.zeros(1, jnp.float8_e4m3fn))
    state = state._replace(count=jnp.int32(100), m=jnp.float32([1e6]), v=jnp.float32([1.0]))
    u, _ = tx.update(jnp.float8_e4m3fn([0.0]), state)
    assert np.float32(u) == 448


@pytest.mark.parametrize("m_dtype, v_dtype", formats(LOW_BIT))
def test_float64_gradients_saturate_in_quantized_state(m_dtype, v_dtype):
    """Updates are computed in float64; 1e300 is stored as the largest number of the format."""
    with jax.enable_x64(True):
        tx = scale_by_adamax(m_dtype=m_dtype, v_dtype=v_dtype, nonfinite="zero")
        gradients = np.float64([[1.0, 1e300], [0.5, -1e300], [1e-3, 1.0], [0.2, 0.0]])
        state, moments = tx.init(np.zeros(2)), reference.start((2,))
        update = jax.jit(tx.update)
        for g in gradients:
            u, state = update(g, state)
            _, moments = reference.step(g, moments)
            assert u.dtype == jnp.float64 and np.all(np.isfinite(u))
            assert np.all(np.abs(np.asarray(u)) <= 1.01)
        assert int(state.nonfinite_count) == 0
        decoded = jax.device_get(decode_state(state)).inner_state
        assert np.all(np.isfinite(decoded.m)) and np.all(np.isfinite(decoded.v))
        assert abs(float(decoded.v[0]) / moments.v[0] - 1) <= v_error(v_dtype)


@pytest.mark.parametrize("m_dtype, v_dtype", SOME_FORMATS[1:])
def test_batched_states_are_decoded_row_by_row(m_dtype, v_dtype):
    """Each row has its own phase. With three rows of three, mixed-up axes would not raise."""
    tx = scale_by_adamax(m_dtype=m_dtype, v_dtype=v_dtype)

    @jax.jit
    def after(steps):
        zeros, g = np.zeros(3, np.float32), np.float32([1, 2, 3])
        carry = jnp.asarray(zeros), tx.init(zeros)
        return jax.lax.fori_loop(0, steps, lambda i, c: tx.update(g, c[1]), carry)[1]

    @jax.jit
    def round_trip(state):
        decoded = decode_state(state)
        return decoded, encode_state(decoded, m_dtype, v_dtype)

    rows = [after(steps) for steps in (1, 250, 500)]
    stacked = jax.tree.map(lambda *x: np.stack(x), *rows)
    expected = jax.tree.map(lambda *x: np.stack(x), *map(round_trip, rows))
    jax.tree.map(np.testing.assert_array_equal, round_trip(stacked), expected)


def test_encode_state_rejects_a_state_of_optax():
    state = optax.adamax(0.1).init(jnp.zeros(3))
    with pytest.raises(TypeError, match="must contain a ScaleByAdamaxState"):
        encode_state(state, "int8", "uint8")


@pytest.mark.parametrize("rule", [{"b1": 1.0}, {"b2": 1.5}, {"b2": -0.1}, {"eps": -1.0}], ids=str)
def test_concrete_arrays_out_of_range_raise(rule):
    ((name, value),) = rule.items()
    with pytest.raises(ValueError, match=name):
        scale_by_adamax(**{name: jnp.float32(value)})
