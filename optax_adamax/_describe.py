"""Summary of a state, leaf by leaf, which shows whether its storage formats fit the gradients."""

import dataclasses
import functools
import math
import textwrap
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from optax_adamax._checks import check_scalar
from optax_adamax._conversion import decode_scaled, normalize_dtypes
from optax_adamax._formats import unwrap
from optax_adamax._m_formats import M_FORMATS, MFormat
from optax_adamax._memory_kind import preserving_memory_kind
from optax_adamax._numerics import safe_divide
from optax_adamax._paths import named_leaves
from optax_adamax._state import ScaleByAdamaxState, formats_of, states_in, stored_tree
from optax_adamax._v_formats import V_FORMATS, VFormat

UNDERFLOW_TOLERANCE = 0.01  # up to this fraction of elements below the range, there is no advice
WIDTH = 80  # columns of the table
MAX_ROWS = 40  # rows of the table


@dataclasses.dataclass(frozen=True)
class LeafDescription:
    """Description of one leaf of a state. Fractions are of all elements of the leaf, in [0, 1]."""

    path: str  # of the parameter, such as "layer/kernel"
    shape: tuple[int, ...]  # of the parameter
    bytes: int  # of m and v together, on all devices; a replicated array counts once
    m_dtype: str  # storage dtype of m
    v_dtype: str  # storage dtype of v
    v_min: float  # smallest v of elements with a gradient; NaN if all gradients were zero
    v_max: float  # largest v of these elements
    underflow_fraction: float  # elements with v at or below the lower end of the format's range
    saturated_fraction: float  # elements with v at or above the upper end of the format's range
    m_saturated_fraction: float  # elements with m at the largest ratio to v of its format
    no_gradient_fraction: float  # elements whose gradients were zero, or too small for the format
    nonfinite_fraction: float  # elements whose m or v is not finite
    advice: str  # another format to use; "" if the format fits


@dataclasses.dataclass(frozen=True, repr=False)
class StateDescription:
    """Result of :func:`describe_state`. ``print`` and ``repr`` show it as a table."""

    leaves: tuple[LeafDescription, ...]  # in the order of the state
    bytes: int  # of all arrays in the state, on all devices; a replicated array counts once

    @property
    def fits(self) -> bool:
        """Returns whether the formats fit, that is, whether the advice of every leaf is ""."""
        return not any(leaf.advice for leaf in self.leaves)

    def __str__(self) -> str:
        shown = sorted(self.leaves, key=lambda leaf: not leaf.advice)[:MAX_ROWS]
        shown = self.leaves if len(shown) == len(self.leaves) else shown
        hidden = len(self.leaves) - len(shown)
        moments = sum(leaf.bytes for leaf in self.leaves)
        return "\n".join(
            [
                *_table([_HEADINGS, *map(_row, shown)]),
                *([f"... and {hidden:,} more leaves"] if hidden else []),
                f"{self.bytes:,} bytes, {moments:,} of them in m and v",
                *(line for leaf in shown if leaf.advice for line in _wrapped(leaf)),
            ]
        )

    __repr__ = __str__


def describe_state(
    state: Any, eps: float = 1e-8, *, all_processes: bool = False
) -> StateDescription:
    r"""Summarizes a state leaf by leaf and reports values outside of the format's range.

    v below the range is stored as a larger number, and updates are too short. v above the range
    saturates, and updates are too long, up to their bound.

    Each moment is read once, on its own devices, and only a few scalars per leaf are written. Call
    it outside of :func:`jax.jit`, for example every thousand steps.

    Args:
      state: a :class:`ScaleByAdamaxState`, or any tree that contains such states, for example the
        state of a chain or of ``flax.nnx.Optimizer``. The state may be sharded, and in device or
        host memory. With :func:`pack_small_leaves`, a leaf is a buffer. To describe the leaves of
        the parameters, pass ``unpack_state(state, params)``.
      eps: as in the transformation. An element is without a gradient if m is 0 and v is at most
        :math:`\varepsilon` or at the lower end of the range.
      all_processes: whether every process of a multi-host run makes this call. It must be True if
        the state is sharded over processes, because the computation needs all of their devices.

    Returns:
      A :class:`StateDescription`: a :class:`LeafDescription` per leaf in ``leaves``, the size of
      the state in ``bytes``, and ``fits``. ``print`` shows a table with the advice below it.

    Raises:
      TypeError: `state` contains no :class:`ScaleByAdamaxState`, or it is traced.
      ValueError: the state is sharded over processes, and `all_processes` is False; its arrays
        were donated; eps is negative.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_adamax import adamax, describe_state
      >>> tx = adamax(0.002, m_dtype="int8", v_dtype="uint8")
      >>> params = {"b": jnp.zeros(2), "w": jnp.zeros((2, 2))}
      >>> gradients = {"b": jnp.array([0.0, 0.25]), "w": jnp.full((2, 2), 1e30)}
      >>> _, state = tx.update(gradients, tx.init(params), params)
      >>> description = describe_state(state)
      >>> for line in str(description).splitlines()[:2]:
      ...     print(line)
      leaf   shape    m/v     v min     v max  no gradient
      b       (2,)  i8/u8      0.25      0.25          50%
      >>> description.leaves[1].saturated_fraction
      1.0
      >>> print(description.leaves[1].advice)  # doctest: +ELLIPSIS
      v reaches ..., the upper end of uint8, in 100% of the elements. Write ...
    """
    check_scalar("eps", eps, 0.0, math.inf)
    found = states_in(state)
    _check_arrays(jax.tree.leaves(found), all_processes)
    leaves = [leaf for state in found for leaf in _describe(state, eps)]
    return StateDescription(
        tuple(leaves), sum(getattr(x, "nbytes", 0) for x in jax.tree.leaves(state))
    )


def _check_arrays(arrays: list[Any], all_processes: bool) -> None:
    """Checks that arrays are concrete, not donated, and on this process unless `all_processes`."""
    if any(isinstance(x, Tracer) for x in arrays):
        raise TypeError(
            "describe_state must read the numbers in a state, but a traced state was given. "
            "Call it outside of jax.jit, on the state that the jitted step returns."
        )
    if any(isinstance(x, jax.Array) and x.is_deleted() for x in arrays):
        raise ValueError(
            "describe_state must read the numbers in a state, but its arrays were deleted or "
            "donated to a jitted function. Pass the state that this function returned."
        )
    if not (all_processes or all(getattr(x, "is_fully_addressable", True) for x in arrays)):
        raise ValueError(
            f"The state is sharded over {jax.process_count()} processes, all of which must call "
            f"describe_state, but all_processes=True was not given. Call d = describe_state(state, "
            f"all_processes=True) in every process, and print d in one process."
        )


def _describe(state: ScaleByAdamaxState, eps: float) -> Iterator[LeafDescription]:
    stored = [jax.tree.leaves(stored_tree(moment)) for moment in (state.m, state.v)]
    state = normalize_dtypes(state)
    m_format, v_format = formats_of(state)
    count = preserving_memory_kind(
        functools.partial(_statistics, eps=eps, m_format=m_format, v_format=v_format)
    )
    phase = jax.tree.leaves(state.v.phase)[0] if v_format.has_shared_scale else jnp.uint32(0)
    m_leaves = named_leaves(unwrap(state.m, m_format), "/")
    v_leaves = jax.tree.leaves(unwrap(state.v, v_format))
    counted = [count(m, v, phase) for (_, m), v in zip(m_leaves, v_leaves, strict=True)]
    names = [path for path, _ in m_leaves]
    for path, m, v, numbers in zip(names, *stored, counted, strict=True):
        v_min, v_max, *counts = map(float, np.asarray(numbers))
        fractions = [c / max(1, m.size) for c in counts]
        yield LeafDescription(
            path,
            m.shape,
            m.nbytes + v.nbytes,
            m.dtype.name,
            v.dtype.name,
            v_min if v_min <= v_max else math.nan,
            v_max if v_min <= v_max else math.nan,
            *fractions,
            advice=" ".join(_advice(*fractions, formats=(m_format, v_format), v_dtype=v.dtype)),
        )


@functools.partial(jax.jit, static_argnames=("m_format", "v_format"))
def _statistics(
    m: jax.Array,
    v: jax.Array,
    phase: jax.Array,
    eps: jax.Array,
    *,
    m_format: MFormat,
    v_format: VFormat,
) -> jax.Array:
    """Returns the numbers of a `LeafDescription` in its order, with counts for fractions."""
    v = decode_scaled(v, phase, v_format) if v_format.has_shared_scale else v
    m = jnp.abs(m_format.decode(m, v) if m_format.is_quantized else m)
    low, high = v_format.range
    is_finite = jnp.isfinite(m) & jnp.isfinite(v)
    no_gradient = (m == 0) & (v <= jnp.maximum(low, eps * (1 + v_format.relative_error)))
    has_gradient = is_finite & ~no_gradient
    # m / v of the largest code has a rounding error. The ratio of the next code is 1/16 smaller.
    m_saturated = safe_divide(m, v) >= m_format.largest_ratio * (1 - 2.0**-6)
    m_saturated &= m_format.largest_ratio < math.inf  # m or m / v may be infinite in other formats
    counts = [
        has_gradient & (v <= low),
        has_gradient & (v >= high),
        m_saturated,
        no_gradient,
        ~is_finite,
    ]
    return jnp.stack(
        [
            jnp.min(v, initial=jnp.inf, where=has_gradient),
            jnp.max(v, initial=-jnp.inf, where=has_gradient),
            *(jnp.sum(count, dtype=v.dtype) for count in counts),
        ]
    )


def _advice(
    underflow_fraction: float,
    saturated_fraction: float,
    m_saturated_fraction: float,
    no_gradient_fraction: float,
    nonfinite_fraction: float,
    *,
    formats: tuple[MFormat, VFormat],
    v_dtype: np.dtype,
) -> Iterator[str]:
    del no_gradient_fraction
    m_format, v_format = formats
    low, high = v_format.range
    for fraction, tolerance, bound, end in (
        (saturated_fraction, 0, high, "upper"),
        (underflow_fraction, UNDERFLOW_TOLERANCE, low, "lower"),
    ):
        if fraction > tolerance:
            wider = _smallest_dtype(
                f for f in V_FORMATS.values() if f.range[0] < low and f.range[1] > high
            )
            cure = f'Write v_dtype="{wider}", or put' if wider else "Put"
            yield (
                f"v reaches {bound:.3g}, the {end} end of {v_dtype}, in {_percent(fraction)} of "
                f"the elements. {cure} optax.scale before the optimizer."
            )
    # If v is saturated, m / v is too large in every element.
    if m_saturated_fraction > 0 and saturated_fraction == 0:
        wider = _smallest_dtype(
            f for f in M_FORMATS.values() if f.largest_ratio > m_format.largest_ratio
        )
        yield (
            f"m is at {m_format.largest_ratio:.3g} v, the largest m of {m_format.dtype}, in "
            f'{_percent(m_saturated_fraction)} of the elements. Write m_dtype="{wider}", or '
            f"b1 < b2."
        )
    if nonfinite_fraction > 0:
        yield (
            f"{_percent(nonfinite_fraction)} of the elements are NaN or infinite. Write "
            f'nonfinite="zero" or nonfinite="skip_step", and restart from an older checkpoint.'
        )


def _smallest_dtype(formats: Iterator[Any]) -> np.dtype | None:
    dtypes = (f.dtype for f in formats if f.dtype is not None)
    return min(dtypes, key=lambda dtype: dtype.itemsize, default=None)


_HEADINGS = ("leaf", "shape", "m/v", "v min", "v max", "no gradient")


def _row(leaf: LeafDescription) -> tuple[str, ...]:
    return (
        leaf.path,
        str(leaf.shape),
        "/".join(map(_abbreviate, (leaf.m_dtype, leaf.v_dtype))),
        *("-" if math.isnan(v) else f"{v:.3g}" for v in (leaf.v_min, leaf.v_max)),
        _percent(leaf.no_gradient_fraction),
    )


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    """Aligns the columns, and shortens long names in the first column to fit into `WIDTH`."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    widths[0] = min(widths[0], max(12, WIDTH - sum(widths[1:]) - 2 * len(widths[1:])))
    lines = []
    for name, *cells in rows:
        name = name if len(name) <= widths[0] else "..." + name[3 - widths[0] :]
        aligned = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        lines.append("  ".join([name.ljust(widths[0]), *aligned]))
    return lines


def _wrapped(leaf: LeafDescription) -> list[str]:
    return textwrap.wrap(f"{leaf.path or 'leaf'}: {leaf.advice}", WIDTH, break_on_hyphens=False)


def _abbreviate(dtype: str) -> str:
    """Abbreviates the name of a dtype, as in f32, bf16 and u8."""
    for name, short in (("float", "f"), ("uint", "u"), ("int", "i"), ("complex", "c")):
        dtype = dtype.replace(name, short)
    return dtype


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.3g}%" if fraction else "0"
