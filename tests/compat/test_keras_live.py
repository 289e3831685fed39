"""`compat.keras` against the installed Keras on its JAX backend, call by call."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peer_grid
import pytest
from peer_grid import assert_same

keras = pytest.importorskip("keras")
if keras.backend.backend() != "jax":
    pytest.skip("These tests compile Keras on its JAX backend.", allow_module_level=True)

from keras_run import KerasRun  # noqa: E402

from optax_adamax.compat import keras as compat_keras  # noqa: E402

OPTIONS = [
    {},
    {"learning_rate": 0.1},
    {"beta_1": 0.5, "beta_2": 0.9},
    {"beta_1": 0.0},
    {"beta_1": 0.99, "beta_2": 0.0},
    {"beta_2": 1.0},
    {"epsilon": 1e-3},
    {"weight_decay": 0.1, "learning_rate": 0.1},
    {"clipnorm": 0.1},
    {"clipnorm": 0.0},
    {"clipvalue": 0.1},
    {"clipvalue": -1.0},
    {"loss_scale_factor": 1024.0},
    {"loss_scale_factor": 3.0},
    {"gradient_accumulation_steps": 3, "learning_rate": 0.1},
    {"gradient_accumulation_steps": 2, "clipvalue": 0.1, "weight_decay": 0.01},
    {"use_ema": True, "ema_momentum": 0.9},
    {"use_ema": True, "ema_momentum": 0.5, "ema_overwrite_frequency": 3, "learning_rate": 0.1},
    {
        "use_ema": True,
        "ema_overwrite_frequency": 2,
        "gradient_accumulation_steps": 3,
        "loss_scale_factor": 8.0,
        "weight_decay": 0.1,
        "clipnorm": 1.0,
        "learning_rate": 0.05,
    },
]


def bias_fault(dtype, calls, beta_1=0.9, steps=1):
    """Returns the relative error of Keras' 1 - beta_1**t, computed in float32."""
    t = np.arange(calls) // steps + 1
    if dtype == np.float64 or beta_1 == 0:
        return np.zeros(len(t))
    power = np.asarray(jnp.power(np.float32(beta_1), t.astype(np.float32)), np.float64)
    return np.abs((1 - power) / (1 - beta_1**t) - 1)


def same(start, run, peer, dtype, steps=1, beta_1=0.9):
    """Asserts equal runs, except for the error of Keras' bias correction."""
    fault = bias_fault(dtype, len(peer), beta_1, steps)
    assert_same(start, run, peer, dtype, peer_fault=fault)


@pytest.mark.parametrize(("dtype", "options"), peer_grid.grid(OPTIONS))
def test_calls_equal_those_of_keras(dtype, options):
    # 2 ULPs per step in float32 and the error of Keras' bias correction; at most 1.6 were measured.
    start, grads = peer_grid.parameters(dtype), peer_grid.gradients(dtype)
    peer = KerasRun(start, grads, **options)
    with jax.enable_x64(dtype == np.float64):
        run = peer_grid.our_run(compat_keras.adamax(**options), start, grads)
    steps = options.get("gradient_accumulation_steps") or 1
    same(start, run, peer.steps, dtype, steps, options.get("beta_1", 0.9))


@pytest.mark.parametrize("options", [OPTIONS[0], OPTIONS[-1]], ids=str)
def test_calls_equal_those_of_eager_keras(options):
    start, grads = peer_grid.parameters(np.float32), peer_grid.gradients(np.float32)[:14]
    peer = KerasRun(start, grads, compiled=False, **options)
    run = peer_grid.our_run(compat_keras.adamax(**options), start, grads)
    same(start, run, peer.steps, np.float32, options.get("gradient_accumulation_steps") or 1)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_global_norm_is_clipped_as_in_keras(dtype):
    # Squares of huge gradients overflow (see the test below), and squares of tiny ones underflow.
    kinds = [k for k in peer_grid.KINDS if k not in ("huge", "tiny")]
    start = peer_grid.parameters(dtype, kinds=kinds)
    grads = peer_grid.gradients(dtype, kinds=kinds)
    for limit in (0.1, 1e12):
        peer = KerasRun(start, grads, global_clipnorm=limit)
        with jax.enable_x64(dtype == np.float64):
            tx = compat_keras.adamax(global_clipnorm=limit)
            run = peer_grid.our_run(tx, start, grads)
        same(start, run, peer.steps, dtype)


@pytest.mark.parametrize(
    ("accumulation", "frequency"),
    [
        (None, None),
        (None, 1),
        (3, 4),
        *(pytest.param(*x, marks=pytest.mark.slow) for x in [(None, 4), (3, None), (3, 1)]),
    ],
)
def test_averages_and_sums_equal_those_of_keras(accumulation, frequency):
    options = {
        "learning_rate": 0.1,
        "use_ema": True,
        "ema_momentum": 0.8,
        "ema_overwrite_frequency": frequency,
        "gradient_accumulation_steps": accumulation,
    }
    start, grads = peer_grid.parameters(np.float64), peer_grid.gradients(np.float64)
    peer = KerasRun(start, grads, **options)
    with jax.enable_x64(True):
        tx = compat_keras.adamax(**options)
        params = jax.tree.map(jnp.asarray, start)
        state = tx.init(params)
        for i, g in enumerate(grads):
            params, state = peer_grid.our_call(tx)(params, state, g)
            for k in start:
                close = {"rtol": 1e-12, "atol": 1e-12 * np.abs(peer.averages[i][k]).max()}
                np.testing.assert_allclose(params[k], peer.steps[i].p[k], **close)
                np.testing.assert_allclose(state.average[k], peer.averages[i][k], **close)
                if accumulation:
                    sums = optax.tree.get(state, "acc_grads")
                    np.testing.assert_array_equal(sums[k], peer.accumulators[i][k])
        final = compat_keras.finalize_variable_values(params, state)
        np.testing.assert_array_equal(final["normal"], state.average["normal"])


def test_infinite_gradient_affects_one_update():
    # clipvalue makes the mean finite, so only the sum could pass the infinity on.
    start, grads = (
        {"x": np.ones(2)},
        [{"x": np.full(2, g)} for g in [1.0, np.inf, 1.0, 1.0, 1.0, 1.0]],
    )
    options = {"gradient_accumulation_steps": 2, "clipvalue": 0.5}
    with jax.enable_x64(True):
        run = peer_grid.our_run(compat_keras.adamax(**options), start, grads)
    same(start, run, KerasRun(start, grads, **options).steps, np.float64)


def test_finalized_parameters_without_average_are_unchanged():
    params = {"x": jnp.ones(2)}
    tx = compat_keras.adamax()
    final = compat_keras.finalize_variable_values(params, tx.init(params))
    assert final["x"] is params["x"]


@pytest.mark.parametrize(
    ("dtype", "accumulation"),
    [
        (np.float32, None),
        (np.float64, 3),
        *(pytest.param(*x, marks=pytest.mark.slow) for x in [(np.float32, 3), (np.float64, None)]),
    ],
)
def test_schedule_receives_number_of_calls(dtype, accumulation):
    rates = {9: 0.1, 21: 0.01, 10**9: 0.001}

    def schedule(count):
        return jnp.select(
            [count < k for k in rates], [jnp.asarray(r, dtype) for r in rates.values()]
        )

    class Schedule(keras.optimizers.schedules.LearningRateSchedule):
        def __call__(self, step):
            return schedule(step)

    options = {"gradient_accumulation_steps": accumulation, "weight_decay": 0.01}
    start, grads = peer_grid.parameters(dtype), peer_grid.gradients(dtype)
    peer = KerasRun(start, grads, learning_rate=Schedule(), **options)
    with jax.enable_x64(dtype == np.float64):
        tx = compat_keras.adamax(schedule, **options)
        run = peer_grid.our_run(tx, start, grads)
    same(start, run, peer.steps, dtype, accumulation or 1)


def test_excluded_parameters_do_not_decay():
    start, grads = peer_grid.parameters(np.float64), peer_grid.gradients(np.float64)
    options = {"weight_decay": 0.1, "learning_rate": 0.1}
    excluded = ["^no", "spi"]
    mask = {k: k in ("normal", "spike") for k in start}
    peer = KerasRun(start, grads, exclude=excluded, **options)
    for exclude in (excluded, lambda params: mask):
        with jax.enable_x64(True):
            tx = compat_keras.adamax(**options, exclude_from_weight_decay=exclude)
            run = peer_grid.our_run(tx, start, grads)
        same(start, run, peer.steps, np.float64)


def test_exclusion_patterns_do_not_match_layer_names():
    tx = compat_keras.adamax(weight_decay=1.0, exclude_from_weight_decay="bias")
    params = {"bias_layer": {"kernel": jnp.ones(2), "bias": jnp.ones(2)}}
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = tx.update(zeros, tx.init(params), params)
    assert np.all(updates["bias_layer"]["bias"] == 0)
    assert np.all(updates["bias_layer"]["kernel"] < 0)


def test_step_in_bfloat16_differs_by_rounding():
    # Each step starts from Keras' state. Keras rounds to bfloat16 after each operation, including
    # 1 - 0.9**t, which is off by 2**-6 at the first steps. Otherwise 2 ULPs are allowed.
    start, grads = peer_grid.parameters(jnp.bfloat16), peer_grid.gradients(jnp.bfloat16)[:20]
    peer = KerasRun(start, grads, learning_rate=0.1).steps
    tx = compat_keras.adamax(learning_rate=0.1)
    for t in range(1, len(grads)):
        power = jnp.power(jnp.bfloat16(0.9), jnp.bfloat16(t + 1))
        fault = abs((1 - float(power)) / (1 - 0.9 ** (t + 1)) - 1)
        before = {k: peer[t - 1].p[k] for k in start}
        step = peer_grid.our_step(tx, before, grads[t], peer[t - 1], t + 1)
        how = {"m": peer[t - 1].m, "peer_fault": fault}
        assert_same(before, [step], [peer[t]], jnp.bfloat16, **how)


def lone_element(dtype, grads, **options):
    """Runs this package and Keras on a single parameter."""
    start, grads = {"x": np.ones(2, dtype)}, [{"x": np.full(2, g, dtype)} for g in grads]
    run = peer_grid.our_run(compat_keras.adamax(**options), start, grads)
    return run, KerasRun(start, grads, **options).steps


def test_u_decays_in_bfloat16_unlike_keras():
    run, peer = lone_element(jnp.bfloat16, [1.0] + [0.0] * 500)
    assert np.all(peer[-1].v["x"] == 1.0)
    np.testing.assert_allclose(run[-1].v["x"], 0.999**500, rtol=1e-4)


def test_zero_gradient_in_float16_is_finite_unlike_keras():
    run, peer = lone_element(np.float16, [0.0])
    assert np.isnan(peer[-1].p["x"]).all()
    assert np.all(run[-1].p["x"] == 1.0)


def test_first_step_equals_learning_rate_unlike_keras():
    run, peer = lone_element(np.float32, [1.0], learning_rate=0.5, beta_1=0.99999)
    assert abs(1 - peer[-1].p["x"][0] - 0.5) > 5e-4
    assert abs(1 - run[-1].p["x"][0] - 0.5) < 1e-6


def test_overflowing_norm_is_finite_unlike_keras():
    run, peer = lone_element(np.float32, [1e30, 1.0], global_clipnorm=1.0)
    assert np.isnan(peer[-1].p["x"]).all()
    assert np.all(run[0].p["x"] == 1.0)
    assert np.isfinite(run[-1].p["x"]).all()


@pytest.mark.parametrize(
    "options",
    [
        {"learning_rate": 1},
        {"clipnorm": 1.0, "clipvalue": 1.0},
        {"clipvalue": 1.0, "global_clipnorm": 1.0},
        {"gradient_accumulation_steps": 1},
        {"gradient_accumulation_steps": -2},
        {"use_ema": True, "ema_momentum": 1.1},
        {"use_ema": True, "ema_momentum": -0.1},
        {"use_ema": True, "ema_overwrite_frequency": -1},
        {"use_ema": True, "ema_overwrite_frequency": 2.0},
    ],
    ids=str,
)
def test_values_invalid_in_keras_raise(options):
    with pytest.raises(ValueError):
        keras.optimizers.Adamax(**options)
    with pytest.raises((TypeError, ValueError)):
        compat_keras.adamax(**options)


def test_signature_equals_that_of_keras():
    theirs = [
        p
        for p in inspect.signature(keras.optimizers.Adamax).parameters.values()
        if p.kind == p.POSITIONAL_OR_KEYWORD
    ]
    mine = inspect.signature(compat_keras.adamax).parameters
    assert list(mine)[: len(theirs)] == [p.name for p in theirs]
    assert [mine[p.name].default for p in theirs] == [p.default for p in theirs]
