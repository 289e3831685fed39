"""Other frameworks' arrays and counters as NumPy's, without importing the frameworks."""

from typing import Any

import jax.numpy as jnp
import numpy as np

LARGEST_STEP = 2**31 - 1


def read_array(label: str, value: Any) -> np.ndarray:
    """The floats in `value`, in float32 at least.

    Args:
      label: what to call it in an error.
      value: an array of NumPy, JAX, PyTorch, MLX, Keras or of whatever NumPy can read.

    Raises:
      TypeError: it is none, or holds no floats.
    """
    try:
        array = _to_numpy(value)
    except Exception as error:  # each framework has its own exceptions
        raise TypeError(
            f"{label} must be an array, but NumPy cannot read this {type(value).__name__}: {error}"
        ) from error
    if not jnp.issubdtype(array.dtype, jnp.inexact):
        raise TypeError(f"{label} must hold floats, but it is an array of {array.dtype}.")
    return array.astype(np.result_type(array.dtype, np.float32))


def read_step(label: str, value: Any) -> int:
    """The number of steps taken, from a number or a scalar array.

    Raises:
      TypeError: `value` is no number.
      ValueError: it is no count of steps.
    """
    try:
        array = _to_numpy(value)
    except Exception as error:  # each framework has its own exceptions
        raise TypeError(f"{label} must be a number, but it is {value!r}.") from error
    if array.dtype.kind not in "iuf":
        raise TypeError(
            f"{label} must be a number, but it is {value!r} of type {type(value).__name__}."
        )
    if array.shape != ():
        raise ValueError(f"{label} must be a scalar, but it has shape {array.shape}.")
    number = array.item()
    if number != number or number != int(min(number, LARGEST_STEP)) or number < 0:
        raise ValueError(
            f"{label} must be a whole number from 0 to 2**31 - 1, but it is {number!r}."
        )
    return int(number)


def _to_numpy(value: Any) -> np.ndarray:
    if hasattr(value, "detach"):  # a tensor of PyTorch, which may be tracked or on a GPU
        value = value.detach().cpu()
    try:
        array = np.asarray(value)
    except (TypeError, ValueError):
        if not hasattr(value, "__dlpack__"):
            raise
        # PyTorch and MLX do not hand bfloat16 to NumPy; JAX does.
        return np.asarray(jnp.from_dlpack(value))
    # HDF5 has no bfloat16: Keras writes the bits, and the dtype as an attribute.
    is_bfloat16 = getattr(value, "attrs", {}).get("dtype") == "bfloat16"
    return array.view(jnp.bfloat16) if is_bfloat16 else array
