"""Composed with the parts that optax offers, against the same composition of optax's own Adamax."""

import functools
import pickle

import flax.serialization
import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import optax
import optax.contrib
import optax.tree
import pytest

import optax_adamax
from tests.oracle import reference

STEPS = 20
RATE = 0.05
SHAPES = {"b": (3,), "w": (4, 3)}
WEIGHTS = {"b": False, "w": True}  # a mask: what is no bias
DECAY = optax.exponential_decay(RATE, 5, 0.7)
RISE = optax.linear_schedule(0.5, 0.9, STEPS)


def tree(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    return {
        name: (scale * rng.standard_t(2, shape)).astype(np.float32)
        for name, shape in SHAPES.items()
    }


PARAMS = jax.tree.map(lambda x: np.clip(x, -4, 4), tree(0))
GRADIENTS = [tree(step, 10.0 ** (step % 5 - 2)) for step in range(1, STEPS + 1)]
SOME_NAN = [
    jax.tree.map(lambda g, t=t: g * np.float32(np.nan if t in (3, 4, 11) else 1), gradients)
    for t, gradients in enumerate(GRADIENTS)
]
PLATEAU = [{"value": jnp.float32(1.0)}] * STEPS


def run(tx, params=PARAMS, gradients=GRADIENTS, extra=None, state=None, compiler=jax.jit):
    """The parameters after each step of a compiled run, and the last state."""
    update = compiler(tx.update)
    params = jax.tree.map(jnp.asarray, params)
    state = tx.init(params) if state is None else state
    trajectory = []
    for step, gradient in enumerate(gradients):
        updates, state = update(gradient, state, params, **(extra[step] if extra else {}))
        params = optax.apply_updates(params, updates)
        trajectory.append(params)
    return trajectory, state


def moments(state, name):
    """The leaves of all moments of that name, wherever wrappers have put them."""
    found = optax.tree.get_all_with_path(state, name)
    return [leaf for _, moment in found for leaf in jax.tree.leaves(moment)]


def assert_like_optax(compose, *, same_gradients=True, **arguments):
    """`compose(package)` must move the parameters alike with our package and with optax.

    m and v are the same bit for bit as long as both see the same gradients. Steps differ by a few
    float32 ulp (the bias correction), and so do the parameters' roundings.
    """
    with jax.numpy_dtype_promotion("standard"):
        ours, state = run(compose(optax_adamax), **arguments)
        theirs, optax_state = run(compose(optax), **arguments)
    assert len(ours) == len(theirs) == STEPS
    for step, (p, q) in enumerate(zip(ours, theirs, strict=True), start=1):
        for x, y in zip(jax.tree.leaves(p), jax.tree.leaves(q), strict=True):
            atol = step * 2**-23 * (8 * RATE + np.abs(y).max())
            np.testing.assert_allclose(x, y, rtol=0, atol=atol)
    start = arguments.get("params", PARAMS)
    assert max(jax.tree.leaves(jax.tree.map(lambda x, y: np.abs(x - y).max(), p, start))) > RATE
    for name, optax_name in (("m", "mu"), ("v", "nu")):
        pairs = list(zip(moments(state, name), moments(optax_state, optax_name), strict=True))
        assert pairs
        for x, y in pairs:
            np.testing.assert_allclose(x, y, rtol=0 if same_gradients else 1e-5)
    return state


COMPOSITIONS = {
    "adamax": lambda o: o.adamax(RATE),
    "adamaxw": lambda o: o.adamaxw(RATE, weight_decay=0.1),
    "schedule": lambda o: o.adamax(DECAY),
    "clip_by_global_norm": lambda o: optax.chain(
        optax.clip_by_global_norm(1.0), o.scale_by_adamax(), optax.scale_by_learning_rate(RATE)
    ),
    "named_chain": lambda o: optax.named_chain(
        ("adamax", o.scale_by_adamax()), ("rate", optax.scale_by_schedule(lambda t: -DECAY(t)))
    ),
    "decay mask": lambda o: o.adamaxw(RATE, weight_decay=0.1, mask=WEIGHTS),
    "decay mask function": lambda o: o.adamaxw(
        RATE, weight_decay=0.1, mask=lambda p: jax.tree.map(lambda x: x.ndim > 1, p)
    ),
    "add_decayed_weights": lambda o: optax.chain(
        o.scale_by_adamax(),
        optax.add_decayed_weights(0.1, mask=WEIGHTS),
        optax.scale_by_learning_rate(RATE),
    ),
    "masked": lambda o: optax.masked(o.adamax(RATE), WEIGHTS),
    "partition": lambda o: optax.partition(
        {True: o.adamax(RATE, b2=0.9), False: o.adamaxw(RATE / 5)}, WEIGHTS
    ),
    "flatten": lambda o: optax.flatten(o.adamax(RATE)),
    "MultiSteps": lambda o: optax.MultiSteps(o.adamax(RATE), 4),
    "ema": lambda o: optax.chain(o.adamax(RATE), optax.ema(0.9)),
    "inject_hyperparams": lambda o: optax.inject_hyperparams(o.adamax)(
        learning_rate=RATE, b1=0.8, b2=0.95, eps=1e-3
    ),
    "inject_hyperparams schedules": lambda o: optax.inject_hyperparams(o.adamax)(
        learning_rate=DECAY, b1=RISE, b2=RISE, eps=DECAY
    ),
    "inject_hyperparams adamaxw": lambda o: optax.inject_hyperparams(o.adamaxw)(
        DECAY, weight_decay=DECAY, mask=None
    ),
    "inject_hyperparams scale_by_adamax": lambda o: optax.chain(
        optax.inject_hyperparams(o.scale_by_adamax)(b1=RISE), optax.scale_by_learning_rate(RATE)
    ),
    "inject_hyperparams in MultiSteps": lambda o: optax.MultiSteps(
        optax.inject_hyperparams(o.adamax)(learning_rate=DECAY), 2
    ),
}


@functools.cache
def composed(name):
    """With our functions: one object, so that it is compiled once."""
    return COMPOSITIONS[name](optax_adamax)


# What others have too: a mask and its function, and fewer injected hyperparameters.
REPEATED = ("decay mask function", "add_decayed_weights", "inject_hyperparams")
REPEATED += ("inject_hyperparams adamaxw",)


@pytest.mark.parametrize(
    "name",
    [pytest.param(x, marks=pytest.mark.slow if x in REPEATED else ()) for x in COMPOSITIONS],
)
def test_composition(name):
    assert_like_optax(COMPOSITIONS[name])


def test_coupled_decay_before_adamax():
    decay = optax.add_decayed_weights(0.1, mask=WEIGHTS)
    assert_like_optax(lambda o: optax.chain(decay, o.adamax(RATE)), same_gradients=False)


def test_apply_if_finite():
    state = assert_like_optax(
        lambda o: optax.apply_if_finite(o.adamax(RATE), 5), gradients=SOME_NAN
    )
    assert int(state.total_notfinite) == 3 and int(optax.tree.get(state, "count")) == STEPS - 3


def test_reduce_on_plateau():
    state = assert_like_optax(
        lambda o: optax.chain(
            o.adamax(RATE), optax.contrib.reduce_on_plateau(factor=0.5, patience=5)
        ),
        extra=PLATEAU,
    )
    assert state[1].scale == 0.125


def test_lookahead():
    assert_like_optax(
        lambda o: optax.lookahead(o.adamax(RATE), sync_period=5, slow_step_size=0.5),
        params=optax.LookaheadParams.init_synced(PARAMS),
    )


def test_schedule_free():
    @functools.cache
    def compose(o):
        return optax.contrib.schedule_free(o.adamax(RATE, b1=0.0), RATE)

    state = assert_like_optax(compose)
    with jax.numpy_dtype_promotion("standard"):
        trajectory, optax_state = run(compose(optax))
        averages = [
            optax.contrib.schedule_free_eval_params(s, trajectory[-1]) for s in (state, optax_state)
        ]
    for x, y in zip(*map(jax.tree.leaves, averages), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)
        assert not np.allclose(x, trajectory[-1]["b" if x.ndim == 1 else "w"], atol=1e-3)


def test_masked_leaves_have_no_state_and_pass_through():
    tx = optax.masked(optax_adamax.scale_by_adamax(), WEIGHTS)
    updates, state = tx.update(GRADIENTS[0], tx.init(PARAMS))
    assert isinstance(state.inner_state.m["b"], optax.MaskedNode)
    assert isinstance(state.inner_state.v["b"], optax.MaskedNode)
    np.testing.assert_array_equal(updates["b"], GRADIENTS[0]["b"])


@pytest.mark.parametrize("name", ["adamax", "adamaxw", "scale_by_adamax"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_hyperparameters_are_refused(name, dtype):
    """inject_hyperparams casts them to the dtype of the parameters, where 0.999 is 1."""
    rate = {} if name == "scale_by_adamax" else {"learning_rate": RATE}
    tx = optax.inject_hyperparams(getattr(optax_adamax, name))(**rate)
    with pytest.raises(TypeError, match=r"hyperparam_dtype=jnp\.float32"):
        tx.init(jnp.zeros(3, dtype))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_v_decays_with_injected_hyperparameters(dtype):
    tx = optax.inject_hyperparams(optax_adamax.adamax, hyperparam_dtype=jnp.float32)(RATE)
    params = jnp.zeros(1, dtype)
    gradients = np.full((2001, 1), 1e-6, dtype)
    gradients[0] = 1

    def step(state, gradient):
        return tx.update(gradient, state, params)[1], None

    with jax.numpy_dtype_promotion("standard"):
        state, _ = jax.lax.scan(step, tx.init(params), gradients)
    _, expected = reference.run(np.asarray(gradients, np.float64))
    np.testing.assert_allclose(expected.v, 0.135, rtol=2e-3)
    np.testing.assert_allclose(optax.tree.get(state, "v"), expected.v, rtol=2e-4)


def test_injected_hyperparameters_can_be_set_in_mid_run():
    tx = optax.inject_hyperparams(optax_adamax.scale_by_adamax)()
    g = np.random.default_rng(0).normal(size=(8, 5)).astype(np.float32)
    params, update = np.zeros(5, np.float32), jax.jit(tx.update)
    state, expected = tx.init(params), reference.start(5)
    for t, gradient in enumerate(g):
        b1, b2, eps = (0.9, 0.999, 1e-8) if t < 4 else (0.5, 0.7, 1e-2)
        state = optax.tree.set(state, b1=b1, b2=b2, eps=eps)
        updates, state = update(gradient, state, params)
        direction, expected = reference.step(gradient, expected, b1, b2, eps)
        np.testing.assert_allclose(updates, direction, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(optax.tree.get(state, "v"), expected.v, rtol=1e-6)


def complex_gradients(steps=STEPS):
    parts = np.random.default_rng(5).standard_t(2, (2, steps, 6)).astype(np.float32)
    return parts[0] + 1j * parts[1]


def test_split_complex_parameters_are_two_real_runs():
    """Bit for bit where each operation stands alone; compiled, fusions round otherwise."""
    z = complex_gradients()
    tx = optax_adamax.adamax(RATE)
    split = optax.contrib.split_real_and_imaginary(tx)
    with jax.numpy_dtype_promotion("standard"):
        whole, state = run(split, z[0], z[1:], compiler=lambda f: f)
        parts = [run(tx, part[0], part[1:], compiler=lambda f: f)[0] for part in (z.real, z.imag)]
    for x, real, imag in zip(whole, *parts, strict=True):
        np.testing.assert_array_equal(x.real, real)
        np.testing.assert_array_equal(x.imag, imag)
    assert {leaf.dtype for leaf in moments(state, "v")} == {np.dtype(np.float32)}


def test_modulus_is_the_default_for_complex_parameters():
    z = complex_gradients()
    trajectory, state = run(optax_adamax.adamax(RATE), z[0], z[1:])
    directions, expected = reference.run(z[1:])
    np.testing.assert_allclose(trajectory[-1], z[0] - RATE * directions.sum(0), rtol=1e-5)
    (v,) = moments(state, "v")
    assert v.dtype == np.float32
    np.testing.assert_allclose(v, expected.v, rtol=1e-6)


@pytest.mark.parametrize("name", ["adamax", "decay mask", "masked", "MultiSteps", "partition"])
def test_map_params_reaches_m_and_v_alone(name):
    tx = COMPOSITIONS[name](optax_adamax)
    tx = getattr(tx, "gradient_transformation", lambda: tx)()
    state = tx.init(PARAMS)
    marked = optax.tree.map_params(tx, lambda x: "m or v", state, transform_non_params=type)
    for path, leaf in jax.tree_util.tree_leaves_with_path(marked):
        keys = {getattr(key, "name", None) for key in path}
        assert (leaf == "m or v") == bool(keys & {"m", "v", "acc_grads"}), path


def test_state_is_read_and_set_by_name():
    _, state = run(composed("inject_hyperparams"))
    assert int(optax.tree.get(state, "ScaleByAdamaxState").count) == STEPS
    zero = optax.tree.set(state, m=jax.tree.map(jnp.zeros_like, PARAMS))
    assert all(not np.any(leaf) for leaf in moments(zero, "m"))
    jax.tree.map(np.testing.assert_array_equal, moments(zero, "v"), moments(state, "v"))


SERIALIZERS = {
    "state dict": lambda state, empty: flax.serialization.from_state_dict(
        empty, flax.serialization.to_state_dict(state)
    ),
    "bytes": lambda state, empty: flax.serialization.from_bytes(
        empty, flax.serialization.to_bytes(state)
    ),
    "pickle": lambda state, empty: pickle.loads(pickle.dumps(state)),
}


@pytest.mark.parametrize("serializer", SERIALIZERS)
@pytest.mark.parametrize("name", ["adamaxw", "schedule", "masked", "inject_hyperparams"])
def test_resumed_run_is_the_same_run(serializer, name):
    tx = composed(name)
    whole, last = run(tx)
    half, state = run(tx, gradients=GRADIENTS[:10])
    restored = SERIALIZERS[serializer](state, tx.init(PARAMS))
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    rest, resumed = run(tx, half[-1], GRADIENTS[10:], state=restored)
    jax.tree.map(np.testing.assert_array_equal, (rest[-1], resumed), (whole[-1], last))
    jax.tree.map(lambda x, y: np.testing.assert_equal(x.dtype, y.dtype), resumed, last)
