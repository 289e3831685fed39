"""Table of bad inputs. A row has a name, a call, the exception, and words of its message.

A call receives the transformations and states of `Given`, and must not change them.
"""

import collections
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax_boxes import linen, nnx
from jax.experimental import sparse

from optax_adamax import (
    ScaleByAdamaxState,
    adamax,
    adamax_step,
    adamaxw,
    compat,
    compensate_rounding,
    limit_spikes,
    pack_small_leaves,
    probe_gradients,
    scale_by_adamax,
    sharding,
)

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

    plain: optax.GradientTransformation  # for PARAMS
    state: ScaleByAdamaxState
    low: optax.GradientTransformation  # for REAL, with 2-byte state, like those below
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
    (dict(b1="0.9"), TypeError, "b1 must be a real number, but '0.9' was given. Write a float"),
    (dict(b1=None), TypeError, "b1 must be a real number"),
    (dict(b1=True), TypeError, "b1 must be a real number"),
    (dict(b1=0.9j), TypeError, "b1 must be a real number"),
    (dict(b1=np.complex64(0.9)), TypeError, "dtype is complex64"),
    (
        dict(b1=jnp.bfloat16(0.9)),
        TypeError,
        "Pass hyperparam_dtype=jnp.float32 to optax.inject_hyperparams, or b1 as a float",
    ),
    (dict(b1=np.float64(1.5)), ValueError, "b1 must be in [0, 1)"),
    (dict(b1=lambda t: 0.9), TypeError, "For a schedule use optax.inject_hyperparams"),
    (dict(b1=jnp.float32(1.5)), ValueError, "b1 must be in [0, 1), but 1.5 was given"),
    (dict(b2=1.001), ValueError, "b2 must be in [0, 1], but 1.001 was given"),
    (dict(b2=-1e-9), ValueError, "b2 must be in [0, 1]"),
    (dict(b2=float("nan")), ValueError, "b2 must be in [0, 1]"),
    (dict(b2=[0.9, 0.99]), TypeError, "b2 must be a real number, but a list was given"),
    (dict(b2={"w": LEAVES["a"]}), TypeError, "but a dict with the keys 'w' was given"),
    (dict(b2=np.array([0.9, 0.99])), ValueError, "b2 must be a scalar, but an array of shape (2,)"),
    (dict(b2=jnp.array([0.9, 0.99])), ValueError, "optax.partition"),
    (dict(b2=jnp.float16(0.999)), TypeError, "a float16 array was given, in which 0.999"),
    (dict(eps=-1e-8), ValueError, "eps must be in [0, inf), but -1e-08"),
    (dict(eps=float("nan")), ValueError, "eps must be in [0, inf)"),
    (dict(eps=float("inf")), ValueError, "eps must be in [0, inf)"),
    (dict(eps="1e-8"), TypeError, "eps must be a real number"),
    (dict(eps_placement="root"), ValueError, "('max', 'denominator'), but 'root'"),
    (dict(eps_placement=None), TypeError, "eps_placement must be one of"),
    (dict(bias_correction=1), TypeError, "bias_correction must be True or False"),
    (dict(nesterov="no"), TypeError, "nesterov must be True or False"),
    (dict(m_dtype="float33"), TypeError, "m_dtype must be"),
    (dict(m_dtype=jnp.zeros(())), TypeError, "m_dtype='float32'"),
    (dict(v_dtype=np.zeros(3)), TypeError, "but an array of shape (3,) and dtype float64 was"),
    (dict(m_dtype="fp8"), TypeError, "bfloat16, int8, but 'fp8' was given, which JAX cannot read"),
    (dict(m_dtype="int16"), ValueError, "m_dtype must be"),
    (dict(m_dtype="i8"), ValueError, "bfloat16, int8, but 'i8', which is int64, was given"),
    (dict(v_dtype=int), ValueError, "bfloat16, uint8, but 'int', which is int64, was given"),
    (dict(v_dtype="complex64"), ValueError, "the dtype of the real part"),
    (
        dict(m_dtype="int8", b1=0.9, b2=0.9),
        ValueError,
        "b1 < b2 and (1 - b1) / (1 - b1",
    ),
    (dict(m_dtype="int8", b1=0.999, b2=0.9), ValueError, "m_dtype='bfloat16'"),
    (dict(mu_dtype="bfloat16"), TypeError, "has no argument mu_dtype. Write m_dtype instead"),
    (dict(epsilon=1e-7), TypeError, "has no argument epsilon. Write eps instead"),
    (dict(betas=(0.9, 0.999)), TypeError, "has no argument betas. Write b1 and b2 instead"),
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
    (dict(decay=jnp.bfloat16(0.99)), TypeError, "or decay as a float: a bfloat16 array was given"),
    (dict(action="warn"), ValueError, "('skip', 'clip'), but 'warn'"),
    (dict(inner=adamax), TypeError, "but the function adamax was given. Write limit_spikes(adamax"),
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

ROWS += [
    ("adamax(params)", lambda _: adamax(PARAMS), TypeError,
     "learning_rate must be a real number or a schedule, but a dict with the keys 'a', 'b' was"),
    ("adamax(lr=)", lambda _: adamax(lr=0.1), TypeError, "Write learning_rate instead"),
    ("adamax(weight_decay=)", lambda _: adamax(0.1, weight_decay=0.1), TypeError,
     "Write adamaxw (decoupled decay), or"),
]  # fmt: skip

# Parameters.

ROWS += [
    (f"init: {words}", lambda _, params=params: scale_by_adamax().init(params), TypeError, words)
    for params, words in [
        ({"w": jnp.zeros(2, jnp.int32)}, "parameter 'w' must be a float array, but its dtype is i"),
        (jnp.zeros(2, bool), "The parameter must be a float array, but its dtype is bool"),
        ({"w": jnp.zeros(2), "step": 3}, "'step' must be a float array, but its dtype is int32"),
        ({"rng": jax.random.key(0)}, "nnx.state(model, nnx.Param)"),
        ({"layer": {"name": "net"}}, "parameter 'layer/name' must be an array, but 'net' was"),
        (
            {"f": jax.nn.relu},
            "'f' must be an array, but the function relu was given. Pass a tree of",
        ),
        ({"dtype": "float32"}, "parameter 'dtype' must be an array, but 'float32' was given"),
        ({"dtype": jnp.float32}, "parameter 'dtype' must be an array, but the class float32 was"),
        (
            {"w": np.zeros(2, "V2")},
            "but an array of shape (2,) and dtype |V2 was given. Write x.view(",
        ),
        (linen.Dense(3), "but a flax Dense was given. Pass the parameters that its init returns"),
        (lambda x: x, "The parameter must be an array, but the function <lambda> was given"),
        (scale_by_adamax(), "The parameter 'init' must be an array, but the function"),
    ]
]
ROWS += [
    ("complex parameters in 8 bits", lambda x: x.low.init(PARAMS), TypeError,
     "split_real_and_imaginary"),
    ("float64 without x64", lambda _: scale_by_adamax(m_dtype="float64").init(PARAMS), ValueError,
     "jax_enable_x64"),
    ("float without x64", lambda _: scale_by_adamax(m_dtype="float").init(PARAMS), ValueError,
     "float64 moments need 64-bit types, which are disabled in JAX"),
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
    ({"a": jnp.ones(3)}, ValueError, "but there is no gradient for 'b'. Pass zeros"),
    ({"a": jnp.ones(3), "b": {}}, ValueError, "there is no gradient for 'b/c', 'b/z'"),
    ({**gradients(), "d": jnp.ones(1)}, ValueError, "'d' is unknown"),
    (None, ValueError, "there is no gradient for 'a', 'b/c', 'b/z'"),
    (gradients(a=None), ValueError, "there is no gradient for 'a'"),
    (gradients(c=None), ValueError, "there is no gradient for 'b/c'. Pass zeros"),
    (gradients(a=optax.MaskedNode()), ValueError, "'a' is a MaskedNode instead of an array of"),
    (gradients(a=(jnp.ones(3),)), ValueError, "the gradient 'a' is a tuple instead of an array"),
    ((jnp.ones(()), gradients()), ValueError, "Pass the gradients alone, without the value"),
    ([*gradients().values()], ValueError, "the gradient is a list instead of a dict with the keys"),
    (gradients(a=jnp.ones(2)), ValueError, "gradient 'a' must have shape (3,)"),
    (gradients(a=jnp.ones(())), ValueError, "its shape is ()"),
    (gradients(c=jnp.ones((2, 2), jnp.int32)), TypeError, "'b/c' must be a float array, but its"),
    (gradients(c=jnp.ones((2, 2), jnp.complex64)), TypeError, "'b/c' must be real, as its param"),
    (gradients(z=jnp.ones(2)), TypeError, "gradient 'b/z' must be complex"),
]
for tree, error, words in GRADIENTS:
    ROWS += [
        (f"update: {words}", lambda x, g=tree: x.plain.update(g, x.state), error, words),
        (f"jit: {words}", lambda x, g=tree: jax.jit(x.plain.update)(g, x.state), error, words),
    ]
ROWS += [
    ("a string", lambda x: x.plain.update(gradients(a="x"), x.state), TypeError,
     "gradient 'a' must be an array, but 'x' was given"),
    ("a gradient of integers", lambda x: x.plain.update(
        gradients(a=np.zeros(3, jax.dtypes.float0)), x.state), TypeError, "have no gradient"),
    ("an array's gradient as a list", lambda x: x.plain.update(
        [jnp.ones(1)], x.plain.init(jnp.ones(1))), ValueError,
     "the gradient is a list instead of an array of shape (1,) and dtype float32"),
    ("an OrderedDict for a dict",
     lambda x: x.plain.update(collections.OrderedDict(gradients()), x.state), ValueError,
     "the gradient is an OrderedDict with the keys 'a', 'b' instead of a dict with the keys"),
    ("containers of another type",
     lambda x: x.plain.update([jnp.ones(1)], x.plain.init((jnp.ones(1),))), ValueError,
     "the gradient is a list instead of a tuple. Use the same containers"),
    ("gradients in variables",
     lambda x: x.plain.update(gradients(a=nnx.Param(jnp.ones(3))), x.state), ValueError,
     "'a' is a flax Param instead of an array of shape (3,) and dtype float32. Call nnx.Optimizer"),
    ("a sparse gradient", lambda x: x.plain.update(
        gradients(a=sparse.BCOO.fromdense(jnp.ones(3))), x.state), ValueError,
     "'a' is a BCOO instead of an array of shape (3,) and dtype float32. Pass x.todense()"),
    ("parameters of another tree",
     lambda x: x.plain.update(gradients(), x.state, {"a": jnp.ones(3)}), ValueError,
     "must have the tree of the gradients, but there is no parameter for 'b'"),
    ("parameters that are not arrays",
     lambda x: x.plain.update(gradients(), x.state, gradients(a="x")), TypeError,
     "The parameter 'a' must be an array, but 'x' was given"),
    ("parameters that are integers",
     lambda x: x.plain.update(gradients(), x.state, gradients(a=3)), TypeError,
     "The parameter 'a' must be a float array, but its dtype is int32"),
    ("skipping: another tree", lambda x: x.skip.update({"a": jnp.ones(3)}, x.skip_state),
     ValueError, "no gradient for 'b'"),
    ("skipping: another shape",
     lambda x: x.skip.update({**REAL, "a": jnp.ones(2)}, x.skip_state), ValueError,
     "gradient 'a' must have shape (3,)"),
    ("under a limit: another tree", lambda x: x.spikes.update({"a": jnp.ones(3)}, x.spike_state),
     ValueError, "no gradient for 'b'"),
]  # fmt: skip

# Leaves that are not arrays, in wrappers that read them before Adamax does.

WRAPPERS = {
    "zero": adamax(0.1, nonfinite="zero"),
    "skip_step": adamax(0.1, nonfinite="skip_step"),
    "limit_spikes": limit_spikes(adamax(0.1), 5.0),
    "clip": limit_spikes(adamax(0.1), 5.0, action="clip"),
    "compensate_rounding": compensate_rounding(adamax(0.1)),
    "pack_small_leaves": pack_small_leaves(adamax(0.1)),
    "probe_gradients": optax.chain(probe_gradients("uint8", every=1), adamax(0.1)),
    "compat": compat.torch.adamax(lr=0.1),
}
ROWS += [
    (f"{name}: {words}", lambda _, tx=tx, call=call: call(tx), TypeError, words)
    for name, tx in WRAPPERS.items()
    for call, words in [
        (
            lambda tx: tx.init(linen.Dense(3)),
            "but a flax Dense was given. Pass the parameters that",
        ),
        (lambda tx: tx.init({"f": jax.nn.relu}), "'f' must be an array, but the function relu was"),
        (lambda tx: tx.init({"name": "x"}), "parameter 'name' must be an array, but 'x' was given"),
        (lambda tx: updated(tx, {"a": "x"}), "gradient 'a' must be an array, but 'x' was given"),
        (
            lambda tx: updated(tx, {"a": jnp.ones(3, jnp.int32)}),
            "must be a float array, but its dty",
        ),
    ]
]


def updated(tx, gradient):
    return tx.update(gradient, tx.init({"a": LEAVES["a"]}), {"a": LEAVES["a"]})


# One step on arrays.

ROWS += [
    ("adamax_step(lr=)", lambda _: adamax_step(1.0, 1.0, 0.0, 0.0, 1, lr=0.1), TypeError,
     "adamax_step has no argument lr. Write learning_rate instead."),
    ("adamax_step(u=)", lambda _: adamax_step(1.0, 1.0, m=0.0, u=0.0, t=1), TypeError,
     "adamax_step has no argument u. Write v instead."),
]  # fmt: skip
ROWS += [
    (f"adamax_step: {words}", lambda _, a=arguments: adamax_step(*a), error, words)
    for arguments, error, words in [
        (([1.0, 2.0], [1.0], 0.0, 0.0, 1), ValueError,
         "grad must have the shape of parameter, (2,), but its shape is (1,)"),
        (([1.0, 2.0], [1.0, 2.0], [0.0], 0.0, 1), ValueError,
         "m must be a scalar or have the shape of parameter, (2,), but its shape is (1,)"),
        ((1.0, 1.0, 0.0, 0.0, 0), ValueError, "t must be in [1, inf), but 0.0"),
        (("x", 1.0, 0.0, 0.0, 1), TypeError, "parameter must be a number or an array, but 'x'"),
        ((1.0, 1 + 1j, 0.0, 0.0, 1), TypeError,
         "grad must be real, because the dtype of parameter is float32, but its dtype is c"),
        ((1 + 1j, 1.0, 0.0, 1j, 1), TypeError, "v must be real, but its dtype is complex64"),
        ((1.0, np.array([object()]), 0.0, 0.0, 1), TypeError, "grad must be a number"),
    ]
]  # fmt: skip
