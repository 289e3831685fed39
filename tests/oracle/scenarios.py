"""Compares v, m and the update with float64 after outliers, zero gradients and a million steps.

Each scenario is one element of a vector, so every format runs all scenarios at once.
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
BEFORE, LENGTH, ZERO_STEPS, LONG, SEED = 1000, 1000, 100_000, 1_000_000, 0
RULE = {"eps": 0.0}
SMALLEST = 1e-36  # a little above the lower end of the range of bfloat16 v


def gradients(zero_steps: int = ZERO_STEPS) -> np.ndarray:
    """Returns gradients, one column per scenario; each event begins after BEFORE steps."""
    rng = np.random.default_rng(SEED)
    g = rng.normal(size=(2 * BEFORE + zero_steps, len(SCENARIOS)))
    g[BEFORE, 0], g[BEFORE, 1] = 1e30, 3e38
    g[:, 2] *= 1e-40
    g[BEFORE : BEFORE + LENGTH, 3] *= 2.0**16
    g[BEFORE : BEFORE + zero_steps, 4] = 0
    return g.astype(np.float32)


@functools.cache
def compiled(m_dtype: str, v_dtype: str) -> Any:
    """Returns a compiled scan from gradients to the direction, m and v of every step."""
    tx = scale_by_adamax(m_dtype=m_dtype, v_dtype=v_dtype, **RULE)

    @jax.jit
    def run(g: jax.Array) -> Any:
        def body(state: Any, g: jax.Array) -> Any:
            u, state = tx.update(g, state)
            decoded = decode_state(state)
            return state, (u, decoded.m, decoded.v)

        return jax.lax.scan(body, tx.init(g[0]), g)[1]

    return run


def exact(g: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the direction, m and v of every step in float64."""
    state, rows = reference.start(g.shape[1:]), []
    for x in np.float64(g):
        u, state = reference.step(x, state, **RULE)
        rows.append((u, state.m, state.v))
    u, m, v = (np.array(x) for x in zip(*rows, strict=True))
    return u, m, v


def compare(found: Any, expected: Any) -> list[dict[str, Any]]:
    """Returns per scenario the range of v / exact v, the errors of m and u, and the largest |u|.

    The error of m is relative to v. The largest |u| is relative to the step bound. v and m are
    compared while the exact v is above SMALLEST, because XLA flushes subnormals to 0.
    """
    (u, m, v), (exact_u, exact_m, exact_v) = (np.float64(x) for x in (found, expected))
    bound = step_bound(np.arange(1, len(u) + 1)[:, None], 0.9, 0.999)
    last = slice(len(u) - 200, None)
    rows = []
    for i in range(u.shape[1]):
        normal = exact_v[:, i] > SMALLEST
        ratios = (v[normal] / exact_v[normal])[:, i]
        errors = (np.abs(m - exact_m)[normal] / exact_v[normal])[:, i]
        rows.append(
            {
                "v_lowest": float(ratios.min()) if normal.any() else None,
                "v_highest": float(ratios.max()) if normal.any() else None,
                "v_last": float(ratios[-1]) if normal.any() else None,
                "m_error": float(errors.max()) if normal.any() else None,
                "largest_step": float((np.abs(u) / bound)[:, i].max()),
                "step_error_last": float(np.abs(u - exact_u)[last, i].max()),
                "finite": bool(np.isfinite([u[:, i], m[:, i], v[:, i]]).all()),
            }
        )
    return rows


@functools.cache
def compiled_long(m_dtype: str, v_dtype: str, steps: int) -> Any:
    """Returns a compiled run of `steps` steps over a repeated table, to its count, m and v."""
    tx = scale_by_adamax(m_dtype=m_dtype, v_dtype=v_dtype, **RULE)

    @jax.jit
    def run(table: jax.Array) -> Any:
        def body(state: Any, t: jax.Array) -> Any:
            return tx.update(table[t % len(table)], state)[1], None

        state, _ = jax.lax.scan(body, tx.init(table[0]), jnp.arange(steps))
        decoded = decode_state(state)
        return decoded.count, decoded.m, decoded.v

    return run


def table_of_gradients() -> np.ndarray:
    """Returns heavy-tailed gradients over eight decades; each maximum recurs every 4,093 steps."""
    rng = np.random.default_rng(SEED + 1)
    return (rng.standard_t(2, (4093, 8)) * 10.0 ** np.arange(-6.0, 2.0)).astype(np.float32)


def exact_long(table: np.ndarray, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns m and v in float64 after `steps` steps over the repeated table."""
    m = v = np.zeros(table.shape[1])
    signed, sizes = 0.1 * np.float64(table), np.abs(np.float64(table))
    for t in range(steps):
        row = t % len(table)
        m, v = 0.9 * m + signed[row], np.maximum(0.999 * v, sizes[row])
    return m, v


def long_run(formats: Any, steps: int) -> list[dict[str, Any]]:
    """Returns the errors of v (relative) and of m (relative to v) against float64, per format."""
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


def saturation(formats: Any, zero_steps: int) -> list[dict[str, Any]]:
    """Returns the comparison for every scenario in every format."""
    g, rows = gradients(zero_steps), []
    expected = exact(g)
    for m_dtype, v_dtype in formats:
        found = compare(compiled(m_dtype, v_dtype)(g), expected)
        for scenario, row in zip(SCENARIOS, found, strict=True):
            rows.append({"scenario": scenario, "m_dtype": m_dtype, "v_dtype": v_dtype, **row})
    return rows
