"""How a moment is kept between steps: what every format says of itself.

A format knows one array at a time: no tree of parameters, and no optimizer. How m may be kept
stands in `_m_formats`, how v may be kept in `_v_formats`. A new format is one class there, and one
row in the table below it.
"""

import abc
from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from optax_adamax._numerics import compute_dtype


class Format(abc.ABC):
    """How one moment is kept."""

    dtype: np.dtype | None  # of what is stored; None: that of the arithmetic
    # What holds the stored tree in a state, in its first field, beside what the format needs for
    # all of it. Each has fields of its own names, so that no checkpoint of one format can be
    # restored into another. None: the tree stands in the state as it is.
    container: ClassVar[type[Any] | None] = None
    # Whether less is stored than was computed.
    is_rounded: ClassVar[bool] = True

    def init(self, parameter: Any, *, real: bool) -> jax.Array:
        """The moment before the first step, shaped and sharded like `parameter`."""
        return jnp.zeros_like(parameter, dtype=self.stored_dtype(parameter, real=real))

    def stored_dtype(self, parameter: Any, *, real: bool) -> np.dtype:
        """The dtype of what is stored for `parameter`; `real`: whatever the parameter is."""
        del real
        assert self.dtype is not None
        if _is_complex(parameter):
            raise TypeError(
                f"Moments of complex parameters cannot be kept in {self.dtype}: wrap the "
                f"transformation in optax.contrib.split_real_and_imaginary, which keeps the two "
                f"parts as real numbers."
            )
        return self.dtype

    def accepts(self, stored: np.dtype) -> bool:
        """Whether an array of this dtype may be stored."""
        return stored == self.dtype


class FullPrecision(Format):
    """A moment kept as float32, float64, or the complex numbers of two of these."""

    is_rounded = False

    def __init__(self, dtype: np.dtype | None):
        self.dtype = dtype

    def stored_dtype(self, parameter: Any, *, real: bool) -> np.dtype:
        dtype = compute_dtype(parameter) if self.dtype is None else self.dtype
        if jax.dtypes.canonicalize_dtype(dtype) != dtype:
            raise ValueError("A float64 moment needs jax.config.update('jax_enable_x64', True).")
        if _is_complex(parameter) and not real:
            dtype = np.result_type(dtype, np.complex64)
        return dtype

    def accepts(self, stored: np.dtype) -> bool:
        if self.dtype is None:
            return jnp.issubdtype(stored, jnp.inexact) and jnp.finfo(stored).bits >= 32
        return stored in (self.dtype, np.result_type(self.dtype, np.complex64))


F = TypeVar("F", bound=Format)


def find_format(table: Mapping[str | None, F], argument: str, dtype: DTypeLike | None) -> F:
    """The format in `table` that the user's `dtype` names.

    Raises:
      TypeError: it is no dtype.
      ValueError: there is no such format.
    """
    if dtype is None:
        return table[None]
    if isinstance(dtype, jax.Array):
        raise TypeError(
            f"{argument} must be a dtype, but an array was given. optax.inject_hyperparams takes a "
            f"callable such as jnp.float32 for a schedule: write {argument}='float32'."
        )
    try:
        name = jnp.dtype(dtype).name
    except TypeError:
        raise TypeError(f"{argument} must be a dtype, but {dtype!r} was given.") from None
    if name not in table:
        raise ValueError(
            f"{argument} must be None or one of {', '.join(filter(None, table))}, but {name} was "
            f"given. For complex parameters give the dtype of the real part."
        )
    return table[name]


def is_in_format(moment: Any, format: Format, table: Mapping[str | None, Format]) -> bool:
    """Whether m or v of a state is kept in `format`, one of those in `table`."""
    nodes = tuple(other.container for other in table.values() if other.container is not None)
    container = type(moment) if isinstance(moment, nodes) else None
    leaves = jax.tree.leaves(unwrap(moment, format)) if container is format.container else []
    return container is format.container and all(format.accepts(jnp.result_type(x)) for x in leaves)


def unwrap(moment: Any, format: Format) -> Any:
    """The stored tree, like the parameters, within m or v of a state."""
    return moment if format.container is None else moment[0]


def wrap(tree: Any, format: Format, *beside: Any) -> Any:
    """The stored tree as m or v of a state; `beside` is what the format's node has besides."""
    return tree if format.container is None else format.container(tree, *beside)


def _is_complex(x: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(x), jnp.complexfloating)


@jax.custom_jvp
def forbid_derivative(x: jax.Array) -> jax.Array:
    """x, on its way to being rounded: refuses to be differentiated, for what follows is constant.

    Raises:
      TypeError: when a derivative is asked for.
    """
    return x


@forbid_derivative.defjvp
def _(primals: Any, tangents: Any) -> Any:
    del primals, tangents
    raise TypeError(
        "An update with m or v in few bits was differentiated, but rounding has no derivative. "
        "Differentiate with m_dtype and v_dtype of float32 (decode_state converts a state), or put "
        "jax.lax.stop_gradient around the gradients."
    )


def float32_bits(x: jax.Array) -> jax.Array:
    """The bits of a float32 as int32."""
    return jax.lax.bitcast_convert_type(x, jnp.int32)


def float32_from_bits(bits: jax.Array) -> jax.Array:
    """The float32 of these bits."""
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def with_sign(size: jax.Array, number: jax.Array) -> jax.Array:
    """size, which is at least 0, with the sign of an integer of fewer bits."""
    same = jnp.dtype(f"int{8 * size.dtype.itemsize}")
    sign = number.astype(same) & jnp.iinfo(same).min
    return jax.lax.bitcast_convert_type(jax.lax.bitcast_convert_type(size, same) | sign, size.dtype)


def py_float32_bits(number: float) -> int:
    """The bits of a number as float32."""
    return int(np.float32(number).view(np.int32))


def py_float32(bits: int) -> float:
    """The float32 of these bits, as a Python number."""
    return float(np.int32(bits).view(np.float32))
