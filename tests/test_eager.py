"""Steps outside of jax.jit compile nothing after the first one."""

import contextlib

import jax
import jax.numpy as jnp
import optax
import pytest

from optax_adamax import (
    adamax,
    adamaxw,
    compensate_rounding,
    limit_spikes,
    master_params,
    pack_small_leaves,
)
from optax_adamax.wrappers.probe import probe_gradients

COMPILED = []


def _listen(event, duration, **names):
    del duration
    if event == "/jax/core/compile/backend_compile_duration":
        COMPILED.append(names.get("fun_name", event))


jax.monitoring.register_event_duration_secs_listener(_listen)


@contextlib.contextmanager
def no_compilation():
    before = len(COMPILED)
    yield
    assert COMPILED[before:] == []


FORMATS = [(None, None), ("bfloat16", "bfloat16"), ("int8", "uint8")]
POLICIES = ["propagate", "zero", "skip_step"]
STEPS = {
    **{
        f"{policy}, {m_dtype}, {v_dtype}": lambda p=policy, m=m_dtype, v=v_dtype: adamax(
            0.1, nonfinite=p, m_dtype=m, v_dtype=v
        )
        for policy in POLICIES
        for m_dtype, v_dtype in FORMATS
    },
    "adamaxw": lambda: adamaxw(0.1),
    "nesterov": lambda: adamax(0.1, nesterov=True, eps_placement="denominator"),
    "schedule": lambda: adamax(optax.cosine_decay_schedule(0.1, 10)),
    "inject_hyperparams": lambda: optax.inject_hyperparams(adamax, hyperparam_dtype=jnp.float32)(
        0.1
    ),
    "pack_small_leaves": lambda: pack_small_leaves(adamax(0.1)),
    "limit_spikes, skip": lambda: limit_spikes(adamax(0.1), 5.0),
    "limit_spikes, clip": lambda: limit_spikes(adamax(0.1), 5.0, action="clip"),
    "compensate_rounding": lambda: compensate_rounding(adamax(0.1)),
    "bfloat16 updates": lambda: compensate_rounding(adamax(0.1), update_dtype="bfloat16"),
    "checked": lambda: compensate_rounding(adamax(0.1), check_applied=True),
    "probe_gradients": lambda: probe_gradients("uint8", lambda _: None, every=2),
}
SLOW = [
    f"{policy}, {dtypes}"
    for policy in POLICIES[1:]
    for dtypes in ("None, None", "bfloat16, bfloat16")
]


@pytest.mark.parametrize(
    "make",
    [pytest.param(x, marks=pytest.mark.slow if name in SLOW else ()) for name, x in STEPS.items()],
    ids=STEPS,
)
def test_step_compiles_in_the_first_call_only(make):
    params = {"a": jnp.ones((3, 4), jnp.bfloat16), "b": jnp.ones(5, jnp.bfloat16)}
    tx = make()
    state = tx.init(params)
    with jax.numpy_dtype_promotion("standard"):
        for t in range(6):
            with no_compilation() if t > 0 else contextlib.nullcontext():
                updates, state = tx.update(params, state, params)
                params = optax.apply_updates(params, updates)


def test_nonfinite_step_compiles_once():
    tx = adamax(0.1, nonfinite="zero")
    bad, other = jnp.array([1.0, jnp.nan]), jnp.array([jnp.inf, 2.0])
    _, state = tx.update(bad, tx.init(bad))
    with no_compilation():
        for g in (bad, other, bad):
            _, state = tx.update(g, state)
    assert int(state.nonfinite_count) == 4


def test_master_params_compiles_once():
    params = jnp.ones(7, jnp.bfloat16)
    state = compensate_rounding(adamax(0.1)).init(params)
    master_params(state, params)
    with no_compilation():
        master_params(state, params)


ARGUMENTS = {
    "optax.adamax, b1": lambda x: optax.adamax(0.1, b1=x),
    "learning_rate": adamax,
    "b1": lambda x: adamax(0.1, b1=x),
    "b2": lambda x: adamax(0.1, b1=0.5, b2=x),
    "eps": lambda x: adamax(0.1, eps=x),
    "b1, int8": lambda x: adamax(0.1, b1=x, m_dtype="int8", v_dtype="uint8"),
    "max_norm_ratio": lambda x: limit_spikes(optax.identity(), x + 1),
    "max_norm": lambda x: limit_spikes(optax.identity(), max_norm=x),
    "decay": lambda x: limit_spikes(optax.identity(), 5.0, decay=x),
}


@pytest.mark.parametrize("as_array", [True, False], ids=["array", "float"])
@pytest.mark.parametrize("make", ARGUMENTS.values(), ids=ARGUMENTS)
def test_other_value_of_a_hyperparameter_compiles_nothing(make, as_array):
    g = jnp.ones(3)

    def step(value):
        with jax.numpy_dtype_promotion("standard"):  # for optax
            tx = make(jnp.float32(value) if as_array else value)
            tx.update(g, tx.init(g))

    step(0.9)
    with no_compilation():
        step(0.8)
        step(0.7)
