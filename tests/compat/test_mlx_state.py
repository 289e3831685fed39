"""Runs that move from the installed MLX to `compat.mlx` and back."""

import jax
import numpy as np
import optax
import peer_grid
import pytest

mx = pytest.importorskip("mlx.core")
mlx_nn = pytest.importorskip("mlx.nn")
mlx_optimizers = pytest.importorskip("mlx.optimizers")
mlx_utils = pytest.importorskip("mlx.utils")

from optax_adamax.compat import mlx as compat_mlx  # noqa: E402

# A number in a name is an index of a list. MLX has an empty dict at index 1.
MODULES = {"Dense_0": "layers.0", "Conv_0": "layers.2", "LayerNorm_0": "norm", "Embed_0": "embed"}
HALF = peer_grid.STEPS // 2
DTYPES = {np.float32: mx.float32, np.float64: mx.float64}


@pytest.fixture(autouse=True, scope="module")
def on_the_cpu():
    before = mx.default_device()
    mx.set_default_device(mx.cpu)  # only the CPU has float64
    yield
    mx.set_default_device(before)


class Peer:
    """MLX's optimizer over the arrays of a model, by name."""

    def __init__(self, params, dtype):
        self.dtype = DTYPES[dtype]
        self.params = self.tree(params)
        self.optimizer = mlx_optimizers.Adamax(learning_rate=0.01)
        self.optimizer.init(self.params)

    def array(self, x):
        return mx.array(x, self.dtype)

    def tree(self, arrays):
        return jax.tree.map(self.array, arrays)

    def train(self, grads):
        for g in grads:
            self.params = self.optimizer.apply_gradients(self.tree(g), self.params)
        return self

    def arrays(self):
        return {k: np.array(x) for k, x in mlx_utils.tree_flatten(self.params)}

    def moments(self):
        flat = {k: np.array(x) for k, x in mlx_utils.tree_flatten(self.optimizer.state)}
        return {k: x for k, x in flat.items() if k not in ("step", "learning_rate")}


def setup(dtype):
    """Returns parameters and gradients in JAX, the layout, and both as MLX has them."""
    params, grads = peer_grid.model_run(dtype)
    names = compat_mlx.flax_names(params, MODULES)
    theirs = compat_mlx.dump_params(params, names)
    return params, grads, names, theirs, [compat_mlx.dump_params(g, names) for g in grads]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_continued_from_mlx(dtype):
    with jax.enable_x64(dtype == np.float64):
        params, grads, names, theirs, their_grads = setup(dtype)
        peer = Peer(theirs, dtype).train(their_grads[:HALF])
        tx = compat_mlx.adamax(learning_rate=0.01)
        params = compat_mlx.load_params(peer.arrays(), params, names)
        state = compat_mlx.load_state(peer.optimizer.state, params, tx, names)
        params, state = peer_grid.train(tx, params, state, grads[HALF:])
        peer.train(their_grads[HALF:])
        ours = dict(mlx_utils.tree_flatten(compat_mlx.dump_params(params, names)))
        peer_grid.assert_equal_trees(ours, peer.arrays(), dtype)
        moments = optax.tree.get(state, "ScaleByAdamaxState")
        assert moments.count == peer_grid.STEPS
        both = {}
        for field, tree in (("m", moments.m), ("v", moments.v)):
            dumped = dict(mlx_utils.tree_flatten(compat_mlx.dump_params(tree, names)))
            both |= {f"{name}.{field}": x for name, x in dumped.items()}
        peer_grid.assert_equal_trees(both, peer.moments(), dtype)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_continued_in_mlx(dtype):
    with jax.enable_x64(dtype == np.float64):
        params, grads, names, theirs, their_grads = setup(dtype)
        tx = compat_mlx.adamax(learning_rate=0.01)
        params, state = peer_grid.train(tx, params, tx.init(params), grads[:HALF])
        peer = Peer(compat_mlx.dump_params(params, names), dtype)

        def to_array(x):
            return peer.array(x) if x.shape else mx.array(x)

        peer.optimizer.state = compat_mlx.dump_state(
            state, params, names, learning_rate=0.01, to_array=to_array
        )
        peer.train(their_grads[HALF:])
        whole = Peer(theirs, dtype).train(their_grads)
        peer_grid.assert_equal_trees(peer.arrays(), whole.arrays(), dtype)
        peer_grid.assert_equal_trees(peer.moments(), whole.moments(), dtype)
        assert peer.optimizer.step.item() == peer_grid.STEPS
        assert peer.optimizer.step.dtype == mx.uint64


def test_file_of_mlx_loads(tmp_path):
    params, _, names, theirs, their_grads = setup(np.float32)
    peer = Peer(theirs, np.float32).train(their_grads[:3])
    file = str(tmp_path / "optimizer.safetensors")
    mx.save_safetensors(file, dict(mlx_utils.tree_flatten(peer.optimizer.state)))
    tx = compat_mlx.adamax(0.01)
    from_file = compat_mlx.load_state(mx.load(file), params, tx, names)
    directly = compat_mlx.load_state(peer.optimizer.state, params, tx, names)
    jax.tree.map(np.testing.assert_array_equal, from_file, directly)


def test_bfloat16_state_of_mlx_loads():
    params = {"w": np.ones(3, np.float32)}
    optimizer = mlx_optimizers.Adamax(learning_rate=0.01)
    gradient = {"w": mx.array([1.0, -2.0, 0.3], mx.bfloat16)}
    optimizer.apply_gradients(gradient, {"w": mx.ones(3, mx.bfloat16)})
    state = compat_mlx.load_state(optimizer.state, params, compat_mlx.adamax(0.01))
    v = optax.tree.get(state, "ScaleByAdamaxState").v["w"]
    np.testing.assert_array_equal(v, optimizer.state["w"]["v"].astype(mx.float32))


def test_state_of_adam_raises():
    rng = np.random.default_rng(0)
    params = {"w": np.zeros(50, np.float32)}
    optimizer = mlx_optimizers.Adam(learning_rate=0.01)
    for g in 0.1 * rng.standard_normal((20, 50)):
        optimizer.apply_gradients({"w": mx.array(g.astype("f4"))}, {"w": mx.zeros(50)})
    with pytest.raises(ValueError, match=r"must come from an Adamax, .* Adam's v is a"):
        compat_mlx.load_state(optimizer.state, params, compat_mlx.adamax(0.01))


def test_mlx_parameter_without_gradient_starts_at_zero_on_request():
    params = {"w": np.ones(3, np.float32), "x": np.ones(2, np.float32)}
    optimizer = mlx_optimizers.Adamax(learning_rate=0.01)
    tx = compat_mlx.adamax(0.01)
    fresh = compat_mlx.load_state(optimizer.state, params, tx, missing="zero")
    jax.tree.map(np.testing.assert_array_equal, fresh, tx.init(params))
    optimizer.apply_gradients({"w": mx.ones(3)}, {"w": mx.ones(3)})
    with pytest.raises(ValueError, match=r"but it has none for 'x'.* missing='zero'"):
        compat_mlx.load_state(optimizer.state, params, tx)
    state = compat_mlx.load_state(optimizer.state, params, tx, missing="zero")
    assert np.all(optax.tree.get(state, "m")["x"] == 0)
    assert int(optax.tree.get(state, "count")) == 1


def test_state_of_multi_optimizer_raises_and_its_parts_load():
    params = {"w": np.ones(3, np.float32), "x": np.ones(2, np.float32)}
    both = [mlx_optimizers.Adamax(learning_rate=rate) for rate in (0.01, 0.1)]
    optimizer = mlx_optimizers.MultiOptimizer(both, [lambda path, _: path == "w"])
    for i in range(3):
        grads = {k: mx.full(x.shape, i + 1.0) for k, x in params.items()}
        optimizer.apply_gradients(grads, jax.tree.map(mx.array, params))
    tx = optax.partition(
        {"a": compat_mlx.adamax(0.01), "b": compat_mlx.adamax(0.1)}, {"w": "a", "x": "b"}
    )
    flat = dict(mlx_utils.tree_flatten(optimizer.state))
    for state in (optimizer.state, flat):
        with pytest.raises(ValueError, match=r"a MultiOptimizer\. .*optimizers\[i\]\.state"):
            compat_mlx.load_state(state, params, tx)
    merged = {}
    for adamax in optimizer.optimizers:
        merged |= dict(mlx_utils.tree_flatten(adamax.state))
    del merged["learning_rate"]
    state = compat_mlx.load_state(merged, params, tx)
    for label, name in (("a", "w"), ("b", "x")):
        node = state.inner_states[label].inner_state[0]
        assert int(node.count) == 3
        np.testing.assert_array_equal(node.v[name], 3.0)
    one = optax.partition({"a": compat_mlx.adamax(0.01), "b": optax.sgd(0.1)}, {"w": "a", "x": "b"})
    state = compat_mlx.load_state(optimizer.optimizers[0].state, params, one)
    assert int(optax.tree.get(state, "count")) == 3


class Net(mlx_nn.Module):
    """A model of nested modules, some of them in a list."""

    def __init__(self):
        super().__init__()
        self.layers = [mlx_nn.Linear(3, 4), mlx_nn.ReLU(), mlx_nn.Linear(4, 2)]
        self.norm = mlx_nn.LayerNorm(2)


def from_mlx(params):
    """Moves a nested dict as `model.parameters()` returns it."""
    first, _, second = params["layers"]
    norm = {"scale": params["norm"]["weight"], "bias": params["norm"]["bias"]}
    layers = [{"kernel": x["weight"].T, "bias": x["bias"]} for x in (first, second)]
    return {"first": layers[0], "second": layers[1], "norm": norm}


def to_mlx(params):
    layers = [
        {"weight": params[k]["kernel"].T, "bias": params[k]["bias"]} for k in ("first", "second")
    ]
    norm = {"weight": params["norm"]["scale"], "bias": params["norm"]["bias"]}
    return {"layers": [layers[0], {}, layers[1]], "norm": norm}


@pytest.mark.parametrize("by_function", [True, False])
def test_dumped_nested_modules_update_the_model(by_function):
    mx.random.seed(0)
    model, optimizer = Net(), mlx_optimizers.Adamax(learning_rate=0.01)
    grads = jax.tree.map(mx.ones_like, model.parameters())
    optimizer.update(model, grads)
    template = jax.tree.map(lambda x: np.zeros(x.shape, "f4"), from_mlx(model.parameters()))
    modules = {"first": "layers.0", "second": "layers.2"}
    names = compat_mlx.flax_names(template, modules)
    there, back = (from_mlx, to_mlx) if by_function else (names, names)
    params = compat_mlx.load_params(model.parameters(), template, there)
    state = compat_mlx.load_state(optimizer.state, params, compat_mlx.adamax(0.01), there)
    assert int(optax.tree.get(state, "count")) == 1
    how = {"to_array": mx.array}
    optimizer.state = compat_mlx.dump_state(state, params, back, learning_rate=0.01, **how)
    other = Net()
    other.update(compat_mlx.dump_params(params, back, **how))
    for mine in (model, other):
        optimizer.state = compat_mlx.dump_state(state, params, back, learning_rate=0.01, **how)
        optimizer.update(mine, grads)
    for a, b in zip(*map(jax.tree.leaves, (model.parameters(), other.parameters())), strict=True):
        np.testing.assert_array_equal(a, b)
    assert optimizer.step.item() == 2


@pytest.mark.parametrize("by_function", [True, False])
def test_frozen_modules_need_no_moments(by_function):
    model, optimizer = Net(), mlx_optimizers.Adamax(learning_rate=0.01)
    model.layers[0].freeze()
    optimizer.update(model, jax.tree.map(mx.ones_like, model.trainable_parameters()))
    params = jax.tree.map(lambda x: np.zeros(x.shape, "f4"), from_mlx(model.parameters()))
    names = compat_mlx.flax_names(params, {"first": "layers.0", "second": "layers.2"})
    names = {k: x for k, x in names.items() if not k.startswith("layers.0")}
    labels = {"first": "frozen", "second": "trained", "norm": "trained"}
    transforms = {"trained": compat_mlx.adamax(0.01), "frozen": optax.set_to_zero()}
    state = compat_mlx.load_state(
        optimizer.state,
        params,
        optax.partition(transforms, labels),
        from_mlx if by_function else names,
        source_params=model.parameters(),
    )
    assert int(optax.tree.get(state, "count")) == 1
    np.testing.assert_allclose(optax.tree.get(state, "v")["second"]["kernel"], 1.0)


def test_other_rate_warns():
    params = {"w": np.ones(3, np.float32)}
    optimizer = mlx_optimizers.Adamax(learning_rate=0.01)
    optimizer.apply_gradients({"w": mx.ones(3)}, {"w": mx.ones(3)})
    with pytest.warns(UserWarning, match=r"0\.1 instead of 0\.01"):
        compat_mlx.load_state(optimizer.state, params, compat_mlx.adamax(0.1))
    with pytest.raises(TypeError, match=r"the name of a file was given: 'a.safetensors'"):
        compat_mlx.load_state("a.safetensors", params, compat_mlx.adamax(0.1))
