"""Quantized state has the same codes with and without optax's wrappers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.tree
import pytest
from parameters import formats

from optax_adamax import adamax, decode_state, scale_by_adamax
from optax_adamax._formats import unwrap
from optax_adamax._m_formats import m_format_of
from optax_adamax._state import dtypes_of
from optax_adamax._v_formats import v_format_of
from tests.oracle.formats import SOME_FORMATS

# Each quantized format of a moment occurs, and uint8 v also with full-precision m.
SOME_LOW_BIT = [*SOME_FORMATS[1:], ("int8", "bfloat16"), (None, "uint8")]
# int8 and uint8 use every value that a step computes; the other formats are slow.
quantized = pytest.mark.parametrize("m_dtype, v_dtype", formats(SOME_LOW_BIT, SOME_FORMATS[2:]))
PARAMS = {"a": np.ones((3, 5), np.float32), "b": np.ones(7, np.float32)}


def gradients(steps=12, seed=0):
    rng = np.random.default_rng(seed)
    return [
        jax.tree.map(lambda p: np.asarray(rng.standard_t(2, p.shape), np.float32), PARAMS)
        for _ in range(steps)
    ]


def run(tx, sequence, params=PARAMS):
    """Returns the last updates and state, under the dtype promotion that optax's wrappers need."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        updates, state, update = None, tx.init(params), jax.jit(tx.update)
        for g in sequence:
            updates, state = update(g, state, params)
    return updates, state


@functools.cache
def optimizer(m_dtype, v_dtype):
    return adamax(0.1, m_dtype=m_dtype, v_dtype=v_dtype)


@functools.cache
def plain_run(m_dtype, v_dtype):
    """Returns the run without a wrapper."""
    return run(optimizer(m_dtype, v_dtype), gradients())


def codes(state):
    """Returns the stored m and v without their containers."""
    core = optax.tree.get(state, "ScaleByAdamaxState")
    m_dtype, v_dtype = dtypes_of(core)
    return unwrap(core.m, m_format_of(m_dtype)), unwrap(core.v, v_format_of(v_dtype))


def assert_same_codes(state, other):
    """Checks equality bit for bit, except for float32 m: XLA can fuse its product and sum."""

    def same(x, y):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-6 if x.dtype == jnp.float32 else 0)

    jax.tree.map(same, codes(state), codes(other))


@quantized
def test_multi_steps_gives_the_same_codes(m_dtype, v_dtype):
    tx, sequence = optimizer(m_dtype, v_dtype), gradients()
    halves = [g for pair in zip(sequence, sequence, strict=True) for g in pair]
    _, state = run(optax.MultiSteps(tx, 2).gradient_transformation(), halves)
    assert_same_codes(state, plain_run(m_dtype, v_dtype)[1])


@quantized
def test_masked_and_partition_give_the_same_codes(m_dtype, v_dtype):
    tx = optimizer(m_dtype, v_dtype)
    only_a = [{"a": g["a"]} for g in gradients()]
    expected, plain = run(tx, only_a, {"a": PARAMS["a"]})
    for wrapped in (
        optax.masked(tx, {"a": True, "b": False}),
        optax.partition({"x": tx, "y": optax.sgd(0.1)}, {"a": "x", "b": "y"}),
    ):
        updates, state = run(wrapped, gradients())
        np.testing.assert_array_equal(updates["a"], expected["a"])
        for tree, other in zip(codes(state), codes(plain), strict=True):
            np.testing.assert_array_equal(tree["a"], other["a"])


@quantized
def test_flatten_gives_the_same_codes(m_dtype, v_dtype):
    updates, state = run(optax.flatten(optimizer(m_dtype, v_dtype)), gradients())
    expected, plain = plain_run(m_dtype, v_dtype)
    jax.tree.map(np.testing.assert_array_equal, updates, expected)
    for flat, tree in zip(codes(state), codes(plain), strict=True):
        leaves = [np.ravel(x) for x in jax.tree.leaves(tree)]
        np.testing.assert_array_equal(flat, np.concatenate(leaves))


@quantized
def test_apply_if_finite_skips_a_nonfinite_step(m_dtype, v_dtype):
    tx, sequence = optimizer(m_dtype, v_dtype), gradients()
    bad = jax.tree.map(lambda g: np.full_like(g, np.nan), sequence[0])
    updates, state = run(optax.apply_if_finite(tx, 3), [*sequence[:5], bad, *sequence[5:]])
    expected, plain = plain_run(m_dtype, v_dtype)
    jax.tree.map(np.testing.assert_array_equal, updates, expected)
    assert_same_codes(state, plain)


@quantized
def test_injected_hyperparameters_take_effect_in_each_step(m_dtype, v_dtype):
    """b1 is traced, b2 is scheduled, and the learning rate is set during the run."""
    make, params = optax.inject_hyperparams(adamax), {"b": PARAMS["b"]}
    tx = make(0.1, b1=0.8, b2=lambda t: 0.9 + 0.005 * t, eps=0.0, m_dtype=m_dtype, v_dtype=v_dtype)
    sequence = [{"b": g["b"]} for g in gradients(steps=12)]
    updates, state = run(tx, sequence, params)
    v = np.zeros_like(PARAMS["b"])
    for t, g in enumerate(sequence):
        v = np.maximum(np.float32(0.9 + 0.005 * t) * v, np.abs(g["b"]))
    found = decode_state(state).inner_state[0].v["b"]
    np.testing.assert_allclose(found, v, rtol={"bfloat16": 2**-8, "uint8": 1 / 8 + 1e-4}[v_dtype])
    state.hyperparams["learning_rate"] = jnp.float32(0.0)
    with jax.numpy_dtype_promotion("standard"):
        updates, _ = jax.jit(tx.update)(sequence[0], state, params)
    assert all(np.all(u == 0) for u in jax.tree.leaves(updates))


@quantized
def test_vmap_over_b2_equals_single_runs(m_dtype, v_dtype):
    """Each run of the batch has its own b2 and phase."""
    sequence = np.stack([g["b"] for g in gradients(steps=30)])

    def train(b2):
        tx = scale_by_adamax(b2=b2, m_dtype=m_dtype, v_dtype=v_dtype)
        return jax.lax.scan(lambda s, g: tx.update(g, s)[::-1], tx.init(sequence[0]), sequence)[0]

    b2 = np.float32([0.95, 0.99, 0.999])
    batch = jax.tree.map(np.asarray, jax.jit(jax.vmap(train))(b2))
    single_run = jax.jit(train)
    for i, value in enumerate(b2):
        single = single_run(value)
        row = jax.tree.map(lambda x: x[i], batch)  # noqa: B023
        assert_same_codes(row, single)
        assert row.v.phase == single.v.phase


@functools.cache
def run_in(dtype, m_dtype=None, v_dtype=None):
    """Returns the last update and the stored v after gradients of this dtype."""
    with jax.enable_x64(dtype == "float64"):
        tx = scale_by_adamax(m_dtype=m_dtype, v_dtype=v_dtype)
        sequence = [g["b"].astype(dtype) for g in gradients()]
        state, update = tx.init(sequence[0]), jax.jit(tx.update)
        kinds = jax.tree.map(jnp.result_type, state)
        for g in sequence:
            u, state = update(g, state)
            assert u.dtype == dtype and jax.tree.map(jnp.result_type, state) == kinds
        return np.float64(u), np.float64(decode_state(state).v)


@pytest.mark.parametrize(
    "m_dtype, v_dtype, dtype",
    [
        # Fast: every dtype with the 2-byte state, and each format of SOME_FORMATS with bfloat16.
        pytest.param(*moments, dtype, marks=[] if fast else pytest.mark.slow)
        for moments in SOME_LOW_BIT
        for dtype in ("bfloat16", "float16", "float64")
        for fast in [
            moments == SOME_FORMATS[2] or (moments in SOME_FORMATS and dtype == "bfloat16")
        ]
    ],
)
def test_quantized_state_agrees_with_full_precision_in_every_dtype(m_dtype, v_dtype, dtype):
    u, v = run_in(dtype, m_dtype, v_dtype)
    expected, exact_v = run_in(dtype)
    np.testing.assert_allclose(u, expected, atol=0.2)
    np.testing.assert_allclose(v, exact_v, rtol=1 / 8 + 1e-4)
