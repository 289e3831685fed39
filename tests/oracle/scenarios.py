"""What outliers, silence and a million steps do to v, m and the step, beside float64.

Every format runs through every scenario at once: each is an element of one vector.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_adamax import decode_state, scale_by_adamax
from tests.oracle import reference
from tests.oracle.formats import step_bound

SCENARIOS = (
    "one gradient of 1e30",
    "one gradient of 3e38",
    "gradients of 1e-40",
    "loss scale 2^16 for 1,000 steps",
    "no gradient for 10^5 steps",
)
BEFORE, LENGTH, SILENCE, LONG, SEED = 1000, 1000, 100_000, 1_000_000, 0
RULE = {"eps": 0.0}
SMALLEST = 1e-36  # to which v in bfloat16 reaches, with a margin


def gradients(silence: int = SILENCE) -> np.ndarray:
    """A row a step, a column a scenario: normal gradients, and what happens to them at BEFORE."""
    rng = np.random.default_rng(SEED)
    g = rng.normal(size=(2 * BEFORE + silence, len(SCENARIOS)))
    g[BEFORE, 0], g[BEFORE, 1] = 1e30, 3e38
    g[:, 2] *= 1e-40
    g[BEFORE : BEFORE + LENGTH, 3] *= 2.0**16
    g[BEFORE : BEFORE + silence, 4] = 0
    return g.astype(np.float32)


@functools.cache
def compiled(m_dtype: str, v_dtype: str) -> Any:
    """A scan over gradients: directions, m and v of every step."""
    tx = scale_by_adamax(m_dtype=m_dtype, v_dtype=v_dtype, **RULE)

    @jax.jit
    def run(g: jax.Array) -> Any:
        def body(state: Any, g: jax.Array) -> Any:
            u, state = tx.update(g, state)
            kept = decode_state(state)
            return state, (u, kept.m, kept.v)

        return jax.lax.scan(body, tx.init(g[0]), g)[1]

    return run


def exact(g: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The same in float64."""
    state, rows = reference.start(g.shape[1:]), []
    for x in np.float64(g):
        u, state = reference.step(x, state, **RULE)
        rows.append((u, state.m, state.v))
    u, m, v = (np.array(x) for x in zip(*rows, strict=True))
    return u, m, v


def compare(found: Any, expected: Any) -> list[dict[str, Any]]:
    """For each scenario: v / exact v, the errors of m (in v) and of the step, the largest step.

    The first two where floats can hold the exact v: XLA takes what is subnormal for 0.
    """
    (u, m, v), (exact_u, exact_m, exact_v) = (np.float64(x) for x in (found, expected))
    bound = step_bound(np.arange(1, len(u) + 1)[:, None], 0.9, 0.999)
    last = slice(len(u) - 200, None)
    rows = []
    for i in range(u.shape[1]):
        held = exact_v[:, i] > SMALLEST
        ratios = (v[held] / exact_v[held])[:, i]
        errors = (np.abs(m - exact_m)[held] / exact_v[held])[:, i]
        rows.append(
            {
                "v_lowest": float(ratios.min()) if held.any() else None,
                "v_highest": float(ratios.max()) if held.any() else None,
                "v_last": float(ratios[-1]) if held.any() else None,
                "m_error": float(errors.max()) if held.any() else None,
                "largest_step": float((np.abs(u) / bound)[:, i].max()),
                "step_error_last": float(np.abs(u - exact_u)[last, i].max()),
                "finite": bool(np.isfinite([u[:, i], m[:, i], v[:, i]]).all()),
            }
        )
    return rows


@functools.cache
def compiled_long(m_dtype: str, v_dtype: str, steps: int) -> Any:
    """The last m and v of many steps around a table of gradients."""
    tx = scale_by_adamax(m_dtype=m_dtype, v_dtype=v_dtype, **RULE)

    @jax.jit
    def run(table: jax.Array) -> Any:
        def body(state: Any, t: jax.Array) -> Any:
            return tx.update(table[t % len(table)], state)[1], None

        kept = decode_state(jax.lax.scan(body, tx.init(table[0]), jnp.arange(steps))[0])
        return kept.count, kept.m, kept.v

    return run


def table_of_gradients() -> np.ndarray:
    """Heavy tails over eight decades, with the largest seen once in 4,093 steps."""
    rng = np.random.default_rng(SEED + 1)
    return (rng.standard_t(2, (4093, 8)) * 10.0 ** np.arange(-6.0, 2.0)).astype(np.float32)


def exact_long(table: np.ndarray, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """m and v after them in float64."""
    m = v = np.zeros(table.shape[1])
    signed, sizes = 0.1 * np.float64(table), np.abs(np.float64(table))
    for t in range(steps):
        row = t % len(table)
        m, v = 0.9 * m + signed[row], np.maximum(0.999 * v, sizes[row])
    return m, v


def long_run(formats: Any, steps: int) -> list[dict[str, Any]]:
    """How far m (in v) and v are from float64 after the steps."""
    table, rows = table_of_gradients(), []
    exact_m, exact_v = exact_long(table, steps)
    for m_dtype, v_dtype in formats:
        count, m, v = (np.float64(x) for x in compiled_long(m_dtype, v_dtype, steps)(table))
        rows.append(
            {
                "m_dtype": m_dtype,
                "v_dtype": v_dtype,
                "steps": int(count),
                "v_error": float(np.abs(v / exact_v - 1).max()),
                "m_error": float((np.abs(m - exact_m) / exact_v).max()),
            }
        )
    return rows


def saturation(formats: Any, silence: int) -> list[dict[str, Any]]:
    """Every scenario in every format."""
    g, rows = gradients(silence), []
    expected = exact(g)
    for m_dtype, v_dtype in formats:
        found = compare(compiled(m_dtype, v_dtype)(g), expected)
        for scenario, row in zip(SCENARIOS, found, strict=True):
            rows.append({"scenario": scenario, "m_dtype": m_dtype, "v_dtype": v_dtype, **row})
    return rows
