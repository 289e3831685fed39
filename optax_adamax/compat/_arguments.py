"""Arguments that several frameworks share."""

import functools
from collections.abc import Callable, Iterable
from typing import Any, ParamSpec, TypeVar

import jax
import numpy as np
import optax
from jax.typing import ArrayLike

from optax_adamax import _checks

Arguments = ParamSpec("Arguments")
Transformation = TypeVar("Transformation")


def without_params(
    constructor: Callable[Arguments, Transformation],
) -> Callable[Arguments, Transformation]:
    """Refuses the parameters, with which a constructor begins in PyTorch."""

    @functools.wraps(constructor)
    def checked(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Transformation:
        if "params" in kwargs or (args and ("lr" in kwargs or _is_tree(args[0]))):
            given = "params" if "params" in kwargs else f"a {type(args[0]).__name__}"
            raise TypeError(
                f"The first argument is lr, but {given} was given. There are no parameters here: "
                f"leave them out, and give them to the init of what is returned."
            )
        return constructor(*args, **kwargs)

    return checked


def _is_tree(value: Any) -> bool:
    if isinstance(value, (jax.Array, np.ndarray)):
        return value.ndim > 0
    return isinstance(value, Iterable) and not isinstance(value, str)


def check_betas(betas: Any) -> tuple[ArrayLike, ArrayLike]:
    """The pair of decay rates, both in [0, 1) as PyTorch and MLX demand.

    Raises:
      ValueError: not two of them, or one out of range.
      TypeError: no pair, or one of the wrong type.
    """
    try:
        b1, b2 = betas
    except TypeError:
        raise TypeError(f"betas must be a pair of numbers, but {betas!r} was given.") from None
    except ValueError:
        raise ValueError(f"betas must be two numbers, but {betas!r} was given.") from None
    _checks.check_decay("betas[0]", b1, closed=False)
    _checks.check_decay("betas[1]", b2, closed=False)
    return b1, b2


def l2_decay(weight_decay: Any) -> list[optax.GradientTransformation]:
    """The links that add an L2 penalty to the gradient: none where it is the number 0.

    Without the link ``update`` needs no parameters.
    """
    _checks.check_scalar("weight_decay", weight_decay, 0.0, float("inf"))
    if isinstance(weight_decay, (int, float)) and weight_decay == 0:
        return []
    return [optax.add_decayed_weights(weight_decay)]
