"""Parameters in Flax's variables, and a loaded state in `nnx.Optimizer`."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

linen = pytest.importorskip("flax.linen")
nnx = pytest.importorskip("flax.nnx")

from optax_adamax.compat import keras, torch  # noqa: E402


@pytest.fixture(autouse=True)
def as_flax_computes():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


class Linen(linen.Module):
    """One layer, with a kernel in `linen.Partitioned` and a plain bias."""

    @linen.compact
    def __call__(self, x):
        init = linen.with_partitioning(linen.initializers.ones, ("in", "out"))
        return linen.Dense(3, kernel_init=init, bias_init=linen.initializers.ones)(x)


def boxed_linen():
    params = jax.jit(Linen().init)(jax.random.key(0), np.ones((1, 2), np.float32))
    # The bias is boxed by hand, because with_partitioning of a bias needs a mesh of one axis.
    dense = params["params"]["Dense_0"]
    dense["bias"] = linen.Partitioned(dense["bias"], names=("out",))
    return params


def plain(tree):
    is_box = lambda x: isinstance(x, linen.Partitioned)  # noqa: E731
    tree = jax.tree.map(lambda x: x.value if is_box(x) else x, tree, is_leaf=is_box)
    return tree["params"]["Dense_0"]


def test_patterns_match_boxed_parameters_of_linen():
    params = boxed_linen()
    zeros = jax.tree.map(jnp.zeros_like, params)
    tx = keras.adamax(0.1, weight_decay=1.0, exclude_from_weight_decay=["^bias$"])
    updates, _ = jax.jit(tx.update)(zeros, jax.jit(tx.init)(params), params)
    assert np.all(plain(updates)["bias"] == 0) and np.all(plain(updates)["kernel"] < 0)

    tx = torch.adamax(0.1, groups=[{"params": "bias$", "lr": 0.2}, {}])
    updates, _ = jax.jit(tx.update)(params, jax.jit(tx.init)(params), params)
    np.testing.assert_allclose(plain(updates)["bias"], -0.2, rtol=1e-6)
    np.testing.assert_allclose(plain(updates)["kernel"], -0.1, rtol=1e-6)


def saved_by_torch():
    """Returns the state dict of `torch.nn.Linear(2, 3)`."""
    moments = [np.linspace(0.1, 0.6, 6, dtype=np.float32).reshape(3, 2), np.full(3, 0.3, "f4")]
    entries = {i: {"step": 5.0, "exp_avg": x / 2, "exp_inf": x} for i, x in enumerate(moments)}
    return {"state": entries, "param_groups": [{"params": [0, 1]}]}


ORDER = ["Dense_0.weight", "Dense_0.bias"]


def test_boxed_parameters_of_linen_are_loaded_and_dumped():
    params, tx = boxed_linen(), torch.adamax(0.1)
    names = torch.flax_names(params)
    assert names["Dense_0.weight"] == ("params/Dense_0/kernel", (1, 0))
    state = torch.load_state(saved_by_torch(), params, tx, names, names=ORDER)
    assert jax.tree.structure(state) == jax.tree.structure(tx.init(params))
    groups = saved_by_torch()["param_groups"]
    dumped = torch.dump_state(state, params, groups, names, names=ORDER)
    jax.tree.map(np.testing.assert_array_equal, dumped["state"], saved_by_torch()["state"])
    arrays = {"Dense_0.weight": np.full((3, 2), 2.0), "Dense_0.bias": np.full(3, 3.0)}
    loaded = torch.load_params(arrays, params, names)
    assert isinstance(loaded["params"]["Dense_0"]["kernel"], linen.Partitioned)
    np.testing.assert_array_equal(torch.dump_params(loaded, names)["Dense_0.bias"], 3.0)


class Model(nnx.Module):
    """A model of one layer."""

    def __init__(self):
        self.Dense_0 = nnx.Linear(2, 3, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.Dense_0(x)


def test_state_of_an_nnx_model_can_be_the_parameters():
    params, tx = nnx.state(Model(), nnx.Param), torch.adamax(0.1)
    names = torch.flax_names(params)
    arrays = {"Dense_0.weight": np.full((3, 2), 2.0, "f4"), "Dense_0.bias": np.full(3, 3.0, "f4")}
    by_function = lambda a: {"Dense_0": {"kernel": a[ORDER[0]].T, "bias": a[ORDER[1]]}}  # noqa: E731
    for layout in (names, by_function):
        loaded = torch.load_params(arrays, params, layout)
        assert jax.tree.structure(loaded) == jax.tree.structure(params)
        state = torch.load_state(saved_by_torch(), loaded, tx, layout, names=ORDER)
        assert jax.tree.structure(state) == jax.tree.structure(tx.init(params))
        groups = saved_by_torch()["param_groups"]
        dumped = torch.dump_state(state, loaded, groups, names, names=ORDER)
        jax.tree.map(np.testing.assert_array_equal, dumped["state"], saved_by_torch()["state"])


@pytest.mark.skipif(not hasattr(nnx, "as_pure"), reason="nnx.as_pure is newer than Flax 0.12.0")
@pytest.mark.parametrize("formats", [{}, {"m_dtype": "int8", "v_dtype": "uint8"}], ids=str)
@pytest.mark.parametrize("groups", [None, [{"params": "bias$", "lr": 0.2}, {}]])
def test_loaded_state_continues_in_nnx_optimizer(groups, formats):
    # docs/guide/moving.md shows these calls.
    model = Model()
    tx = torch.adamax(0.1, groups=groups, **formats)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    params = nnx.as_pure(nnx.state(model, nnx.Param))
    names = torch.flax_names(params)
    state = torch.load_state(saved_by_torch(), params, tx, names, names=ORDER)
    nnx.update(optimizer.opt_state, nnx.state(state))
    grads = nnx.grad(lambda model: model(jnp.ones((1, 2))).sum())(model)
    nnx.jit(lambda optimizer, model, grads: optimizer.update(model, grads))(optimizer, model, grads)

    @jax.jit
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    expected, state = step(params, state, nnx.as_pure(grads))
    after = nnx.as_pure(nnx.state(model, nnx.Param))
    jax.tree.map(np.testing.assert_array_equal, after, expected)
    kept = nnx.as_pure(optimizer.opt_state)
    assert {int(n) for _, n in optax.tree.get_all_with_path(kept, "count")} == {6}
    jax.tree.map(np.testing.assert_array_equal, kept, state)
