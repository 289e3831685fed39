"""Bad input: the exception, and the words that it must contain."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_adamax import ScaleByAdamaxState, adamax, adamaxw, scale_by_adamax

HYPERPARAMETERS = [
    (dict(b1=1.0), ValueError, "b1 must be in [0, 1), but 1.0 was given"),
    (dict(b1=-0.1), ValueError, "b1 must be in [0, 1)"),
    (dict(b1=float("nan")), ValueError, "b1 must be in [0, 1), but nan"),
    (dict(b1="0.9"), TypeError, "b1 must be a real number, but '0.9' is of type str"),
    (dict(b1=None), TypeError, "b1 must be a real number"),
    (dict(b1=True), TypeError, "b1 must be a real number"),
    (dict(b1=0.9j), TypeError, "b1 must be a real number"),
    (dict(b1=np.complex64(0.9)), TypeError, "dtype is complex64"),
    (dict(b1=jnp.bfloat16(0.9)), TypeError, "hyperparam_dtype=jnp.float32"),
    (dict(b1=np.float64(1.5)), ValueError, "b1 must be in [0, 1)"),
    (dict(b1=lambda t: 0.9), TypeError, "b1 must be a real number"),
    (dict(b2=1.001), ValueError, "b2 must be in [0, 1], but 1.001 was given"),
    (dict(b2=-1e-9), ValueError, "b2 must be in [0, 1]"),
    (dict(b2=float("nan")), ValueError, "b2 must be in [0, 1]"),
    (dict(b2=[0.9, 0.99]), TypeError, "of type list"),
    (dict(b2=np.array([0.9, 0.99])), ValueError, "b2 must be a scalar, but an array of shape (2,)"),
    (dict(b2=jnp.array([0.9, 0.99])), ValueError, "optax.partition"),
    (dict(b2=jnp.float16(0.999)), TypeError, "b2 was given as a float16 array"),
    (dict(eps=-1e-8), ValueError, "eps must be in [0, inf), but -1e-08"),
    (dict(eps=float("nan")), ValueError, "eps must be in [0, inf)"),
    (dict(eps=float("inf")), ValueError, "eps must be in [0, inf)"),
    (dict(eps="1e-8"), TypeError, "eps must be a real number"),
    (dict(eps_placement="root"), ValueError, "('max', 'denominator'), but 'root'"),
    (dict(eps_placement=None), TypeError, "eps_placement must be one of"),
    (dict(bias_correction=1), TypeError, "bias_correction must be True or False"),
    (dict(nesterov="no"), TypeError, "nesterov must be True or False"),
    (dict(m_dtype="float33"), TypeError, "m_dtype must be a dtype, but 'float33'"),
    (dict(m_dtype=jnp.zeros(())), TypeError, "write m_dtype='float32'"),
    (dict(m_dtype="int16"), ValueError, "m_dtype must be"),
    (dict(v_dtype="complex64"), ValueError, "the dtype of the real part"),
]


@pytest.mark.parametrize("make", [scale_by_adamax, lambda **k: adamax(0.1, **k),
                                  lambda **k: adamaxw(0.1, **k)])  # fmt: skip
@pytest.mark.parametrize("arguments, error, words", HYPERPARAMETERS)
def test_hyperparameters(make, arguments, error, words):
    with pytest.raises(error) as raised:
        make(**arguments)
    assert words in str(raised.value)


@pytest.mark.parametrize(
    "name, value, error",
    [
        ("learning_rate", -1e-3, ValueError),
        ("learning_rate", float("nan"), ValueError),
        ("learning_rate", float("inf"), ValueError),
        ("learning_rate", "1e-3", TypeError),
        ("learning_rate", None, TypeError),
        ("weight_decay", -1e-3, ValueError),
        ("weight_decay", float("nan"), ValueError),
        ("weight_decay", "1e-3", TypeError),
    ],
)
def test_rates(name, value, error):
    with pytest.raises(error, match=f"{name} must be"):
        adamaxw(**{"learning_rate": 0.1, name: value})
    if name == "learning_rate":
        with pytest.raises(error, match=f"{name} must be"):
            adamax(value)


@pytest.mark.parametrize(
    "params, words",
    [
        ({"w": jnp.zeros(2, jnp.int32)}, "['w'] has dtype int32"),
        (jnp.zeros(2, bool), "the parameter has dtype bool"),
        ({"w": jnp.zeros(2), "step": 3}, "['step'] has dtype int32"),
        ({"name": "net"}, "['name'] must be an array, but 'net' is of type str"),
        ({"f": jax.nn.relu}, "equinox.filter"),
    ],
)
def test_parameters_that_cannot_be_trained(params, words):
    with pytest.raises(TypeError) as raised:
        scale_by_adamax().init(params)
    assert words in str(raised.value)


PARAMS = {"a": jnp.ones(3), "b": {"c": jnp.ones((2, 2)), "z": jnp.ones(2, jnp.complex64)}}


def gradients(**changes):
    leaves = {"a": jnp.ones(3), "c": jnp.ones((2, 2)), "z": jnp.ones(2, jnp.complex64), **changes}
    return {"a": leaves["a"], "b": {"c": leaves["c"], "z": leaves["z"]}}


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize(
    "given, error, words",
    [
        ({"a": jnp.ones(3)}, ValueError, "no gradient for [\"['b']['c']\", \"['b']['z']\"]"),
        ({**gradients(), "d": jnp.ones(1)}, ValueError, "there is no state for [\"['d']\"]"),
        (gradients(a=None), ValueError, "no gradient for [\"['a']\"]"),
        (gradients(a=optax.MaskedNode()), ValueError, "no gradient for [\"['a']\"]"),
        (tuple(gradients().values()), ValueError, "initialized for"),
        (gradients(a=jnp.ones(2)), ValueError, "gradient['a'] has shape (2,)"),
        (gradients(a=jnp.ones(())), ValueError, "gradient['a'] has shape ()"),
        (gradients(c=jnp.ones((2, 2), jnp.int32)), TypeError, "gradient['b']['c'] has dtype int32"),
        (gradients(c=jnp.ones((2, 2), jnp.complex64)), TypeError, "its moment is float32"),
        (gradients(z=jnp.ones(2)), TypeError, "its moment is complex64"),
    ],
)  # fmt: skip
def test_gradients_of_other_parameters(given, error, words, jit):
    tx = scale_by_adamax()
    state = tx.init(PARAMS)
    update = jax.jit(tx.update) if jit else tx.update
    with pytest.raises(error) as raised:
        update(given, state)
    assert words in str(raised.value)


def test_containers_of_another_type_are_named():
    tx = scale_by_adamax()
    with pytest.raises(ValueError, match=r"PyTreeDef\(\(\*,\)\) instead of PyTreeDef\(\[\*\]\)"):
        tx.update((jnp.ones(1),), tx.init([jnp.ones(1)]))


@pytest.mark.parametrize(
    "state",
    [
        optax.adam(0.1).init(PARAMS),
        adamax(0.1).init(PARAMS),
        scale_by_adamax().init(PARAMS)._asdict(),
        None,
    ],
    ids=lambda s: type(s).__name__,
)
def test_state_of_another_transformation(state):
    with pytest.raises(TypeError, match="must be a ScaleByAdamaxState"):
        scale_by_adamax().update(gradients(), state)


def test_weight_decay_needs_parameters():
    tx = adamaxw(0.1)
    with pytest.raises(ValueError, match="not passing `params`"):
        tx.update(gradients(), tx.init(PARAMS))


def test_float64_moments_need_x64():
    with pytest.raises(ValueError, match="jax_enable_x64"):
        scale_by_adamax(m_dtype="float64").init(PARAMS)


def test_bad_input_leaves_the_state_alone():
    tx = scale_by_adamax()
    _, state = tx.update(gradients(), tx.init(PARAMS))
    before = jax.tree.map(np.array, state)
    with pytest.raises(ValueError):
        tx.update(gradients(a=jnp.ones(2)), state)
    jax.tree.map(np.testing.assert_array_equal, before, state)
    assert isinstance(state, ScaleByAdamaxState)
