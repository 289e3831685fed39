"""What the constructors of `compat` refuse and accept; needs no peer."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_adamax.compat import keras, lucid, mlx, torch

REFUSED = [
    (torch.adamax, {"betas": 0.9}, TypeError, "betas must be a pair"),
    (torch.adamax, {"betas": (0.9, 0.99, 0.999)}, ValueError, "betas must be two numbers"),
    (torch.adamax, {"betas": (0.9, 1.0)}, ValueError, r"betas\[1\] must be in \[0, 1\)"),
    (torch.adamax, {"betas": ("0.9", 0.9)}, TypeError, r"betas\[0\] must be a real number"),
    (torch.adamax, {"lr": "fast"}, TypeError, "lr must be a real number"),
    (torch.adamax, {"lr": -0.1}, ValueError, "lr must be in"),
    (torch.adamax, {"weight_decay": -0.1}, ValueError, "weight_decay must be in"),
    (torch.adamax, {"maximize": 1}, TypeError, "maximize must be True or False"),
    (lucid.adamax, {"betas": (1.0, 0.999)}, ValueError, r"betas\[0\]"),
    (lucid.adamax, {"lr": float("nan")}, ValueError, "lr must be in"),
    (lucid.adamax, {"weight_decay": None}, TypeError, "weight_decay must be a real number"),
    (mlx.adamax, {"learning_rate": 0.1, "betas": [0.9]}, ValueError, "betas must be two numbers"),
    (mlx.adamax, {"learning_rate": -0.1}, ValueError, "learning_rate must be in"),
    (keras.adamax, {"learning_rate": 1}, ValueError, "Keras refuses integers"),
    (keras.adamax, {"learning_rate": -0.1}, ValueError, "learning_rate must be in"),
    (keras.adamax, {"clipnorm": 1.0, "clipvalue": 2.0}, ValueError, "At most one limit"),
    (keras.adamax, {"use_ema": 1}, TypeError, "use_ema must be True or False"),
    (keras.adamax, {"gradient_accumulation_steps": 1}, ValueError, "an integer >= 2"),
    (keras.adamax, {"gradient_accumulation_steps": 2.5}, TypeError, "an integer >= 2"),
    (keras.adamax, {"loss_scale_factor": -1.0}, ValueError, "loss_scale_factor must be in"),
    (keras.adamax, {"weight_decay": -1.0}, ValueError, "weight_decay must be in"),
    (
        keras.adamax,
        {"use_ema": True, "ema_overwrite_frequency": 0},
        ValueError,
        "ema_overwrite_frequency must be an integer >= 1",
    ),
]


@pytest.mark.parametrize(("make", "arguments", "error", "match"), REFUSED)
def test_refused(make, arguments, error, match):
    with pytest.raises(error, match=match):
        make(**arguments)


def test_the_signature_of_lucid():
    defaults = {n: p.default for n, p in inspect.signature(lucid.adamax).parameters.items()}
    expected = {"lr": 2e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0}
    assert list(defaults.items())[:4] == list(expected.items())


@pytest.mark.parametrize(
    "tx",
    [
        torch.adamax(m_dtype="float32", v_dtype="float32"),
        lucid.adamax(m_dtype="float32", v_dtype="float32"),
        mlx.adamax(1e-3, m_dtype="float32", v_dtype="float32"),
        keras.adamax(m_dtype="float32", v_dtype="float32"),
    ],
)
def test_storage_dtypes_are_passed_through(tx):
    with jax.enable_x64(True):
        state = tx.init({"w": jnp.ones(2, jnp.float64)})
    moments = optax.tree.get(state, "ScaleByAdamaxState")
    assert moments.m["w"].dtype == moments.v["w"].dtype == np.float32


@pytest.mark.parametrize(
    "tx",
    [
        torch.adamax(weight_decay=0.1, maximize=True),
        lucid.adamax(weight_decay=0.1),
        keras.adamax(use_ema=True, ema_overwrite_frequency=2, gradient_accumulation_steps=2),
    ],
)
def test_they_compose_like_any_transformation(tx):
    # eval_shape, ShapeDtypeStruct, map_params and scan see the same state.
    params = {"w": jnp.ones((2, 3)), "z": jnp.ones(2, jnp.bfloat16)}
    state = tx.init(params)
    shapes = jax.eval_shape(tx.init, params)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == jax.tree.map(
        lambda x: (x.shape, x.dtype), shapes
    )
    assert jax.tree.structure(tx.init(shapes_of(params))) == jax.tree.structure(state)
    counted = optax.tree.map_params(tx, lambda x: x + 1, state)
    assert jax.tree.structure(counted) == jax.tree.structure(state)

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(params, state, params)
        return (optax.apply_updates(params, updates), state), None

    (_, after), _ = jax.lax.scan(step, (params, state), length=5)
    assert jax.tree.map(lambda x: x.dtype, after) == jax.tree.map(lambda x: x.dtype, state)


def shapes_of(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def test_complex_parameters_have_a_state_under_eval_shape():
    tx = torch.adamax()
    params = {"z": jnp.ones(2, jnp.complex64)}
    state = tx.init(params)
    abstract = tx.init(shapes_of(params))
    assert jax.tree.structure(abstract) == jax.tree.structure(state)
    moments = optax.tree.get(state, "ScaleByAdamaxState")
    assert moments.m["z"].real.dtype == moments.v["z"].imag.dtype == np.float32


def test_an_infinite_imaginary_part_leaves_the_real_one_alone():
    tx = torch.adamax(lr=0.1)
    params = {"z": jnp.ones(2, jnp.complex64)}
    updates, _ = tx.update({"z": jnp.array([complex(1, np.inf), 1 + 1j])}, tx.init(params), params)
    np.testing.assert_allclose(updates["z"].real, -0.1, rtol=1e-6)
    assert np.isnan(updates["z"].imag[0])


@pytest.mark.parametrize("name", ["accumulate", "average"])
def test_the_state_of_another_chain_is_refused(name):
    options = {
        "accumulate": {"gradient_accumulation_steps": 2},
        "average": {"use_ema": True},
    }
    tx = keras.adamax(**options[name])
    params = {"w": jnp.ones(2)}
    with pytest.raises(TypeError, match="The state must be a"):
        tx.update(params, keras.adamax().init(params), params)


def test_an_average_needs_the_parameters():
    tx = keras.adamax(use_ema=True)
    params = {"w": jnp.ones(2)}
    with pytest.raises(ValueError, match="needs the parameters"):
        tx.update(params, tx.init(params))


def test_mlx_rounds_its_rate_to_float32():
    with jax.enable_x64(True):
        params = {"w": jnp.ones(2, jnp.float64)}
        for rate in (0.1, np.float64(0.1), lambda count: 0.1):
            tx = mlx.adamax(rate, eps=0.0)
            updates, _ = tx.update(params, tx.init(params))
            np.testing.assert_array_equal(
                -updates["w"] / 0.1, float(np.float32(0.1)) * (1 - 0.9) / 0.1
            )


def test_complex_gradients_are_not_accumulated():
    with pytest.raises(TypeError, match="gradient_accumulation_steps needs real parameters"):
        keras.adamax(gradient_accumulation_steps=2).init({"z": jnp.ones(2, jnp.complex64)})


def test_accumulation_is_loaded_and_dumped_inside_multi_steps():
    params = {"w": jnp.ones(2)}
    tx = keras.adamax(0.1, gradient_accumulation_steps=3)
    outer = optax.MultiSteps(tx, 2).gradient_transformation()
    variables = [7, 0.1, np.full(2, 0.5), np.full(2, 0.1), np.ones(2)]
    state = keras.load_state(variables, params, outer, order=["w"])
    assert isinstance(state, optax.MultiStepsState)
    (inner,) = state.inner_opt_state
    assert (state.mini_step, inner.mini_step, inner.gradient_step) == (0, 1, 2)
    dumped = keras.dump_state(state, params, order=["w"], learning_rate=0.1)
    jax.tree.map(np.testing.assert_allclose, dumped, variables)
