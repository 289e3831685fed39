"""Names and files of Keras' variables: order, legacy files, wrappers of the optimizer."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peer_grid
import pytest

h5py = pytest.importorskip("h5py")
keras = pytest.importorskip("keras")

from optax_adamax.compat import keras as compat_keras  # noqa: E402


@pytest.fixture(autouse=True)
def as_keras_computes():
    """Allows the mixed dtypes and ranks that Keras needs."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


class TwoOfOneName(keras.Model):
    """A model of two layers with the same name, which Keras allows outside of `Sequential`."""

    def __init__(self):
        super().__init__(name="model")
        self.both = [keras.layers.Dense(2, name="dense", use_bias=False) for _ in range(2)]

    def call(self, x):
        return self.both[1](self.both[0](x))


def test_variables_of_equal_paths_need_other_names():
    model = TwoOfOneName()
    model(np.ones((1, 2)))
    optimizer = keras.optimizers.Adamax(0.1)
    optimizer.build(model.trainable_variables)
    order = [v.path for v in model.trainable_variables]
    assert order == ["model/dense/kernel"] * 2
    params = {"first": jnp.ones((2, 2)), "second": jnp.ones((2, 2))}
    tx = compat_keras.adamax(0.1)
    with pytest.raises(ValueError, match=r"'model/dense/kernel' was given twice. .* '0:name'"):
        compat_keras.load_state(optimizer.variables, params, tx, names=order)
    with pytest.raises(ValueError, match="'model/dense/kernel' was given twice"):
        compat_keras.dump_state(tx.init(params), params, names=order, learning_rate=0.1)
    for i, value in ((2, 0.1), (3, 1.0), (4, 0.2), (5, 2.0)):
        optimizer.variables[i].assign(np.full((2, 2), value))
    order = [f"{i}:{path}" for i, path in enumerate(order)]
    names = dict(zip(order, params, strict=True))
    state = compat_keras.load_state(optimizer.variables, params, tx, names, names=order)
    v = optax.tree.get(state, "v")
    assert (float(v["first"][0, 0]), float(v["second"][0, 0])) == (1.0, 2.0)


def test_swapped_names_raise():
    layers = [keras.layers.Dense(3, name=name, use_bias=False) for name in ("one", "two")]
    model = keras.Sequential([keras.Input((3,)), *layers], name="model")
    optimizer = keras.optimizers.Adamax(0.1)
    optimizer.build(model.trainable_variables)
    params = {"model": {name: {"kernel": jnp.ones((3, 3))} for name in ("one", "two")}}
    order = [v.path for v in model.trainable_variables]
    tx = compat_keras.adamax(0.1)
    compat_keras.load_state(optimizer.variables, params, tx, names=order)
    with pytest.raises(ValueError, match="is called 'model_one_kernel_momentum'"):
        compat_keras.load_state(optimizer.variables, params, tx, names=order[::-1])
    # Other names and arrays without names cannot be compared with the order of the variables.
    names = dict(zip("ab", order[::-1], strict=True))
    compat_keras.load_state(optimizer.variables, params, tx, names, names=["a", "b"])
    values = [np.asarray(v) for v in optimizer.variables]
    compat_keras.load_state(values, params, tx, names=order[::-1])


def test_dumped_iteration_counts_calls():
    params = {"w": jnp.ones(2)}
    tx = compat_keras.adamax(0.1, gradient_accumulation_steps=3)
    after, state = peer_grid.train(tx, params, tx.init(params), [params] * 7)
    dumped = compat_keras.dump_state(state, after, names=["w"], learning_rate=0.1)
    assert int(dumped[0]) == 7
    again = compat_keras.load_state(dumped, after, tx, names=["w"])
    jax.tree.map(np.testing.assert_array_equal, again, state)


def test_bfloat16_file_of_keras_loads(tmp_path):
    layer = keras.layers.Dense(4, name="layer", dtype="bfloat16")
    model = keras.Sequential([keras.Input((3,)), layer], name="model")
    model.optimizer = keras.optimizers.Adamax(0.01)
    model.optimizer.build(model.trainable_variables)
    variables = model.optimizer.variables
    values = [v.value for v in variables]
    gradients = [jnp.ones(v.shape, jnp.bfloat16) for v in model.trainable_variables]
    weights = [v.value for v in model.trainable_variables]
    _, values = model.optimizer.stateless_apply(values, gradients, weights)
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)
    with warnings.catch_warnings():
        # Keras 3.15 with NumPy 2: its variables do not know the copy argument of __array__.
        warnings.simplefilter("ignore", DeprecationWarning)
        model.save_weights(tmp_path / "model.weights.h5")
    params = {"model": {"layer": {"kernel": jnp.ones((3, 4)), "bias": jnp.ones(4)}}}
    order = [v.path for v in model.trainable_variables]
    with h5py.File(tmp_path / "model.weights.h5") as opened:
        saved = opened["optimizer/vars"]
        state = compat_keras.load_state(saved, params, compat_keras.adamax(0.01), names=order)
    m = optax.tree.get(state, "m")["model"]["layer"]["kernel"]
    np.testing.assert_array_equal(m, np.asarray(variables[2].value, np.float32))


def test_exclusion_without_a_match_raises():
    params = {"dense": {"kernel": jnp.ones(2), "bias": jnp.ones(2)}}
    for exclude in (["bias", "biass"], "biass"):
        tx = compat_keras.adamax(weight_decay=0.1, exclude_from_weight_decay=exclude)
        with pytest.raises(ValueError, match=r"'biass' matches none. .* \['dense/bias'"):
            tx.init(params)
    tx = compat_keras.adamax(weight_decay=0.1, exclude_from_weight_decay=["bias"])
    state = tx.init(params)
    assert jax.tree.structure(optax.tree.map_params(tx, jnp.ones_like, state)) == (
        jax.tree.structure(state)
    )


def test_zero_gradient_without_epsilon_is_finite_unlike_keras():
    optimizer = keras.optimizers.Adamax(0.1, epsilon=0.0)
    x = keras.Variable(np.ones(2, np.float32), name="x")
    optimizer.build([x])
    (after,), _ = optimizer.stateless_apply(
        [v.value for v in optimizer.variables], [jnp.zeros(2)], [x.value]
    )
    assert np.isnan(after).all()
    tx = compat_keras.adamax(0.1, epsilon=0.0)
    updates, _ = tx.update(jnp.zeros(2), tx.init(jnp.ones(2)))
    assert np.all(updates == 0)


def trained_model(**options):
    """Returns a model of two layers after three steps, its names, and parameters of 0."""
    keras.utils.set_random_seed(0)
    layers = [keras.layers.Dense(n, name=name) for n, name in ((4, "a"), (2, "b"))]
    model = keras.Sequential([keras.Input((3,)), *layers], name="model")
    model.compile(keras.optimizers.Adamax(0.01, **options), "mse")
    x = np.random.default_rng(0).standard_normal((6, 3)).astype("f4")
    model.fit(x, x[:, :2], batch_size=2, verbose=0)
    names = [v.path for v in model.trainable_variables]
    params = {"model": {"a": {}, "b": {}}}
    for v in model.trainable_variables:
        _, layer, name = v.path.split("/")
        params["model"][layer][name] = jnp.zeros(v.shape)
    return model, names, params


@pytest.mark.parametrize("options", [{}, {"use_ema": True}], ids=str)
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_legacy_file_loads(options, tmp_path):
    model, names, params = trained_model(**options)
    model.save(tmp_path / "model.h5")
    tx = compat_keras.adamax(0.01, **options)
    expected = compat_keras.load_state(model.optimizer.variables, params, tx, names=names)
    with h5py.File(tmp_path / "model.h5") as opened:
        for source in (opened, opened["optimizer_weights"]):
            state = compat_keras.load_state(source, params, tx, names=names)
            jax.tree.map(np.testing.assert_array_equal, state, expected)
        with pytest.raises(
            ValueError, match="must have the name of this variable, but it is called"
        ):
            compat_keras.load_state(opened, params, tx, names=names[::-1])


KERAS_2 = ["Adamax/{}/m:0", "Adamax/{}/v:0"]  # until 2.10: all momenta, then all norms
KERAS_2_11 = ["Adamax/m/{}:0", "Adamax/u/{}:0"]


@pytest.mark.parametrize("form", [KERAS_2, KERAS_2_11], ids=["2.10", "2.11"])
def test_order_of_keras_2_loads(form, tmp_path):
    model, names, params = trained_model()
    tx = compat_keras.adamax(0.01)
    expected = compat_keras.load_state(model.optimizer.variables, params, tx, names=names)
    iteration, rate, *moments = (np.asarray(v) for v in model.optimizer.variables)
    plain = [name.removeprefix("model/") for name in names]
    saved = {"Adamax/iter:0": iteration}
    if form is KERAS_2:
        for i in range(2):
            saved |= {form[i].format(n): x for n, x in zip(plain, moments[i::2], strict=True)}
    else:
        saved |= {"Adamax/learning_rate:0": rate}
        for i, x in enumerate(moments):
            saved[form[i % 2].format(plain[i // 2])] = x
    with h5py.File(tmp_path / "model.h5", "w") as opened:
        group = opened.create_group("optimizer_weights")
        group.attrs["weight_names"] = [name.encode() for name in saved]
        for name, value in saved.items():
            group[name] = value
    with h5py.File(tmp_path / "model.h5") as opened:
        state = compat_keras.load_state(opened, params, tx, names=names)
        jax.tree.map(np.testing.assert_array_equal, state, expected)
    in_order = [iteration, rate, *moments[::2], *moments[1::2]]
    with pytest.raises(ValueError, match="Keras 2 may write all momenta"):
        compat_keras.load_state(in_order, params, tx, names=names)


def test_function_moves_variables_of_keras():
    model, names, params = trained_model(use_ema=True, gradient_accumulation_steps=2)
    tx = compat_keras.adamax(0.01, use_ema=True, gradient_accumulation_steps=2)
    expected = compat_keras.load_state(model.optimizer.variables, params, tx, names=names)
    from_keras = lambda a: [a[name].T for name in names]  # noqa: E731
    to_keras = lambda p: dict(zip(names, [x.T for x in p], strict=True))  # noqa: E731
    turned = from_keras(
        {n: jnp.zeros(v.shape) for n, v in zip(names, model.trainable_variables, strict=True)}
    )
    state = compat_keras.load_state(model.optimizer.variables, turned, tx, from_keras, names=names)
    np.testing.assert_array_equal(state.average[0], expected.average["model"]["a"]["kernel"].T)
    how = {"names": names, "learning_rate": 0.01}
    dumped = compat_keras.dump_state(state, turned, to_keras, **how)
    for value, variable in zip(dumped, model.optimizer.variables, strict=True):
        np.testing.assert_allclose(value, np.asarray(variable), rtol=1e-7)
    assert dumped[0].dtype == np.int32


def test_other_rate_warns():
    model, names, params = trained_model()
    with pytest.warns(UserWarning, match=r"0\.1 instead of 0\.01"):
        compat_keras.load_state(
            model.optimizer.variables, params, compat_keras.adamax(0.1), names=names
        )
    options = {"gradient_accumulation_steps": 2}
    model, names, params = trained_model(**options)
    with pytest.warns(UserWarning, match=r"0\.1 instead of 0\.01"):
        tx = compat_keras.adamax(0.1, **options)
        compat_keras.load_state(model.optimizer.variables, params, tx, names=names)
    with pytest.raises(TypeError, match="the name of a file was given"):
        compat_keras.load_state("model.h5", params, compat_keras.adamax(0.1), names=names)


def test_statistics_of_batch_norm_need_no_place():
    layers = [keras.layers.Dense(2, name="dense"), keras.layers.BatchNormalization(name="norm")]
    model = keras.Sequential([keras.Input((3,)), *layers], name="model")
    arrays = {v.path: v for v in model.variables}
    params = {"model": {"dense": {}, "norm": {}}}
    for v in model.trainable_variables:
        _, layer, name = v.path.split("/")
        params["model"][layer][name] = jnp.zeros(v.shape)
    loaded = compat_keras.load_params(arrays, params)
    np.testing.assert_array_equal(loaded["model"]["norm"]["gamma"], 1.0)
    params["model"]["norm"]["moving_variance"] = jnp.zeros(2)
    loaded = compat_keras.load_params(arrays, params)
    np.testing.assert_array_equal(loaded["model"]["norm"]["moving_variance"], 1.0)


def test_inner_variables_of_a_loss_scale_optimizer_load():
    model, names, params = trained_model()
    scaled = keras.optimizers.LossScaleOptimizer(keras.optimizers.Adamax(0.01))
    scaled.build(model.trainable_variables)
    tx = compat_keras.adamax(0.01)
    with pytest.raises(ValueError, match="but 14 were given"):
        compat_keras.load_state(scaled.variables, params, tx, names=names)
    inner = scaled.inner_optimizer.variables
    state = compat_keras.load_state(inner, params, tx, names=names)
    jax.tree.map(np.testing.assert_array_equal, state, tx.init(params))


def test_dumping_untrained_variables_raises():
    _, names, params = trained_model()
    frozen = {"a": compat_keras.adamax(0.01), "b": optax.set_to_zero()}
    tx = optax.partition(frozen, {"model": {"a": "a", "b": "b"}})
    with pytest.raises(ValueError, match=r"has no moments of \['model/b/kernel', 'model/b/bias'\]"):
        compat_keras.dump_state(tx.init(params), params, names=names, learning_rate=0.01)
