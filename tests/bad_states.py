"""Table of states that `update` and the conversions reject, in the form of `bad_inputs`."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from bad_inputs import PARAMS, REAL, gradients

from optax_adamax import (
    adamax,
    adamaxw,
    compat,
    compensate_rounding,
    decode_state,
    describe_state,
    encode_state,
    limit_spikes,
    master_params,
    pack_small_leaves,
    probe_gradients,
    scale_by_adamax,
)
from optax_adamax.compat import optax as compat_optax

A_STATE = "must be a ScaleByAdamaxState, but "
RESTORE = "Restore a checkpoint into the structure and the dtypes that init returns"
ORDER = "The arguments are update(gradients, state, params), in this order."
AVERAGE = "To average states over workers, average the floats of decode_state(state)"
SAME_MOMENTS = "optax.tree.set(tx.init(params), count=state[0].count, m=state[0].m, v=state[0].v)"
STATES = [
    ("of adam", lambda x: optax.adam(0.1).init(PARAMS), TypeError, A_STATE + "a tuple"),
    ("of a chain", lambda x: adamax(0.1).init(PARAMS), TypeError, "pass it to the update of that"),
    ("a dict, as flax restores it", lambda x: x.state._asdict(), TypeError, RESTORE),
    ("a tuple, as JSON restores it", lambda x: tuple(x.state), TypeError, A_STATE + "a tuple"),
    ("none", lambda x: None, TypeError, A_STATE + "None"),
    ("the parameters", lambda x: PARAMS, TypeError, ORDER),
    ("with a policy", lambda x: scale_by_adamax(nonfinite="skip_step").init(PARAMS), TypeError,
     A_STATE + "a HandleNonfiniteState was given. Pass its inner_state"),
    ("in another format", lambda x: x.state._replace(m=jax.tree.map(
        lambda m: m.astype(jnp.bfloat16), {**x.state.m, "b": {**x.state.m["b"], "z": m_of(x)}})),
     TypeError, "stores m as bfloat16, but the transformation was built with m_dtype=None"),
    ("in half precision", lambda x: halved(x.state), TypeError,
     "Convert the state with optax_adamax.encode_state(state, m_dtype=None, v_dtype=None)."),
    ("without a count", lambda x: x.state._replace(count=None), TypeError, RESTORE),
    ("with a float count", lambda x: x.state._replace(count=jnp.float32(3)), TypeError, AVERAGE),
    ("of vmap", lambda x: jax.tree.map(lambda leaf: jnp.stack([leaf] * 2), x.state), ValueError,
     "must be a scalar, but its shape is (2,). Pass a state that jax.vmap(tx.init)"),
    ("from a file of NumPy", lambda x: jax.tree.map(
        lambda m: np.zeros(m.shape, "V2") if m.ndim else m, x.state), TypeError,
     "The m of the state must consist of arrays, but it contains an array of shape (3,) and dtype"),
    ("with a tree as count", lambda x: x.state._replace(count=x.state.m), TypeError, RESTORE),
    ("without v", lambda x: x.state._replace(v=None), ValueError, RESTORE),
    ("v of another tree", lambda x: x.state._replace(v={"a": x.state.v["a"]}), ValueError, RESTORE),
    ("v of another shape", lambda x: x.state._replace(v={**x.state.v, "a": jnp.ones(4)}),
     ValueError, RESTORE),
]  # fmt: skip


def m_of(x):
    return x.state.m["a"]


def halved(state):
    """Casts the real floats of a state to float16."""
    return jax.tree.map(lambda x: x.astype(np.float16) if x.dtype == np.float32 else x, state)


def averaged(state, *, counters):
    """Casts the codes of a state to floats, and also its counters if `counters`."""
    return jax.tree.map(lambda x: x.astype(np.float32) if counters or x.ndim else x, state)


ROWS = [
    (f"state: {name}", lambda x, s=state: x.plain.update(gradients(), s(x)), error, words)
    for name, state, error, words in STATES
]
# States passed to an alias.
ROWS += [
    (f"state of {name}", lambda _, tx=tx, s=state: tx.update(REAL, s(), REAL), TypeError, words)
    for name, tx, state, words in [
        ("a number, then a schedule", adamax(lambda t: 0.1), lambda: adamax(0.1).init(REAL),
         "made with a number as learning_rate, but the transformation was built with a schedule"),
        ("a schedule, then a number", adamax(0.1), lambda: adamax(lambda t: 0.1).init(REAL),
         SAME_MOMENTS),
        ("a number, then a schedule, of the decay", adamaxw(0.1, weight_decay=lambda t: 0.1),
         lambda: adamaxw(0.1).init(REAL), "built with a schedule as weight_decay"),
        ("no mask, then a mask", adamaxw(0.1, mask=True), lambda: adamaxw(0.1).init(REAL),
         "built with a number as weight_decay and a mask"),
        ("no decay, then decay", adamaxw(0.1), lambda: adamax(0.1).init(REAL), SAME_MOMENTS),
        ("one transformation", adamax(0.1), lambda: adamax(0.1).init(REAL)[0],
         "Pass the whole state of the chain"),
        ("a policy, then none", adamax(0.1), lambda: adamax(0.1, nonfinite="zero").init(REAL),
         "Pass its inner_state"),
        ("parameters", adamax(0.1), lambda: REAL, ORDER),
        ("optax", adamax(0.1), lambda: optax.adamax(0.1).init(REAL), "compat.optax.load_state"),
    ]
]  # fmt: skip
ROWS += [
    ("gradients and state in the wrong order", lambda x: x.plain.update(x.state, gradients()),
     TypeError, ORDER),
    ("the state after the parameters", lambda x: adamax(0.1).update(REAL, REAL, x.low_state),
     TypeError, "a dict with the keys 'a', 'b' was given. " + ORDER),
    ("quantized moments for float32",
     lambda x: scale_by_adamax().update(REAL, x.low_state), TypeError,
     "stores m as int8 in a RatioInt8, but the transformation was built with m_dtype=None"),
    ("float32 moments for quantized ones",
     lambda x: x.low.update(REAL, scale_by_adamax().init(REAL)), TypeError,
     "optax_adamax.encode_state(state, m_dtype='int8', v_dtype='uint8')"),
    ("a float phase", lambda x: x.low.update(REAL, with_phase(x.low_state, jnp.float32(0.5))),
     TypeError, "The phase of the state must be an array of dtype uint32, but it is an array of"),
    ("a signed phase", lambda x: x.low.update(REAL, with_phase(x.low_state, jnp.int32(5))),
     TypeError, "The phase of the state must be an array of dtype uint32, but it is an array of"),
    ("a phase in 8 bits", lambda x: x.low.update(REAL, with_phase(x.low_state, jnp.uint8(5))),
     TypeError, "The phase of the state must be an array of dtype uint32, but it is an array of"),
    ("averaged residuals", lambda _: COMPENSATED.update(HALF, averaged_residuals(), HALF),
     TypeError, "['a'] must be int8 or int16, but its dtype is float32. Residuals cannot be cast"),
    ("averaged residuals to read", lambda _: master_params(averaged_residuals(), HALF), TypeError,
     "average master_params(state, params), cast the mean to bfloat16, and write"),
    ("a file of NumPy to decode", lambda x: decode_state(x.low_state._replace(v=np.ones(2, "V2"))),
     TypeError, "Write x.view(jnp.bfloat16)"),
    ("codes without their container",
     lambda x: x.low.update(REAL, x.low_state._replace(v=x.low_state.v.scaled_uint8)), TypeError,
     "must store v outside of a container as float arrays, but its dtype is uint8"),
    ("averaged codes", lambda x: x.low.update(REAL, averaged(x.low_state, counters=False)),
     TypeError, "int8 codes, which cannot be cast or averaged, but its dtype is float32"),
    ("an averaged state", lambda x: x.low.update(REAL, averaged(x.low_state, counters=True)),
     TypeError, AVERAGE),
    ("averaged codes to convert",
     lambda x: encode_state(averaged(x.low_state, counters=False), "int8", "uint8"),
     TypeError, AVERAGE),
    ("averaged codes to decode",
     lambda x: decode_state(averaged(x.low_state, counters=True)), TypeError, AVERAGE),
    ("some averaged codes to decode", lambda x: decode_state(x.low_state._replace(
        v=x.low_state.v._replace(
            scaled_uint8={**x.low_state.v.scaled_uint8, "a": np.ones((2, 3), np.float32)}))),
     TypeError, "cannot be cast or averaged, but its dtype is float32 and uint8"),
    ("averaged codes to describe",
     lambda x: describe_state(averaged(x.low_state, counters=False)), TypeError, AVERAGE),
    ("shapes to convert", lambda x: encode_state(jax.eval_shape(lambda: x.state), "int8"),
     TypeError, "jax.eval_shape(lambda s: encode_state(s, m_dtype, v_dtype), state)"),
    ("a traced state to describe", lambda x: jax.jit(lambda s: describe_state(s).bytes)(x.state),
     TypeError, "Call it outside of jax.jit"),
    ("a donated state to describe", lambda x: describe_state(donated(x.low_state)), ValueError,
     "Pass the state that this function returned"),
    ("no eps to describe with", lambda x: describe_state(x.state, eps="x"), TypeError, "eps must"),
    ("a policy, and a state without", lambda x: x.skip.update(REAL, x.low_state), TypeError,
     "To continue a run without nonfinite='skip_step', write init(params)._replace(inner_state="),
    ("a limit, and a state without", lambda x: x.spikes.update(REAL, x.skip_state), TypeError,
     "To continue a run without limit_spikes, write init(params)._replace(inner_state=state)."),
    ("weight decay without parameters",
     lambda x: adamaxw(0.1).update(gradients(), adamaxw(0.1).init(PARAMS)), ValueError,
     "not passing `params`"),
    ("encode_state to no dtype", lambda x: encode_state(x.state, "int7"), TypeError,
     "m_dtype must be"),
    ("encode_state of complex moments", lambda x: encode_state(x.state, "int8"), TypeError,
     "split_real_and_imaginary"),
    ("encode_state of optax's state", lambda x: encode_state(optax.adamax(0.1).init(REAL), "int8"),
     TypeError, "must contain a ScaleByAdamaxState, but this tuple does not"),
    ("optax's state", lambda x: x.plain.update(gradients(), optax.scale_by_adamax().init(PARAMS)),
     TypeError, "optax_adamax.compat.optax.load_state(state, params, tx), which reads mu as m"),
    ("optax's state of another optimizer", lambda x: compat_optax.load_state(
        optax.sgd(0.1).init(REAL), REAL, adamax(0.1)),
     ValueError, "must contain a ScaleByAdamState"),
]  # fmt: skip

# Frameworks whose state is passed in the position of another argument.
ROWS += [
    (f"compat.{name}: {case}", lambda _, tx=tx, swap=swap: tx.update(*swap(REAL, tx.init(REAL))),
     TypeError, f"but a dict with the keys 'a', 'b' was given. {ORDER}")
    for name, tx in [
        ("torch", compat.torch.adamax(lr=0.1)),
        ("keras", compat.keras.adamax(0.1)),
        ("mlx", compat.mlx.adamax(0.1)),
        ("lucid", compat.lucid.adamax(0.1)),
    ]
    for case, swap in [
        ("the state first", lambda g, s: (s, g, g)),
        ("the state last", lambda g, s: (g, g, s)),
    ]
] + [
    ("compat.torch: the state of scale_by_adamax", lambda _: compat.torch.adamax(lr=0.1).update(
        REAL, scale_by_adamax().init(REAL)), TypeError,
     f"The state must be the tuple that init returns, but a ScaleByAdamaxState was given. {ORDER}"),
]  # fmt: skip
# Weight decay would broadcast the gradient to its parameter.
ROWS += [
    (f"a scalar gradient for {name}", lambda _, tx=tx: tx.update(
        {**REAL, "a": jnp.ones(())}, tx.init(REAL), REAL), ValueError,
     "The gradient 'a' must have shape (3,), as its parameter in init, but its shape is ()")
    for name, tx in [
        ("compat.torch", compat.torch.adamax(lr=0.1, weight_decay=0.1)),
        ("compat.keras", compat.keras.adamax(0.1, gradient_accumulation_steps=2)),
    ]
]  # fmt: skip
# Wrappers whose state is passed in the position of another argument.
ROWS += [
    (f"{name}: {case}", lambda _, tx=tx, swap=swap: tx.update(*swap(REAL, tx.init(REAL))),
     TypeError, f"must be a {state}, but {given} was given. {ORDER}")
    for name, tx, state in [
        ("a policy", adamax(0.1, nonfinite="zero"), "HandleNonfiniteState"),
        ("limit_spikes", limit_spikes(adamax(0.1), 5.0), "LimitSpikesState"),
        ("compensate_rounding", compensate_rounding(adamax(0.1)), "CompensateRoundingState"),
        ("pack_small_leaves", pack_small_leaves(adamax(0.1)), "PackedState"),
        ("probe_gradients", probe_gradients("uint8"), "ProbeGradientsState"),
    ]
    for case, swap, given in [
        ("the state first", lambda g, s: (s, g, g), "a dict with the keys 'a', 'b'"),
        ("the state last", lambda g, s: (g, g, s), "a dict with the keys 'a', 'b'"),
        ("a state of optax", lambda g, s: (g, optax.sgd(0.1).init(g), g), "a tuple"),
    ]
]  # fmt: skip


HALF = {"a": np.ones(3, jnp.bfloat16)}
COMPENSATED = compensate_rounding(optax.sgd(0.1))


def averaged_residuals():
    state = COMPENSATED.init(HALF)
    return state._replace(residual=jax.tree.map(lambda r: r.astype(np.float32), state.residual))


def with_phase(state, phase):
    return state._replace(v=state.v._replace(phase=phase))


def donated(state):
    copy = jax.tree.map(jnp.copy, state)
    jax.tree.map(lambda x: x.delete(), copy)
    assert "count=int32" in repr(copy)
    return copy
