"""`compensate_rounding` passes float32 to `inner`; int16 residuals reproduce float32 exactly."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compensated import stepper, take, to_float64

from optax_adamax import Int8Residual, adamax, adamaxw, compensate_rounding, master_params


def inner_of(kind):
    """Returns an optimizer with a rate that is not a power of two, so XLA may contract products."""
    # Piecewise constant, because a compiled cosine differs in the last bits.
    schedule = optax.piecewise_constant_schedule(3e-4, {5: 0.7, 11: 0.3})
    if kind == "decay":  # a power of two, because optax adds a product
        return optax.chain(optax.add_decayed_weights(2.0**-10), optax.sgd(schedule))
    return {"rate": optax.sgd(3e-4), "schedule": optax.sgd(schedule)}[kind]


@pytest.mark.parametrize(
    "kind, residual_dtype",
    [
        ("rate", "int8"),
        ("decay", "int16"),
        pytest.param("rate", "int16", marks=pytest.mark.slow),
        pytest.param("decay", "int8", marks=pytest.mark.slow),
        pytest.param("schedule", "int8", marks=pytest.mark.slow),
        pytest.param("schedule", "int16", marks=pytest.mark.slow),
    ],
)
def test_compiled_eager_and_scanned_agree(kind, residual_dtype):
    rng = np.random.default_rng(1)
    tx = compensate_rounding(inner_of(kind), residual_dtype)
    params = jnp.asarray(rng.normal(size=500), jnp.bfloat16)
    gradients = jnp.asarray(rng.normal(size=(20, 500)), jnp.bfloat16)
    eager = compiled = start = params, tx.init(params)
    step = stepper(tx)
    for g in gradients:
        eager, compiled = take(tx, *eager, g), step(*compiled, g)

    @jax.jit
    def scan(carry):
        return jax.lax.scan(lambda c, g: (take(tx, *c, g), None), carry, gradients)[0]

    jax.tree.map(np.testing.assert_array_equal, eager, compiled)
    jax.tree.map(np.testing.assert_array_equal, eager, scan(start))


def test_int16_equals_float32_exactly():
    """The gradients are bfloat16, with weight decay. The steps run outside of jax.jit."""
    rng, inner = np.random.default_rng(2), adamaxw(3e-4, weight_decay=0.01)
    tx = compensate_rounding(inner, "int16")
    params = jnp.asarray(rng.normal(size=300), jnp.bfloat16)
    masters = params.astype(jnp.float32)
    state, inner_state = tx.init(params), inner.init(masters)
    for g in jnp.asarray(rng.normal(size=(6, 300)), jnp.bfloat16):
        params, state = take(tx, params, state, g)
        updates, inner_state = inner.update(g.astype(jnp.float32), inner_state, masters)
        masters = optax.apply_updates(masters, updates)
        np.testing.assert_array_equal(master_params(state, params), masters)
    jax.tree.map(np.testing.assert_array_equal, state.inner_state, inner_state)


def run_with_decay(make, params, gradients):
    """Returns by how much a decay of 1e-4 reduces the master parameters on average."""

    @jax.jit
    def run(decay):
        tx = make(decay)
        step = lambda carry, g: (take(tx, *carry, g), None)  # noqa: E731
        stored, state = jax.lax.scan(step, (params, tx.init(params)), gradients)[0]
        return stored if make is float32_optimizer else master_params(state, stored)

    with jax.numpy_dtype_promotion("standard"):
        without, decayed = (np.mean(to_float64(run(np.float32(decay)))) for decay in (0.0, 1e-4))
    return without - decayed


def float32_optimizer(decay):
    return optax.adamaxw(0.01, weight_decay=decay)


def test_weight_decay_is_applied_in_full_with_bfloat16_gradients():
    """With bfloat16 gradients, an optax chain would apply only 2 % of the decay."""
    rng = np.random.default_rng(3)
    params = rng.uniform(1, 2, 4096).astype(jnp.bfloat16)
    gradients = rng.normal(size=(300, 4096)).astype(jnp.bfloat16)
    expected = run_with_decay(
        float32_optimizer, params.astype(np.float32), gradients.astype(np.float32)
    )
    assert expected == pytest.approx(1e-4 * 300 * 0.01 * 1.5, rel=0.05)
    # int8 rounds 300 times per element, so the standard deviation is 1.4 % of the result.
    for residual_dtype, tolerance in (("int16", 2e-3), ("int8", 0.05)):

        def make(decay, residual_dtype=residual_dtype):
            return compensate_rounding(adamaxw(0.01, weight_decay=decay), residual_dtype)

        assert run_with_decay(make, params, gradients) == pytest.approx(expected, rel=tolerance)


def test_float32_and_complex_parameters_have_no_residual():
    tx = compensate_rounding(optax.identity())
    params = {"w": jnp.ones(3), "b": jnp.ones(2, jnp.bfloat16), "z": jnp.ones(2, jnp.complex64)}
    state = tx.init(params)
    assert [x.dtype for x in jax.tree.leaves(state)] == [jnp.int32, jnp.int8]
    assert isinstance(state.residual, Int8Residual)
    updates = jax.tree.map(lambda p: p * p.dtype.type(0.001), params)
    new, state = tx.update(updates, state, params)
    np.testing.assert_array_equal(new["w"], updates["w"])
    np.testing.assert_array_equal(new["z"], updates["z"])
    assert {k: u.dtype for k, u in new.items()} == {"w": "float32", "b": "float32", "z": "c8"}
    masters = master_params(state, params)
    assert masters["w"] is params["w"]


def test_inner_receives_float32_gradients_and_masters():
    """float64 gradients are not cast."""
    seen = []

    def update(updates, state, params=None, **extra):
        seen.append((updates, params, extra))
        return updates, state

    tx = compensate_rounding(optax.GradientTransformationExtraArgs(lambda _: (), update), "int16")
    params = {"a": jnp.ones(2, jnp.bfloat16), "b": jnp.ones(2)}
    state = tx.init(params)
    gradients = jax.tree.map(lambda p: p.astype(jnp.bfloat16) * jnp.bfloat16(0.001), params)
    params, state = take(tx, params, state, gradients)
    take(tx, params, state, gradients)
    for updates, masters, _ in seen:
        assert all(x.dtype == jnp.float32 for x in jax.tree.leaves((updates, masters)))
    assert float(seen[1][1]["a"][0]) == float(1 + jnp.float32(gradients["a"][0]))
    tx.update(gradients, state, params, value=3)
    assert seen[2][2] == {"value": 3}
    with jax.enable_x64(True):
        tx.update({"a": jnp.ones(2, jnp.float64), "b": jnp.ones(2)}, state, params)
        assert seen[3][0]["a"].dtype == jnp.float64


TX = compensate_rounding(adamax(1e-3))
LOW, FLOAT32 = jnp.ones(2, jnp.bfloat16), jnp.ones(2)


def init(params):
    return TX.init(params)


@pytest.mark.parametrize(
    ("error", "words", "call"),
    [
        (TypeError, "int8 or int16", lambda: compensate_rounding(adamax(0.1), "float32")),
        (TypeError, "int8 or int16, but 'int7' was given",
         lambda: compensate_rounding(adamax(0.1), "int7")),
        (TypeError, "update_dtype must be float32 or bfloat16, but float16 was given",
         lambda: compensate_rounding(adamax(0.1), update_dtype="float16")),
        (TypeError, r"compensate_rounding\(adamax", lambda: compensate_rounding("int8")),
        (TypeError, "Cast it to bfloat16 or float32", lambda: init(jnp.ones(2, jnp.float8_e4m3fn))),
        (TypeError, r"\['b'\] has dtype float16", lambda: init({"b": jnp.ones(2, "float16")})),
        (ValueError, "needs the parameters", lambda: TX.update(LOW, init(LOW))),
        (TypeError, "must be a CompensateRoundingState", lambda: TX.update(LOW, (init(LOW),), LOW)),
        (TypeError, "with optax.apply_updates", lambda: TX.update(LOW, init(LOW), FLOAT32)),
        (TypeError, "has no residual for it", lambda: TX.update(FLOAT32, init(FLOAT32), LOW)),
        (ValueError, r"its shape is \(3,\)",
         lambda: TX.update(LOW, init(LOW), jnp.ones(3, LOW.dtype))),
        (TypeError, "in an Int8Residual, but the transformation was built for an Int16Residual",
         lambda: compensate_rounding(adamax(0.1), "int16").update(LOW, init(LOW), LOW)),
        (ValueError, "contain a CompensateRoundingState, but this tuple does not",
         lambda: master_params((), LOW)),
        (ValueError, r"there is no parameter for \['a'\]\. Call init with these parameters",
         lambda: master_params(init({"a": LOW}), {"b": LOW})),
        (TypeError, "with optax.apply_updates", lambda: master_params(init(LOW), FLOAT32)),
        (ValueError, r"its shape is \(3,\)",
         lambda: master_params(init(LOW), jnp.ones(3, LOW.dtype))),
    ],
)  # fmt: skip
def test_bad_input_raises(error, words, call):
    with pytest.raises(error, match=words):
        call()
