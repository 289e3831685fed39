"""Bad inputs: what is called, the exception, and words that it must contain. The table is the test.

A call gets the transformations and states of `Given`, none of which it may change.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_adamax import (
    ScaleByAdamaxState,
    adamax,
    adamax_step,
    adamaxw,
    encode_state,
    limit_spikes,
    scale_by_adamax,
    sharding,
)
from optax_adamax.compat import optax as compat_optax

LEAVES = {
    "a": jnp.asarray(np.ones(3, np.float32)),
    "c": jnp.asarray(np.ones((2, 2), np.float32)),
    "z": jnp.asarray(np.ones(2, np.complex64)),
}
PARAMS = {"a": LEAVES["a"], "b": {"c": LEAVES["c"], "z": LEAVES["z"]}}
REAL = {"a": LEAVES["a"], "b": LEAVES["c"]}


def gradients(**changes):
    leaves = {**LEAVES, **changes}
    return {"a": leaves["a"], "b": {"c": leaves["c"], "z": leaves["z"]}}


class Given(NamedTuple):
    """Transformations, each with its state after a step."""

    plain: optax.GradientTransformation  # of PARAMS
    state: ScaleByAdamaxState
    low: optax.GradientTransformation  # of REAL, in 2 bytes, as all below
    low_state: ScaleByAdamaxState
    skip: optax.GradientTransformation
    skip_state: tuple
    spikes: optax.GradientTransformation
    spike_state: tuple


def given():
    plain, low = scale_by_adamax(), scale_by_adamax(m_dtype="int8", v_dtype="uint8")
    skip = adamax(0.1, m_dtype="int8", v_dtype="uint8", nonfinite="skip_step")
    spikes = limit_spikes(skip, 5.0)
    given = [(plain, PARAMS), (low, REAL), (skip, REAL), (spikes, REAL)]

    @jax.jit
    def states():
        return [tx.update(params, tx.init(params))[1] for tx, params in given]

    return Given(*(x for (tx, _), state in zip(given, states(), strict=True) for x in (tx, state)))


# Arguments of the constructors.

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
    (dict(b1=jnp.float32(1.5)), ValueError, "b1 must be in [0, 1), but 1.5 was given"),
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
    (
        dict(m_dtype="int8", b1=0.9, b2=0.9),
        ValueError,
        "m_dtype=int8 keeps m as a ratio to v, up to 7.5",
    ),
    (dict(mu_dtype="bfloat16"), TypeError, "has no argument mu_dtype: write m_dtype=..."),
    (dict(nonfinite="ignore"), ValueError, "'zero', 'skip_step'), but 'ignore'"),
    (dict(nonfinite=None), TypeError, "nonfinite must be one of"),
    (dict(nonfinite=True), TypeError, "nonfinite must be one of"),
]

RATES = [
    ("learning_rate", -1e-3, ValueError),
    ("learning_rate", float("nan"), ValueError),
    ("learning_rate", float("inf"), ValueError),
    ("learning_rate", "1e-3", TypeError),
    ("learning_rate", None, TypeError),
    ("weight_decay", -1e-3, ValueError),
    ("weight_decay", float("nan"), ValueError),
    ("weight_decay", "1e-3", TypeError),
]

SPIKES = [
    (dict(max_norm_ratio=1.0), ValueError, "max_norm_ratio must be above 1"),
    (dict(max_norm_ratio=0.5), ValueError, "max_norm_ratio must be in [1, inf), but 0.5"),
    (dict(max_norm_ratio="5"), TypeError, "max_norm_ratio must be a real number"),
    (dict(max_norm_ratio=float("nan")), ValueError, "max_norm_ratio must be in [1, inf), but nan"),
    (dict(decay=1.0), ValueError, "decay must be in [0, 1), but 1.0"),
    (dict(decay=jnp.bfloat16(0.99)), TypeError, "decay was given as a bfloat16 array"),
    (dict(action="warn"), ValueError, "('skip', 'clip'), but 'warn'"),
    (dict(inner=adamax), TypeError, "inner must be an optax transformation, but it is a function"),
]


def constructed(make, arguments):
    return lambda _: make(**arguments)


CONSTRUCTORS = {
    "scale_by_adamax": scale_by_adamax,
    "adamax": lambda **k: adamax(0.1, **k),
    "adamaxw": lambda **k: adamaxw(0.1, **k),
}
ROWS = [
    (f"{name}({arguments})", constructed(make, arguments), error, words)
    for name, make in CONSTRUCTORS.items()
    for arguments, error, words in HYPERPARAMETERS
]
ROWS += [
    (f"{make.__name__}({name}={value})",
     constructed(make, {"learning_rate": 0.1, name: value}), error, f"{name} must be")
    for make in (adamax, adamaxw)
    for name, value, error in RATES
    if make is adamaxw or name == "learning_rate"
]  # fmt: skip
ROWS += [
    (f"limit_spikes({arguments})",
     constructed(limit_spikes, {"inner": adamax(0.1), "max_norm_ratio": 5.0, **arguments}),
     error, words)
    for arguments, error, words in SPIKES
]  # fmt: skip

# Parameters.

ROWS += [
    (f"init: {words}", lambda _, params=params: scale_by_adamax().init(params), TypeError, words)
    for params, words in [
        ({"w": jnp.zeros(2, jnp.int32)}, "['w'] has dtype int32"),
        (jnp.zeros(2, bool), "the parameter has dtype bool"),
        ({"w": jnp.zeros(2), "step": 3}, "['step'] has dtype int32"),
        ({"name": "net"}, "['name'] must be an array, but 'net' is of type str"),
        ({"f": jax.nn.relu}, "equinox.filter"),
    ]
]
ROWS += [
    ("complex parameters in 8 bits", lambda x: x.low.init(PARAMS), TypeError,
     "cannot be kept in int8: wrap the transformation in optax.contrib.split_real_and_imaginary"),
    ("float64 without x64", lambda _: scale_by_adamax(m_dtype="float64").init(PARAMS), ValueError,
     "jax_enable_x64"),
    ("hyperparameters in bfloat16",
     lambda _: optax.inject_hyperparams(adamax)(0.1).init(jnp.ones(2, jnp.bfloat16)), TypeError,
     "hyperparam_dtype=jnp.float32"),
    ("a decay mask of another structure",
     lambda _: adamaxw(0.1, mask={"a": True, "c": True}).init(REAL), ValueError, "key"),
    ("a mesh axis that does not exist", lambda _: sharding.shard(
        scale_by_adamax(), on_devices(REAL), zero1_axis="model"), ValueError,
     "zero1_axis is 'model', but the mesh of the parameters has the axes ('x',)"),
]  # fmt: skip


def on_devices(tree):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    return jax.device_put(tree, jax.NamedSharding(mesh, jax.P()))


# Gradients.

GRADIENTS = [
    ({"a": jnp.ones(3)}, ValueError, "no gradient for [\"['b']['c']\", \"['b']['z']\"]"),
    ({**gradients(), "d": jnp.ones(1)}, ValueError, "there is no state for [\"['d']\"]"),
    (None, ValueError, "there is no gradient for"),
    (gradients(a=None), ValueError, "no gradient for [\"['a']\"]"),
    (gradients(a=optax.MaskedNode()), ValueError, "no gradient for [\"['a']\"]"),
    (tuple(gradients().values()), ValueError, "initialized for"),
    (gradients(a=jnp.ones(2)), ValueError, "gradient['a'] has shape (2,)"),
    (gradients(a=jnp.ones(())), ValueError, "gradient['a'] has shape ()"),
    (gradients(c=jnp.ones((2, 2), jnp.int32)), TypeError, "gradient['b']['c'] has dtype int32"),
    (gradients(c=jnp.ones((2, 2), jnp.complex64)), TypeError, "its moment is float32"),
    (gradients(z=jnp.ones(2)), TypeError, "its moment is complex64"),
]
for tree, error, words in GRADIENTS:
    ROWS += [
        (f"update: {words}", lambda x, g=tree: x.plain.update(g, x.state), error, words),
        (f"jit: {words}", lambda x, g=tree: jax.jit(x.plain.update)(g, x.state), error, words),
    ]
ROWS += [
    ("a string", lambda x: x.plain.update(gradients(a="x"), x.state), TypeError,
     "gradient['a'] must be an array, but 'x' is of type str"),
    ("containers of another type",
     lambda x: x.plain.update([jnp.ones(1)], x.plain.init((jnp.ones(1),))), ValueError,
     "PyTreeDef([*]) instead of PyTreeDef((*,))"),
    ("skipping: another tree", lambda x: x.skip.update({"a": jnp.ones(3)}, x.skip_state),
     ValueError, "no gradient for [\"['b']\"]"),
    ("skipping: another shape",
     lambda x: x.skip.update({**REAL, "a": jnp.ones(2)}, x.skip_state), ValueError,
     "gradient['a'] has shape (2,)"),
    ("under a limit: another tree", lambda x: x.spikes.update({"a": jnp.ones(3)}, x.spike_state),
     ValueError, "no gradient for [\"['b']\"]"),
]  # fmt: skip

# States.

A_STATE = "must be a ScaleByAdamaxState, but a "
RESTORE = "restore the checkpoint into the structure and the dtypes that init returns"
STATES = [
    ("of adam", lambda x: optax.adam(0.1).init(PARAMS), TypeError, A_STATE + "tuple"),
    ("of a chain", lambda x: adamax(0.1).init(PARAMS), TypeError, A_STATE + "tuple"),
    ("a dict, as flax restores it", lambda x: x.state._asdict(), TypeError, A_STATE + "dict"),
    ("a tuple, as JSON restores it", lambda x: tuple(x.state), TypeError, A_STATE + "tuple"),
    ("none", lambda x: None, TypeError, A_STATE + "NoneType"),
    ("the parameters", lambda x: PARAMS, TypeError, A_STATE + "dict"),
    ("with a policy", lambda x: scale_by_adamax(nonfinite="skip_step").init(PARAMS), TypeError,
     A_STATE + "HandleNonfiniteState was given. Give its inner_state"),
    ("in another format", lambda x: x.state._replace(m=jax.tree.map(
        lambda m: m.astype(jnp.bfloat16), {**x.state.m, "b": {**x.state.m["b"], "z": m_of(x)}})),
     TypeError, "keeps m as bfloat16, but the transformation was built with m_dtype=None"),
    ("without a count", lambda x: x.state._replace(count=None), TypeError, RESTORE),
    ("with a float count", lambda x: x.state._replace(count=jnp.float32(3)), TypeError, RESTORE),
    ("without v", lambda x: x.state._replace(v=None), ValueError, RESTORE),
    ("v of another tree", lambda x: x.state._replace(v={"a": x.state.v["a"]}), ValueError, RESTORE),
    ("v of another shape", lambda x: x.state._replace(v={**x.state.v, "a": jnp.ones(4)}),
     ValueError, RESTORE),
]  # fmt: skip


def m_of(x):
    return x.state.m["a"]


ROWS += [
    (f"state: {name}", lambda x, s=state: x.plain.update(gradients(), s(x)), error, words)
    for name, state, error, words in STATES
]
ROWS += [
    ("gradients and state in the wrong order", lambda x: x.plain.update(x.state, gradients()),
     TypeError, A_STATE + "dict"),
    ("few bits where floats are expected",
     lambda x: scale_by_adamax().update(REAL, x.low_state), TypeError,
     "keeps m as int8 in a RatioInt8, but the transformation was built with m_dtype=None"),
    ("floats where few bits are expected",
     lambda x: x.low.update(REAL, scale_by_adamax().init(REAL)), TypeError, "encode_state(state"),
    ("a frame of another version", lambda x: x.low.update(REAL, x.low_state._replace(
        v=x.low_state.v._replace(phase=jnp.float32(0.5)))), TypeError, "for phase: " + RESTORE),
    ("codes without their frame",
     lambda x: x.low.update(REAL, x.low_state._replace(v=x.low_state.v.scaled_uint8)), TypeError,
     "keeps v as uint8, but the transformation was built with v_dtype=uint8"),
    ("a policy, and a state without", lambda x: x.skip.update(REAL, x.low_state), TypeError,
     "nonfinite='skip_step' needs the HandleNonfiniteState that its init returns"),
    ("a limit, and a state without", lambda x: x.spikes.update(REAL, x.skip_state), TypeError,
     "limit_spikes needs the LimitSpikesState that its init returns"),
    ("weight decay without parameters",
     lambda x: adamaxw(0.1).update(gradients(), adamaxw(0.1).init(PARAMS)), ValueError,
     "not passing `params`"),
    ("encode_state to no dtype", lambda x: encode_state(x.state, "int7"), TypeError,
     "m_dtype must be a dtype, but 'int7'"),
    ("encode_state of complex moments", lambda x: encode_state(x.state, "int8"), TypeError,
     "cannot be kept in int8"),
    ("encode_state of optax's state", lambda x: encode_state(optax.adamax(0.1).init(REAL), "int8"),
     TypeError, "There is no ScaleByAdamaxState"),
    ("optax's state", lambda x: x.plain.update(gradients(), optax.scale_by_adamax().init(PARAMS)),
     TypeError, "with mu for m and nu for v, by optax_adamax.compat.optax.load_state"),
    ("optax's state of another optimizer", lambda x: compat_optax.load_state(
        optax.sgd(0.1).init(REAL), REAL, adamax(0.1)), ValueError, "There is no ScaleByAdamState"),
]  # fmt: skip

# One step on arrays.

ROWS += [
    (f"adamax_step: {words}", lambda _, a=arguments: adamax_step(*a), error, words)
    for arguments, error, words in [
        (([1.0, 2.0], [1.0], 0.0, 0.0, 1), ValueError, "grad has shape (1,), but parameter (2,)"),
        (([1.0, 2.0], [1.0, 2.0], [0.0], 0.0, 1), ValueError, "m has shape (1,)"),
        ((1.0, 1.0, 0.0, 0.0, 0), ValueError, "t must be in [1, inf), but 0.0"),
        (("x", 1.0, 0.0, 0.0, 1), TypeError, "parameter must be a number or an array"),
        ((1.0, 1 + 1j, 0.0, 0.0, 1), TypeError, "grad is of complex64, whose imaginary part"),
        ((1.0, np.array([object()]), 0.0, 0.0, 1), TypeError, "grad must be a number"),
    ]
]
