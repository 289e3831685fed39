"""`compensate_rounding` works in loops with other additions, and detects changed updates."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compensated import (
    SGD,
    adding,
    assert_equal,
    gradients,
    parameters,
    residuals,
    stepper,
    take,
    to_float64,
)

from optax_adamax import adamax, adamaxw, compensate_rounding, limit_spikes, master_params


@residuals
def test_bfloat16_updates_train_like_float32_updates(residual_dtype):
    """A scan adds them without a cast, under strict promotion."""
    start = parameters()["a"]
    stacked = jnp.stack(gradients(start, steps=200))

    def train(update_dtype, add):
        tx = compensate_rounding(adamax(1e-3), residual_dtype, update_dtype=update_dtype)

        def step(carry, g):
            params, state = carry
            updates, state = tx.update(g, state, params)
            return (add(params, updates), state), None

        params, state = jax.lax.scan(step, (start, tx.init(start)), stacked)[0]
        return to_float64(master_params(state, params))

    bfloat16 = train("bfloat16", lambda p, u: p + u)
    with jax.numpy_dtype_promotion("standard"):
        float32 = train("float32", optax.apply_updates)
    distance, error = np.abs(float32 - to_float64(start)), np.abs(bfloat16 - float32)
    assert distance.max() > 0.01
    assert error.max() < 0.02 * distance.max()
    if residual_dtype == "int16":  # equal, except for elements that changed their sign
        assert np.mean(error < 1e-6) > 0.95


@pytest.mark.parametrize("update_dtype", ["float32", "bfloat16"])
def test_equinox_apply_updates_needs_bfloat16_updates(update_dtype):
    """With float32 updates, the next step raises an error that names the argument."""
    model = eqx.nn.Linear(2, 1, use_bias=False, key=jax.random.key(0), dtype=jnp.bfloat16)
    tx = compensate_rounding(adamaxw(1e-3), update_dtype=update_dtype)
    arrays, rest = eqx.partition(model, eqx.is_inexact_array)
    state, update = tx.init(arrays), jax.jit(tx.update)
    g = jax.tree.map(lambda p: p / p, arrays)
    with jax.numpy_dtype_promotion("standard"):
        updates, state = update(g, state, arrays)
        added = eqx.filter(eqx.apply_updates(model, updates), eqx.is_inexact_array)
        applied = eqx.combine(optax.apply_updates(arrays, updates), rest)
        if update_dtype == "float32":
            with pytest.raises(TypeError, match=r"compensate_rounding\(\.\.\., update_dtype="):
                update(g, state, added)
        else:
            update(g, state, added)
            np.testing.assert_array_equal(added.weight, applied.weight)
    assert applied.weight.dtype == jnp.bfloat16
    assert master_params(state, applied).weight.dtype == jnp.float32


def scaled_outside(tx):
    return optax.chain(tx, optax.scale(1e-4))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    "outside", [scaled_outside, lambda tx: optax.chain(tx, optax.add_decayed_weights(0.1))]
)
def test_check_applied_detects_transformations_outside(outside, compiled):
    """Without the check, optax.chain(compensate_rounding(...), scale) changes no parameters."""
    params = parameters()
    for check_applied in (False, True):
        tx = outside(compensate_rounding(optax.sgd(0.1), check_applied=check_applied))
        step = stepper(tx, compiled)
        first = step(params, tx.init(params), params)
        if not check_applied:
            jax.block_until_ready(step(*first, params))
            continue
        error = jax.errors.JaxRuntimeError if compiled else ValueError
        with pytest.raises(error, match=r"elements of \['a'\] differ. Make it the outermost"):
            jax.block_until_ready(step(*first, params))
            jax.effects_barrier()


def test_check_applied_accepts_correct_loops():
    """The check also accepts skipped steps of limit_spikes, and can be turned on during a run."""
    params, sequence = parameters(), gradients(steps=3)
    checked = compensate_rounding(SGD, check_applied=True)
    plain = compensate_rounding(SGD)
    for tx, state in [
        (checked, checked.init(params)),
        (limit_spikes(checked, max_norm=1e3), None),
        (checked, plain.init(params)),
    ]:
        p, state = params, tx.init(params) if state is None else state
        step = stepper(tx)
        large = jax.tree.map(lambda g: g * g.dtype.type(1e6), sequence[1])
        for g in (sequence[0], large, sequence[1]):
            p, state = step(p, state, g)
        jax.effects_barrier()
    left = plain.update(sequence[2], state, p)[1]  # the check can be turned off again
    assert left.expected_params == ()


def test_check_applied_accepts_parameters_that_are_nan():
    """NaN differs from itself, but the loop has added the updates unchanged."""
    params = {"w": jnp.ones(3, jnp.bfloat16)}
    tx = compensate_rounding(SGD, check_applied=True)
    state = tx.init(params)
    for g in (np.float32([1, np.nan, 2]), np.ones(3, np.float32)):
        params, state = take(tx, params, state, {"w": jnp.asarray(g)})
    jax.effects_barrier()
    np.testing.assert_array_equal(np.isnan(np.float32(params["w"])), [False, True, False])


def test_check_applied_stores_the_applied_parameters():
    params = parameters()
    tx = compensate_rounding(SGD, check_applied=True)
    params, state = take(tx, params, tx.init(params), params)
    assert state.expected_params["c"] == optax.MaskedNode()
    assert_equal({k: params[k] for k in "ab"}, {k: state.expected_params[k] for k in "ab"})


def test_count_saturates():
    """A count that wraps to negative numbers would exchange updates and residuals."""
    tx = adding("int8")
    params = jnp.ones(4, jnp.bfloat16)
    state = tx.init(params)._replace(count=jnp.int32(2**31 - 1))
    for _ in range(2):
        updates, state = tx.update(jnp.full(4, 0.25), state, params)
        np.testing.assert_array_equal(updates, np.full(4, 0.25, np.float32))
    assert int(state.count) == 2**31 - 1


def test_derivative_of_an_update_raises():
    """Without the error, the derivative would be zero, because rounding is piecewise constant."""
    tx = compensate_rounding(optax.sgd(0.1))
    params = jnp.ones(3, jnp.bfloat16)

    def loss(g):
        return jnp.sum(tx.update(g, tx.init(params), params)[0])

    for differentiate in (jax.grad(loss), jax.jit(jax.grad(loss))):
        with pytest.raises(TypeError, match=r"stop_gradient"):
            differentiate(jnp.ones(3))
    assert loss(jnp.ones(3)) < 0
