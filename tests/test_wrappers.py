"""All wrappers and policies have a count first in their state and accept the same objects."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.tree
import pytest

import optax_adamax
from optax_adamax import (
    adamax,
    adamaxw,
    compat,
    compensate_rounding,
    limit_spikes,
    master_params,
    pack_small_leaves,
    sharding,
)
from optax_adamax.wrappers.probe import ProbeGradientsState, probe_gradients

SGD = optax.sgd(0.1, momentum=0.9)
STATES = {
    optax_adamax.HandleNonfiniteState: "nonfinite_count",
    optax_adamax.LimitSpikesState: "spike_count",
    optax_adamax.CompensateRoundingState: "count",
    optax_adamax.ScaleByAdamaxState: "count",
    ProbeGradientsState: "count",
}
WRAPPERS = {
    "compensate_rounding": compensate_rounding,
    "limit_spikes, skip": lambda tx: limit_spikes(tx, 5.0),
    "limit_spikes, clip": lambda tx: limit_spikes(tx, 5.0, action="clip"),
}
each_wrapper = pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)


@pytest.mark.parametrize("state, counter", STATES.items())
def test_first_field_of_each_state_is_a_counter(state, counter):
    """For a chain, users write `state[0].count`. It must be the counter or raise."""
    assert state._fields[0] == counter


@pytest.mark.parametrize(
    "make",
    [
        lambda: adamax(0.1, nonfinite="zero"),
        lambda: adamax(0.1, nonfinite="skip_step"),
        lambda: limit_spikes(adamax(0.1), 5.0),
        lambda: compensate_rounding(adamax(0.1)),
        lambda: adamax(0.1),
    ],
)
def test_count_of_the_first_state_is_never_a_method(make):
    """If the inner state were the first field, `state[0].count` would be `tuple.count`."""
    state = make().init(jnp.ones(3))
    assert not callable(getattr(state[0], "count", None))


class Duck:
    """An object with `init` and `update` that accepts no extra arguments."""

    def init(self, params):
        return SGD.init(params)

    def update(self, updates, state, params=None):
        return SGD.update(updates, state, params)


@each_wrapper
@pytest.mark.parametrize("inner", [optax.MultiSteps(SGD, 2), Duck()], ids=["MultiSteps", "Duck"])
def test_object_with_init_and_update_is_accepted(wrap, inner):
    params = jnp.ones(3, jnp.bfloat16)
    plain = inner
    if isinstance(inner, optax.MultiSteps):
        plain = inner.gradient_transformation()
    tx, expected = wrap(inner), wrap(plain)
    state, other = tx.init(params), expected.init(params)
    for _ in range(2):
        with jax.numpy_dtype_promotion("standard"):  # MultiSteps needs it
            u, state = tx.update(params, state, params, value=1.0)
            w, other = expected.update(params, other, params, value=1.0)
        np.testing.assert_array_equal(u, w)
    assert np.all(np.asarray(u, np.float32) < 0)


@each_wrapper
def test_extra_arguments_reach_multi_steps(wrap):
    seen = []

    def update(updates, state, params=None, **extra_args):
        seen.append(extra_args)
        return updates, state

    inner = optax.GradientTransformationExtraArgs(lambda _: (), update)
    tx = wrap(optax.MultiSteps(inner, 1))
    params = jnp.ones(2, jnp.bfloat16)
    with jax.numpy_dtype_promotion("standard"):
        tx.update(params, tx.init(params), params, value=3.0)
    assert seen and seen[-1]["value"] == 3.0


@each_wrapper
@pytest.mark.parametrize(
    "inner, words",
    [(adamax, "the function adamax"), (optax.MultiSteps, "the class MultiSteps"), (None, "None")],
)
def test_other_object_raises(wrap, inner, words):
    with pytest.raises(TypeError, match=f"but {words} was given. Write .*adamax"):
        wrap(inner)


class Model(eqx.Module):
    """Has arrays, functions, an integer, an integer array and a submodule without parameters."""

    linear: eqx.nn.Linear
    table: jax.Array
    steps: int = 3
    activation: object = jax.nn.relu
    pool: object = eqx.nn.Lambda(jax.nn.tanh)


def model_and_gradients():
    linear = eqx.nn.Linear(2, 2, key=jax.random.key(0), dtype=jnp.bfloat16)
    model = Model(linear, jnp.arange(3))
    return model, jax.tree.map(jnp.ones_like, eqx.filter(model, eqx.is_inexact_array))


UNFILTERED = {
    "limit_spikes, skip": lambda: limit_spikes(SGD, 5.0),
    "limit_spikes, clip": lambda: limit_spikes(SGD, 5.0, action="clip"),
    "compensate_rounding": lambda: compensate_rounding(SGD),
    "probe_gradients": lambda: optax.chain(probe_gradients("uint8"), SGD),
    "adamax": lambda: adamax(0.1),
    "adamaxw": lambda: adamaxw(0.1),
    "zero": lambda: adamax(0.1, nonfinite="zero"),
    "skip_step": lambda: adamax(0.1, nonfinite="skip_step"),
    "limit_spikes of adamax": lambda: limit_spikes(adamax(0.1), 5.0),
    "compensated adamax": lambda: compensate_rounding(adamaxw(0.1)),
    "pack_small_leaves": lambda: pack_small_leaves(adamaxw(0.1)),
    "shard": lambda: sharding.shard(
        adamaxw(0.1), eqx.filter(model_and_gradients()[0], eqx.is_inexact_array)
    ),
    "compat.torch": lambda: compat.torch.adamax(lr=0.1, weight_decay=0.1),
    "compat.keras": lambda: compat.keras.adamax(0.1, weight_decay=0.1),
    "compat.lucid": lambda: compat.lucid.adamax(0.1, weight_decay=0.1),
    "compat.mlx": lambda: compat.mlx.adamax(0.1),
}


@pytest.mark.parametrize("make", UNFILTERED.values(), ids=UNFILTERED)
def test_unfiltered_equinox_model_is_accepted(make):
    """As in optax, a parameter may have any type if its gradient is None."""
    model, g = model_and_gradients()
    tx = make()
    with jax.numpy_dtype_promotion("standard"):
        state = tx.init(eqx.filter(model, eqx.is_inexact_array))
        for _ in range(2):
            updates, state = tx.update(g, state, model)
    assert jax.tree.structure(updates) == jax.tree.structure(g)
    filtered = eqx.filter(model, eqx.is_inexact_array)
    expected, _ = tx.update(g, state, filtered)
    again, _ = tx.update(g, state, model)
    jax.tree.map(np.testing.assert_array_equal, again, expected)


def test_masters_of_an_unfiltered_model_keep_its_other_leaves():
    model, _ = model_and_gradients()
    state = compensate_rounding(SGD).init(eqx.filter(model, eqx.is_inexact_array))
    masters = master_params(state, model)
    assert masters.linear.weight.dtype == jnp.float32
    assert masters.activation is model.activation and masters.steps == 3
    assert masters.table is model.table
