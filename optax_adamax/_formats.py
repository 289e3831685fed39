"""Base classes of the storage formats of m (`_m_formats`) and v (`_v_formats`).

A storage format converts one array between floats and the stored dtype. It depends neither on the
tree of parameters nor on the optimizer. A new format is a class and a row in the table of one of
these files.
"""

import abc
from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from optax_adamax._derivatives import identity_without_derivative
from optax_adamax._messages import describe_dtype, describe_value
from optax_adamax._numerics import compute_dtype


class Format(abc.ABC):
    """A storage format of one moment."""

    dtype: np.dtype | None  # of the stored array; None: the compute dtype
    # The NamedTuple whose first field is the stored tree; None: no container. The field names
    # differ between formats, because a checkpoint must not be restored into another format.
    container: ClassVar[type[Any] | None] = None
    is_quantized: ClassVar[bool] = True  # False: stored values have all bits of computed values

    def init(self, parameter: Any, *, real: bool) -> jax.Array:
        """Returns the zero moment, with the shape and sharding of `parameter`."""
        return jnp.zeros_like(parameter, dtype=self.stored_dtype(parameter, real=real))

    def stored_dtype(self, parameter: Any, *, real: bool) -> np.dtype:
        """Returns the stored dtype for `parameter`. With `real`, it is real for any parameter."""
        del real
        assert self.dtype is not None
        if jnp.iscomplexobj(parameter):
            raise TypeError(
                f"Moments of complex parameters must be in full precision, but {self.dtype} was "
                f"given. Write float32 or float64, or store the two parts as real numbers: wrap "
                f"the optimizer in optax.with_extra_args_support("
                f"optax.contrib.split_real_and_imaginary(...))."
            )
        return self.dtype

    def accepts(self, stored: np.dtype) -> bool:
        """Returns whether arrays in this format may have the dtype `stored`."""
        return stored == self.dtype


class FullPrecision(Format):
    """float32 or float64, or for complex m a pair of these."""

    is_quantized = False

    def __init__(self, dtype: np.dtype | None):
        self.dtype = dtype

    def stored_dtype(self, parameter: Any, *, real: bool) -> np.dtype:
        dtype = compute_dtype(parameter) if self.dtype is None else self.dtype
        if jax.dtypes.canonicalize_dtype(dtype) != dtype:
            raise ValueError(
                "float64 moments need 64-bit types, which are disabled in JAX. Call "
                "jax.config.update('jax_enable_x64', True) first, or write float32."
            )
        if jnp.iscomplexobj(parameter) and not real:
            dtype = np.result_type(dtype, np.complex64)
        return dtype

    def accepts(self, stored: np.dtype) -> bool:
        if self.dtype is None:
            return jnp.issubdtype(stored, jnp.inexact) and jnp.finfo(stored).bits >= 32
        return stored in (self.dtype, np.result_type(self.dtype, np.complex64))


F = TypeVar("F", bound=Format)


def find_format(table: Mapping[str | None, F], argument: str, dtype: DTypeLike | None) -> F:
    """Returns the format in `table` for the dtype that a user passed as `argument`.

    Raises:
      TypeError: `dtype` is not a dtype.
      ValueError: `table` does not contain this dtype.
    """
    if dtype is None:
        return table[None]
    allowed = f"{argument} must be None or one of {', '.join(filter(None, table))}, but"
    if isinstance(dtype, jax.Array):
        raise TypeError(
            f"{allowed} {describe_value(dtype)} was given. With optax.inject_hyperparams, write "
            f"the name of the dtype, {argument}='float32': it calls jnp.float32 like a schedule."
        )
    try:
        name = jnp.dtype(dtype).name
    except TypeError:
        given = describe_value(dtype)
        raise TypeError(f"{allowed} {given} was given, which JAX cannot read as a dtype.") from None
    if name not in table:
        is_complex = jnp.issubdtype(name, jnp.complexfloating)
        hint = " For complex parameters, write the dtype of the real part." if is_complex else ""
        raise ValueError(f"{allowed} {describe_dtype(dtype, name)} was given.{hint}")
    return table[name]


def is_in_format(moment: Any, format: Format, table: Mapping[str | None, Format]) -> bool:
    """Returns whether a moment of a state is stored in `format`, one of the formats in `table`."""
    containers = tuple(other.container for other in table.values() if other.container is not None)
    container = type(moment) if isinstance(moment, containers) else None
    leaves = jax.tree.leaves(unwrap(moment, format)) if container is format.container else []
    return container is format.container and all(format.accepts(jnp.result_type(x)) for x in leaves)


def unwrap(moment: Any, format: Format) -> Any:
    """Removes the container from a moment of a state, and returns the stored tree."""
    return moment if format.container is None else moment[0]


def wrap(tree: Any, format: Format, *others: Any) -> Any:
    """Puts a stored tree into the container of its format; `others` are the other fields."""
    return tree if format.container is None else format.container(tree, *others)


# Applied to values before they are rounded.
forbid_derivative = identity_without_derivative(
    "An update with quantized m or v was differentiated, but rounding has no useful "
    "derivative. To differentiate through the update, use float32 for m_dtype and v_dtype "
    "(decode_state converts a state). Otherwise put jax.lax.stop_gradient around the "
    "gradients, or disable implicit differentiation in the solver that called the update "
    "(implicit_diff=False in jaxopt, another adjoint in optimistix)."
)
