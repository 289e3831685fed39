"""Loops, batches and meshes of devices give the updates and moments of one device."""

import functools

import jax
import numpy as np
import optax
import optax.tree
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from transformations import build, fast_only, params_like, types

from optax_adamax import scale_by_adamax

# These two have every kind of state leaf; the others are slow tests. test_low_bit_codes.py tests
# 16 bits in scan, vmap and on a mesh. Other files test chains and decay.
floats_and_8_bits = pytest.mark.parametrize("name", fast_only("scale_by_adamax", "8 bits"))
every_axis_type = pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=str)


def many(seed):
    """Returns parameters or gradients with two rows for each of eight devices.

    Rows fill the vector registers of the processor: XLA can round the tail of a loop differently.
    """
    rng = np.random.default_rng(seed)
    return {"w": rng.standard_t(2, (16, 4, 16)).astype(np.float32)}


def two_steps(init, update, place=lambda x: x):
    """Returns updates and state after two steps, with parameters and gradients moved by `place`."""
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
    """Checks updates and moments, which are of order 1, against a program for one device."""
    tx, (expected, expected_state) = build(name), on_one_device(name)
    for actual, leaf in zip(*map(jax.tree.leaves, (updates, expected)), strict=True):
        np.testing.assert_allclose(np.reshape(actual, leaf.shape), leaf, rtol=0, atol=atol)
    leaves = [[leaf for leaf, _ in params_like(tx, s, many(0))] for s in (state, expected_state)]
    for actual, leaf in zip(*leaves, strict=True):
        np.testing.assert_allclose(np.reshape(actual, leaf.shape), leaf, rtol=0, atol=moment_atol)


@floats_and_8_bits
def test_scan_equals_single_steps(name):
    tx, params = build(name), many(0)
    gradients = jax.tree.map(lambda *g: np.stack(g), many(1), many(2))

    def step(state, gradient):
        updates, state = tx.update(gradient, state, params)
        return state, updates

    state, updates = jax.jit(jax.lax.scan, static_argnums=0)(step, tx.init(params), gradients)
    last = jax.tree.map(lambda u: np.asarray(u)[-1], updates)
    # Inside the loop, XLA fuses other multiplications and additions.
    assert_like_one_device(name, last, state, atol=4 * 2**-23, moment_atol=4 * 2**-23)


@floats_and_8_bits
def test_vmap_equals_single_runs(name):
    tx = build(name)
    updates, state = two_steps(jax.jit(jax.vmap(tx.init)), jax.jit(jax.vmap(tx.update)))
    # XLA reorders the two divisions of the update if the bias correction is a vector.
    assert_like_one_device(name, updates, state, atol=4 * 2**-23)


@pytest.mark.parametrize("name", fast_only("8 bits"))
def test_pmap_equals_one_device(name):
    def place(tree):
        return jax.tree.map(lambda x: x.reshape(8, 2, *x.shape[1:]), tree)

    tx = build(name)
    updates, state = two_steps(jax.pmap(tx.init), jax.pmap(tx.update), place)
    # Inside pmap, XLA fuses other multiplications and additions (jaxlib 0.8).
    assert_like_one_device(name, updates, state, atol=4 * 2**-23)


@pytest.mark.parametrize("name", fast_only("8 bits"))
def test_shard_map_equals_one_device(name):
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
    """Returns a mesh, a sharding of the first dimension, and a function that applies it."""
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
    # XLA rounds the scalar bound C_t differently in the program for a mesh.
    assert_like_one_device(name, updates, state, 2**-23 if name == "8 bits" else 0)


def assert_sharded(tx, state, start, sharding):
    for leaf, _ in params_like(tx, state, many(0)):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
    assert types(state) == types(start)


@pytest.mark.parametrize("name", fast_only("8 bits"))
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


@every_axis_type
def test_moments_of_complex_shapes_are_sharded_like_them(axis_type):
    _, sharding, _ = over_eight_devices(axis_type)
    shape = jax.ShapeDtypeStruct((16, 4), np.complex64, sharding=sharding)
    state = scale_by_adamax().init(shape)
    assert state.m.sharding == state.v.sharding == sharding
    assert (state.m.dtype, state.v.dtype) == (np.complex64, np.float32)
