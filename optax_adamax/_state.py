"""The state of `scale_by_adamax`, and the storage formats of a given state."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from optax_adamax._formats import Format, is_in_format
from optax_adamax._m_formats import M_FORMATS, MFormat
from optax_adamax._messages import arrays_summary, count_summary
from optax_adamax._v_formats import V_FORMATS, VFormat


class ScaleByAdamaxState(NamedTuple):
    """State of `scale_by_adamax`.

    m and v are trees like the parameters. An int8 m is inside a :class:`RatioInt8`, a bfloat16 v in
    a :class:`ScaledBfloat16`, and a uint8 v in a :class:`ScaledUint8`. :func:`decode_state`
    converts m and v to float32. ``repr`` shows only dtypes. ``print(describe_state(state))`` shows
    names, shapes and ranges of values.
    """

    # shape=(), dtype=int32: number of steps, saturates at 2**31 - 1
    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    m: Any  # first moment
    v: Any  # infinity norm, real

    def __repr__(self) -> str:
        """Returns the count and the dtypes, without the arrays."""
        m, v = (arrays_summary(stored_tree(moment)) for moment in (self.m, self.v))
        return f"{type(self).__name__}(count={count_summary(self.count)}, m={m}, v={v})"


def formats_of(state: ScaleByAdamaxState) -> tuple[MFormat, VFormat]:
    """Returns the storage formats of m and v in a state."""
    m_format = next(f for f in M_FORMATS.values() if is_in_format(state.m, f, M_FORMATS))
    v_format = next(f for f in V_FORMATS.values() if is_in_format(state.v, f, V_FORMATS))
    return m_format, v_format


def dtypes_of(state: ScaleByAdamaxState) -> tuple[np.dtype | None, np.dtype | None]:
    """Returns `m_dtype` and `v_dtype` of a state; None for moments in full precision."""
    m_format, v_format = formats_of(state)
    return m_format.dtype, v_format.dtype


def container_of(moment: Any, table: Mapping[str | None, Format]) -> type[Any] | None:
    """Returns the class of the container around a moment of a state; None without a container."""
    containers = [format.container for format in table.values()]
    return type(moment) if type(moment) in containers else None


def stored_tree(moment: Any) -> Any:
    """Returns the stored tree of a moment of a state, without its container."""
    return moment if container_of(moment, {**M_FORMATS, **V_FORMATS}) is None else moment[0]


def is_adamax_state(x: Any) -> bool:
    """Returns whether x is the state of `scale_by_adamax`."""
    return isinstance(x, ScaleByAdamaxState)


def states_in(tree: Any) -> list[ScaleByAdamaxState]:
    """Returns the states of `scale_by_adamax` in a tree.

    Raises:
      TypeError: the tree contains no such state.
    """
    found = [x for x in jax.tree.leaves(tree, is_leaf=is_adamax_state) if is_adamax_state(x)]
    if not found:
        raise TypeError(
            f"The state must contain a ScaleByAdamaxState, but this {type(tree).__name__} does "
            f"not. Pass the state of a transformation of optax_adamax. To convert a state of "
            f"optax.adamax, write compat.optax.load_state(state, params, tx)."
        )
    return found
