"""Bad input is refused here, at the earliest place where it can be known.

Numbers are checked when a transformation is built, concrete JAX arrays too. Tracers
(`optax.inject_hyperparams`, `jax.vmap`, `jax.grad`) cannot be.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

P = ParamSpec("P")
R = TypeVar("R")


def suggest_renamed_arguments(function: Callable[P, R]) -> Callable[P, R]:
    """Tells what an argument is called here that other optimizers call otherwise."""

    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        for name, here in (("mu_dtype", "m_dtype"), ("nu_dtype", "v_dtype")):
            if name in kwargs:
                raise TypeError(f"{function.__name__} has no argument {name}: write {here}=...")
        return function(*args, **kwargs)

    return checked


def check_scalar(name: str, value: Any, low: float, high: float, *, closed: bool = False) -> None:
    """Refuses anything but a real scalar in [low, high), or in [low, high] if `closed`.

    Raises:
      TypeError: `value` is no real number, or an array of a dtype that cannot hold it.
      ValueError: `value` is outside the interval, not a number, or not a scalar.
    """
    if isinstance(value, bool) or not isinstance(
        value, (int, float, np.number, np.ndarray, jax.Array)
    ):
        raise TypeError(
            f"{name} must be a real number, but {value!r} is of type {type(value).__name__}: "
            f"give a float or a scalar array."
        )
    if np.ndim(value) != 0:
        raise ValueError(
            f"{name} must be a scalar, but an array of shape {np.shape(value)} was given: "
            f"use optax.partition for parameters that need different values of {name}."
        )
    dtype = getattr(value, "dtype", None)
    if dtype is not None and not (
        jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)
    ):
        raise TypeError(f"{name} must be a real number, but its dtype is {dtype}.")
    known = concrete_value(value)
    if known is not None and not (low <= known < high or (closed and known == high)):
        interval = f"[{low:g}, {high:g}" + ("]" if closed else ")")
        raise ValueError(f"{name} must be in {interval}, but {known!r} was given.")


def concrete_value(value: Any) -> float | None:
    """A scalar as a Python number; None where it is traced."""
    return None if isinstance(value, Tracer) else float(value)


def check_decay(name: str, value: Any, *, closed: bool) -> None:
    """Refuses a decay rate outside [0, 1), or [0, 1] if `closed`, or in half precision."""
    check_scalar(name, value, 0.0, 1.0, closed=closed)
    dtype = getattr(value, "dtype", None)
    if dtype is not None and jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize < 4:
        raise TypeError(
            f"{name} was given as a {dtype} array, in which 0.999 is "
            f"{float(jnp.asarray(0.999, dtype)):.6g}: give it in float32. With "
            f"optax.inject_hyperparams, pass hyperparam_dtype=jnp.float32."
        )


def check_ratio(b1: Any, b2: Any, largest_ratio: float) -> None:
    """Rejects decay rates for which m / v may exceed the largest ratio of the storage format of m.

    For constant b1 < b2, |m_t| / v_t is at most (1 - b1) / (1 - b1/b2). Traced rates are not
    checked.
    """
    b1, b2 = concrete_value(b1), concrete_value(b2)
    if b1 is None or b2 is None or math.isinf(largest_ratio):
        return
    if b1 >= b2 or (1 - b1) / (1 - b1 / b2) > largest_ratio:
        raise ValueError(
            f"m_dtype='int8' requires b1 < b2 and (1 - b1) / (1 - b1/b2) <= {largest_ratio:.4g}, "
            f"the largest ratio of m to v that it stores, but b1={b1:g} and b2={b2:g} were given. "
            f"Decrease b1, increase b2, or use m_dtype='bfloat16'."
        )


def check_rate(name: str, value: Any) -> None:
    """Refuses a learning rate or weight decay that is neither a schedule nor a number >= 0."""
    if not callable(value):
        check_scalar(name, value, 0.0, math.inf)


def check_flag(name: str, value: Any) -> None:
    """Refuses anything but True or False."""
    if not isinstance(value, bool):
        raise TypeError(
            f"{name} must be True or False, but {value!r} is of type {type(value).__name__}. "
            f"Under jax.jit and optax.inject_hyperparams it must be static."
        )


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Refuses anything but one of the strings `choices`."""
    if not isinstance(value, str):
        raise TypeError(f"{name} must be one of {choices}, but {value!r} was given.")
    if value not in choices:
        raise ValueError(f"{name} must be one of {choices}, but {value!r} was given.")


def check_parameter(path: Any, parameter: Any) -> None:
    """Refuses a parameter that real steps cannot move.

    Raises:
      TypeError: the parameter is no array, or of an integer or boolean dtype.
    """
    where = jax.tree_util.keystr(path) or "the parameter"
    try:
        dtype = jnp.result_type(parameter)
    except TypeError:
        raise TypeError(
            f"{where} must be an array, but {parameter!r} is of type {type(parameter).__name__}: "
            f"filter the tree first, for instance with equinox.filter."
        ) from None
    if not jnp.issubdtype(dtype, jnp.inexact):
        raise TypeError(
            f"{where} has dtype {dtype}, which Adamax cannot train: cast it to a float, give it to "
            f"optax.set_to_zero with optax.partition, or filter by equinox.is_inexact_array."
        )


def as_float_array(name: str, value: Any) -> jax.Array:
    """Takes numbers, nested lists or arrays of them as a float or complex array."""
    try:
        array = jnp.asarray(value)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} must be a number or an array, but it is {value!r}.") from error
    return array if jnp.issubdtype(array.dtype, jnp.inexact) else array.astype(float)


def check_arrays(parameter: jax.Array, *, grad: jax.Array, m: jax.Array, v: jax.Array) -> None:
    """Refuses the arrays of one parameter that do not fit it.

    Raises:
      ValueError: a gradient of another shape, or a moment neither of this shape nor scalar.
      TypeError: a complex array where the parameter is real, or a complex v.
    """
    if grad.shape != parameter.shape:
        raise ValueError(f"grad has shape {grad.shape}, but parameter {parameter.shape}.")
    for name, moment in (("m", m), ("v", v)):
        if moment.shape not in ((), parameter.shape):
            raise ValueError(
                f"{name} has shape {moment.shape}, but parameter {parameter.shape}: give one of "
                f"the same shape, or a scalar."
            )
    for name, array in (("grad", grad), ("m", m), ("v", v)):
        if jnp.iscomplexobj(array) and (name == "v" or not jnp.iscomplexobj(parameter)):
            raise TypeError(
                f"{name} is of {array.dtype}, whose imaginary part a parameter of "
                f"{parameter.dtype} would lose: give a real one, or a complex parameter."
            )


def check_gradients(gradients: Any, moments: Any) -> None:
    """Refuses gradients that do not belong to the parameters that the state was made for.

    Args:
      gradients: the tree given to `update`.
      moments: the tree of m in the state.

    Raises:
      ValueError: another tree structure, or another shape.
      TypeError: an integer gradient, or a complex one for a real parameter or the reverse.
    """
    if jax.tree.structure(gradients) != jax.tree.structure(moments):
        raise ValueError(
            f"The gradients are not of the tree that the state was initialized for: "
            f"{_difference(gradients, moments)}. Give zeros for a parameter without a gradient, "
            f"freeze it by optax.set_to_zero in optax.partition, or call init again with these "
            f"parameters."
        )
    leaves = zip(jax.tree.leaves(gradients), jax.tree.leaves(moments), strict=True)
    for index, (gradient, moment) in enumerate(leaves):
        try:
            dtype = jnp.result_type(gradient)
        except TypeError:
            raise TypeError(
                f"{_leaf_name(gradients, index)} must be an array, but {gradient!r} is of type "
                f"{type(gradient).__name__}."
            ) from None
        if jnp.shape(gradient) != jnp.shape(moment):
            raise ValueError(
                f"{_leaf_name(gradients, index)} has shape {jnp.shape(gradient)}, but the state "
                f"was initialized for shape {jnp.shape(moment)}."
            )
        if not jnp.issubdtype(dtype, jnp.inexact):
            raise TypeError(
                f"{_leaf_name(gradients, index)} has dtype {dtype}: cast it to a float."
            )
        if jnp.issubdtype(dtype, jnp.complexfloating) != jnp.iscomplexobj(moment):
            raise TypeError(
                f"{_leaf_name(gradients, index)} has dtype {dtype}, but its moment is "
                f"{moment.dtype}: both must be real or both complex."
            )


def _paths(tree: Any) -> list[str]:
    return [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


def _leaf_name(tree: Any, index: int) -> str:
    return f"The gradient{_paths(tree)[index]}"


def _difference(gradients: Any, moments: Any) -> str:
    given, known = _paths(gradients), _paths(moments)
    missing = [path for path in known if path not in given]
    surplus = [path for path in given if path not in known]
    if missing:
        return f"there is no gradient for {missing}"
    if surplus:
        return f"there is no state for {surplus}"
    return f"{jax.tree.structure(gradients)} instead of {jax.tree.structure(moments)}"
