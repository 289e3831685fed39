"""Runs many rows of hyperparameters in one program, and checks them against float64.

The axes of all arrays are steps, rows and elements.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optax_adamax import decode_state, scale_by_adamax
from tests.oracle import reference
from tests.oracle.formats import m_error, step_bound, v_error, v_range

STEPS, SIZE = 160, 24
BETAS = 0.9, 0.999


class Row(NamedTuple):
    """Gradients of one run, and its hyperparameters, each a number or one number per step."""

    gradients: np.ndarray
    b1: float | np.ndarray = BETAS[0]
    b2: float | np.ndarray = BETAS[1]
    eps: float = 1e-8


def heavy_tails(seed, decades=(-6, 2)):
    """Returns gradients of many sizes, a fifth of them zeros; the first element is always zero."""
    rng = np.random.default_rng(seed)
    g = rng.normal(size=(STEPS, SIZE)) * 10.0 ** rng.uniform(*decades, SIZE)
    g[rng.random(g.shape) < 0.2] = 0
    g[:, 0] = 0
    return np.float32(g)


def decaying(b2):
    """Returns gradients equal to the decayed v, for which updates are the longest possible."""
    return np.float32(np.cumprod(b2)[:, None] * np.geomspace(1e-3, 10, SIZE))


def similar(seed):
    """Returns gradients of either sign and similar sizes."""
    rng = np.random.default_rng(seed)
    return np.float32(rng.uniform(0.5, 1.5, (STEPS, SIZE)) * rng.choice([-1, 1], (STEPS, SIZE)))


def outliers(seed):
    """Returns gradients of either sign, each of any size."""
    rng = np.random.default_rng(seed)
    sizes = 10.0 ** rng.uniform(-30, 37, (STEPS, SIZE))
    return np.float32(sizes * rng.choice([-1, 0, 1], sizes.shape))


def stack(rows):
    """Returns gradients, b1, b2 and eps of all rows, with one entry per step."""
    numbers = [[np.broadcast_to(x, STEPS) for x in row[1:]] for row in rows]
    return np.stack([row.gradients for row in rows], axis=1), *np.float64(numbers).transpose(
        1, 2, 0
    )


class Run(NamedTuple):
    """Updates and moments of all rows and steps, and their inputs."""

    u: np.ndarray
    m: np.ndarray  # decoded, after each step
    v: np.ndarray
    g: np.ndarray
    b1: np.ndarray
    b2: np.ndarray
    eps: np.ndarray


@functools.cache
def program(m_dtype, v_dtype, rule):
    """Compiles a scan over rows with traced b1 and b2, and one over rows with constant `BETAS`."""
    formats = {"m_dtype": m_dtype, "v_dtype": v_dtype}

    def scan(gradients, b1, b2, eps, *, constant):
        def step(state, g, b1, b2, eps):
            betas = BETAS if constant else (b1, b2)
            tx = scale_by_adamax(*betas, eps, **dict(rule), **formats)
            u, state = tx.update(g, state)
            decoded = decode_state(state)
            return state, (u, decoded.m, decoded.v)

        start = jax.vmap(scale_by_adamax(**formats).init)(gradients[0])
        body = jax.vmap(step)
        return jax.lax.scan(lambda s, x: body(s, *x), start, (gradients, b1, b2, eps))[1]

    return jax.jit(
        lambda traced, constant: (scan(*traced, constant=False), scan(*constant, constant=True))
    )


def run(m_dtype, v_dtype, rule, traced, constant):
    """Returns the runs of the rows with traced hyperparameters and with constant b1 and b2."""
    traced, constant = stack(traced), stack(constant)
    traced = tuple(map(np.float32, traced))
    found = program(m_dtype, v_dtype, tuple(rule.items()))(traced, tuple(map(np.float32, constant)))
    return [
        as_run(outputs, *given) for outputs, given in zip(found, (traced, constant), strict=True)
    ]


def as_run(outputs, gradients, *hyperparameters):
    """Converts outputs and inputs to a `Run` in float64."""
    hyperparameters = (np.float64(x)[..., None] for x in hyperparameters)
    return Run(*map(np.float64, outputs), np.float64(gradients), *hyperparameters)


def exact(run, rule):
    """Returns updates, m and v, computed in float64."""
    state, steps = reference.start(run.g.shape[1:]), []
    for g, b1, b2, eps in zip(run.g, run.b1, run.b2, run.eps, strict=True):
        u, state = reference.step(g, state, b1, b2, eps, **rule)
        steps.append((u, state.m, state.v))
    return (np.array(x) for x in zip(*steps, strict=True))


def check(run, m_dtype, v_dtype, rule, *, bounded, dtype=np.float32):
    """Checks that v, m and u are within the errors of their formats, if v is in its range.

    u is compared with the update of the exact moments, and with the update of the stored moments.

    Args:
      run: a `Run`.
      m_dtype: storage format of m.
      v_dtype: storage format of v.
      rule: static options.
      bounded: whether b1 and b2 are constant; only then is u clipped.
      dtype: dtype of u.
    """
    info = jnp.finfo(dtype)
    u_error, smallest = max(2e-5, float(info.eps)), max(1e-30, float(info.smallest_subnormal))
    u, m, v = exact(run, rule)
    low, high = v_range(v_dtype)
    known = (v > low) & (np.maximum.accumulate(v) < high)
    assert known.mean() > 0.7
    v_limit = v_error(v_dtype)
    assert np.all(np.abs(run.v - v)[known] <= v_limit * v[known])
    untouched = np.broadcast_to(~np.any(run.g, axis=0), run.u.shape)
    assert not np.any(run.u[untouched]) and not np.any(run.m[untouched])
    assert np.all(run.v[v == 0] <= low)
    beyond = np.abs(run.g) >= high
    assert np.all(run.v[beyond] >= high * (1 - v_error(v_dtype)))
    m_limit = check_m(run, m_dtype, known)
    assert np.all((np.abs(run.m - m) <= m_limit)[known])

    stored, size = update_of(run.m, run.v, run, rule)
    bound = np.inf
    if bounded:
        bound = step_bound(steps(run), *BETAS, **_without_eps(rule))
        assert np.all(np.abs(run.u) <= bound * (1 + 1e-6 + float(info.eps) / 2))
    error = np.abs(run.u - np.clip(stored, -bound, bound))
    assert np.all(error <= u_error * size + smallest)
    # Errors of m in the numerator and of v in the denominator add up.
    m_part, _ = update_of(m_limit, v * (1 - v_limit), run._replace(g=0 * run.g), rule)
    error = np.abs(run.u - u) - u_error * size - smallest
    assert np.all((error <= m_part + np.abs(u) * v_limit / (1 - v_limit))[known])


def check_m(run, m_dtype, known):
    """Checks each m against the m stored before it; returns bounds on its accumulated error."""
    before = np.concatenate([np.zeros_like(run.m[:1]), run.m[:-1]])
    parts = run.b1 * before, (1 - run.b1) * run.g
    expected = sum(parts)
    limit = m_error(m_dtype, expected, run.v) + 1e-6 * sum(map(np.abs, parts))
    error = run.m - expected
    assert np.all((np.abs(error) <= limit)[known])
    # The mean of the rounding is 0, within four standard deviations, for either sign of g and of m.
    scale = np.where(known & (run.v > 0), run.v, np.inf)
    for sign in (np.sign(run.g), np.sign(expected)):
        total = np.sum(sign * error / scale, axis=(0, 2))
        assert np.all(np.abs(total) <= 4 * np.sqrt(np.sum((0.5 * limit / scale) ** 2, axis=(0, 2))))
    total, totals = np.zeros_like(limit[0]), []
    for b1, added in zip(run.b1, limit, strict=True):
        total = b1 * total + added
        totals.append(total)
    return np.array(totals)


def update_of(m, v, run, rule):
    """Returns u of these moments, and the sum of the absolute values of its terms."""
    t, corrects = steps(run), rule.get("bias_correction", True)
    bias, next_bias = (1 - run.b1 ** (t + i) if corrects else 1.0 for i in range(2))
    if rule.get("nesterov"):
        terms = run.b1 * m / next_bias, (1 - run.b1) * run.g / bias
    else:
        terms = (m / bias,)
    v = v + run.eps if rule.get("eps_placement") == "denominator" else v
    zero = v == 0
    v = np.where(zero, 1, v)
    return np.where(zero, 0, sum(terms) / v), sum(map(np.abs, terms)) / v


def steps(run):
    """Returns t of each step."""
    return np.arange(1, len(run.g) + 1)[:, None, None]


def _without_eps(rule):
    return {name: value for name, value in rule.items() if name != "eps_placement"}
