"""Packed and unpacked, the same transformation gives the same bits."""

import functools
import pickle
import re

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.tree
import pytest
from flax_boxes import nnx, unboxed
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from optax_adamax import (
    adamax,
    adamaxw,
    decode_state,
    encode_state,
    pack_small_leaves,
    repack_state,
    unpack_state,
)

MAX_SIZE = 64
FORMATS = [("bfloat16", "bfloat16"), ("float32", "uint8"), ("int8", "float32"), ("int8", "uint8")]
TRANSFORMATIONS = {
    "adamaxw, schedule": adamaxw(optax.linear_schedule(0.1, 0.0, 10), weight_decay=0.1),
    "nonfinite": adamax(0.1, nonfinite="skip_step"),
    "optax": optax.adamaxw(0.1),
    **{f"{m}, {v}": adamax(0.1, m_dtype=m, v_dtype=v) for m, v in FORMATS},
}
# Shapes of three sizes, in an order in which equal sizes are apart.
PARAMS = {
    "a": jnp.ones(3),
    "b": [jnp.full((4, 3), 2.0), None, jnp.ones(())],
    "c": (jnp.ones((9, 9)), optax.MaskedNode(), {}),
    "d": jnp.zeros((2, 2, 3)),
    "e": jnp.full(3, -1.0),
}
MIXED = {
    "half": [jnp.ones(5, jnp.bfloat16), jnp.ones((2, 2), jnp.bfloat16)],
    "small half": jnp.ones(5, jnp.float16),
    "single": jnp.ones(5),
    "complex": jnp.ones((3, 2), jnp.complex64),
    "empty": [jnp.ones(0), jnp.ones((3, 0, 2))],
    "NumPy": np.ones(4, np.float32),
    "NumPy scalar": np.float32(2.0),
    "Python float": 1.5,
}


def gradient(params, step):
    rng = np.random.default_rng(step)

    def like(p):
        scale = 10.0 ** (step % 5 - 2)
        return jnp.asarray(scale * rng.standard_t(2, np.shape(p)), jnp.result_type(p))

    return jax.tree.map(like, params)


def run(tx, params, steps=6, compiler=jax.jit):
    """The updates of each step, and the last state."""
    update, state, found = compiler(tx.update), tx.init(params), []
    for step in range(steps):
        updates, state = update(gradient(params, step), state, params)
        found.append(updates)
    return found, state


def same(x, y):
    assert jax.tree.structure(x) == jax.tree.structure(y)
    jax.tree.map(np.testing.assert_array_equal, x, y)
    assert jax.tree.map(jnp.result_type, x) == jax.tree.map(jnp.result_type, y)


def test_without_a_compiler():
    tx = TRANSFORMATIONS["adamaxw, schedule"]
    unpacked, _ = run(tx, PARAMS, steps=2, compiler=lambda f: f)
    packed, _ = run(pack_small_leaves(tx, MAX_SIZE), PARAMS, steps=2, compiler=lambda f: f)
    same(packed, unpacked)


@pytest.mark.parametrize("params", [MIXED, {}, None, jnp.ones(3), 2.0, [jnp.ones(0)]])
def test_every_tree(params):
    unpacked, _ = run(adamax(0.1), params)
    for max_size in (0, 5, MAX_SIZE):
        packed, _ = run(pack_small_leaves(adamax(0.1), max_size), params)
        same(packed, unpacked)


def test_scan_without_params():
    sequence = jax.tree.map(lambda *x: jnp.stack(x), *(gradient(PARAMS, t) for t in range(6)))

    def scan(tx):
        def body(state, g):
            return tuple(reversed(tx.update(g, state)))

        return jax.jit(lambda: jax.lax.scan(body, tx.init(PARAMS), sequence))()

    tx = adamax(0.1, m_dtype="int8", v_dtype="uint8")
    state, updates = scan(tx)
    packed_state, packed_updates = scan(pack_small_leaves(tx, MAX_SIZE))
    same(packed_updates, updates)
    same(optax.tree.get(packed_state, "count"), optax.tree.get(state, "count"))


def test_vmap():
    stacked = jax.tree.map(lambda x: jnp.stack([x, -x]), PARAMS)

    def updates(tx, g):
        return tx.update(g, tx.init(g))[0]

    tx = adamax(0.1, m_dtype="int8", v_dtype="uint8")
    packed = jax.jit(jax.vmap(functools.partial(updates, pack_small_leaves(tx, MAX_SIZE))))
    same(packed(stacked), jax.jit(jax.vmap(functools.partial(updates, tx)))(stacked))


def test_layout_follows_from_shapes_and_dtypes():
    tx = pack_small_leaves(adamax(0.1), 12)
    state = tx.init(MIXED | {"large": jnp.ones(13)})
    m = optax.tree.get(state, "m")
    sizes = {name: buffer.size for name, buffer in m.flat.items()}
    assert sizes == {"bfloat16": 9, "float16": 5, "float32": 5 + 4}
    alone = {
        "['complex']",
        "['empty'][0]",
        "['empty'][1]",
        "['NumPy scalar']",
        "['Python float']",
        "['large']",
    }
    assert set(m.alone) == alone
    shapes = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, MIXED | {"large": jnp.ones(13)}))
    for other in (tx.init(shapes), jax.jit(tx.init)(MIXED | {"large": jnp.ones(13)})):
        same(other, state)
    assert jax.tree.structure(jax.eval_shape(tx.init, shapes)) == jax.tree.structure(state)


def test_inner_init_sees_the_values():
    tx = pack_small_leaves(optax.contrib.schedule_free(optax.sgd(0.1), 0.1), MAX_SIZE)
    z = optax.tree.get(tx.init(PARAMS), "z")
    assert sorted(z.flat["float32"].tolist()) == [-1] * 3 + [0] * 12 + [1] * 3 + [2] * 12


def test_gradients_of_another_dtype():
    params = {"a": jnp.ones(3, jnp.bfloat16), "b": jnp.ones(5, jnp.bfloat16)}
    g = jax.tree.map(lambda x: x.astype(jnp.float32) / 3, params)
    tx = pack_small_leaves(adamax(0.1))
    updates, state = tx.update(g, tx.init(params), params)
    same(updates, adamax(0.1).update(g, adamax(0.1).init(params), params)[0])
    assert jax.tree.structure(state) == jax.tree.structure(tx.init(params))
    with pytest.raises(TypeError, match="bfloat16 and float32: cast them to one dtype"):
        tx.update(g | {"b": params["b"]}, state, params)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda g: g | {"f": g["a"]}, r"lacks \[\] and has \[\"\['f'\]\"\]"),
        (lambda g: {k: x for k, x in g.items() if k != "a"}, r"lacks \[\"\['a'\]\"\] and has \[\]"),
        (lambda g: g | {"d": g["d"].reshape(3, 2, 2)}, r"\['d'\] has shape \(3, 2, 2\), but"),
        (lambda g: g | {"a": jnp.ones(4)}, r"\['a'\] has shape \(4,\), but .* \(3,\)"),
    ],
)
def test_refuses_gradients_of_another_tree(change, message):
    tx = pack_small_leaves(adamax(0.1), MAX_SIZE)
    state = tx.init(PARAMS)
    with pytest.raises(ValueError, match=message):
        tx.update(change(gradient(PARAMS, 0)), state, PARAMS)
    with pytest.raises(ValueError, match=message):
        tx.update(gradient(PARAMS, 0), state, change(PARAMS))


def test_refuses_what_it_cannot_take():
    with pytest.raises(TypeError, match="max_size must be an integer, but 2\\.5"):
        pack_small_leaves(adamax(0.1), 2.5)
    with pytest.raises(ValueError, match="max_size must be at least 0, but -1"):
        pack_small_leaves(adamax(0.1), -1)
    with pytest.raises(TypeError, match="must be a PackedState, but a tuple"):
        pack_small_leaves(adamax(0.1)).update(PARAMS, adamax(0.1).init(PARAMS))
    with pytest.raises(TypeError, match=r"\['i'\].* has dtype int32"):
        pack_small_leaves(adamax(0.1)).init({"i": jnp.ones(3, jnp.int32)})
    with pytest.raises(TypeError, match="'relu' is of type str"):
        pack_small_leaves(adamax(0.1)).init({"i": "relu"})


WRAPPERS = {
    "masked": lambda tx: optax.masked(tx, lambda p: jax.tree.map(lambda x: jnp.ndim(x) > 0, p)),
    "partition": lambda tx: optax.partition(
        {0: tx, 1: optax.set_to_zero()}, lambda p: jax.tree.map(lambda x: jnp.ndim(x) % 2, p)
    ),
    "MultiSteps": lambda tx: optax.MultiSteps(tx, 2).gradient_transformation(),
    "chain": lambda tx: optax.chain(
        optax.clip_by_global_norm(1.0), tx, optax.add_decayed_weights(0.1)
    ),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 2),
}


@functools.cache
def runs(name):
    """Without packing and with it: the updates of each step, and the last state."""
    tx, wrap = TRANSFORMATIONS.get(name, adamax(0.1, v_dtype="bfloat16")), WRAPPERS.get(name)
    wrap = wrap or (lambda tx: tx)
    with jax.numpy_dtype_promotion("standard"):  # which optax's own need
        packed = wrap(pack_small_leaves(tx, MAX_SIZE))
        return run(wrap(tx), PARAMS), run(packed, PARAMS), jax.eval_shape(packed.init, PARAMS)


# Two of these formats only mix what the others have.
SLOW = ("float32, uint8", "int8, float32")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name in SLOW else ())
        for name in [*TRANSFORMATIONS, *WRAPPERS]
    ],
)
def test_updates_are_the_same_bit_for_bit(name):
    (expected, _), (found, _), _ = runs(name)
    same(found, expected)


def test_hyperparameters_can_be_injected():
    inject = functools.partial(optax.inject_hyperparams, hyperparam_dtype=jnp.float32)
    tx = inject(adamax)(learning_rate=0.1)
    found = []
    for each in (tx, pack_small_leaves(tx, MAX_SIZE)):
        state = optax.tree.set(each.init(PARAMS), learning_rate=jnp.float32(0.2))
        found.append(jax.jit(each.update)(gradient(PARAMS, 0), state)[0])
    same(*found)


def test_state_is_converted_and_kept_by_checkpoints():
    tx = pack_small_leaves(adamax(0.1, m_dtype="int8", v_dtype="uint8"), MAX_SIZE)
    _, state = run(tx, PARAMS)
    same(pickle.loads(pickle.dumps(state)), state)
    same(flax.serialization.from_bytes(tx.init(PARAMS), flax.serialization.to_bytes(state)), state)
    floats = decode_state(state)
    same(encode_state(floats).layout, state.layout)
    plain = pack_small_leaves(adamax(0.1), MAX_SIZE)
    assert jax.tree.structure(plain.init(PARAMS)) == jax.tree.structure(floats)
    plain.update(gradient(PARAMS, 0), floats)


@pytest.mark.parametrize("name", ["nonfinite", "int8, uint8", *WRAPPERS])
def test_unpacked_state_is_that_of_the_same_run_without_packing(name):
    (_, expected), (_, state), like = runs(name)
    unpacked = unpack_state(state, PARAMS)
    same(unpacked, expected)
    same(repack_state(unpacked, like), state)
    same(unpack_state(expected, PARAMS), expected)  # nothing to unpack


def test_state_is_carried_over_a_change_of_max_size():
    inner = adamax(0.1, m_dtype="int8", v_dtype="uint8")
    old, new = (pack_small_leaves(inner, size) for size in (4, MAX_SIZE))
    _, state = run(old, PARAMS)
    carried = repack_state(unpack_state(state, PARAMS), like=new.init(PARAMS))
    g = gradient(PARAMS, 6)
    same(new.update(g, carried)[0], old.update(g, state)[0])


def test_refuses_a_state_of_other_parameters_or_of_another_format():
    tx = pack_small_leaves(adamax(0.1), MAX_SIZE)
    state = tx.init(PARAMS)
    with pytest.raises(ValueError, match=r"packed for \[\"\['a'\]\"\], which are not in params"):
        unpack_state(state, {name: x for name, x in PARAMS.items() if name != "a"})
    unpacked = unpack_state(state, PARAMS)
    other_format = pack_small_leaves(adamax(0.1, v_dtype="uint8"), MAX_SIZE)
    other_chain = pack_small_leaves(optax.sgd(0.1, momentum=0.9), MAX_SIZE)
    larger = jax.tree.map(lambda x: jnp.stack([x, x]), PARAMS)
    for like in (other_format.init(PARAMS), other_chain.init(PARAMS), tx.init(larger)):
        with pytest.raises(ValueError):
            repack_state(unpacked, like)
    half = optax.tree.set(unpacked, count=jnp.zeros((), jnp.int16))
    with pytest.raises(ValueError, match=r"count has shape and dtype \(\), int16, but in `like`"):
        repack_state(half, state)


@pytest.mark.parametrize("axis_type", [AxisType.Explicit, AxisType.Auto])
@pytest.mark.parametrize("compiler", [jax.jit, lambda f: f])
def test_sharded_leaves(axis_type, compiler):
    mesh = jax.make_mesh((4,), ("x",), (axis_type,), devices=jax.devices()[:4])
    specs = {"large": P("x"), "split": P("x"), "columns": P(None, "x"), "whole": P(), "other": P()}
    shapes = {"large": (80,), "split": (8,), "columns": (2, 4), "whole": (8,), "other": (4, 2)}
    host = {name: np.full(shape, 2.0, np.float32) for name, shape in shapes.items()}
    params = {k: jax.device_put(x, NamedSharding(mesh, specs[k])) for k, x in host.items()}
    tx = pack_small_leaves(adamax(0.1), MAX_SIZE)
    with jax.set_mesh(mesh):
        state = tx.init(params)
        updates, state = compiler(tx.update)(params, state, params)
        assert jax.eval_shape(tx.init, params).layout == state.layout == tx.init(host).layout
    expected, _ = adamax(0.1).update(host, adamax(0.1).init(host))
    jax.tree.map(np.testing.assert_array_equal, updates, expected)
    m = optax.tree.get(state, "m")
    assert m.alone["['large']"].sharding.spec == P("x")
    if axis_type == AxisType.Explicit:
        assert m.flat["float32"].sharding.is_fully_replicated
        for name, x in updates.items():
            assert x.sharding.is_equivalent_to(params[name].sharding, x.ndim)


def test_boxes_of_flax_do_not_matter():
    """nnx.Optimizer gives boxed parameters to init and arrays to update."""
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    boxed = nnx.state(model, nnx.Param)
    arrays = unboxed(boxed)
    tx = pack_small_leaves(adamax(0.1), MAX_SIZE)
    assert tx.init(boxed).layout == tx.init(arrays).layout
    expected, _ = adamax(0.1).update(arrays, adamax(0.1).init(arrays))
    same(tx.update(arrays, tx.init(boxed), arrays)[0], expected)
    same(unboxed(tx.update(boxed, tx.init(arrays))[0]), expected)
    unpacked, wanted = unpack_state(tx.init(arrays), boxed), adamax(0.1).init(boxed)
    assert jax.tree.structure(unpacked) == jax.tree.structure(wanted)
    same(unboxed(unpacked), unboxed(wanted))
    nnx.Optimizer(model, tx, wrt=nnx.Param).update(model, boxed)
    same(unboxed(nnx.state(model, nnx.Param)), jax.tree.map(jnp.add, arrays, expected))


def test_one_kernel_serves_all_leaves_of_a_size():
    tx = pack_small_leaves(adamax(0.1))
    params = [jnp.ones(16) for _ in range(90)] + [jnp.ones((4, 4)) for _ in range(10)]
    text = jax.jit(tx.update).lower(params, tx.init(params)).compile().as_text()
    assert len(re.findall(r"dynamic-slice\(", text)) >= 100
    assert len(re.findall(r" slice\(", text)) == 1  # what the branch looks at
    bodies = re.findall(r"\n%fused_computation\S* [^\n]*\{\n(.*?)\n\}", text, re.DOTALL)
    cuts = [re.sub(r"%?[\w.-]+ = |\.\d+|, metadata=\{.*?\}", "", b) for b in bodies]
    cuts = {re.sub(r"%[\w.-]+", "%", b) for b in cuts if "dynamic-slice" in b}
    assert len(cuts) <= 4


def test_state_is_updated_in_place():
    tx = pack_small_leaves(adamax(0.1), MAX_SIZE)
    state = tx.init(PARAMS)
    compiled = jax.jit(tx.update, donate_argnums=1).lower(PARAMS, state).compile()
    size = sum(x.nbytes for x in jax.tree.leaves(state))
    assert compiled.memory_analysis().alias_size_in_bytes == size
