"""Reads arrays and numbers of other frameworks, and puts arrays where a template is."""

import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from optax_adamax._messages import describe_value

LARGEST_STEP = 2**31 - 1


def check_is_read(what: str, value: Any, kind: type = Mapping) -> None:
    """Raises TypeError if `value` is the name of a file, or not of this kind."""
    if isinstance(value, (str, bytes, os.PathLike)):
        raise TypeError(
            f"The argument must be {what}, but the name of a file was given: {value!r}. Read the "
            f"file first, for instance by torch.load, mlx.core.load or h5py.File."
        )
    if not isinstance(value, kind):
        raise TypeError(
            f"The argument must be {what}, but {describe_value(value)} was given. Read the file of "
            f"the source framework, and pass its content."
        )


def read_array(label: str, value: Any) -> np.ndarray:
    """Returns the floats of an array of any framework, as float32 or wider.

    Args:
      label: the name of the array in error messages.
      value: an array of NumPy, JAX, PyTorch, MLX or Keras, or anything that NumPy can read.

    Raises:
      TypeError: `value` cannot be read, or does not hold floats.
    """
    array = _to_numpy(label, value)
    if not jnp.issubdtype(array.dtype, jnp.inexact):
        raise TypeError(
            f"{label} must be an array of floats, but {describe_value(value)} was given. Pass the "
            f"arrays of the source framework, or NumPy arrays."
        )
    return array.astype(np.result_type(array.dtype, np.float32), copy=False)


def read_step(label: str, value: Any) -> int:
    """Returns the number of steps in a number or a scalar array.

    Raises:
      TypeError: `value` is not a number.
      ValueError: it cannot be a number of steps.
    """
    array = _to_numpy(label, value)
    if not any(jnp.issubdtype(array.dtype, kind) for kind in (jnp.integer, jnp.floating)):
        raise TypeError(
            f"{label} must be a number, but {describe_value(value)} was given. Pass the number of "
            f"steps that the source framework has saved."
        )
    number = array.item() if array.shape == () else np.nan
    if not 0 <= number <= LARGEST_STEP or number != int(number):
        given = f"it is {number!r}" if array.shape == () else f"its shape is {array.shape}"
        raise ValueError(
            f"{label} must be a whole number from 0 to 2**31 - 1, but {given}. Pass the number of "
            f"steps that the source framework has saved."
        )
    return int(number)


def maker_like(value: Any) -> Callable[[np.ndarray], Any]:
    """Returns the function that makes arrays of PyTorch or MLX, if `value` is one, from NumPy's."""
    if hasattr(value, "new_tensor"):
        wide = value.float() if value.dtype.itemsize < 4 else value
        return wide.new_tensor
    if type(value).__module__.startswith("mlx."):
        return type(value)
    return np.asarray


def fetch(array: Any) -> np.ndarray:
    """Returns an array of JAX, which may be spread over several processes."""
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        return np.asarray(multihost_utils.process_allgather(array, tiled=True))
    return np.asarray(array)


def put_like(value: np.ndarray, like: Any) -> jax.Array:
    """Returns `value` in the dtype of `like`, on its devices and in its kind of memory."""
    value = np.asarray(value, jnp.result_type(like))
    sharding = getattr(like, "sharding", None)
    if sharding is None or not getattr(like, "committed", True):
        return jnp.asarray(value)
    if sharding.is_fully_addressable:
        return jax.device_put(value, sharding)
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])


def _to_numpy(label: str, value: Any) -> np.ndarray:
    """Returns an array of any framework in its dtype.

    Raises:
      TypeError: NumPy and JAX cannot read `value`.
    """
    try:
        if hasattr(value, "detach"):  # a tensor of PyTorch: tracked, on a GPU, or a view
            value = value.detach().cpu().contiguous()
        # NumPy cannot read the bfloat16 of PyTorch and MLX. JAX can.
        is_bfloat16 = str(getattr(value, "dtype", "")).endswith(".bfloat16")
        array = np.asarray(jnp.from_dlpack(value) if is_bfloat16 else value)
    except Exception as error:  # each framework has its own exceptions
        raise TypeError(
            f"{label} must be an array, but NumPy cannot read {describe_value(value)}: {error}. "
            f"Convert it to a NumPy array."
        ) from error
    # HDF5 has no bfloat16: Keras writes the bits, and the dtype as an attribute.
    is_bfloat16 = getattr(value, "attrs", {}).get("dtype") == "bfloat16"
    return array.view(jnp.bfloat16) if is_bfloat16 else array
