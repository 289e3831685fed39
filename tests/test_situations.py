"""Situations of user code: wrappers of optax, odd schedules and counters, export, logging."""

import copy
import dataclasses
import functools
import json
import pickle

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import optax.tree
import pytest
from jax.experimental import checkify

import optax_adamax
from optax_adamax import (
    adamax,
    compensate_rounding,
    describe_state,
    limit_spikes,
    pack_small_leaves,
    probe_gradients,
    scale_by_adamax,
    unpack_state,
)
from tests.oracle import reference

LOW = {"m_dtype": "int8", "v_dtype": "uint8"}
RNG = np.random.default_rng(0)
PARAMS = {"b": np.float32(RNG.normal(size=3)), "w": np.float32(RNG.normal(size=(4, 3)))}
GRADIENTS = [
    jax.tree.map(lambda p: np.float32(RNG.standard_t(3, p.shape)), PARAMS) for _ in range(6)
]
WRAPPED_BY_OPTAX = {
    "mechanize": lambda o: optax.contrib.mechanize(o.adamax(0.1)),
    "sam": lambda o: optax.contrib.sam(
        o.adamax(0.1), optax.chain(optax.contrib.normalize(), o.adamax(0.05))
    ),
}


def train(tx, gradients=GRADIENTS, params=PARAMS):
    state, update = tx.init(params), jax.jit(tx.update)
    with jax.numpy_dtype_promotion("standard"):  # optax needs it
        for g in gradients:
            updates, state = update(g, state, params)
            params = optax.apply_updates(params, updates)
    return params, state


def assert_close(tree, other, rtol=2e-5, atol=1e-6):
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=rtol, atol=atol), tree, other)


@pytest.mark.parametrize("name", WRAPPED_BY_OPTAX)
def test_wrapped_by_optax_it_trains_like_optax(name):
    make = WRAPPED_BY_OPTAX[name]
    assert_close(train(make(optax_adamax))[0], train(make(optax))[0], rtol=1e-4)


def test_defaults_of_compensate_rounding_can_be_injected():
    """optax.inject_hyperparams would call a default such as jnp.int8 like a schedule."""
    half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
    tx = optax.inject_hyperparams(compensate_rounding)(adamax(0.1))
    updates, state = jax.eval_shape(tx.update, half, tx.init(half), half)
    assert updates["w"].dtype == jnp.float32
    assert optax.tree.get(state, "residual")[0]["w"].dtype == jnp.int8


def test_injected_limit_is_set_during_a_run():
    tx = optax.inject_hyperparams(limit_spikes)(adamax(0.1), max_norm=100.0)
    _, state = tx.update(GRADIENTS[0], tx.init(PARAMS), PARAMS)
    updates, state = tx.update(GRADIENTS[1], optax.tree.set(state, max_norm=1e-3), PARAMS)
    assert int(optax.tree.get(state, "spike_count")) == 1 and not np.any(updates["w"])


@pytest.mark.parametrize(
    "options", [{"max_norm_ratio": 5.0}, {"max_norm_ratio": 5.0, "action": "clip"}]
)
def test_derivative_without_a_spike_is_the_derivative_of_inner(options):
    """In the first steps, the relative limit is infinite; the derivative of a quotient was NaN."""

    def end(x, tx):
        u, state = tx.update(x, tx.init(x))
        return jnp.sum(u) + jnp.sum(tx.update(x**3, state)[0])

    derivative = jax.jit(jax.grad(end), static_argnums=1)
    inner, x = adamax(0.1), np.float32([1.0, -2.0])
    assert_close(derivative(x, limit_spikes(inner, **options)), derivative(x, inner))
    zero = derivative(0 * x, limit_spikes(optax.identity(), **options))
    np.testing.assert_array_equal(zero, [1, 1])


@pytest.mark.parametrize(
    "tx", [adamax(0.1, eps=0.0), limit_spikes(adamax(0.1), 5.0, action="clip")]
)
def test_zero_gradients_cause_no_division_by_zero(tx):
    zero = np.zeros(3, np.float32)
    checked = jax.jit(checkify.checkify(tx.update, errors=checkify.float_checks))
    checked(zero, tx.init(zero))[0].throw()


SCHEDULES = [
    lambda t: 1,
    lambda t: np.float64(0.5),
    lambda t: jnp.bfloat16(0.5),
    lambda t: np.int64(2),
    optax.join_schedules([optax.constant_schedule(1), optax.constant_schedule(0.25)], [1]),
]


@pytest.mark.parametrize("x64", [False, True])
def test_schedule_may_return_any_number(x64):
    g = np.float32([[1.0], [-3.0], [0.5]])
    directions, _ = reference.run(g)
    with jax.enable_x64(x64), jax.numpy_dtype_promotion("standard"):
        for schedule in SCHEDULES:
            tx = adamax(schedule)
            state = tx.init(g[0])
            for t, direction in enumerate(directions):
                u, state = tx.update(g[t], state)
                assert u.dtype == jnp.float32
                np.testing.assert_allclose(u, -float(schedule(t)) * direction, rtol=2e-5)


@pytest.mark.parametrize("count", [7, np.int64(7)])
def test_restored_number_is_a_count(count):
    """With x64, its dtype is int64. The next state has the dtypes of `init` nevertheless."""
    tx = adamax(0.1)
    with jax.enable_x64(True):
        first = tx.init(PARAMS)
        _, state = tx.update(GRADIENTS[0], optax.tree.set(first, count=count))
    assert jax.tree.map(lambda x: x.dtype, state) == jax.tree.map(lambda x: x.dtype, first)
    assert int(state[0].count) == 8


def test_phase_of_64_bits_raises():
    """It would not overflow at 2**32, and v would not decay by b2."""
    tx = scale_by_adamax(v_dtype="uint8")
    with jax.enable_x64(True):
        state = optax.tree.set(tx.init(PARAMS), phase=np.uint64(5))
        with pytest.raises(TypeError, match="phase of the state must be an array of dtype uint32"):
            tx.update(GRADIENTS[0], state)


def test_step_for_any_size_can_be_exported():
    tx = limit_spikes(adamax(0.1, **LOW, nonfinite="zero"), max_norm=1e3)
    (n,) = jax.export.symbolic_shape("n")
    g, struct = PARAMS["w"], jax.ShapeDtypeStruct((n, 3), np.float32)
    exported = jax.export.export(jax.jit(lambda g: tx.update(g, tx.init(g))[0]))(struct)
    assert_close(exported.call(g), jax.jit(tx.update)(g, tx.init(g))[0])


def test_numpy_integers_are_integers():
    pack_small_leaves(adamax(0.1), np.int64(100)).init(PARAMS)
    reports = []
    tx = probe_gradients("uint8", reports.append, every=np.int64(1))
    tx.update(GRADIENTS[0], tx.init(PARAMS))
    jax.effects_barrier()
    assert len(reports) == 1


def test_description_can_be_logged():
    """As JSON, pickled, from a state of NumPy arrays, and in a callback of a jitted step."""
    _, state = train(adamax(0.1, **LOW), GRADIENTS[:1])
    description, seen = describe_state(state), []
    logged = json.loads(json.dumps(dataclasses.asdict(description)))
    assert logged["leaves"][0]["m_dtype"] == "int8" and logged["bytes"] == 38
    assert pickle.loads(pickle.dumps(description)) == copy.deepcopy(description) == description
    assert describe_state({"opt": state, "name": "run 3"}) == description
    jax.jit(lambda s: jax.debug.callback(lambda s: seen.append(describe_state(s)), s))(state)
    jax.effects_barrier()
    assert [*seen, describe_state(jax.tree.map(np.asarray, state))] == [description] * 2


def test_keys_with_separators_have_different_names():
    b = PARAMS["b"]
    params = {"a/b": b, "a": {"b": 2 * b, "c'd": 3 * b}, "a.b": 4 * b, "": 5 * b}
    packed, packed_state = train(pack_small_leaves(adamax(0.1)), [params] * 3, params)
    plain, state = train(adamax(0.1), [params] * 3, params)
    jax.tree.map(np.testing.assert_array_equal, packed, plain)
    jax.tree.map(np.testing.assert_array_equal, unpack_state(packed_state, params), state)
