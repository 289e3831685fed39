"""Inside shard_map and pmap, the plain transformation gives the bits of one device."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from parameters import formats

import optax_adamax
from optax_adamax import sharding
from sharding.common import (
    AXIS_TYPES,
    EXACT_PRODUCTS,
    FORMATS,
    assert_same_bits,
    exact_adamaxw,
    fewest_bits,
    mesh_of,
    on_one_device,
    random_like,
    structs,
    train,
)

STEPS = 4


def transformation(name):
    return optax_adamax.adamax(**EXACT_PRODUCTS, **FORMATS[name])


SHARD_MAPS = [(name, types) for name in FORMATS for types in ("auto", "explicit")]
ALWAYS = [("float32", "auto"), ("2 bytes", "explicit")]


@pytest.mark.parametrize("name, types", formats(SHARD_MAPS, ALWAYS))
def test_update_in_shard_map_gives_the_bits_of_one_device(name, types):
    mesh = mesh_of(AXIS_TYPES[types])
    params = random_like(structs(mesh), 99)
    tx = exact_adamaxw(name)
    sharded = sharding.shard(tx, params)
    state = sharded.init(params)
    specs = jax.tree.map(lambda s: s.spec, sharded.shardings)
    of_params = jax.tree.map(lambda p: p.sharding.spec, params)
    update = jax.shard_map(
        tx.update,
        mesh=mesh,
        in_specs=(of_params, specs, of_params),
        out_specs=(of_params, specs),
    )
    history, state, _ = train(optax.GradientTransformation(tx.init, update), params, state)
    assert_same_bits((history, state), on_one_device(name))


def integers(params, devices=8):
    """Returns gradients for each device; sums of small integers do not depend on their order."""
    rng = np.random.default_rng(0)
    return {
        k: rng.integers(-8, 8, (devices, *p.shape)).astype(np.float32) for k, p in params.items()
    }


@fewest_bits
def test_zero1_by_hand_in_shard_map_gives_the_bits_of_one_device(name):
    """The function scatters gradients and gathers updates, which XLA inserts for `shard`."""
    mesh = mesh_of(shape=(8, 1))
    params = {
        "w": jax.device_put(np.ones((16, 3), np.float32), NamedSharding(mesh, P())),
        "u": jax.device_put(np.ones((2, 24), np.float32), NamedSharding(mesh, P())),
    }
    axis = {"w": 0, "u": 1}
    tx = transformation(name)
    sharded = sharding.shard(tx, params, zero1_axis="data")
    state = sharded.init(params)
    specs = jax.tree.map(lambda s: s.spec, sharded.shardings)

    @jax.jit
    @partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(P("data"), specs),
        out_specs=(P(), specs),
        check_vma=False,  # the type of all_gather does not state that devices agree
    )
    def update(gradients, state):
        scattered = {
            k: jax.lax.psum_scatter(
                jnp.squeeze(g, 0), "data", scatter_dimension=axis[k], tiled=True
            )
            for k, g in gradients.items()
        }
        updates, state = tx.update(scattered, state)
        gathered = {
            k: jax.lax.all_gather(u, "data", axis=axis[k], tiled=True) for k, u in updates.items()
        }
        return gathered, state

    gradients = integers(params)
    alone, reference = jax.jit(tx.update), jax.jit(tx.init)(params)
    for _ in range(STEPS):
        updates, state = update(gradients, state)
        wanted, reference = alone(jax.tree.map(lambda g: g.sum(0), gradients), reference)
        assert_same_bits(updates, wanted)
    assert_same_bits(state, reference)


@fewest_bits
def test_update_in_pmap_gives_the_bits_of_one_device(name):
    """pmap replicates with a leading axis of devices on every array."""
    params = {"w": np.ones((16, 3), np.float32), "b": np.ones(5, np.float32)}
    tx = transformation(name)

    @partial(jax.pmap, axis_name="data", donate_argnums=1)
    def update(gradients, state):
        return tx.update(jax.lax.pmean(gradients, "data"), state)

    gradients = integers(params)
    state = jax.pmap(tx.init)(jax.tree.map(lambda p: np.stack([p] * 8), params))
    alone, reference = jax.jit(tx.update), jax.jit(tx.init)(params)
    for _ in range(STEPS):
        updates, state = update(gradients, state)
        wanted, reference = alone(jax.tree.map(lambda g: g.mean(0), gradients), reference)
        assert_same_on_each_device(updates, wanted)
    assert_same_on_each_device(state, reference)


def assert_same_on_each_device(stacked, wanted):
    stacked = jax.tree.map(np.asarray, stacked)
    for device in range(8):
        assert_same_bits(jax.tree.map(lambda x, d=device: x[d], stacked), wanted)


def test_state_is_sharded_like_parameters_from_pmap():
    """Arrays that pmap returns have a NamedSharding."""
    params = jax.pmap(lambda x: x * 2)(np.ones((8, 3), np.float32))
    if not isinstance(params.sharding, NamedSharding):
        pytest.skip("JAX 0.7 returns arrays with a PmapSharding, which has no mesh")
    state = sharding.shard(optax.trace(0.9), params).init(params)
    assert state.trace.sharding.is_equivalent_to(params.sharding, 2)
