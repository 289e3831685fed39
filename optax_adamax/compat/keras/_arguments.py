"""Arguments of `keras.optimizers.Adamax` as checked values or as transformations."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import optax

from optax_adamax.compat import _paths
from optax_adamax.compat._arguments import compile_patterns, matching, number, rate
from optax_adamax.compat.keras import _transforms

Exclusion = str | Sequence[str] | Callable[[optax.Params], Any]


def rate_of_updates(learning_rate: Any, steps: int) -> Any:
    """Returns a learning rate as a function of updates, given a function of calls.

    Keras evaluates a schedule in the last of the `steps` calls per update.
    """
    if isinstance(learning_rate, (int, np.integer)):
        raise ValueError(
            f"learning_rate must be a float or a schedule, but got {learning_rate!r}. Keras "
            f"rejects integers. Write {float(learning_rate)}."
        )
    checked = rate("learning_rate", learning_rate)
    return (lambda count: checked((count + 1) * steps - 1)) if callable(checked) else checked


def integer(name: str, value: Any, least: int) -> int | None:
    """Returns None, or an integer that is at least `least`."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} must be an integer >= {least} or None, but got {value!r}.")
    if value < least:
        raise ValueError(f"{name} must be an integer >= {least} or None, but got {value}.")
    return int(value)


def unscale(loss_scale_factor: Any) -> list[optax.GradientTransformation]:
    """Divides gradients by the loss scale, if there is one."""
    if loss_scale_factor is None:
        return []
    factor = number("loss_scale_factor", loss_scale_factor)
    if factor == 0:
        raise ValueError("loss_scale_factor must be greater than 0, but got 0.")
    return [optax.scale(1 / factor)]


def clip(clipnorm: Any, clipvalue: Any, global_clipnorm: Any) -> list[optax.GradientTransformation]:
    """Clips gradients, if a limit is given. As in Keras, a limit <= 0 has no effect."""
    clips = {
        "clipnorm": (clipnorm, _transforms.clip_each),
        "clipvalue": (clipvalue, optax.clip),
        "global_clipnorm": (global_clipnorm, optax.clip_by_global_norm),
    }
    given = {
        name: number(name, limit, -math.inf, math.inf, closed=True)
        for name, (limit, _) in clips.items()
        if limit is not None
    }
    if len(given) > 1:
        raise ValueError(f"At most one limit of the gradient can be given, but got {given}.")
    return [clips[name][1](limit) for name, limit in given.items() if limit > 0]


def decay(weight_decay: Any, exclude: Exclusion | None) -> list[optax.GradientTransformation]:
    """Adds decoupled weight decay, if there is any, except to the parameters in `exclude`."""
    mask = None if exclude is None else _decayed(exclude)
    if weight_decay is None:
        return []
    return [optax.add_decayed_weights(number("weight_decay", weight_decay), mask)]


def _decayed(exclude: Exclusion) -> Callable[[optax.Params], Any]:
    """Returns the function from the parameters to the mask of those with weight decay."""
    if callable(exclude):
        function = exclude
        return lambda params: jax.tree.map(_invert, function(params))
    name = "exclude_from_weight_decay"
    patterns = compile_patterns(name, exclude)

    def decayed(params: optax.Params) -> Any:
        paths = _paths.paths(params)
        excluded = matching(name, patterns, paths, lambda path: path.rsplit("/", 1)[-1])
        return jax.tree_util.tree_map_with_path(
            lambda path, _: _paths.path_name(path) not in excluded, params
        )

    return decayed


def _invert(flag: Any) -> bool:
    if not isinstance(flag, (bool, np.bool_)):
        raise TypeError(
            f"The function exclude_from_weight_decay must return a tree of booleans, but the tree "
            f"has {flag!r}."
        )
    return not flag
