"""The layout of a packed state depends on shapes and dtypes only; other layouts raise."""

import collections
import functools

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax_boxes import nnx, unboxed
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from test_packing import FEW, MAX_SIZE, MIXED, PARAMS, full, gradient, same

from optax_adamax import (
    PackedState,
    PackedTree,
    ScaleByAdamaxState,
    adamax,
    adamaxw,
    pack_small_leaves,
    scale_by_adamax,
    unpack_state,
)


def test_layout_follows_from_shapes_and_dtypes():
    tx = pack_small_leaves(adamax(0.1), 12)
    params = MIXED | {"large": full(13)}
    state = jax.jit(tx.init)(params)
    m = optax.tree.get(state, "m")
    sizes = {name: buffer.size for name, buffer in m.buffers.items()}
    assert sizes == {"bfloat16": 9, "float16": 5, "float32": 5 + 4}
    unpacked = {
        "['complex']",
        "['empty'][0]",
        "['empty'][1]",
        "['NumPy scalar']",
        "['Python float']",
        "['large']",
    }
    assert set(m.unpacked) == unpacked
    shapes = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, params))
    for other in (tx.init(shapes), tx.init(params)):
        same(other, state)
    assert jax.tree.structure(jax.eval_shape(tx.init, shapes)) == jax.tree.structure(state)


@pytest.mark.parametrize("compiler", [jax.jit, lambda f: f])
def test_leaves_on_automatic_axes_give_the_updates_of_one_device(compiler):
    mesh = jax.make_mesh((4,), ("x",), (AxisType.Auto,), devices=jax.devices()[:4])
    specs = {"large": P("x"), "sharded": P("x"), "columns": P(None, "x"), "replicated": P()}
    shapes = {"large": (80,), "sharded": (8,), "columns": (2, 4), "replicated": (8,)}
    host = {name: np.full(shape, 2.0, np.float32) for name, shape in shapes.items()}
    params = {k: jax.device_put(x, NamedSharding(mesh, specs[k])) for k, x in host.items()}
    tx = pack_small_leaves(optax.sgd(0.125, momentum=0.5), MAX_SIZE)
    state = tx.init(params)
    assert state.layout == tx.init(host).layout
    updates, _ = compiler(tx.update)(params, state, params)
    jax.tree.map(np.testing.assert_array_equal, updates, jax.tree.map(lambda x: -x / 8, host))


def test_small_leaves_sharded_over_explicit_axes_raise():
    mesh = jax.make_mesh((4,), ("x",), (AxisType.Explicit,), devices=jax.devices()[:4])
    params = {"w": jax.device_put(np.ones(8, np.float32), NamedSharding(mesh, P("x")))}
    tx = pack_small_leaves(adamax(0.1))
    with pytest.raises(ValueError, match=r"\['w'\] is sharded over explicit .* for one CPU"):
        tx.init(params)
    replicated = {"w": jax.device_put(params["w"], NamedSharding(mesh, P()))}
    state = tx.init(replicated)
    with pytest.raises(ValueError, match=r"\['w'\] is sharded over explicit .* for one CPU"):
        jax.jit(tx.update)(params, state)
    jax.jit(tx.update)(replicated, state)
    large = pack_small_leaves(adamax(0.1), max_size=4).init(params)  # not packed
    assert optax.tree.get(large, "m").unpacked["['w']"].sharding.spec == P("x")


def test_boxes_of_flax_do_not_change_the_updates():
    """nnx.Optimizer passes boxed parameters to init and arrays to update."""
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    boxed = nnx.state(model, nnx.Param)
    arrays = unboxed(boxed)
    tx = pack_small_leaves(adamax(0.1), MAX_SIZE)
    assert tx.init(boxed).layout == tx.init(arrays).layout
    update = jax.jit(tx.update)
    expected, _ = jax.jit(adamax(0.1).update)(arrays, adamax(0.1).init(arrays))
    same(update(arrays, tx.init(boxed), arrays)[0], expected)
    same(unboxed(update(boxed, tx.init(arrays))[0]), expected)
    unpacked, wanted = unpack_state(tx.init(arrays), boxed), adamax(0.1).init(boxed)
    assert jax.tree.structure(unpacked) == jax.tree.structure(wanted)
    same(unboxed(unpacked), unboxed(wanted))
    nnx.Optimizer(model, tx, wrt=nnx.Param).update(model, boxed)
    same(unboxed(nnx.state(model, nnx.Param)), jax.tree.map(np.add, arrays, expected))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda g: g | {"f": g["a"]}, r"given to init, but it has also \['f'\]\. Pass zeros"),
        (
            lambda g: {k: x for k, x in g.items() if k != "a"},
            r"given to init, but it lacks \['a'\]\. Pass zeros",
        ),
        (lambda g: g | {"d": g["d"].reshape(3, 2, 2)}, r"\['d'\] must .* shape is \(3, 2, 2\)\."),
        (lambda g: g | {"a": full(4)}, r"\['a'\] must have shape \(4, 3\), .* \(4,\)\."),
    ],
)
def test_gradients_of_another_tree_raise(change, message):
    tx = pack_small_leaves(adamax(0.1), MAX_SIZE)
    state = jax.eval_shape(tx.init, PARAMS)
    with pytest.raises(ValueError, match=message):
        tx.update(change(gradient(PARAMS, 0)), state, PARAMS)
    with pytest.raises(ValueError, match=message):
        tx.update(gradient(PARAMS, 0), state, change(PARAMS))


def test_function_as_mask_inside_raises():
    """It would receive flat buffers, and matrices would not decay."""

    def is_matrix(params):
        return jax.tree.map(lambda p: p.ndim > 1, params)

    tx = adamaxw(0.1, weight_decay=1.0, mask=is_matrix)
    with pytest.raises(ValueError, match=r"outside: optax.chain\(pack_small_leaves\(scale_by_adam"):
        pack_small_leaves(tx).init(FEW)
    outside = optax.chain(
        pack_small_leaves(scale_by_adamax()),
        optax.add_decayed_weights(1.0, is_matrix),
        optax.scale_by_learning_rate(0.1),
    )
    expected, found = (jax.jit(t.update)(FEW, t.init(FEW), FEW)[0] for t in (tx, outside))
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_bad_arguments_raise():
    with pytest.raises(TypeError, match="max_size must be an integer, but 2\\.5"):
        pack_small_leaves(adamax(0.1), 2.5)
    with pytest.raises(ValueError, match="max_size must be at least 0, but -1"):
        pack_small_leaves(adamax(0.1), -1)
    with pytest.raises(TypeError, match="must be an optax transformation, or an object with init"):
        pack_small_leaves(adamax)
    with pytest.raises(TypeError, match="must be a PackedState, but a tuple"):
        pack_small_leaves(adamax(0.1)).update(FEW, adamax(0.1).init(FEW))
    with pytest.raises(TypeError, match="must be a float array, but its dtype is int32"):
        pack_small_leaves(adamax(0.1)).init({"i": np.ones(3, np.int32)})
    with pytest.raises(TypeError, match="must be an array, but 'relu' was given"):
        pack_small_leaves(adamax(0.1)).init({"i": "relu"})


GOLDEN = (
    """[["['at']",[3,4],"float32"],["['above']",[13],""],["['half']",[2,5],"bfloat16"],"""
    """["['one']",[1],""],["['small']",[2],"float32"]]"""
)


def test_layout_of_a_version_does_not_change():
    """A leaf of exactly max_size elements is packed; buffers are sorted by size, then by path."""
    params = collections.OrderedDict(
        at=full((3, 4), 1.0),
        above=full(13, 2.0),
        half=full((2, 5), 3.0, jnp.bfloat16),
        one=full(1, 4.0),
        small=full(2, 5.0),
    )
    inner = optax.GradientTransformation(lambda params: params, lambda g, s, p=None: (g, s))
    state = pack_small_leaves(inner, 12).init(params)
    assert state.layout == {GOLDEN: None}
    assert {name: buffer.tolist() for name, buffer in state.inner_state.buffers.items()} == {
        "float32": [5.0] * 2 + [1.0] * 12,
        "bfloat16": [3.0] * 10,
    }
    assert list(state.inner_state.unpacked) == ["['above']", "['one']"]


def test_gradients_in_another_order_of_keys_get_their_own_updates():
    """Leaves of equal size would exchange their updates if they were matched by position."""
    params = collections.OrderedDict(a=full(3), b=full(3))
    gradients = collections.OrderedDict(b=full(3, -1.0), a=full(3, 1.0))
    tx = pack_small_leaves(optax.sgd(0.1, momentum=0.9))
    for p in (params, collections.OrderedDict(reversed(params.items()))):
        updates, state = tx.update(gradients, tx.init(params), p)
        assert list(updates) == ["b", "a"]
        assert updates["a"].tolist() == pytest.approx([-0.1] * 3)
        assert updates["b"].tolist() == pytest.approx([0.1] * 3)
        trace = optax.tree.get(unpack_state(state, params), "trace")
        assert (trace["a"][0], trace["b"][0]) == (1.0, -1.0)


@functools.cache
def register_for_export():
    for node in (PackedState, PackedTree, ScaleByAdamaxState):
        jax.export.register_namedtuple_serialization(
            node, serialized_name=f"optax_adamax.{node.__name__}"
        )


def test_step_can_be_exported():
    """JAX serializes dictionaries with string keys only."""
    pytest.importorskip("flatbuffers", reason="JAX needs it to serialize a program")
    register_for_export()
    tx = pack_small_leaves(scale_by_adamax(), MAX_SIZE)
    state, gradients = tx.init(FEW), gradient(FEW, 0)
    exported = jax.export.export(jax.jit(tx.update))(gradients, state)
    loaded = jax.export.deserialize(exported.serialize())
    same(loaded.call(gradients, state), jax.jit(tx.update)(gradients, state))


def test_another_layout_of_a_checkpoint_raises(tmp_path):
    tx = pack_small_leaves(adamax(0.1), MAX_SIZE)
    state = jax.jit(tx.update)(gradient(FEW, 0), tx.init(FEW))[1]
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        same(checkpointer.restore(tmp_path / "state", tx.init(FEW)), state)
        for other in (
            pack_small_leaves(adamax(0.1), max_size=5).init(FEW),
            tx.init({**FEW, "a": FEW["c"], "c": FEW["a"]}),
            tx.init({"d": FEW["a"], "b": FEW["b"], "c": FEW["c"]}),
        ):
            with pytest.raises(ValueError, match="tree structures do not match"):
                checkpointer.restore(tmp_path / "state", other)
