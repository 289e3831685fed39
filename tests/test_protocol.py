"""What every public transformation keeps, whatever its rule: one contract, read from one table."""

import functools
import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.tree
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optax_adamax

# A transformation with storage formats of its own gets a row for each of them.
TRANSFORMATIONS = {
    "scale_by_adamax": ("scale_by_adamax", {}),
    "nesterov": (
        "scale_by_adamax",
        {"eps_placement": "denominator", "eps": 0.0, "nesterov": True},
    ),
    "no bias correction": (
        "scale_by_adamax",
        {"bias_correction": False, "m_dtype": "float32", "v_dtype": "float32"},
    ),
    "8 bits": ("scale_by_adamax", {"m_dtype": "int8", "v_dtype": "uint8", "nesterov": True}),
    "adamax": ("adamax", {"learning_rate": 0.1}),
    "16 bits": ("adamax", {"learning_rate": 0.1, "m_dtype": "bfloat16", "v_dtype": "bfloat16"}),
    "schedule": ("adamax", {"learning_rate": optax.linear_schedule(0.1, 0.0, 10)}),
    "adamaxw": ("adamaxw", {"learning_rate": 0.1, "weight_decay": 0.1}),
}

TREES = {
    "every kind of leaf": {
        "array": np.ones((4, 3), np.float32),
        "None": None,
        "MaskedNode": (optax.MaskedNode(), [np.ones((4, 3), np.float32)]),
        "no leaves": {"a": {}, "b": [], "c": ()},
        "empty array": np.ones((3, 0, 2), np.float32),
        "scalar array": np.ones((), np.float32),
        "NumPy scalar": np.float32(1.0),
        "Python float": 1.5,
        "weak type": jnp.asarray(1.5),
    },
    "an array": np.ones((4, 3), np.float32),
    "a Python float": 1.5,
    "nothing": (),
}

# The dtypes of parameters and gradients.
NARROW = [
    ("float32", "float32"),
    ("bfloat16", "bfloat16"),
    ("float16", "float16"),
    ("complex64", "complex64"),
    ("bfloat16", "float32"),
    ("float16", "float32"),
    ("float32", "bfloat16"),
]
WIDE = [
    ("float64", "float64"),
    ("complex128", "complex128"),
    ("float32", "float64"),
    ("float64", "float32"),
]

every_transformation = pytest.mark.parametrize("name", TRANSFORMATIONS)


def only_slow_but(*names):
    return [pytest.param(x, marks=[] if x in names else pytest.mark.slow) for x in TRANSFORMATIONS]


# Where programs are compiled, two stand for the others, one of which has every part of a state.
# test_low_bit.py has 16 bits under scan, vmap and on a mesh, other tests have chains and decay.
floats_and_8_bits = pytest.mark.parametrize("name", only_slow_but("scale_by_adamax", "8 bits"))
every_tree = pytest.mark.parametrize("tree", TREES)
X64_IDS = ["x32", "x64"]
every_axis_type = pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=str)
with_and_without_x64 = pytest.mark.parametrize("x64", [False, True], ids=X64_IDS)


def build(name):
    constructor, options = TRANSFORMATIONS[name]
    return getattr(optax_adamax, constructor)(**options)


def types(tree):
    """Shape, dtype, weak type and sharding of each leaf, and the structure."""
    return jax.tree.map(jax.typeof, tree)


def params_like(tx, state, params):
    """The leaves of the state that belong to a parameter, each with its parameter."""
    pairs = []
    optax.tree.map_params(tx, lambda *pair: pairs.append(pair), state, params)
    return pairs


def equal(x, y):
    jax.tree.map(np.testing.assert_array_equal, x, y)


def test_table_has_every_transformation():
    public = {name: getattr(optax_adamax, name) for name in optax_adamax.__all__}
    transformations = {
        name
        for name, function in public.items()
        if inspect.isfunction(function)
        and "GradientTransformation" in str(inspect.signature(function).return_annotation)
    }
    # These have tests of their own.
    others = {"compensate_rounding", "limit_spikes", "pack_small_leaves", "probe_gradients"}
    assert transformations - others == {name for name, _ in TRANSFORMATIONS.values()}


@every_transformation
@every_tree
def test_init_is_a_map_to_zeros(name, tree):
    tx, params = build(name), TREES[tree]
    state = tx.init(params)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(state))
    pairs = params_like(tx, state, params)
    assert len(pairs) == 2 * len(jax.tree.leaves(params))
    assert all(leaf.shape == np.shape(parameter) for leaf, parameter in pairs)
    assert types(jax.eval_shape(tx.init, params)) == types(state)
    specs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), jnp.result_type(x)), params)
    of_specs = tx.init(specs)
    assert types(of_specs) == types(state)
    equal(of_specs, state)


@every_transformation
@every_tree
def test_types_of_state_and_updates(name, tree):
    tx, params = build(name), TREES[tree]
    state = tx.init(params)
    start = types(state)
    assert not any(leaf.weak_type for leaf in jax.tree.leaves(start))
    traced = types(jax.eval_shape(tx.update, params, state, params))
    updates, state = tx.update(params, state, params)
    assert types((updates, state)) == traced and types(state) == start
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    for update, gradient in zip(*map(jax.tree.leaves, (updates, params)), strict=True):
        assert update.shape == np.shape(gradient)
        assert update.dtype == jnp.result_type(gradient)
        assert np.all(np.isfinite(update)) and np.all(update != 0)


def every_dtype(name, x64):
    """Parameters and gradients of each pair of dtypes."""
    pairs = NARROW + (WIDE if x64 else [])
    if name in ("8 bits", "16 bits"):  # for real numbers
        pairs = [pair for pair in pairs if "complex" not in pair[0]]
    if name == "adamaxw":  # optax.add_decayed_weights adds the parameters to the updates
        pairs = [pair for pair in pairs if pair[0] == pair[1]]
    params, gradients = ({pair: np.ones(2, pair[i]) for pair in pairs} for i in range(2))
    return jax.tree.map(jnp.asarray, (params, gradients))


def check_dtypes(name, x64, evaluate):
    """`evaluate(f, *arguments)` is a call of f, or one that looks at types alone."""
    with jax.enable_x64(x64):
        tx = build(name)
        params, gradients = every_dtype(name, x64)
        state = evaluate(tx.init, params)
        kept = (types(gradients), types(state))
        if name != "adamaxw":  # which needs the parameters
            assert types(evaluate(tx.update, gradients, state)) == kept
        wider = jax.tree.map(
            lambda p, g: jnp.asarray(p if p.dtype.itemsize > g.dtype.itemsize else g),
            params,
            gradients,
        )
        kept = (types(wider), types(state))
        assert types(evaluate(tx.update, gradients, state, params)) == kept


@every_transformation
@with_and_without_x64
def test_dtypes_of_state_and_updates(name, x64):
    check_dtypes(name, x64, jax.eval_shape)


@pytest.mark.parametrize("name", only_slow_but("scale_by_adamax"))
@pytest.mark.parametrize("x64", [pytest.param(False, marks=pytest.mark.slow), True], ids=X64_IDS)
def test_dtypes_of_eager_state_and_updates(name, x64):
    check_dtypes(name, x64, lambda f, *arguments: f(*arguments))


@every_transformation
@with_and_without_x64
def test_state_can_be_carried_by_scan(name, x64):
    """Tracing alone raises where a type changes."""
    with jax.enable_x64(x64):
        tx = build(name)
        params, gradients = every_dtype(name, x64)

        def step(state, _):
            return tx.update(gradients, state, params)[1], None

        state = jax.eval_shape(tx.init, params)
        last, _ = jax.eval_shape(lambda state: jax.lax.scan(step, state, length=3), state)
        assert types(last) == types(state)


@pytest.mark.parametrize("name", only_slow_but("8 bits", "adamaxw"))
def test_second_call_does_not_retrace(name):
    tx, params = build(name), TREES["every kind of leaf"]
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(gradients, state, params):
        return tx.update(gradients, state, params)

    state = tx.init(params)
    for _ in range(3):
        updates, state = step(params, state, params)
    assert jax.tree.structure(updates) == jax.tree.structure(params)


def many(seed):
    """Parameters or gradients of which eight devices take two rows each.

    The rows are whole vectors of the processor: XLA may round the rest of a loop otherwise.
    """
    rng = np.random.default_rng(seed)
    return {"w": rng.standard_t(2, (16, 4, 16)).astype(np.float32)}


def two_steps(init, update, place=lambda x: x):
    """Updates and state after two steps with parameters and gradients put where `place` says."""
    params = place(many(0))
    state = init(params)
    for seed in (1, 2):
        updates, state = update(place(many(seed)), state, params)
    return updates, state


@functools.cache
def on_one_device(name):
    tx = build(name)
    return two_steps(jax.jit(tx.init), jax.jit(tx.update))


def assert_like_one_device(name, updates, state, atol=0, moment_atol=0):
    """Updates and moments, which are of the order 1, are those compiled for one device."""
    tx, (expected, expected_state) = build(name), on_one_device(name)
    for actual, leaf in zip(*map(jax.tree.leaves, (updates, expected)), strict=True):
        np.testing.assert_allclose(np.reshape(actual, leaf.shape), leaf, rtol=0, atol=atol)
    leaves = [[leaf for leaf, _ in params_like(tx, s, many(0))] for s in (state, expected_state)]
    for actual, leaf in zip(*leaves, strict=True):
        np.testing.assert_allclose(np.reshape(actual, leaf.shape), leaf, rtol=0, atol=moment_atol)


@floats_and_8_bits
def test_scan_is_the_loop(name):
    tx, params = build(name), many(0)
    gradients = jax.tree.map(lambda *g: np.stack(g), many(1), many(2))

    def step(state, gradient):
        updates, state = tx.update(gradient, state, params)
        return state, updates

    state, updates = jax.jit(jax.lax.scan, static_argnums=0)(step, tx.init(params), gradients)
    last = jax.tree.map(lambda u: np.asarray(u)[-1], updates)
    # XLA contracts multiplications and additions otherwise inside the loop.
    assert_like_one_device(name, last, state, atol=4 * 2**-23, moment_atol=4 * 2**-23)


@floats_and_8_bits
def test_vmap_is_a_run_for_each_row(name):
    tx = build(name)
    updates, state = two_steps(jax.jit(jax.vmap(tx.init)), jax.jit(jax.vmap(tx.update)))
    # XLA orders the two divisions of the update otherwise where the bias is a vector.
    assert_like_one_device(name, updates, state, atol=4 * 2**-23)


@pytest.mark.parametrize("name", only_slow_but("8 bits"))
def test_pmap(name):
    def place(tree):
        return jax.tree.map(lambda x: x.reshape(8, 2, *x.shape[1:]), tree)

    tx = build(name)
    updates, state = two_steps(jax.pmap(tx.init), jax.pmap(tx.update), place)
    # XLA of jaxlib 0.8 contracts multiplications and additions otherwise here.
    assert_like_one_device(name, updates, state, atol=4 * 2**-23)


@pytest.mark.parametrize("name", only_slow_but("8 bits"))
def test_shard_map(name):
    tx = build(name)
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    specs = optax.tree.map_params(
        tx,
        lambda _: P("x"),
        jax.eval_shape(tx.init, many(0)),
        transform_non_params=lambda _: P(),
    )
    update = jax.shard_map(
        tx.update, mesh=mesh, in_specs=(P("x"), specs, P("x")), out_specs=(P("x"), specs)
    )
    updates, state = two_steps(tx.init, jax.jit(update))
    assert_like_one_device(name, updates, state)


def over_eight_devices(axis_type):
    """A mesh, what splits the first dimension over it, and what places a tree so."""
    mesh = jax.make_mesh((8,), ("x",), axis_types=(axis_type,))
    sharding = NamedSharding(mesh, P("x"))
    return mesh, sharding, functools.partial(jax.device_put, device=sharding)


@floats_and_8_bits
@every_axis_type
def test_state_is_sharded_like_the_parameters(name, axis_type):
    tx, (mesh, sharding, place) = build(name), over_eight_devices(axis_type)
    with jax.set_mesh(mesh):
        start = tx.init(place(many(0)))
        updates, state = two_steps(lambda _: start, jax.jit(tx.update), place)
        if axis_type == AxisType.Explicit:
            assert types(jax.jit(tx.init)(place(many(0)))) == types(start)
    for tree in (start, state):
        assert_sharded(tx, tree, start, sharding)
    for update in jax.tree.leaves(updates):
        assert update.sharding.is_equivalent_to(sharding, update.ndim)
    # The limit of the step, C_t, is one number for all: XLA rounds it otherwise on a mesh.
    assert_like_one_device(name, updates, state, 2**-23 if name == "8 bits" else 0)


def assert_sharded(tx, state, start, sharding):
    for leaf, _ in params_like(tx, state, many(0)):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
    assert types(state) == types(start)


@pytest.mark.parametrize("name", only_slow_but("8 bits"))
@pytest.mark.parametrize(
    "axis_type",
    [AxisType.Auto, pytest.param(AxisType.Explicit, marks=pytest.mark.slow)],
    ids=str,
)
def test_eager_state_is_sharded_like_the_parameters(name, axis_type):
    tx, (mesh, sharding, place) = build(name), over_eight_devices(axis_type)
    with jax.set_mesh(mesh):
        start = tx.init(place(many(0)))
        _, state = tx.update(place(many(1)), start, place(many(0)))
    assert_sharded(tx, state, start, sharding)
