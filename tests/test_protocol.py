"""Every public transformation follows optax's protocol: structure, types, a single trace."""

import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from transformations import (
    TRANSFORMATIONS,
    TREES,
    build,
    every_transformation,
    every_tree,
    fast_only,
    params_like,
    types,
)

import optax_adamax

# The dtypes of parameters and gradients.
WITHOUT_X64 = [
    ("float32", "float32"),
    ("bfloat16", "bfloat16"),
    ("float16", "float16"),
    ("complex64", "complex64"),
    ("bfloat16", "float32"),
    ("float16", "float32"),
    ("float32", "bfloat16"),
]
WITH_X64 = [
    ("float64", "float64"),
    ("complex128", "complex128"),
    ("float32", "float64"),
    ("float64", "float32"),
]

X64_IDS = ["x32", "x64"]
with_and_without_x64 = pytest.mark.parametrize("x64", [False, True], ids=X64_IDS)


def equal(x, y):
    jax.tree.map(np.testing.assert_array_equal, x, y)


def test_table_lists_every_transformation():
    public = {name: getattr(optax_adamax, name) for name in optax_adamax.__all__}
    transformations = {
        name
        for name, function in public.items()
        if inspect.isfunction(function)
        and "GradientTransformation" in str(inspect.signature(function).return_annotation)
    }
    # These are wrappers, or only inspect gradients. They have separate tests.
    others = {"compensate_rounding", "limit_spikes", "pack_small_leaves", "probe_gradients"}
    assert transformations - others == {name for name, _ in TRANSFORMATIONS.values()}


@every_transformation
@every_tree
def test_init_returns_zeros_of_the_shapes_of_the_parameters(name, tree):
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
def test_update_preserves_types_and_structure(name, tree):
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
    """Returns parameters and gradients, one leaf per pair of dtypes."""
    pairs = WITHOUT_X64 + (WITH_X64 if x64 else [])
    if name in ("8 bits", "16 bits"):  # only real numbers can be quantized
        pairs = [pair for pair in pairs if "complex" not in pair[0]]
    if name == "adamaxw":  # optax.add_decayed_weights adds the parameters to the updates
        pairs = [pair for pair in pairs if pair[0] == pair[1]]
    params, gradients = ({pair: np.ones(2, pair[i]) for pair in pairs} for i in range(2))
    return jax.tree.map(jnp.asarray, (params, gradients))


def check_dtypes(name, x64, evaluate):
    """Checks that updates have the wider dtype and that the types of the state do not change.

    `evaluate(f, *arguments)` calls f, or evaluates its shapes and dtypes only.
    """
    with jax.enable_x64(x64):
        tx = build(name)
        params, gradients = every_dtype(name, x64)
        state = evaluate(tx.init, params)
        expected = (types(gradients), types(state))
        if name != "adamaxw":  # adamaxw needs the parameters
            assert types(evaluate(tx.update, gradients, state)) == expected
        wider = jax.tree.map(
            lambda p, g: jnp.asarray(p if p.dtype.itemsize > g.dtype.itemsize else g),
            params,
            gradients,
        )
        expected = (types(wider), types(state))
        assert types(evaluate(tx.update, gradients, state, params)) == expected


@every_transformation
@with_and_without_x64
def test_update_has_the_wider_dtype(name, x64):
    check_dtypes(name, x64, jax.eval_shape)


@pytest.mark.parametrize("name", fast_only("scale_by_adamax"))
@pytest.mark.parametrize("x64", [pytest.param(False, marks=pytest.mark.slow), True], ids=X64_IDS)
def test_eager_update_has_the_wider_dtype(name, x64):
    check_dtypes(name, x64, lambda f, *arguments: f(*arguments))


@every_transformation
@with_and_without_x64
def test_state_can_be_carried_by_scan(name, x64):
    """Tracing a scan raises if a type changes."""
    with jax.enable_x64(x64):
        tx = build(name)
        params, gradients = every_dtype(name, x64)

        def step(state, _):
            return tx.update(gradients, state, params)[1], None

        state = jax.eval_shape(tx.init, params)
        last, _ = jax.eval_shape(lambda state: jax.lax.scan(step, state, length=3), state)
        assert types(last) == types(state)


@pytest.mark.parametrize("name", fast_only("8 bits", "adamaxw"))
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
