"""`compat.keras.finalize_variable_values` for averages inside wrappers and partitions."""

import jax.numpy as jnp
import numpy as np
import optax
import peer_grid
import pytest

import optax_adamax
from optax_adamax.compat import keras as compat_keras


def test_average_inside_wrappers_is_finalized():
    params = {"w": jnp.ones(2), "x": jnp.ones(3)}
    average = compat_keras.adamax(0.1, use_ema=True)
    for tx in (
        optax.chain(optax.clip(1.0), average),
        optax.inject_hyperparams(compat_keras.adamax)(learning_rate=0.1, use_ema=True),
        optax_adamax.pack_small_leaves(average),
        optax.masked(average, {"w": True, "x": True}),
    ):
        after, state = peer_grid.train(tx, params, tx.init(params), [params] * 3)
        final = compat_keras.finalize_variable_values(after, state)
        # The average of the parameters after 1, 2 and 3 calls, the first of them a copy.
        copy = 1 - 0.1
        expected = 0.99 * (0.99 * copy + 0.01 * (copy - 0.1)) + 0.01 * (copy - 0.2)
        np.testing.assert_allclose(final["w"], expected, rtol=1e-5)
        assert float(after["w"][0]) == pytest.approx(0.7)


def test_averages_in_a_partition_are_finalized():
    params = {"w": jnp.ones(2), "x": jnp.ones(3), "y": jnp.ones(3)}
    average = compat_keras.adamax(0.1, use_ema=True)
    groups = {"a": average, "b": average, "plain": optax.sgd(0.1)}
    tx = optax.partition(groups, {"w": "a", "x": "b", "y": "plain"})
    after, state = peer_grid.train(tx, params, tx.init(params), [params] * 3)
    final = compat_keras.finalize_variable_values(after, state)
    assert np.all(final["w"] > after["w"]) and np.all(final["x"] > after["x"])
    np.testing.assert_array_equal(final["y"], after["y"])
    with pytest.raises(ValueError, match=r"with averages, but \['x'\] are missing"):
        compat_keras.finalize_variable_values({"w": params["w"], "y": params["y"]}, state)
    with pytest.raises(TypeError, match="must contain a ScaleByAdamaxState, but this dict"):
        compat_keras.finalize_variable_values(state, params)
    with pytest.raises(ValueError, match="but it has 2 AverageState"):
        compat_keras.dump_state(state, params, names=list(params), learning_rate=None)
