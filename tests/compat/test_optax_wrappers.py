"""`compat.optax` inside optax's wrappers, whose states continue in both directions."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_adamax import limit_spikes
from optax_adamax.compat import optax as compat_optax

PARAMS = {"w": jnp.linspace(0.5, 1.5, 6).reshape(2, 3), "x": jnp.ones(3)}
STEPS, SEAM = 24, 11
LABELS = {"w": "a", "x": "b"}


@pytest.fixture(autouse=True)
def as_optax_computes():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def rate(count):
    return 0.1 / (1 + count)


def conditionally(inner):
    def is_even(step, **extra_args):
        return step % 2 == 0

    return optax.transforms.conditionally_mask(inner, is_even)


WRAPPERS = {
    "alone": lambda adamax: adamax(rate),
    "ema": lambda adamax: optax.chain(adamax(rate), optax.ema(0.9)),
    "trace": lambda adamax: optax.chain(optax.trace(0.9), adamax(rate)),
    "add_noise": lambda adamax: optax.chain(optax.add_noise(0.1, 0.5, 3), adamax(rate)),
    "apply_every": lambda adamax: optax.chain(adamax(rate), optax.apply_every(3)),
    "multi_steps": lambda adamax: optax.MultiSteps(adamax(rate), 4),
    "plateau": lambda adamax: optax.chain(
        adamax(0.1), optax.contrib.reduce_on_plateau(0.5, patience=2)
    ),
    "schedule_free": lambda adamax: optax.contrib.schedule_free(adamax(0.1, b1=0.0), 0.1),
    "conditionally_mask": lambda adamax: conditionally(adamax(rate)),
    "apply_if_finite": lambda adamax: optax.apply_if_finite(adamax(rate), 3),
    "inject_hyperparams": lambda adamax: optax.inject_hyperparams(adamax)(
        learning_rate=0.1, b1=lambda count: 0.9 - 0.01 * count
    ),
    "masked": lambda adamax: optax.masked(
        optax.masked(adamax(rate), {"w": True, "x": False}), True
    ),
    "adam": lambda adamax: optax.partition({"a": adamax(rate), "b": optax.adam(rate)}, LABELS),
    "sgd": lambda adamax: optax.partition(
        {"a": adamax(rate), "b": optax.sgd(rate, momentum=0.9)}, LABELS
    ),
    "two_groups": lambda adamax: optax.chain(
        optax.partition({"a": adamax(rate), "b": adamax(0.01)}, LABELS),
        optax.scale_by_schedule(rate),
    ),
    "lookahead_chain": lambda adamax: optax.named_chain(
        ("decay", optax.add_decayed_weights(rate)), ("adamax", adamax(rate))
    ),
}


def train(tx, params, state, steps):
    @jax.jit
    def step(params, state, count):
        grads = jax.tree.map(lambda p: p * jnp.cos(3.0 * count + jnp.arange(3)), params)
        value = jnp.abs(jnp.cos(count))  # the loss, for reduce_on_plateau
        updates, state = optax.with_extra_args_support(tx).update(
            grads, state, params, value=value, step=count
        )
        return optax.apply_updates(params, updates), state

    for count in steps:
        params, state = step(params, state, jnp.asarray(float(count)))
    return params, state


def plain(tree):
    """Returns a tree with random keys as numbers."""
    is_key = lambda x: jnp.issubdtype(x.dtype, jax.dtypes.prng_key)  # noqa: E731
    return jax.tree.map(lambda x: jax.random.key_data(x) if is_key(x) else x, tree)


def transformation(tx):
    return tx.gradient_transformation() if isinstance(tx, optax.MultiSteps) else tx


@pytest.mark.parametrize("name", WRAPPERS)
def test_wrappers_continue_in_both_packages(name):
    theirs = transformation(WRAPPERS[name](optax.adamax))
    ours = transformation(WRAPPERS[name](compat_optax.adamax))
    whole, whole_state = train(theirs, PARAMS, theirs.init(PARAMS), range(STEPS))
    params, state = train(theirs, PARAMS, theirs.init(PARAMS), range(SEAM))

    loaded = compat_optax.load_state(state, params, ours)
    assert jax.tree.structure(loaded) == jax.tree.structure(ours.init(params))
    here, here_state = train(ours, params, loaded, range(SEAM, STEPS))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), here, whole)

    dumped = compat_optax.dump_state(here_state, here, theirs)
    assert jax.tree.structure(dumped) == jax.tree.structure(whole_state)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)  # noqa: E731
    jax.tree.map(close, plain(dumped), plain(whole_state))
    again = compat_optax.dump_state(loaded, params, theirs)
    jax.tree.map(np.testing.assert_array_equal, plain(again), plain(state))


def test_nonfinite_policy_is_added_and_removed():
    theirs, tx = (
        optax.chain(make(rate), optax.ema(0.9))
        for make in (optax.adamax, lambda rate: compat_optax.adamax(rate, nonfinite="zero"))
    )
    params, state = train(theirs, PARAMS, theirs.init(PARAMS), range(3))
    loaded = compat_optax.load_state(state, params, tx)
    assert jax.tree.structure(loaded) == jax.tree.structure(tx.init(params))
    assert int(loaded[1].count) == 3 and int(loaded[0].nonfinite_count) == 0
    again = compat_optax.dump_state(loaded, params, theirs)
    jax.tree.map(np.testing.assert_array_equal, again, state)


def test_other_wrappers_raise_unless_stateless():
    params = PARAMS
    state = optax.chain(optax.adamax(rate), optax.ema(0.9)).init(params)
    with pytest.raises(ValueError, match=r"wrappers differ, so .*ema.* would be lost"):
        compat_optax.load_state(state, params, compat_optax.adamax(rate))
    _, state = train(optax.adamax(rate), params, optax.adamax(rate).init(params), range(3))
    tx = optax.chain(optax.clip(1.0), compat_optax.adamax(rate), optax.ema(0.9))
    loaded = compat_optax.load_state(state, params, tx)
    counts = {k[-1].name: int(x) for k, x in optax.tree.get_all_with_path(loaded, "count")}
    assert [int(loaded[1][0].count), int(loaded[1][1].count), int(loaded[2].count)] == [3, 3, 0], (
        counts
    )
    np.testing.assert_array_equal(loaded[1][0].m["w"], state[0].mu["w"])
    theirs = optax.chain(optax.identity(), optax.adamax(rate))
    with pytest.raises(ValueError, match="would be lost"):
        compat_optax.dump_state(loaded, params, theirs)
    bare = compat_optax.load_state(state, params, compat_optax.adamax(rate))
    dumped = compat_optax.dump_state(bare, params, theirs)
    np.testing.assert_array_equal(dumped[1][0].nu["x"], state[0].nu["x"])
    assert int(dumped[1][1].count) == 3


@pytest.mark.parametrize("wrap", [lambda tx: tx, optax.chain])
def test_other_parameters_raise(wrap):
    both, one = {"w": True, "x": True}, {"w": True, "x": False}
    more, less = (optax.masked(compat_optax.adamax(rate), mask) for mask in (both, one))
    their_more, their_less = (wrap(optax.masked(optax.adamax(rate), m)) for m in (both, one))
    for tx, theirs in ((more, their_less), (less, their_more)):
        with pytest.raises(ValueError, match=r"trains \["):
            compat_optax.dump_state(tx.init(PARAMS), PARAMS, theirs)
        with pytest.raises(ValueError, match=r"trains \["):
            compat_optax.load_state(theirs.init(PARAMS), PARAMS, tx)


def bounded_state(b1, b2, steps=800):
    """Returns a state of optax whose m / v is at its bound, because gradients decay as v does."""
    tx, params = optax.adamax(0.1, b1, b2, eps=0.0), {"w": jnp.ones(20)}

    def step(state, count):
        return tx.update({"w": jnp.full(20, b2**count)}, state)[1], None

    state, _ = jax.lax.scan(step, tx.init(params), jnp.arange(float(steps)))
    return state, params


@pytest.mark.parametrize(("b1", "b2"), [(0.99, 0.999), (0.9, 0.99), (0.9, 0.92), (0.98, 0.999)])
def test_state_at_its_bound_loads(b1, b2):
    state, params = bounded_state(b1, b2)
    ratio = float((state[0].mu["w"] / state[0].nu["w"])[0])
    assert ratio > 1.02
    loaded = compat_optax.load_state(state, params, compat_optax.adamax(0.1, b1, b2))
    np.testing.assert_array_equal(loaded[0].m["w"], state[0].mu["w"])


@pytest.mark.parametrize(("b1", "b2"), [(0.9, 0.5), (0.9, 0.0)])
def test_state_without_a_bound_loads(b1, b2):
    tx, params = optax.adamax(0.1, b1, b2), {"w": jnp.ones(20)}
    state, update = tx.init(params), jax.jit(tx.update)
    for count in range(20):
        _, state = update({"w": jnp.full(20, 0.3**count)}, state)
    assert float(state[0].mu["w"][0]) > 2 * float(state[0].nu["w"][0])
    compat_optax.load_state(state, params, compat_optax.adamax(0.1, b1, b2))
    with pytest.raises(ValueError, match=r"must come from an Adamax, .* 1\.009 v"):
        compat_optax.load_state(state, params, compat_optax.adamax(0.1))


def test_moments_of_bfloat16_parameters_round_trip():
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    for theirs in (optax.adamax(rate), optax.chain(optax.identity(), optax.adamax(rate))):
        _, state = train(optax.adamax(rate), params, optax.adamax(rate).init(params), range(3))
        loaded = compat_optax.load_state(state, params, compat_optax.adamax(rate))
        assert loaded[0].m["w"].dtype == jnp.float32
        dumped = compat_optax.dump_state(loaded, params, theirs)
        dtypes = jax.tree.map(lambda x: x.dtype, dumped)
        assert dtypes == jax.tree.map(lambda x: x.dtype, theirs.init(params))
        for x, y in zip(*map(jax.tree.leaves, (dumped, state)), strict=True):
            np.testing.assert_array_equal(x, y)


def test_state_is_loaded_into_wrappers_of_this_package():
    theirs = optax.adamax(rate)
    _, state = train(theirs, PARAMS, theirs.init(PARAMS), range(3))
    tx = limit_spikes(compat_optax.adamax(rate), max_norm_ratio=5.0, action="clip")
    loaded = compat_optax.load_state(state, PARAMS, tx)
    assert jax.tree.structure(loaded) == jax.tree.structure(tx.init(PARAMS))
    assert [int(x) for _, x in optax.tree.get_all_with_path(loaded, "count")] == [3, 3]
