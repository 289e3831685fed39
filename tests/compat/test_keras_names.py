"""`compat.keras` where averages stand within chains, and where names say whose a variable is."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peer_grid
import pytest

h5py = pytest.importorskip("h5py")
keras = pytest.importorskip("keras")

import optax_adamax  # noqa: E402
from optax_adamax.compat import keras as compat_keras  # noqa: E402


@pytest.fixture(autouse=True)
def as_keras_computes():
    """Keras mixes dtypes and ranks as strict JAX forbids."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def test_an_average_within_a_chain_is_finalized():
    params = {"w": jnp.ones(2), "x": jnp.ones(3)}
    average = compat_keras.adamax(0.1, use_ema=True)
    for tx in (
        optax.chain(optax.clip(1.0), average),
        optax.inject_hyperparams(compat_keras.adamax)(learning_rate=0.1, use_ema=True),
        optax_adamax.pack_small_leaves(average),
        optax.masked(average, {"w": True, "x": True}),
    ):
        after, state = peer_grid.train(tx, params, tx.init(params), [params] * 3)
        final = compat_keras.finalize_variable_values(after, state)
        # The average of the parameters after 1, 2 and 3 calls, the first of them a copy.
        copy = 1 - 0.1
        expected = 0.99 * (0.99 * copy + 0.01 * (copy - 0.1)) + 0.01 * (copy - 0.2)
        np.testing.assert_allclose(final["w"], expected, rtol=1e-5)
        assert float(after["w"][0]) == pytest.approx(0.7)


def test_each_part_of_a_partition_is_finalized():
    params = {"w": jnp.ones(2), "x": jnp.ones(3), "y": jnp.ones(3)}
    average = compat_keras.adamax(0.1, use_ema=True)
    groups = {"a": average, "b": average, "plain": optax.sgd(0.1)}
    tx = optax.partition(groups, {"w": "a", "x": "b", "y": "plain"})
    after, state = peer_grid.train(tx, params, tx.init(params), [params] * 3)
    final = compat_keras.finalize_variable_values(after, state)
    assert np.all(final["w"] > after["w"]) and np.all(final["x"] > after["x"])
    np.testing.assert_array_equal(final["y"], after["y"])
    with pytest.raises(ValueError, match=r"averages of \['x'\]"):
        compat_keras.finalize_variable_values({"w": params["w"], "y": params["y"]}, state)
    with pytest.raises(TypeError, match="must contain a ScaleByAdamaxState, but this dict"):
        compat_keras.finalize_variable_values(state, params)
    with pytest.raises(ValueError, match="There are 2 AverageState"):
        compat_keras.dump_state(state, params, names=list(params), learning_rate=None)


class TwoOfOneName(keras.Model):
    """Both of its layers are called the same, as Keras allows outside of `Sequential`."""

    def __init__(self):
        super().__init__(name="model")
        self.both = [keras.layers.Dense(2, name="dense", use_bias=False) for _ in range(2)]

    def call(self, x):
        return self.both[1](self.both[0](x))


def test_two_variables_of_one_path():
    model = TwoOfOneName()
    model(np.ones((1, 2)))
    optimizer = keras.optimizers.Adamax(0.1)
    optimizer.build(model.trainable_variables)
    order = [v.path for v in model.trainable_variables]
    assert order == ["model/dense/kernel"] * 2
    params = {"first": jnp.ones((2, 2)), "second": jnp.ones((2, 2))}
    tx = compat_keras.adamax(0.1)
    with pytest.raises(ValueError, match=r"'model/dense/kernel' twice: .* '0:model/dense/kernel'"):
        compat_keras.load_state(optimizer.variables, params, tx, names=order)
    with pytest.raises(ValueError, match="'model/dense/kernel' twice"):
        compat_keras.dump_state(tx.init(params), params, names=order, learning_rate=0.1)
    for i, value in ((2, 0.1), (3, 1.0), (4, 0.2), (5, 2.0)):
        optimizer.variables[i].assign(np.full((2, 2), value))
    order = [f"{i}:{path}" for i, path in enumerate(order)]
    names = dict(zip(order, params, strict=True))
    state = compat_keras.load_state(optimizer.variables, params, tx, names, names=order)
    v = optax.tree.get(state, "v")
    assert (float(v["first"][0, 0]), float(v["second"][0, 0])) == (1.0, 2.0)


def test_swapped_names_are_refused():
    layers = [keras.layers.Dense(3, name=name, use_bias=False) for name in ("one", "two")]
    model = keras.Sequential([keras.Input((3,)), *layers], name="model")
    optimizer = keras.optimizers.Adamax(0.1)
    optimizer.build(model.trainable_variables)
    params = {"model": {name: {"kernel": jnp.ones((3, 3))} for name in ("one", "two")}}
    order = [v.path for v in model.trainable_variables]
    tx = compat_keras.adamax(0.1)
    compat_keras.load_state(optimizer.variables, params, tx, names=order)
    with pytest.raises(ValueError, match="so it is that of 'model/one/kernel'"):
        compat_keras.load_state(optimizer.variables, params, tx, names=order[::-1])
    # A caller's own names say nothing of the order, nor do bare arrays.
    names = dict(zip("ab", order[::-1], strict=True))
    compat_keras.load_state(optimizer.variables, params, tx, names, names=["a", "b"])
    values = [np.asarray(v) for v in optimizer.variables]
    compat_keras.load_state(values, params, tx, names=order[::-1])


def test_the_state_knows_the_calls_to_an_update():
    params = {"w": jnp.ones(2)}
    tx = compat_keras.adamax(0.1, gradient_accumulation_steps=3)
    after, state = peer_grid.train(tx, params, tx.init(params), [params] * 7)
    dumped = compat_keras.dump_state(state, after, names=["w"], learning_rate=0.1)
    assert int(dumped[0]) == 7
    again = compat_keras.load_state(dumped, after, tx, names=["w"])
    jax.tree.map(np.testing.assert_array_equal, again, state)


def test_bfloat16_in_a_file_is_read(tmp_path):
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


def test_a_pattern_that_excludes_nothing_is_refused():
    params = {"dense": {"kernel": jnp.ones(2), "bias": jnp.ones(2)}}
    for exclude in (["bias", "biass"], "biass"):
        tx = compat_keras.adamax(weight_decay=0.1, exclude_from_weight_decay=exclude)
        with pytest.raises(ValueError, match=r"'biass', which matches no .* \['dense/bias'"):
            tx.init(params)
    tx = compat_keras.adamax(weight_decay=0.1, exclude_from_weight_decay=["bias"])
    state = tx.init(params)
    assert jax.tree.structure(optax.tree.map_params(tx, jnp.ones_like, state)) == (
        jax.tree.structure(state)
    )


def test_nothing_divides_zero_by_zero_but_keras():
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
    """A model of two layers after three steps."""
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
def test_a_legacy_file_is_read(options, tmp_path):
    model, names, params = trained_model(**options)
    model.save(tmp_path / "model.h5")
    tx = compat_keras.adamax(0.01, **options)
    expected = compat_keras.load_state(model.optimizer.variables, params, tx, names=names)
    with h5py.File(tmp_path / "model.h5") as opened:
        for source in (opened, opened["optimizer_weights"]):
            state = compat_keras.load_state(source, params, tx, names=names)
            jax.tree.map(np.testing.assert_array_equal, state, expected)
        with pytest.raises(ValueError, match="so it is that of 'model/a/kernel'"):
            compat_keras.load_state(opened, params, tx, names=names[::-1])


KERAS_2 = ["Adamax/{}/m:0", "Adamax/{}/v:0"]  # until 2.10: all momenta, then all norms
KERAS_2_11 = ["Adamax/m/{}:0", "Adamax/u/{}:0"]


@pytest.mark.parametrize("form", [KERAS_2, KERAS_2_11], ids=["2.10", "2.11"])
def test_the_order_of_keras_2_is_read(form, tmp_path):
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
    with pytest.raises(ValueError, match="If Keras 2 wrote the variables"):
        compat_keras.load_state(in_order, params, tx, names=names)


def test_a_function_moves_the_variables_of_keras():
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


def test_a_rate_that_differs_warns():
    model, names, params = trained_model()
    with pytest.warns(UserWarning, match=r"0\.1 here and 0\.01 in the checkpoint"):
        compat_keras.load_state(
            model.optimizer.variables, params, compat_keras.adamax(0.1), names=names
        )
    with pytest.raises(TypeError, match="the name of a file was given"):
        compat_keras.load_state("model.h5", params, compat_keras.adamax(0.1), names=names)
