"""Checks of arguments that several constructors share."""

import functools
import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ParamSpec, TypeVar

import jax
import numpy as np
import optax

from optax_adamax import _checks
from optax_adamax.compat._paths import near

Arguments = ParamSpec("Arguments")
Transformation = TypeVar("Transformation")


def without_params(
    constructor: Callable[Arguments, Transformation],
) -> Callable[Arguments, Transformation]:
    """Rejects parameters, which are the first argument of the constructor in PyTorch."""

    @functools.wraps(constructor)
    def checked(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Transformation:
        if "params" in kwargs or (args and ("lr" in kwargs or _is_tree(args[0]))):
            given = "params" if "params" in kwargs else f"a {type(args[0]).__name__}"
            raise TypeError(
                f"adamax takes no parameters: its first argument is lr, but got {given}. Remove "
                f"it, and pass the parameters to tx.init(params) instead."
            )
        return constructor(*args, **kwargs)

    return checked


def _is_tree(value: Any) -> bool:
    if isinstance(value, (jax.Array, np.ndarray)):
        return value.ndim > 0
    return isinstance(value, Iterable) and not isinstance(value, str)


def number(
    name: str, value: Any, low: float = 0.0, high: float = math.inf, *, closed: bool = False
) -> Any:
    """Returns a number in [low, high), or [low, high] if `closed`; as a float unless traced.

    A float has no dtype that strict promotion could reject.
    """
    _checks.check_scalar(name, value, low, high, closed=closed)
    known = _checks.concrete_value(value)
    return value if known is None else known


def rate(name: str, value: Any) -> Any:
    """Returns a schedule, or a number >= 0."""
    return value if callable(value) else number(name, value)


def pair(betas: Any) -> tuple[Any, Any]:
    """Returns the decay rates in `betas`, both in [0, 1) as PyTorch and MLX require."""
    if not isinstance(betas, (list, tuple)):  # the order of a set and the keys of a dict mislead
        raise TypeError(f"betas must be a pair such as (0.9, 0.999), but got {betas!r}.")
    if len(betas) != 2:
        raise ValueError(f"betas must have two numbers, but got {betas!r}.")
    for i, beta in enumerate(betas):
        _checks.check_decay(f"betas[{i}]", beta, closed=False)
    return betas[0], betas[1]


def l2_decay(weight_decay: Any) -> list[optax.GradientTransformation]:
    """Returns the transformation that adds an L2 penalty to gradients; none for the number 0.

    Without weight decay ``update`` needs no parameters.
    """
    decay = number("weight_decay", weight_decay)
    is_zero = not isinstance(weight_decay, jax.Array) and decay == 0
    return [] if is_zero else [optax.add_decayed_weights(decay)]


def compile_patterns(name: str, patterns: Any) -> list[re.Pattern[str]]:
    """Compiles a pattern or a list of patterns.

    Raises:
      TypeError: `patterns` is neither.
      ValueError: a pattern is empty, and would match everything, or no regular expression.
    """
    listed = [patterns] if isinstance(patterns, str) else patterns
    if not isinstance(listed, (list, tuple)) or not all(isinstance(x, str) for x in listed):
        raise TypeError(
            f"{name} must be a pattern or a list of patterns, which are searched in the paths of "
            f"the parameters, such as 'head/.*kernel', but got {patterns!r}."
        )
    try:
        if "" in listed:
            raise re.error("it is empty")
        return [re.compile(x) for x in listed]
    except re.error as error:
        raise ValueError(f"{name} has an invalid pattern, {patterns!r}: {error}.") from error


def matching(
    name: str,
    patterns: Sequence[re.Pattern[str]],
    paths: Iterable[str],
    part: Callable[[str], str] = str,
) -> set[str]:
    """Returns the paths in which one of the patterns is found, or in the `part` of which.

    Raises:
      ValueError: a pattern that is found in none.
    """
    found = {x: {path for path in paths if x.search(part(path))} for x in patterns}
    for pattern, matched in found.items():
        if not matched:
            raise ValueError(
                f"{name} has the pattern {pattern.pattern!r}, which matches no parameter. Similar "
                f"paths are {near(pattern.pattern, paths)}."
            )
    return set().union(*found.values())
