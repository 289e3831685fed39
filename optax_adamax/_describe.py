"""What is in a state, leaf by leaf: does its storage format fit the gradients?"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_adamax._formats import unwrap
from optax_adamax._m_formats import M_FORMATS, MFormat
from optax_adamax._numerics import preserving_memory_kind, safe_divide
from optax_adamax._paths import named_leaves
from optax_adamax._state import ScaleByAdamaxState, decode_framed, formats_of, states_in
from optax_adamax._v_formats import V_FORMATS, VFormat

FEW = 0.01  # the share of elements below the range that is not worth a word


@dataclasses.dataclass(frozen=True)
class LeafDescription:
    """One leaf of a state. What is a share is one of all elements of the leaf, from 0 to 1."""

    path: str  # of the parameter, as jax.tree_util.keystr writes it
    size: int  # number of elements
    bytes: int  # of m and v together, on all devices
    m_dtype: str  # in which m is stored
    v_dtype: str  # in which v is stored
    v_min: float  # least v of the elements that have seen a gradient; NaN if none has
    v_max: float  # largest v of these
    underflow_fraction: (
        float  # share of elements with v at the lower end of the format's range, or below
    )
    saturated_fraction: (
        float  # share of elements with v at the upper end of the format's range, or above
    )
    m_saturated_fraction: float  # share of elements with m at the largest code of its format
    no_gradient_fraction: (
        float  # share of elements that never saw a gradient that the format can tell from 0
    )
    nonfinite_fraction: float  # share of elements whose m or v is not finite
    advice: str  # what to write where the format does not fit; "" where it does


@dataclasses.dataclass(frozen=True)
class StateDescription:
    """What :func:`describe_state` returns. Its ``str`` is a table."""

    leaves: tuple[LeafDescription, ...]

    @property
    def bytes(self) -> int:
        """Bytes of all moments on all devices."""
        return sum(leaf.bytes for leaf in self.leaves)

    @property
    def fits(self) -> bool:
        """Whether there is no advice for any leaf."""
        return not any(leaf.advice for leaf in self.leaves)

    def __str__(self) -> str:
        rows = [_HEADINGS, *map(_row, self.leaves)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(
                cell.ljust(width) if i == 0 else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
            for row in rows
        ]
        advice = [
            f"{leaf.path or 'the leaf'}: {leaf.advice}" for leaf in self.leaves if leaf.advice
        ]
        return "\n".join([*lines, f"{self.bytes:,} bytes", *advice])


def describe_state(state: Any, eps: float = 1e-8) -> StateDescription:
    r"""Tells, for each leaf, whether its storage format fits the gradients that it has seen.

    An element is at the bottom or at the top if its v is not within the range in which the format
    keeps its relative error. At the bottom v counts as larger than it is, and steps are too short;
    at the top it saturates, and steps no longer shrink with the gradient's size.

    It reads every moment once, on the devices where it is, and nothing larger than a few numbers a
    leaf is written. Call it outside of :func:`jax.jit`, now and then.

    Args:
      state: a :class:`ScaleByAdamaxState`, or any tree with such states in it, as the state of a
        chain is; sharded or not, in the memory of a device or of the host. The leaves of
        `pack_small_leaves` are its buffers: for the leaves of the parameters, give
        ``unpack_state(state, params)``.
      eps: as the transformation has it. An element with m = 0 and v at most :math:`\varepsilon`, or
        at the bottom, counts as one that has never seen a gradient.

    Returns:
      A :class:`StateDescription`: a :class:`LeafDescription` for each leaf in its ``leaves``,
      ``bytes`` in all, and ``fits``; ``print`` shows it as a table, with advice below it.

    Raises:
      TypeError: there is no :class:`ScaleByAdamaxState` in `state`.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_adamax import adamax, describe_state
      >>> tx = adamax(0.002, m_dtype="int8", v_dtype="uint8")
      >>> params = {"b": jnp.zeros(2), "w": jnp.zeros((2, 2))}
      >>> gradients = {"b": jnp.array([0.0, 0.1]), "w": jnp.full((2, 2), 1e6)}
      >>> _, state = tx.update(gradients, tx.init(params), params)
      >>> description = describe_state(state)
      >>> print(description)  # doctest: +NORMALIZE_WHITESPACE
      leaf   elements     m      v  bytes   least v  largest v  bottom   top  m at limit  unseen
      ['b']         2  int8  uint8      4     0.104      0.104       0     0           0     50%
      ['w']         4  int8  uint8      8  1.23e+04   1.23e+04       0  100%        100%       0
      12 bytes
      ['w']: v reaches 6.14e+03, the upper end of uint8, in 100% of the elements: write
      v_dtype="bfloat16", or put optax.scale before the optimizer.
      >>> description.leaves[0].no_gradient_fraction
      0.5
    """
    return StateDescription(
        tuple(leaf for found in states_in(state) for leaf in _describe(found, eps))
    )


def _describe(state: ScaleByAdamaxState, eps: float) -> list[LeafDescription]:
    m_format, v_format = formats_of(state)
    count = preserving_memory_kind(
        functools.partial(_statistics, eps=eps, m_format=m_format, v_format=v_format)
    )
    phase = state.v.phase if v_format.has_shared_scale else jnp.uint32(0)
    m_leaves = named_leaves(unwrap(state.m, m_format))
    v_leaves = jax.tree.leaves(unwrap(state.v, v_format))
    described = []
    for (path, m), v in zip(m_leaves, v_leaves, strict=True):
        v_min, v_max, *counts = map(float, np.asarray(count(m, v, phase)))
        shares = [c / max(1, m.size) for c in counts]
        described.append(
            LeafDescription(
                path,
                m.size,
                m.size * (m.dtype.itemsize + v.dtype.itemsize),
                m.dtype.name,
                v.dtype.name,
                v_min if v_min <= v_max else math.nan,
                v_max if v_min <= v_max else math.nan,
                *shares,
                advice=" ".join(_advice(*shares, m_format=m_format, v_format=v_format)),
            )
        )
    return described


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
    """Least and largest v, and the numbers of elements, as `LeafDescription` lists them."""
    v = decode_framed(v, phase, v_format) if v_format.has_shared_scale else v
    m = jnp.abs(m_format.decode(m, v) if m_format.is_quantized else m)
    low, high = v_format.range
    is_finite = jnp.isfinite(m) & jnp.isfinite(v)
    unseen = (m == 0) & (v <= jnp.maximum(low, eps * (1 + v_format.relative_error)))
    seen = is_finite & ~unseen
    # Two neighbours among the codes of a ratio are at least a sixteenth apart.
    at_limit = safe_divide(m, v) >= m_format.largest_ratio * (1 - 2.0**-6)
    counts = [
        seen & (v <= low),
        seen & (v >= high),
        is_finite & at_limit,
        unseen,
        ~is_finite,
    ]
    return jnp.stack(
        [
            jnp.min(v, initial=jnp.inf, where=seen),
            jnp.max(v, initial=-jnp.inf, where=seen),
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
    m_format: MFormat,
    v_format: VFormat,
) -> list[str]:
    del no_gradient_fraction
    words = []
    low, high = v_format.range
    for share, bound, end in (
        (saturated_fraction, high, "upper"),
        (underflow_fraction, low, "lower"),
    ):
        if share > (FEW if end == "lower" else 0):
            wider = _smallest(
                f for f in V_FORMATS.values() if f.range[0] < low and f.range[1] > high
            )
            words.append(
                f"v reaches {bound:.3g}, the {end} end of {v_format.dtype}, in {_percent(share)} "
                f'of the elements: write v_dtype="{wider}", or put optax.scale before the '
                f"optimizer."
            )
    if (
        m_saturated_fraction > 0 and saturated_fraction == 0
    ):  # above a v that has saturated, any m would be at its limit
        wider = _smallest(f for f in M_FORMATS.values() if f.largest_ratio > m_format.largest_ratio)
        words.append(
            f"m is at {m_format.largest_ratio:.3g} v, the most that {m_format.dtype} holds, in "
            f'{_percent(m_saturated_fraction)} of the elements: write m_dtype="{wider}", or '
            f"b1 < b2."
        )
    if nonfinite_fraction > 0:
        words.append(
            f"{_percent(nonfinite_fraction)} of the elements are not finite: write "
            f'nonfinite="zero" or nonfinite="skip_step", and go on from an older checkpoint.'
        )
    return words


def _smallest(formats: Any) -> np.dtype:
    return min((f.dtype for f in formats if f.dtype is not None), key=lambda d: d.itemsize)


_HEADINGS = (
    "leaf",
    "elements",
    "m",
    "v",
    "bytes",
    "least v",
    "largest v",
    "bottom",
    "top",
    "m at limit",
    "unseen",
)


def _row(leaf: LeafDescription) -> tuple[str, ...]:
    return (
        leaf.path,
        f"{leaf.size:,}",
        leaf.m_dtype,
        leaf.v_dtype,
        f"{leaf.bytes:,}",
        *("-" if math.isnan(v) else f"{v:.3g}" for v in (leaf.v_min, leaf.v_max)),
        *map(
            _percent,
            (
                leaf.underflow_fraction,
                leaf.saturated_fraction,
                leaf.m_saturated_fraction,
                leaf.no_gradient_fraction,
            ),
        ),
    )


def _percent(share: float) -> str:
    return f"{100 * share:.3g}%" if share else "0"
