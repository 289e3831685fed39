"""Arguments of the constructors of `compat`; no source framework is needed."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_adamax.compat import keras, lucid, mlx, torch

NAN = float("nan")
NEEDS_PATTERN = "must be a pattern or a list of patterns"
INVALID = [
    (torch.adamax, {"betas": 0.9}, TypeError, "betas must be a pair"),
    # The order of a set and the keys of a dict are not the order that was written or meant.
    (torch.adamax, {"betas": {0.9, 0.999}}, TypeError, "betas must be a pair"),
    (torch.adamax, {"betas": {0.9: "b1", 0.999: "b2"}}, TypeError, "betas must be a pair"),
    (torch.adamax, {"betas": iter((0.9, 0.999))}, TypeError, "betas must be a pair"),
    (torch.adamax, {"betas": "ab"}, TypeError, "betas must be a pair"),
    (torch.adamax, {"betas": (0.9, 0.99, 0.999)}, ValueError, "betas must be a pair"),
    (torch.adamax, {"betas": (0.9, 1.0)}, ValueError, r"betas\[1\] must be in \[0, 1\)"),
    (torch.adamax, {"betas": ("0.9", 0.9)}, TypeError, r"betas\[0\] must be a real number"),
    (torch.adamax, {"betas": (True, 0.9)}, TypeError, r"betas\[0\] must be a real number"),
    (torch.adamax, {"lr": "fast"}, TypeError, "lr must be a real number"),
    (torch.adamax, {"lr": True}, TypeError, "lr must be a real number"),
    (torch.adamax, {"lr": -0.1}, ValueError, "lr must be in"),
    (torch.adamax, {"eps": NAN}, ValueError, "eps must be in"),
    (torch.adamax, {"weight_decay": -0.1}, ValueError, "weight_decay must be in"),
    (torch.adamax, {"weight_decay": lambda count: 0.1}, TypeError, "weight_decay must be a real"),
    (torch.adamax, {"maximize": 1}, TypeError, "maximize must be True or False"),
    (torch.adamax, {"foreach": 0.1}, TypeError, "foreach must be True or False"),
    (torch.adamax, {"differentiable": None}, TypeError, "differentiable must be True or False"),
    (torch.adamax, {"capturable": "no"}, TypeError, "capturable must be True or False"),
    (lucid.adamax, {"betas": (1.0, 0.999)}, ValueError, r"betas\[0\]"),
    (lucid.adamax, {"betas": {0.9, 0.999}}, TypeError, "betas must be a pair"),
    (lucid.adamax, {"lr": NAN}, ValueError, "lr must be in"),
    (lucid.adamax, {"weight_decay": None}, TypeError, "weight_decay must be a real number"),
    (mlx.adamax, {"learning_rate": 1.0, "betas": [0.9]}, ValueError, "betas must be a pair"),
    (mlx.adamax, {"learning_rate": 1.0, "betas": {0.9, 0.999}}, TypeError, "must be a pair"),
    (mlx.adamax, {"learning_rate": -0.1}, ValueError, "learning_rate must be in"),
    (keras.adamax, {"learning_rate": 1}, ValueError, "Keras rejects integers"),
    (keras.adamax, {"learning_rate": np.int64(1)}, ValueError, "Keras rejects integers"),
    (keras.adamax, {"learning_rate": -0.1}, ValueError, "learning_rate must be in"),
    (keras.adamax, {"beta_1": 1.0}, ValueError, "beta_1 must be in"),
    (keras.adamax, {"beta_2": NAN}, ValueError, "beta_2 must be in"),
    (keras.adamax, {"epsilon": True}, TypeError, "epsilon must be a real number"),
    (keras.adamax, {"clipnorm": 1.0, "clipvalue": 2.0}, ValueError, "At most one limit"),
    (keras.adamax, {"clipnorm": NAN}, ValueError, "clipnorm must be in"),
    (keras.adamax, {"clipvalue": NAN}, ValueError, "clipvalue must be in"),
    (keras.adamax, {"global_clipnorm": NAN}, ValueError, "global_clipnorm must be in"),
    (keras.adamax, {"clipnorm": True}, TypeError, "clipnorm must be a real number"),
    (keras.adamax, {"clipvalue": "1"}, TypeError, "clipvalue must be a real number"),
    (keras.adamax, {"use_ema": 1}, TypeError, "use_ema must be True or False"),
    (keras.adamax, {"ema_momentum": NAN}, ValueError, "ema_momentum must be in"),
    (keras.adamax, {"ema_overwrite_frequency": True}, TypeError, "an integer >= 1"),
    (keras.adamax, {"ema_overwrite_frequency": 0}, ValueError, "an integer >= 1"),
    (keras.adamax, {"gradient_accumulation_steps": 1}, ValueError, "an integer >= 2"),
    (keras.adamax, {"gradient_accumulation_steps": 2.5}, TypeError, "an integer >= 2"),
    (keras.adamax, {"gradient_accumulation_steps": ""}, TypeError, "an integer >= 2"),
    (keras.adamax, {"gradient_accumulation_steps": False}, TypeError, "an integer >= 2"),
    (keras.adamax, {"loss_scale_factor": -1.0}, ValueError, "loss_scale_factor must be in"),
    (keras.adamax, {"loss_scale_factor": 0}, ValueError, "must be greater than 0"),
    (keras.adamax, {"weight_decay": -1.0}, ValueError, "weight_decay must be in"),
    (keras.adamax, {"exclude_from_weight_decay": b"bias"}, TypeError, NEEDS_PATTERN),
    (keras.adamax, {"exclude_from_weight_decay": 5}, TypeError, NEEDS_PATTERN),
    (keras.adamax, {"exclude_from_weight_decay": ["bias", 5]}, TypeError, NEEDS_PATTERN),
    (keras.adamax, {"exclude_from_weight_decay": {"bias"}}, TypeError, NEEDS_PATTERN),
    (keras.adamax, {"exclude_from_weight_decay": iter(["bias"])}, TypeError, NEEDS_PATTERN),
    (keras.adamax, {"exclude_from_weight_decay": True}, TypeError, NEEDS_PATTERN),
    (keras.adamax, {"exclude_from_weight_decay": {"w": True}}, TypeError, NEEDS_PATTERN),
    (keras.adamax, {"exclude_from_weight_decay": ["bias", ""]}, ValueError, "an empty pattern"),
    (keras.adamax, {"exclude_from_weight_decay": "*"}, ValueError, "nothing to repeat"),
]


@pytest.mark.parametrize(("make", "arguments", "error", "match"), INVALID)
def test_invalid_argument_raises(make, arguments, error, match):
    with pytest.raises(error, match=match):
        make(**arguments)


ARRAY = jnp.array([0.9, 0.99])


@pytest.mark.parametrize(
    ("make", "arguments"),
    [
        *((framework.adamax, {"betas": ARRAY}) for framework in (torch, lucid, mlx)),
        (torch.adamax, {"groups": ARRAY}),
        (keras.adamax, {"gradient_accumulation_steps": ARRAY}),
        (keras.adamax, {"exclude_from_weight_decay": ARRAY}),
    ],
)
def test_message_describes_an_array_without_its_elements(make, arguments):
    rate = {"learning_rate": 0.1} if make is mlx.adamax else {}
    with pytest.raises(TypeError, match=r"an array of shape \(2,\) and dtype float32 was given"):
        make(**rate, **arguments)


@pytest.mark.parametrize("excluded", ["bias", ["bias"], 5, None], ids=str)
def test_exclusion_that_returns_no_booleans_raises(excluded):
    tx = keras.adamax(weight_decay=0.1, exclude_from_weight_decay=lambda params: {"w": excluded})
    with pytest.raises((TypeError, ValueError)):
        tx.init({"w": jnp.ones(2)})


SCALARS = [np.float32(0.5), np.float64(0.5), jnp.float32(0.5)]


@pytest.mark.parametrize("scalar", SCALARS, ids=lambda x: f"{type(x).__name__}-{x.dtype}")
def test_numbers_of_every_type_equal_floats(scalar):
    def updates(x):
        made = {
            "torch": torch.adamax(x, eps=x, weight_decay=x),
            "lucid": lucid.adamax(x, eps=x, weight_decay=x),
            "mlx": mlx.adamax(x, eps=x),
            "loss scale": keras.adamax(x, x, x, x, x, clipvalue=x, loss_scale_factor=x),
            "norm": keras.adamax(x, clipnorm=x, use_ema=True, ema_momentum=x),
            "global norm": keras.adamax(x, global_clipnorm=x),
        }
        return {name: tx.update(params, tx.init(params), params)[0] for name, tx in made.items()}

    with jax.enable_x64(True):
        params = {"w": jnp.ones(2, jnp.float64)}
        jax.tree.map(np.testing.assert_array_equal, updates(scalar), updates(0.5))


def test_integers_of_numpy_are_integers():
    options = {"gradient_accumulation_steps": np.int64(2), "ema_overwrite_frequency": np.int32(3)}
    state = keras.adamax(use_ema=True, **options).init({"w": jnp.ones(2)})
    assert optax.tree.get(state, "gradient_accumulation_steps") == 2


def test_signature_equals_that_of_lucid():
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
def test_constructors_compose_like_other_transformations(tx):
    # eval_shape, ShapeDtypeStruct, map_params and scan give the same state.
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


def test_infinite_imaginary_part_leaves_real_part_finite():
    tx = torch.adamax(lr=0.1)
    params = {"z": jnp.ones(2, jnp.complex64)}
    updates, _ = tx.update({"z": jnp.array([complex(1, np.inf), 1 + 1j])}, tx.init(params), params)
    np.testing.assert_allclose(updates["z"].real, -0.1, rtol=1e-6)
    assert np.isnan(updates["z"].imag[0])


@pytest.mark.parametrize("name", ["accumulate", "average"])
def test_state_of_another_chain_raises(name):
    options = {
        "accumulate": {"gradient_accumulation_steps": 2},
        "average": {"use_ema": True},
    }
    tx = keras.adamax(**options[name])
    params = {"w": jnp.ones(2)}
    with pytest.raises(TypeError, match="The state must be made with"):
        tx.update(params, keras.adamax().init(params), params)


def test_average_without_parameters_raises():
    tx = keras.adamax(use_ema=True)
    params = {"w": jnp.ones(2)}
    with pytest.raises(ValueError, match="must receive the parameters"):
        tx.update(params, tx.init(params))


def test_mlx_rounds_the_learning_rate_to_float32():
    with jax.enable_x64(True):
        params = {"w": jnp.ones(2, jnp.float64)}
        for rate in (0.1, np.float64(0.1), lambda count: 0.1):
            tx = mlx.adamax(rate, eps=0.0)
            updates, _ = tx.update(params, tx.init(params))
            np.testing.assert_array_equal(
                -updates["w"] / 0.1, float(np.float32(0.1)) * (1 - 0.9) / 0.1
            )


def test_accumulation_of_complex_gradients_raises():
    with pytest.raises(TypeError, match="must be real with gradient_accumulation_steps"):
        keras.adamax(gradient_accumulation_steps=2).init({"z": jnp.ones(2, jnp.complex64)})


def test_accumulation_is_loaded_and_dumped_inside_multi_steps():
    params = {"w": jnp.ones(2)}
    tx = keras.adamax(0.1, gradient_accumulation_steps=3)
    outer = optax.MultiSteps(tx, 2).gradient_transformation()
    variables = [7, 0.1, np.full(2, 0.5), np.full(2, 0.1), np.ones(2)]
    state = keras.load_state(variables, params, outer, names=["w"])
    assert isinstance(state, optax.MultiStepsState)
    (inner,) = state.inner_opt_state
    assert (state.mini_step, inner.mini_step, inner.gradient_step) == (0, 1, 2)
    dumped = keras.dump_state(state, params, names=["w"], learning_rate=0.1)
    jax.tree.map(np.testing.assert_allclose, dumped, variables)
