"""The common part of storage formats.

A format handles one array. It knows neither the tree of parameters nor the optimizer. The formats
of m are in `_m_formats`, the formats of v in `_v_formats`. A new format is a class and a row in the
table of one of these files.
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
    """A storage format of one moment."""

    dtype: np.dtype | None  # of the stored array; None: the compute dtype
    # The NamedTuple around the stored tree in a state; its first field is the tree. The field names
    # differ between formats, so that a checkpoint cannot be restored into another format. None: the
    # state contains the tree itself.
    container: ClassVar[type[Any] | None] = None
    is_quantized: ClassVar[bool] = True  # whether stored values have fewer bits than computed ones

    def init(self, parameter: Any, *, real: bool) -> jax.Array:
        """Returns the zero moment, with the shape and sharding of `parameter`."""
        return jnp.zeros_like(parameter, dtype=self.stored_dtype(parameter, real=real))

    def stored_dtype(self, parameter: Any, *, real: bool) -> np.dtype:
        """Returns the stored dtype for `parameter`; `real`: also if the parameter is complex."""
        del real
        assert self.dtype is not None
        if _is_complex(parameter):
            raise TypeError(
                f"Moments of complex parameters cannot be stored as {self.dtype}. Use a "
                f"full-precision dtype, or store the two parts as real numbers: wrap the whole "
                f"optimizer in optax.with_extra_args_support("
                f"optax.contrib.split_real_and_imaginary(...))."
            )
        return self.dtype

    def accepts(self, stored: np.dtype) -> bool:
        """Returns whether an array of this dtype may be stored in this format."""
        return stored == self.dtype


class FullPrecision(Format):
    """float32, float64, or a complex dtype whose parts have one of these."""

    is_quantized = False

    def __init__(self, dtype: np.dtype | None):
        self.dtype = dtype

    def stored_dtype(self, parameter: Any, *, real: bool) -> np.dtype:
        dtype = compute_dtype(parameter) if self.dtype is None else self.dtype
        if jax.dtypes.canonicalize_dtype(dtype) != dtype:
            raise ValueError(
                "A float64 moment was requested, but JAX has 64-bit types disabled. Call "
                "jax.config.update('jax_enable_x64', True) first, or use float32."
            )
        if _is_complex(parameter) and not real:
            dtype = np.result_type(dtype, np.complex64)
        return dtype

    def accepts(self, stored: np.dtype) -> bool:
        if self.dtype is None:
            return jnp.issubdtype(stored, jnp.inexact) and jnp.finfo(stored).bits >= 32
        return stored in (self.dtype, np.result_type(self.dtype, np.complex64))


F = TypeVar("F", bound=Format)


def find_format(table: Mapping[str | None, F], argument: str, dtype: DTypeLike | None) -> F:
    """Returns the format in `table` for the dtype that the user gave for `argument`.

    Raises:
      TypeError: `dtype` is not a dtype.
      ValueError: `table` has no format with this dtype.
    """
    if dtype is None:
        return table[None]
    allowed = f"{argument} must be None or one of {', '.join(filter(None, table))}, but"
    if isinstance(dtype, jax.Array):
        raise TypeError(
            f"{allowed} an array was given. With optax.inject_hyperparams, write the name of the "
            f"dtype, {argument}='float32', because a callable such as jnp.float32 is used as a "
            f"schedule."
        )
    try:
        name = jnp.dtype(dtype).name
    except TypeError:
        raise TypeError(f"{allowed} {dtype!r} was given, which is not a dtype.") from None
    if name not in table:
        hint = ""
        if jnp.issubdtype(name, jnp.complexfloating):
            hint = " For complex parameters, give the dtype of the real part."
        raise ValueError(f"{allowed} {name} was given.{hint}")
    return table[name]


def is_in_format(moment: Any, format: Format, table: Mapping[str | None, Format]) -> bool:
    """Returns whether m or v of a state is stored in `format`, one of the formats in `table`."""
    containers = tuple(other.container for other in table.values() if other.container is not None)
    container = type(moment) if isinstance(moment, containers) else None
    leaves = jax.tree.leaves(unwrap(moment, format)) if container is format.container else []
    return container is format.container and all(format.accepts(jnp.result_type(x)) for x in leaves)


def unwrap(moment: Any, format: Format) -> Any:
    """Returns the stored tree, which is like the parameters, of m or v of a state."""
    return moment if format.container is None else moment[0]


def wrap(tree: Any, format: Format, *others: Any) -> Any:
    """Returns the stored tree as m or v of a state; `others` are the container's other fields."""
    return tree if format.container is None else format.container(tree, *others)


def _is_complex(x: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(x), jnp.complexfloating)


@jax.custom_jvp
def forbid_derivative(x: jax.Array) -> jax.Array:
    """Returns x, and raises if it is differentiated; applied before rounding, which is constant.

    Raises:
      TypeError: a derivative was requested.
    """
    return x


@forbid_derivative.defjvp
def _(primals: Any, tangents: Any) -> Any:
    del primals, tangents
    raise TypeError(
        "An update with quantized m or v was differentiated, but rounding has no useful "
        "derivative. To differentiate through the update, use float32 for m_dtype and v_dtype "
        "(decode_state converts a state). Otherwise put jax.lax.stop_gradient around the "
        "gradients, or turn off implicit differentiation of the solver that called the update "
        "(implicit_diff=False in jaxopt, another adjoint in optimistix)."
    )
