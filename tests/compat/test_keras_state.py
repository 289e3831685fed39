"""Runs that move from the installed Keras to `compat.keras` and back."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peer_grid
import pytest

h5py = pytest.importorskip("h5py")
keras = pytest.importorskip("keras")

from keras_run import keras_mode  # noqa: E402

from optax_adamax.compat import keras as compat_keras  # noqa: E402

# Calls before the move. With three or four calls per update, one is already accumulated.
BEFORE = 25
OPTIONS = [
    {},
    {"weight_decay": 0.1},
    {"gradient_accumulation_steps": 3},
    {"use_ema": True, "ema_momentum": 0.8},
    {
        "use_ema": True,
        "ema_momentum": 0.8,
        "ema_overwrite_frequency": 3,
        "gradient_accumulation_steps": 4,
        "clipnorm": 1.0,
    },
]


@pytest.fixture(autouse=True, params=[pytest.param(np.float32, marks=pytest.mark.slow), np.float64])
def dtype(request):
    """The dtype in which Keras computes."""
    with keras_mode(request.param):
        yield request.param


class Peer:
    """A Keras model of two layers and its optimizer."""

    def __init__(self, weights=None, learning_rate=0.01, **options):
        dtype = keras.config.floatx()
        first = keras.layers.Dense(4, name="first", dtype=dtype)
        second = keras.layers.Dense(2, name="second", dtype=dtype)
        self.model = keras.Sequential([keras.Input((3,)), first, second], name="model")
        self.variables = self.model.trainable_variables
        self.order = [v.path for v in self.variables]
        if weights is not None:
            for v in self.variables:
                v.assign(weights[v.path])
        self.optimizer = keras.optimizers.Adamax(learning_rate, **options)
        self.optimizer.build(self.variables)

    def train(self, grads):
        call = jax.jit(self.optimizer.stateless_apply)  # eager Keras compiles at every call
        values = [v.value for v in self.variables]
        state = [v.value for v in self.optimizer.variables]
        for g in grads:
            values, state = call(state, [jnp.asarray(g[name]) for name in self.order], values)
        for variable, value in zip(self.variables, values, strict=True):
            variable.assign(value)
        for variable, value in zip(self.optimizer.variables, state, strict=True):
            variable.assign(value)
        return self

    def arrays(self):
        return {v.path: np.asarray(v) for v in self.variables}

    def state(self):
        return {v.name + str(i): np.asarray(v) for i, v in enumerate(self.optimizer.variables)}


def setup(dtype):
    """Returns the layout, the initial weights and the gradients of the model."""
    rng = np.random.default_rng(6)
    shapes = {v.path: v.shape for v in Peer().variables}
    draws = [
        {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}
        for _ in range(peer_grid.STEPS + 1)
    ]
    # The parameters in JAX have other names, and the second kernel is transposed.
    names = {
        "model/first/kernel": "a/kernel",
        "model/first/bias": "a/bias",
        "model/second/kernel": ("b/weight", (1, 0)),
        "model/second/bias": "b/bias",
    }
    return names, draws[0], draws[1:]


def nested(arrays):
    """Returns Keras' arrays as a tree in the layout of this package's parameters."""
    return {
        "a": {"kernel": arrays["model/first/kernel"], "bias": arrays["model/first/bias"]},
        "b": {"weight": arrays["model/second/kernel"].T, "bias": arrays["model/second/bias"]},
    }


# All options in float64, in which rounding hides no error; few options in float32.
CONTINUED = [
    pytest.param(dtype, schedule, o, marks=() if few or o in OPTIONS[::4] else pytest.mark.slow)
    for dtype, schedule, few in [
        (np.float64, False, True),
        (np.float64, True, False),
        (np.float32, False, False),
    ]
    for o in OPTIONS
] + [pytest.param(np.float32, True, o, marks=pytest.mark.slow) for o in OPTIONS]


@pytest.mark.parametrize(
    ("dtype", "schedule", "options"), CONTINUED, indirect=["dtype"], ids=peer_grid.label
)
def test_continued_from_keras_and_in_keras(options, schedule, dtype):
    names, weights, grads = setup(dtype)
    theirs = ours = 0.01
    if schedule:
        theirs = keras.optimizers.schedules.PiecewiseConstantDecay([30], [0.01, 0.001])
        ours = lambda count: jnp.where(count <= 30, 0.01, 0.001)  # noqa: E731
    tx = compat_keras.adamax(ours, **options)
    how = {"names": Peer().order}
    rate = None if schedule else 0.01
    whole = Peer(weights, theirs, **options).train(grads)

    half = Peer(weights, theirs, **options).train(grads[:BEFORE])
    params = compat_keras.load_params(half.arrays(), nested(weights), names)
    state = compat_keras.load_state(half.optimizer.variables, params, tx, names, **how)
    params, state = peer_grid.train(tx, params, state, map(nested, grads[BEFORE:]))
    back = compat_keras.dump_params(params, names)
    peer_grid.assert_equal_trees(back, whole.arrays(), dtype)
    dumped = compat_keras.dump_state(state, params, names, learning_rate=rate, **how)
    end = Peer(back, theirs, **options)
    end.optimizer.set_weights(dumped)
    peer_grid.assert_equal_trees(end.state(), whole.state(), dtype)

    start = nested(weights)
    params, state = peer_grid.train(tx, start, tx.init(start), map(nested, grads[:BEFORE]))
    half = Peer(compat_keras.dump_params(params, names), theirs, **options)
    dumped = compat_keras.dump_state(state, params, names, learning_rate=rate, **how)
    half.optimizer.set_weights(dumped)
    half.train(grads[BEFORE:])
    peer_grid.assert_equal_trees(half.arrays(), whole.arrays(), dtype)
    peer_grid.assert_equal_trees(half.state(), whole.state(), dtype)


@pytest.mark.parametrize("dtype", [np.float32, np.float64], indirect=True)
@pytest.mark.parametrize("options", [{}, OPTIONS[-1]], ids=str)
def test_file_of_keras_loads(options, dtype, tmp_path):
    names, weights, grads = setup(dtype)
    peer = Peer(weights, **options).train(grads[:7])
    peer.model.optimizer = peer.optimizer
    file = tmp_path / "model.weights.h5"
    with warnings.catch_warnings():
        # Keras 3.15 with NumPy 2: its variables do not know the copy argument of __array__.
        warnings.simplefilter("ignore", DeprecationWarning)
        peer.model.save_weights(file)
    tx = compat_keras.adamax(0.01, **options)
    how = {"names": peer.order}
    params = nested(weights)
    with h5py.File(file) as opened:
        from_file = compat_keras.load_state(opened["optimizer/vars"], params, tx, names, **how)
    directly = compat_keras.load_state(peer.optimizer.variables, params, tx, names, **how)
    jax.tree.map(np.testing.assert_array_equal, from_file, directly)


def test_variables_of_another_optimizer_raise(dtype):
    names, weights, _ = setup(dtype)
    peer = Peer(weights)
    optimizer = keras.optimizers.Nadam(0.01)
    optimizer.build(peer.variables)
    with pytest.raises(ValueError, match="variables"):
        compat_keras.load_state(
            optimizer.variables, nested(weights), compat_keras.adamax(), names, names=peer.order
        )
    optimizer = keras.optimizers.Adam(0.01)
    optimizer.build(peer.variables)
    with pytest.raises(ValueError, match="is called 'model_first_kernel_velocity'"):
        compat_keras.load_state(
            optimizer.variables, nested(weights), compat_keras.adamax(), names, names=peer.order
        )


def test_average_equals_that_of_finalize_variable_values(dtype):
    names, weights, grads = setup(dtype)
    peer = Peer(weights, use_ema=True).train(grads)
    params = compat_keras.load_params(peer.arrays(), nested(weights), names)
    tx = compat_keras.adamax(0.01, use_ema=True)
    variables = peer.optimizer.variables
    state = compat_keras.load_state(variables, params, tx, names, names=peer.order)
    peer.optimizer.finalize_variable_values(peer.variables)
    final = compat_keras.finalize_variable_values(params, state)
    ours = compat_keras.dump_params(final, names)
    for name, x in peer.arrays().items():
        np.testing.assert_array_equal(ours[name], x)
    assert optax.tree.get(state, "iteration") == peer_grid.STEPS
