"""With each option and storage format, v, m and u are within the stated errors of the format."""

import jax
import numpy as np
import pytest
import trajectories
from parameters import formats
from trajectories import (
    BETAS,
    STEPS,
    Row,
    as_run,
    check,
    decaying,
    heavy_tails,
    outliers,
    similar,
)

from optax_adamax import decode_state, scale_by_adamax
from tests.oracle.formats import FORMATS, STEP_VARIANTS

RULES = {
    "default": {},
    "keras": {"eps_placement": "denominator"},
    "mlx": {"eps_placement": "denominator", "bias_correction": False},
    "nesterov": {"nesterov": True},
    "all": {"eps_placement": "denominator", "bias_correction": False, "nesterov": True},
}
RISES, FALLS = np.linspace(0.92, 0.9999, STEPS), np.linspace(0.9999, 0.95, STEPS)
LEAPS = np.where(np.arange(STEPS) < 40, 0.92, 0.9999)
TRACED = {
    "default": Row(heavy_tails(0)),
    "eps of the size of the gradients": Row(similar(1), eps=0.7),
    "eps = 0": Row(heavy_tails(2), eps=0.0),
    "b1 = 0": Row(heavy_tails(3), b1=0.0),
    "b2 = 0": Row(similar(4), b2=0.0),
    "b2 = 1": Row(heavy_tails(5), b2=1.0),
    "b2 rises": Row(decaying(RISES), b2=RISES),
    "b2 leaps": Row(decaying(LEAPS), b2=LEAPS),
    "b2 falls": Row(decaying(FALLS), b2=FALLS),
    "b1 rises": Row(decaying(0.999 * np.ones(STEPS)), b1=np.linspace(0.5, 0.98, STEPS)),
    "b1 falls": Row(decaying(0.999 * np.ones(STEPS)), b1=np.linspace(0.98, 0.5, STEPS)),
    "both change": Row(
        heavy_tails(6), np.linspace(0.5, 0.95, STEPS), np.linspace(0.9, 1, STEPS), eps=0.0
    ),
}

LONGEST = decaying(0.999 * np.ones(STEPS))
CONSTANT = {
    "default": Row(heavy_tails(7)),
    "eps of the size of the gradients": Row(similar(8), eps=0.7),
    "outliers": Row(outliers(9), eps=0.0),
    "the longest updates": Row(LONGEST, eps=0.0),
    "the longest updates, then back": Row(
        LONGEST * np.where(np.arange(STEPS) < 80, 1, -1)[:, None]
    ),
}


in_every_format = pytest.mark.parametrize("m_dtype, v_dtype", formats(FORMATS))


# Each option and each branch of the step occurs; the other pairs are slow tests.
ALWAYS = [(name, *form) for name in ("default", "all") for form in STEP_VARIANTS] + [
    ("keras", "float32", "uint8"),
    ("keras", "int8", "float32"),
    ("mlx", "int8", "uint8"),
    ("nesterov", "float32", "float32"),
    ("nesterov", "bfloat16", "bfloat16"),
    ("nesterov", "int8", "uint8"),
]


@pytest.mark.parametrize(
    "name, m_dtype, v_dtype",
    formats([(name, *form) for name in RULES for form in FORMATS], ALWAYS),
)
def test_option_in_format_is_within_the_promised_error(name, m_dtype, v_dtype):
    rule, rows = RULES[name], dict(TRACED)
    if m_dtype == "int8":
        del rows["b2 = 0"]  # see test_core_defects.py
    traced, constant = trajectories.run(m_dtype, v_dtype, rule, rows.values(), CONSTANT.values())
    check(traced, m_dtype, v_dtype, rule, bounded=False)
    check(constant, m_dtype, v_dtype, rule, bounded=True)


def scan(gradients, **options):
    """Returns updates, m and v of each step, with the constants `BETAS`."""

    def body(state, g):
        u, state = tx.update(g, state)
        decoded = decode_state(getattr(state, "inner_state", state))
        return state, (u, decoded.m, decoded.v)

    tx = scale_by_adamax(*BETAS, **options)
    return jax.lax.scan(body, tx.init(jax.tree.map(lambda g: g[0], gradients)), gradients)[1]


def check_constant(outputs, gradients, m_dtype, v_dtype, **rule):
    """Calls `check` for one row with the constants `BETAS`."""
    outputs, row = ([x[:, None] for x in rows] for rows in (outputs, [gradients]))
    run = as_run(outputs, *row, *(np.full((len(gradients), 1), x) for x in (*BETAS, 1e-8)))
    check(run, m_dtype, v_dtype, rule, bounded=True, dtype=outputs[0].dtype)


@in_every_format
def test_gradient_dtype_in_format_is_within_the_promised_error(m_dtype, v_dtype):
    gradients = {d: heavy_tails(10, decades=(-3, 2)).astype(d) for d in ("float16", "float64")}
    with jax.enable_x64(True):
        found = jax.jit(lambda g: scan(g, m_dtype=m_dtype, v_dtype=v_dtype))(gradients)
    for dtype, g in gradients.items():
        outputs = [x[dtype] for x in found]
        assert outputs[0].dtype == dtype
        check_constant(outputs, g, m_dtype, v_dtype)


@in_every_format
def test_policy_with_an_option_in_format_is_within_the_promised_error(m_dtype, v_dtype):
    """Policy "zero" treats non-finite elements as zeros; "skip_step" omits their steps."""
    gradients = heavy_tails(11)
    gradients[::7, 3], gradients[::9, 5], gradients[::11, 7] = np.nan, np.inf, -np.inf
    finite = np.isfinite(gradients)
    zero = {"nesterov": True}
    skip = {"nesterov": True, "eps_placement": "denominator"}
    form = {"m_dtype": m_dtype, "v_dtype": v_dtype}
    found = jax.jit(
        lambda g: (
            scan(g, nonfinite="zero", **zero, **form),
            scan(g, nonfinite="skip_step", **skip, **form),
        )
    )(gradients)
    check_constant(found[0], np.where(finite, gradients, 0), **form, **zero)
    applied = finite.all(axis=1)
    assert not np.any(found[1][0][~applied])
    check_constant([x[applied] for x in found[1]], gradients[applied], **form, **skip)
