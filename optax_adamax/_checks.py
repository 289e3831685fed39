"""Checks of the arguments of constructors and of `adamax_step`.

The values of traced arguments are not checked (`optax.inject_hyperparams`, `jax.vmap`, `jax.grad`).
"""

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from optax_adamax._messages import describe_value

P = ParamSpec("P")
R = TypeVar("R")

# Arguments of other implementations, and the corresponding arguments of this package.
RENAMED = {
    "mu_dtype": "m_dtype",
    "nu_dtype": "v_dtype",
    "lr": "learning_rate",
    "betas": "b1 and b2",
    "beta_1": "b1",
    "beta_2": "b2",
    "epsilon": "eps",
    "u": "v",
    "weight_decay": "adamaxw (decoupled decay), or optax.add_decayed_weights in a chain before "
    "adamax (L2 decay),",
}


def suggest_renamed_arguments(function: Callable[P, R]) -> Callable[P, R]:
    """Adds an error for arguments in `RENAMED`, with the name that `function` uses."""
    renamed = RENAMED.keys() - inspect.signature(function).parameters.keys()

    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        for name in kwargs.keys() & renamed:
            raise TypeError(
                f"{function.__name__} has no argument {name}. Write {RENAMED[name]} instead."
            )
        return function(*args, **kwargs)

    return checked


def check_scalar(
    name: str,
    value: Any,
    low: float,
    high: float,
    *,
    closed: bool = False,
    kind: str = "a real number",
    advice: str = "Write a float or a scalar array.",
) -> None:
    """Checks that a value is a real scalar in [low, high), or in [low, high] if `closed`.

    Raises:
      TypeError: the value is neither a real number nor an array of real numbers.
      ValueError: the value is outside of the interval, NaN, or an array with dimensions.
    """
    if isinstance(value, bool) or not isinstance(
        value, (int, float, np.number, np.ndarray, jax.Array)
    ):
        given = describe_value(value)
        if callable(value):
            advice = "For a schedule use optax.inject_hyperparams."
        raise TypeError(f"{name} must be {kind}, but {given} was given. {advice}")
    if np.ndim(value) != 0:
        raise ValueError(
            f"{name} must be a scalar, but {describe_value(value)} was given. For parameters that "
            f"need different values of {name}, use optax.partition."
        )
    dtype = getattr(value, "dtype", None)
    if dtype is not None and not (
        jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)
    ):
        raise TypeError(f"{name} must be {kind}, but its dtype is {dtype}. {advice}")
    known = concrete_value(value)
    if known is not None and not (low <= known < high or (closed and known == high)):
        interval = f"[{low:g}, {high:g}" + ("]" if closed else ")")
        raise ValueError(f"{name} must be in {interval}, but {known!r} was given.")


def concrete_value(value: Any) -> float | None:
    """Returns a scalar as a Python number; None if it is traced."""
    return None if isinstance(value, Tracer) else float(value)


def check_decay(name: str, value: Any, *, closed: bool) -> None:
    """Checks that a decay rate is in [0, 1), or [0, 1] if `closed`, and not in half precision."""
    check_scalar(name, value, 0.0, 1.0, closed=closed)
    dtype = getattr(value, "dtype", None)
    if dtype is not None and jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize < 4:
        raise TypeError(
            f"Pass hyperparam_dtype=jnp.float32 to optax.inject_hyperparams, or {name} as a float: "
            f"a {dtype} array was given, in which 0.999 is "
            f"{float(jnp.asarray(0.999, dtype)):.6g}. optax.inject_hyperparams casts "
            f"hyperparameters to the dtype of the parameters."
        )


def check_ratio(b1: Any, b2: Any, largest_ratio: float) -> None:
    """Checks that the storage format of m can represent every m / v that b1 and b2 allow.

    For constant b1 < b2, |m_t| / v_t is at most (1 - b1) / (1 - b1/b2). Traced decay rates are not
    checked.
    """
    b1, b2 = concrete_value(b1), concrete_value(b2)
    if b1 is None or b2 is None or math.isinf(largest_ratio):
        return
    ratio = (1 - b1) / (1 - b1 / b2) if b1 < b2 else math.inf
    if ratio > largest_ratio:
        reached = "" if math.isinf(ratio) else f", for which the ratio is {ratio:.4g}"
        raise ValueError(
            f"m_dtype='int8' stores m / v, so it requires b1 < b2 and (1 - b1) / (1 - b1 / b2) <= "
            f"{largest_ratio:.4g}, but b1={b1:g} and b2={b2:g} were given{reached}. Write a "
            f"smaller b1, a larger b2, or m_dtype='bfloat16'."
        )


def check_rate(name: str, value: Any) -> None:
    """Checks that a learning rate or weight decay is a schedule or a number >= 0."""
    if not callable(value):
        check_scalar(
            name,
            value,
            0.0,
            math.inf,
            kind="a real number or a schedule",
            advice="Write a float or a schedule. Pass parameters to init.",
        )


def check_flag(name: str, value: Any) -> None:
    """Checks that a value is True or False."""
    if not isinstance(value, bool):
        raise TypeError(
            f"{name} must be True or False, but {describe_value(value)} was given. Write a Python "
            f"bool. With optax.inject_hyperparams, name the argument in static_args."
        )


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Checks that a value is one of the strings `choices`."""
    error = ValueError if isinstance(value, str) else TypeError
    if not isinstance(value, str) or value not in choices:
        raise error(f"{name} must be one of {choices}, but {describe_value(value)} was given.")


def as_float_array(name: str, value: Any) -> jax.Array:
    """Converts a number, a nested list of numbers or an array to a float or complex array."""
    try:
        array = jnp.asarray(value)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"{name} must be a number or an array, but {describe_value(value)} was given."
        ) from error
    return array if jnp.issubdtype(array.dtype, jnp.inexact) else array.astype(float)


def check_arrays(parameter: jax.Array, *, grad: jax.Array, m: jax.Array, v: jax.Array) -> None:
    """Checks that gradient, m and v match a parameter in shape and in being real or complex.

    Raises:
      ValueError: a gradient of another shape; a moment of another shape that is not a scalar.
      TypeError: a complex gradient or m of a real parameter; a complex v.
    """
    if grad.shape != parameter.shape:
        raise ValueError(
            f"grad must have the shape of parameter, {parameter.shape}, but its shape is "
            f"{grad.shape}."
        )
    for name, moment in (("m", m), ("v", v)):
        if moment.shape not in ((), parameter.shape):
            raise ValueError(
                f"{name} must be a scalar or have the shape of parameter, {parameter.shape}, but "
                f"its shape is {moment.shape}."
            )
    for name, array in (("grad", grad), ("m", m), ("v", v)):
        if jnp.iscomplexobj(array) and (name == "v" or not jnp.iscomplexobj(parameter)):
            reason = "" if name == "v" else f", because the dtype of parameter is {parameter.dtype}"
            raise TypeError(f"{name} must be real{reason}, but its dtype is {array.dtype}.")
