"""The step: the same bits on 8 devices as on 1, no communication but ZeRO's gather."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax_boxes import nnx, unboxed
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from parameters import formats

import optax_adamax
from optax_adamax import sharding
from sharding.common import (
    AXIS_TYPES,
    CASES,
    FORMATS,
    HOST_MEMORY,
    NEWLY_SPLIT,
    OPTIONS,
    STEPS,
    assert_same_bits,
    collectives,
    count_compilations,
    exact_adamaxw,
    fewest_bits,
    is_at,
    mesh_of,
    on_one_device,
    random_like,
    state_structs,
    structs,
    train,
)


@cache
def kept(name, types, options):
    """A case that several tests look at: its parameters, and what `train` gives."""
    params = random_like(structs(mesh_of(AXIS_TYPES[types])), 99)
    tx = sharding.keep_sharded(exact_adamaxw(name), params, **OPTIONS[options])
    state = sharding.init_sharded(tx, params, **OPTIONS[options])
    with count_compilations("step") as compilations:
        history, state, step = train(tx, params, state)
    return params, history, state, step, len(compilations)


@pytest.mark.parametrize(("name", "types", "options"), CASES)
def test_trajectory(name, types, options):
    params, history, state, *_ = kept(name, types, options)
    assert_same_bits((history, state), on_one_device(name))
    assert all(is_at(u, params[k].sharding) for k, u in history[-1][1].items())
    wanted = sharding.state_shardings(exact_adamaxw(name), params, **OPTIONS[options])
    assert jax.tree.all(jax.tree.map(is_at, state, wanted))


@pytest.mark.parametrize("options", ["zero", pytest.param("host", marks=HOST_MEMORY)])
def test_trajectory_on_axes_of_both_types(options):
    """JAX 0.10.2 needs the out_shardings."""
    params = random_like(structs(mesh_of(AXIS_TYPES["mixed"])), 99)
    tx = sharding.keep_sharded(exact_adamaxw("float32"), params, **OPTIONS[options])
    state = sharding.init_sharded(tx, params, **OPTIONS[options])
    wanted = sharding.state_shardings(tx, params, **OPTIONS[options])
    of_params = jax.tree.map(lambda p: p.sharding, params)
    places = (of_params, wanted, of_params)
    history, state, _ = train(tx, params, state, out_shardings=places)
    assert_same_bits((history, state), on_one_device("float32"))
    assert jax.tree.all(jax.tree.map(is_at, state, wanted))


@pytest.mark.parametrize("name", ["float32", "2 bytes"])
def test_plain_jit_keeps_the_state_beside_the_parameters(name):
    """No wrapper is needed without ZeRO and host memory."""
    params = random_like(structs(mesh_of()), 99)
    tx = exact_adamaxw(name)
    history, state, step = train(tx, params, sharding.init_sharded(tx, params))
    assert_same_bits((history, state), on_one_device(name))
    wanted = sharding.state_shardings(tx, params)
    assert jax.tree.all(jax.tree.map(is_at, state, wanted))
    assert collectives(step.lower(params, state, params).compile()) == []


@cache
def gathers(types):
    return gather_alone(structs(mesh_of(AXIS_TYPES[types])))


def gather_alone(updates):
    """The collectives of nothing but bringing `updates` from ZeRO's shardings to their own."""
    zero = sharding.state_shardings(optax.trace(0.9), updates, zero_axis="data").trace
    split = {
        name: jax.ShapeDtypeStruct(u.shape, u.dtype, sharding=zero[name])
        for name, u in updates.items()
    }
    whole = {name: u.sharding for name, u in updates.items()}
    return collectives(jax.jit(lambda u: u, out_shardings=whole).lower(split).compile())


@pytest.mark.parametrize(("name", "types", "options"), CASES)
def test_collectives(name, types, options):
    params, _, _, step, _ = kept(name, types, options)
    state = state_structs(exact_adamaxw(name), params, **OPTIONS[options])
    found = collectives(step.lower(params, state, params).compile())
    if "zero_axis" in OPTIONS[options]:
        assert found == gathers(types)
        assert [kind for kind, _ in found] == ["all-gather"] * len(NEWLY_SPLIT)
    else:
        assert found == []


def network(mesh):
    """A data-parallel step of a tensor-parallel network: parameters, batch and loss."""
    params = {"in": P(None, "model"), "out": P("model", None), "bias": P()}
    shapes = {"in": (16, 32), "out": (32, 8), "bias": (8,)}
    params = {
        name: jax.ShapeDtypeStruct(
            shapes[name], np.float32, sharding=NamedSharding(mesh, params[name])
        )
        for name in params
    }
    batch = jax.ShapeDtypeStruct((64, 16), np.float32, sharding=NamedSharding(mesh, P("data")))

    def loss(params, x):
        hidden = jnp.tanh(x @ params["in"])
        return jnp.mean((hidden @ params["out"] + jnp.expand_dims(params["bias"], 0)) ** 2)

    return params, batch, loss


def update_by_hand(tx, gradients, state, params):
    updates, state = tx.update(gradients, state, params)
    return optax.apply_updates(params, updates), state


def compile_step(update_params, name, options, **jit_options):
    """A step of the network with a state of adamax in the format `name`."""
    params, batch, loss = network(mesh_of())
    state = state_structs(network_adamax(name), params, **OPTIONS[options])

    def step(params, state, batch):
        return update_params(jax.grad(loss)(params, batch), state, params)

    step = jax.jit(step, donate_argnums=(0, 1), **jit_options)
    return step.lower(params, state, batch).compile()


def network_adamax(name):
    return optax_adamax.adamax(1e-3, **FORMATS[name])


@cache
def train_step(name, options):
    """The step with keep_sharded, compiled."""
    kept = sharding.keep_sharded(network_adamax(name), network(mesh_of())[0], **OPTIONS[options])
    return compile_step(partial(update_by_hand, kept), name, options)


@cache
def collectives_of_gradients():
    params, batch, loss = network(mesh_of())
    places = jax.tree.map(lambda p: p.sharding, params)
    return collectives(jax.jit(jax.grad(loss), out_shardings=places).lower(params, batch).compile())


TRAIN_STEPS = [(name, options) for name in FORMATS for options in ("like parameters", "zero")]
ALWAYS = [("float32", "like parameters"), ("2 bytes", "zero")]


@pytest.mark.parametrize("name, options", formats(TRAIN_STEPS, ALWAYS))
def test_collectives_of_a_train_step(name, options):
    found = collectives(train_step(name, options))
    wanted = collectives_of_gradients()
    assert [kind for kind, _ in wanted].count("all-reduce") >= 3
    if "zero_axis" in OPTIONS[options]:
        wanted = sorted(wanted + gather_alone(network(mesh_of())[0]))
    assert found == wanted


@HOST_MEMORY
@pytest.mark.parametrize(
    ("types", "options"),
    [
        ("auto", "zero and host"),
        ("explicit", "host"),
        pytest.param("auto", "host", marks=pytest.mark.slow),
        pytest.param("explicit", "zero and host", marks=pytest.mark.slow),
    ],
)
def test_a_donated_state_in_host_memory_is_there_once(types, options):
    params = random_like(structs(mesh_of(AXIS_TYPES[types])), 0)
    tx = sharding.keep_sharded(optax_adamax.adamax(0.1), params, **OPTIONS[options])
    before = sharding.init_sharded(tx, params, **OPTIONS[options])
    _, after = jax.jit(tx.update, donate_argnums=1)(params, before)
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        assert old.is_deleted()
        assert new.sharding.memory_kind == "pinned_host"


@pytest.mark.parametrize(("name", "types", "options"), CASES)
def test_compiles_once(name, types, options):
    *_, compilations = kept(name, types, options)
    assert compilations == 1


@pytest.mark.parametrize("types", ["auto", "explicit"])
def test_a_transformation_that_selects(types):
    """Under explicit axes lax.select takes no two shardings, unlike the sums of Adamax."""

    def update(updates, state, params=None):
        trace = jax.tree.map(
            lambda g, m, p: jnp.where(g > 0, m, jnp.where(m > p, g, p)),
            updates,
            state.trace,
            params,
        )
        return trace, optax.TraceState(trace)

    params = random_like({"wide": structs(mesh_of(AXIS_TYPES[types]))["wide"]}, 0)
    tx = optax.GradientTransformation(optax.trace(0.9).init, update)
    kept = sharding.keep_sharded(tx, params, zero_axis="data")
    state = sharding.init_sharded(tx, params, zero_axis="data")
    gradients = random_like(params, 1)
    got = jax.jit(kept.update)(gradients, state, params)
    g, p = np.asarray(gradients["wide"]), np.asarray(params["wide"])
    wanted = {"wide": np.where(g > 0, 0, np.where(p < 0, g, p))}
    assert_same_bits(got, (wanted, optax.TraceState(wanted)))


def test_extra_arguments_reach_the_transformation():
    def update(updates, state, params=None, *, value):
        return jax.tree.map(lambda g: g * value, updates), state

    params = random_like({"wide": structs(mesh_of())["wide"]}, 0)
    tx = optax.chain(
        optax_adamax.scale_by_adamax(),
        optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update),
    )
    kept = sharding.keep_sharded(tx, params, zero_axis="data")
    state = sharding.init_sharded(kept, params, zero_axis="data")
    updates, _ = jax.jit(kept.update)(params, state, value=jnp.float32(3.0))
    alone, _ = jax.jit(optax_adamax.scale_by_adamax().update)(params, state[0])
    assert_same_bits(updates, jax.tree.map(lambda u: u * 3.0, alone))


@fewest_bits
def test_a_zero_step_costs_no_more_than_the_choice_of_the_partitioner(name):
    """Without `sharding`, `out_shardings` say where XLA shall leave the results."""
    params, *_ = network(mesh_of())
    tx = network_adamax(name)
    state = state_structs(tx, params, zero_axis="data")
    shardings = jax.tree.map(lambda x: x.sharding, (params, state))
    update_params = sharding.make_update_params(tx, params, zero_axis="data")
    ours = compile_step(update_params, name, "zero")
    choice = compile_step(partial(update_by_hand, tx), name, "zero", out_shardings=shardings)
    updates_gathered = train_step(name, "zero")
    assert collectives(ours) == collectives(choice)
    assert temporaries(ours) <= temporaries(choice)
    assert bytes_accessed(ours) <= bytes_accessed(choice)
    assert bytes_accessed(ours) < bytes_accessed(updates_gathered)
    assert jax.tree.all(jax.tree.map(equivalent, ours.output_shardings, shardings, (params, state)))


def equivalent(got, wanted, x):
    return got.is_equivalent_to(wanted, x.ndim)


def temporaries(compiled):
    return compiled.memory_analysis().temp_size_in_bytes


def bytes_accessed(compiled):
    return compiled.cost_analysis()["bytes accessed"]


@pytest.mark.parametrize(
    ("types", "options"),
    [
        ("explicit", "zero"),
        pytest.param("auto", "zero and host", marks=HOST_MEMORY),
        pytest.param("auto", "zero", marks=pytest.mark.slow),
        pytest.param("explicit", "zero and host", marks=[HOST_MEMORY, pytest.mark.slow]),
    ],
)
def test_update_params(types, options):
    params = random_like(structs(mesh_of(AXIS_TYPES[types])), 99)
    tx = exact_adamaxw("2 bytes")
    state = sharding.init_sharded(tx, params, **OPTIONS[options])
    update_params = jax.jit(sharding.make_update_params(tx, params, **OPTIONS[options]))
    history, last_state = on_one_device("2 bytes")
    for t in range(STEPS):
        params, state = update_params(random_like(params, t), state, params)
        assert_same_bits(params, history[t][0])
    assert_same_bits(state, last_state)
    wanted = sharding.state_shardings(tx, params, **OPTIONS[options])
    assert jax.tree.all(jax.tree.map(is_at, state, wanted))
    own = structs(mesh_of(AXIS_TYPES[types]))
    assert all(is_at(x, own[name].sharding) for name, x in params.items())


@pytest.mark.parametrize("boxed", [True, False])
def test_boxes_of_flax(boxed):
    """nnx.Optimizer gives boxed parameters to init and arrays to update."""
    mesh = jax.make_mesh((4,), ("data",), devices=jax.devices()[:4])
    split = nnx.with_partitioning(nnx.initializers.ones, (None, "data"))
    with jax.set_mesh(mesh):
        params = nnx.state(nnx.Linear(8, 4, rngs=nnx.Rngs(0), kernel_init=split), nnx.Param)
        params = jax.tree.map(lambda p: jax.device_put(p, NamedSharding(mesh, P())), params)
        tx = optax_adamax.scale_by_adamax()
        kept = sharding.keep_sharded(tx, params, zero_axis="data")
        state = sharding.init_sharded(tx, params, zero_axis="data")
        given = (params, state) if boxed else unboxed((params, state))
        updates, state = jax.jit(kept.update)(*given)
    assert jax.tree.structure((updates, state)) == jax.tree.structure(given)
    assert all(u.sharding.is_fully_replicated for u in jax.tree.leaves(updates))
    assert all(m.sharding.spec[0] == "data" for m in jax.tree.leaves(state.m))
    report = sharding.unsplit_leaves(tx, params)
    assert report == []


def test_other_parameters_than_those_kept():
    params = random_like({"wide": structs(mesh_of())["wide"]}, 0)
    kept = sharding.keep_sharded(optax_adamax.adamax(0.1), params, zero_axis="data")
    with pytest.raises(ValueError, match=r"leaves \[\"\['wide'\]\"\], but here are .*\['bias'\]"):
        kept.update(params | {"bias": params["wide"]}, kept.init(params))
