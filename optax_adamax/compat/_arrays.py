"""Reads arrays and numbers of other frameworks, and puts arrays on the devices of others."""

import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

LARGEST_STEP = 2**31 - 1


def check_is_read(what: str, value: Any, kind: type = Mapping) -> None:
    """Raises TypeError if `value` is the name of a file, or not of this kind."""
    if isinstance(value, (str, bytes, os.PathLike)):
        raise TypeError(
            f"{what} was expected, but the name of a file was given: {value!r}. Read the file "
            f"first, for instance by torch.load, mlx.core.load or h5py.File."
        )
    if not isinstance(value, kind):
        raise TypeError(f"{what} was expected, but a {type(value).__name__} was given.")


def read_array(label: str, value: Any) -> np.ndarray:
    """Returns the floats of an array of any framework, as float32 or wider.

    Args:
      label: the name of the array in error messages.
      value: an array of NumPy, JAX, PyTorch, MLX or Keras, or anything that NumPy can read.

    Raises:
      TypeError: `value` cannot be read, or does not hold floats.
    """
    try:
        array = _to_numpy(value)
    except Exception as error:  # each framework has its own exceptions
        raise TypeError(
            f"{label} must be an array, but NumPy cannot read this {type(value).__name__}: {error}"
        ) from error
    if not jnp.issubdtype(array.dtype, jnp.inexact):
        raise TypeError(f"{label} must hold floats, but it is an array of {array.dtype}.")
    return array.astype(np.result_type(array.dtype, np.float32), copy=False)


def read_step(label: str, value: Any) -> int:
    """Returns the number of steps in a number or a scalar array.

    Raises:
      TypeError: `value` is not a number.
      ValueError: it cannot be a number of steps.
    """
    try:
        array = _to_numpy(value)
    except Exception as error:  # each framework has its own exceptions
        raise TypeError(f"{label} must be a number, but it is {value!r}.") from error
    if not any(jnp.issubdtype(array.dtype, kind) for kind in (jnp.integer, jnp.floating)):
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


def maker_like(value: Any) -> Callable[[np.ndarray], Any]:
    """Returns the function that makes an array of PyTorch or MLX if `value` is one."""
    if hasattr(value, "new_tensor"):
        wide = value.float() if value.dtype.itemsize < 4 else value
        return wide.new_tensor
    if type(value).__module__.startswith("mlx."):
        return lambda array: type(value)(array)  # which takes floats only in float32
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


def _to_numpy(value: Any) -> np.ndarray:
    if hasattr(value, "detach"):  # a tensor of PyTorch, which may be tracked or on a GPU
        value = value.detach().cpu()
    try:
        array = np.asarray(value)
    except (TypeError, ValueError):
        if not hasattr(value, "__dlpack__"):
            raise
        # PyTorch and MLX do not pass bfloat16 to NumPy; JAX does.
        return np.asarray(jnp.from_dlpack(value))
    # HDF5 has no bfloat16: Keras writes the bits, and the dtype as an attribute.
    is_bfloat16 = getattr(value, "attrs", {}).get("dtype") == "bfloat16"
    return array.view(jnp.bfloat16) if is_bfloat16 else array
