"""Gradients that are not finite: what counts as 0, what stays, and what is counted."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.tree
import pytest
from compiled import copies, passes, since_010, train_step
from parameters import formats

from optax_adamax import (
    HandleNonfiniteState,
    ScaleByAdamaxState,
    adamax,
    adamaxw,
    decode_state,
    encode_state,
    scale_by_adamax,
)
from optax_adamax.compat import optax as compat_optax
from tests.oracle.formats import FORMATS, SOME_FORMATS

# One for each way in which m and v can be kept; the other combinations are marked slow.
ends_of_formats = pytest.mark.parametrize(
    "m_dtype, v_dtype", formats(SOME_FORMATS, SOME_FORMATS[::2])
)
every_format = pytest.mark.parametrize("m_dtype, v_dtype", formats(FORMATS, SOME_FORMATS))
every_policy = pytest.mark.parametrize("policy", ["zero", "skip_step"])
some_pairs = pytest.mark.parametrize(
    "policy, m_dtype, v_dtype",
    [
        ("zero", *SOME_FORMATS[1]),
        ("skip_step", *SOME_FORMATS[2]),
        *(pytest.param("zero", *x, marks=pytest.mark.slow) for x in SOME_FORMATS[::2]),
        *(pytest.param("skip_step", *x, marks=pytest.mark.slow) for x in SOME_FORMATS[:2]),
    ],
)

STEPS, BAD_STEPS = 24, (0, 3, 4, 11, 23)
PARAMS = {
    "a": np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4),
    "b": [None],
    "c": np.ones((), np.float32),
}
SCHEDULE = optax.exponential_decay(0.05, 5, 0.7)


def clean_gradients(seed=0):
    rng = np.random.default_rng(seed)
    return [
        jax.tree.map(lambda p: np.asarray(rng.standard_t(3, p.shape), np.float32), PARAMS)
        for _ in range(STEPS)
    ]


def spoiled(gradients):
    """One element, each time another kind, in each of BAD_STEPS; and where."""
    bad = [jax.tree.map(lambda g: np.zeros(g.shape, bool), g) for g in gradients]
    for i, t in enumerate(BAD_STEPS):
        bad[t]["a"][i % 3, 1] = True
    bad[4]["c"] = np.array(True)
    kinds = [np.float32(x) for x in (np.nan, np.inf, -np.inf)]
    return [
        jax.tree.map(lambda g, b, t=t: np.where(b, kinds[t % 3], g), g, b)
        for t, (g, b) in enumerate(zip(gradients, bad, strict=True))
    ], bad


@functools.cache
def compiled(tx):
    @jax.jit
    def step(params, state, g):
        updates, state = tx.update(g, state, params)
        return updates, optax.apply_updates(params, updates), state

    return step


def run(tx, gradients, params=PARAMS, state=None):
    """All parameters, updates and states of a compiled run."""
    step = compiled(tx)
    state, steps = tx.init(params) if state is None else state, []
    for g in gradients:
        updates, params, state = step(params, state, g)
        steps.append((updates, params, state))
    return steps


@functools.cache
def adamax_with(policy):
    return adamax(0.1, nonfinite=policy)


def assert_same(tree, other):
    jax.tree.map(np.testing.assert_array_equal, tree, other)


@functools.cache
def adamaxw_of(m_dtype, v_dtype, **options):
    return adamaxw(SCHEDULE, weight_decay=0.1, m_dtype=m_dtype, v_dtype=v_dtype, **options)


# Skipping a step.


@every_format
def test_a_skipped_step_is_no_step(m_dtype, v_dtype):
    """The run is the run without these steps: parameters, moments, frame, count and schedule."""
    gradients, _ = spoiled(clean_gradients())
    tx = adamaxw_of(m_dtype, v_dtype, nonfinite="skip_step")
    steps = run(tx, gradients)
    good = [g for t, g in enumerate(gradients) if t not in BAD_STEPS]
    for t in BAD_STEPS:
        updates, params, state = steps[t]
        assert not any(np.any(u) for u in jax.tree.leaves(updates))
        before = steps[t - 1][1:] if t else (PARAMS, tx.init(PARAMS))
        assert_same((params, state.inner_state), (before[0], before[1].inner_state))
    _, params, state = steps[-1]
    _, good_params, good_state = run(tx, good)[-1]
    assert_same((params, state.inner_state), (good_params, good_state.inner_state))
    assert int(optax.tree.get(state, "nonfinite_count")) == len(BAD_STEPS)
    assert optax.tree.get(state, "nonfinite_count").dtype == jnp.int32
    assert int(good_state.nonfinite_count) == 0


@ends_of_formats
def test_a_skipped_step_is_that_of_apply_if_finite(m_dtype, v_dtype):
    gradients, _ = spoiled(clean_gradients())
    _, params, state = run(adamaxw_of(m_dtype, v_dtype, nonfinite="skip_step"), gradients)[-1]
    wrapped = optax.apply_if_finite(adamaxw_of(m_dtype, v_dtype), 100)
    _, expected, theirs = run(wrapped, gradients)[-1]
    assert int(theirs.total_notfinite) == int(state.nonfinite_count)
    # XLA contracts multiplications and additions otherwise in the branch.
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(close, params, expected)
    found, kept = (s.inner_state[0] for s in (state, theirs))
    exact = np.testing.assert_array_equal
    jax.tree.map(lambda x, y: (exact if x.dtype.itemsize < 4 else close)(x, y), found, kept)


# Elements that count as 0.


@every_format
def test_a_bad_element_counts_as_zero(m_dtype, v_dtype):
    """The run is the run with 0 in these places: m and v decay there, and all else sees nothing."""
    gradients, bad = spoiled(clean_gradients())
    zeros = jax.tree.map(lambda g, b: np.where(b, np.float32(0), g), gradients, bad)
    steps = run(adamaxw_of(m_dtype, v_dtype, nonfinite="zero"), gradients)
    expected = run(adamaxw_of(m_dtype, v_dtype), zeros)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)

    def same(x, y):
        (np.testing.assert_array_equal if x.dtype.itemsize < 4 else close)(x, y)

    for (u, params, state), (w, q, plain) in zip(steps, expected, strict=True):
        jax.tree.map(close, (u, params), (w, q))
        jax.tree.map(same, state.inner_state[0], plain[0])
    assert int(optax.tree.get(steps[-1][2], "nonfinite_count")) == len(BAD_STEPS) + 1
    assert int(optax.tree.get(steps[-1][2], "ScaleByAdamaxState").count) == STEPS


@every_policy
def test_complex_gradients(policy):
    """Not finite is also what has an infinite modulus, for that is what v would hold."""
    tx = scale_by_adamax(nonfinite=policy)
    update = jax.jit(tx.update)
    good = np.array([1 + 2j, -1j, 3], np.complex64)
    _, before = update(good, tx.init(good))
    for bad in (complex(np.nan, 1), complex(1, -np.inf), complex(3e38, 3e38)):
        updates, after = update(np.array([good[0], bad, good[2]], np.complex64), before)
        assert int(after.nonfinite_count) == 1
        if policy == "zero":
            expected, zeroed = update(np.array([good[0], 0, good[2]], np.complex64), before)
            assert_same((updates, after.inner_state), (expected, zeroed.inner_state))
        else:
            assert not np.any(updates)
            assert_same(after.inner_state, before.inner_state)


@every_policy
@pytest.mark.parametrize(
    "dtype", ["float32", "bfloat16", pytest.param("float16", marks=pytest.mark.slow)]
)
def test_no_bad_element_of_a_large_leaf_is_missed(policy, dtype):
    """`jnp.max` would lose NaN here (jaxlib 0.10.2, on CPU)."""
    size = 1 << 16
    tx = scale_by_adamax(nonfinite=policy)
    update, state = jax.jit(tx.update), tx.init(np.zeros(size, dtype))
    for bad in (np.nan, np.inf, -np.inf):
        for place in (0, 12345, size // 2, size - 1):
            g = np.ones(size, dtype)
            g[place] = bad
            updates, after = update(g, state)
            assert int(after.nonfinite_count) == 1 and np.asarray(updates)[place] == 0
            assert int(after.inner_state.count) == (policy == "zero")
    largest = np.full(size, jnp.finfo(dtype).max, dtype)
    assert int(update(largest, state)[1].nonfinite_count) == 0


# Everywhere the same.


@some_pairs
def test_scan_is_the_loop(policy, m_dtype, v_dtype):
    gradients, _ = spoiled(clean_gradients())
    tx = adamaxw_of(m_dtype, v_dtype, nonfinite=policy)
    _, expected_params, expected = run(tx, gradients)[-1]

    @jax.jit
    def scan(gradients):
        def body(carry, g):
            params, state = carry
            updates, state = tx.update(g, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(body, (PARAMS, tx.init(PARAMS)), gradients)[0]

    params, state = scan(jax.tree.map(lambda *g: np.stack(g), *gradients))
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(close, (params, state), (expected_params, expected))
    assert int(state.nonfinite_count) == int(expected.nonfinite_count) > 0


@some_pairs
def test_all_devices_agree(policy, m_dtype, v_dtype):
    """The bad element is on one of eight devices; the decision and the count are on all."""
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.NamedSharding(mesh, jax.P("x"))
    rng = np.random.default_rng(0)
    gradients = rng.normal(size=(6, 64)).astype(np.float32)
    gradients[2, 37], gradients[4, [0, 63]] = np.nan, np.inf
    tx = adamaxw_of(m_dtype, v_dtype, nonfinite=policy)
    place = functools.partial(jax.device_put, device=split)
    _, params, state = run(tx, [place(g) for g in gradients], place(np.ones(64, np.float32)))[-1]
    _, expected, alone = run(tx, gradients, np.ones(64, np.float32))[-1]
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(close, (params, state), (expected, alone))
    counts = {int(shard.data) for shard in state.nonfinite_count.addressable_shards}
    assert len(state.nonfinite_count.addressable_shards) == 8
    assert counts == {2 if policy == "skip_step" else 3}


@every_policy
def test_vmap_decides_row_by_row(policy):
    tx = scale_by_adamax(m_dtype="int8", v_dtype="uint8", nonfinite=policy)
    g = np.random.default_rng(0).normal(size=(4, 3, 16)).astype(np.float32)
    g[2, 1, 5] = np.nan
    params = np.zeros((3, 16), np.float32)
    state, update = jax.jit(jax.vmap(tx.init))(params), jax.jit(jax.vmap(tx.update))
    for x in g:
        updates, state = update(x, state)
    updates = np.asarray(updates)
    np.testing.assert_array_equal(state.nonfinite_count, [0, 1, 0])
    for row in range(3):
        alone, _, expected = run(tx, g[:, row], params[row])[-1]
        np.testing.assert_allclose(updates[row], alone, rtol=1e-5, atol=1e-6)
        assert int(expected.inner_state.count) == np.asarray(state.inner_state.count)[row]


# Beside the rest.


@every_policy
def test_inside_inject_hyperparams_and_apply_if_finite(policy):
    gradients, _ = spoiled(clean_gradients())
    tx = optax.inject_hyperparams(adamaxw, static_args=("nonfinite", "mask"))(
        learning_rate=SCHEDULE, mask=None, nonfinite=policy
    )
    with jax.numpy_dtype_promotion("standard"):
        _, params, state = run(tx, gradients)[-1]
    expected = 6 if policy == "zero" else len(BAD_STEPS)
    assert int(optax.tree.get(state, "nonfinite_count")) == expected
    assert all(np.all(np.isfinite(p)) for p in jax.tree.leaves(params))
    around = optax.apply_if_finite(adamax_with(policy), 2)
    _, params, state = run(around, gradients)[-1]
    assert int(state.total_notfinite) == len(BAD_STEPS)
    assert int(optax.tree.get(state, "nonfinite_count")) == 0  # apply_if_finite lets none through
    persistent = [jax.tree.map(lambda g: g * np.float32(np.nan), gradients[1])] * 5
    _, params, state = run(around, persistent)[-1]  # until it gives up
    assert int(optax.tree.get(state, "nonfinite_count")) == 3 * (
        sum(np.size(p) for p in jax.tree.leaves(PARAMS)) if policy == "zero" else 1
    )
    assert_same(params, PARAMS)


@every_policy
def test_hyperparameters_may_be_traced(policy):
    ones, g = np.ones(2, np.float32), np.float32([1.0, np.nan])

    @jax.jit
    def two_steps(b1, b2):
        tx = scale_by_adamax(b1, b2, v_dtype="bfloat16", nonfinite=policy)
        updates, state = tx.update(g, tx.update(ones, tx.init(ones))[1])
        return updates, decode_state(state)

    updates, state = map(jax.device_get, two_steps(0.9, 0.5))
    expected = 0.5 if policy == "zero" else 1.0
    np.testing.assert_allclose(state.inner_state.v[1], expected, rtol=1e-6)
    momentum = 0.09 / 0.19 / 0.5  # of the one gradient, in a v that has halved since
    np.testing.assert_allclose(updates[1], momentum if policy == "zero" else 0, rtol=1e-6)


@every_policy
def test_none_masks_and_nothing(policy):
    tx = adamax_with(policy)
    updates, state = tx.update((), tx.init(()))
    assert updates == () and int(state.nonfinite_count) == 0
    masked = optax.masked(tx, {"a": True, "b": False})
    gradients = {"a": np.float32([np.nan]), "b": np.float32([np.nan])}
    updates, state = masked.update(gradients, masked.init(gradients))
    assert np.asarray(updates["a"]) == 0 and np.isnan(updates["b"])
    assert int(optax.tree.get(state, "nonfinite_count")) == 1
    empty = np.zeros((0, 3), np.float32)
    assert int(jax.jit(tx.update)(empty, tx.init(empty))[1].nonfinite_count) == 0


@every_policy
def test_the_counter_stops_at_its_largest(policy):
    tx = scale_by_adamax(nonfinite=policy)
    bad, update = np.full(5, np.nan, np.float32), jax.jit(tx.update)
    state = tx.init(bad)._replace(nonfinite_count=np.int32(2**31 - 3))
    for _ in range(4):
        _, state = update(bad, state)
    assert int(state.nonfinite_count) == 2**31 - 1


@every_policy
def test_states_are_converted_and_continued(policy):
    """From a run without a policy, to another format, and to optax and back."""
    gradients, _ = spoiled(clean_gradients())
    plain_tx = adamaxw_of("float32", "float32")
    _, params, plain = run(plain_tx, clean_gradients())[-1]
    tx = adamaxw_of("int8", "uint8", nonfinite=policy)
    empty = tx.init(params)
    state = empty._replace(inner_state=encode_state(plain, "int8", "uint8"))
    assert jax.tree.map(jax.typeof, state) == jax.tree.map(jax.typeof, empty)
    _, _, state = run(tx, gradients, params, state)[-1]
    assert int(state.nonfinite_count) > 0
    decoded = decode_state(state)
    assert (
        isinstance(decoded, HandleNonfiniteState)
        and decoded.nonfinite_count == state.nonfinite_count
    )
    assert decoded.inner_state[0].m["a"].dtype == jnp.float32
    again = encode_state(state, "int8", "uint8")
    assert_same(again, state)


@every_policy
def test_to_optax_and_back(policy):
    _, params, state = run(adamax_with(policy), clean_gradients())[-1]
    theirs = compat_optax.dump_state(state, params, optax.adamax(0.1))
    assert_same(optax.tree.get(theirs, "mu"), state.inner_state[0].m)
    back = compat_optax.load_state(theirs, params, adamax_with(policy))
    assert_same(back.inner_state, state.inner_state)
    assert isinstance(back, HandleNonfiniteState) and int(back.nonfinite_count) == 0


@pytest.mark.parametrize("make", [scale_by_adamax, functools.partial(adamax, 0.1)])
def test_the_default_has_the_state_that_it_always_had(make):
    state = make().init(PARAMS)
    found = state if isinstance(state, ScaleByAdamaxState) else state[0]
    assert isinstance(found, ScaleByAdamaxState)
    assert jax.tree.structure(make(nonfinite="propagate").init(PARAMS)) == jax.tree.structure(state)


# What it costs.


@functools.cache
def train_step_of(size, m_dtype, v_dtype, policy):
    return train_step(adamaxw(1e-3, m_dtype=m_dtype, v_dtype=v_dtype, nonfinite=policy), size)


@since_010
@every_policy
@pytest.mark.parametrize("m_dtype, v_dtype", formats(FORMATS, SOME_FORMATS[::2]))
def test_no_pass_over_memory_but_the_reduction(policy, m_dtype, v_dtype):
    size = 1 << 16
    plain, policed = (train_step_of(size, m_dtype, v_dtype, x) for x in ("propagate", policy))
    assert copies(policed, size) == 0
    assert passes(policed, size) == passes(plain, size)
    account = policed.memory_analysis()
    assert account.alias_size_in_bytes >= plain.memory_analysis().alias_size_in_bytes
    # Elements are counted in a branch of its own, which is entered only if there are some.
    allowed = size // 16 if policy == "skip_step" else 5 * size
    assert account.temp_size_in_bytes <= allowed
