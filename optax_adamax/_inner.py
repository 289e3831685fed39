"""Accepts every object with `init` and `update` as the inner transformation of a wrapper."""

import inspect
from typing import Any

import optax


def as_transformation(inner: Any, example: str) -> optax.GradientTransformationExtraArgs:
    """Returns `inner` as a transformation whose `update` accepts extra arguments.

    Args:
      inner: an optax transformation, or an object with the same two methods, for example
        `optax.MultiSteps`.
      example: a correct call of the wrapper, for the error message.

    Raises:
      TypeError: `inner` has no `init` and `update`.
    """
    if isinstance(inner, optax.GradientTransformation):
        return optax.with_extra_args_support(inner)
    methods = [getattr(inner, name, None) for name in ("init", "update")]
    if isinstance(inner, type) or not all(map(callable, methods)):
        what = f"the class {inner.__name__}" if isinstance(inner, type) else type(inner).__name__
        raise TypeError(
            f"inner must be an optax transformation, or an object with init and update, but got "
            f"{what}. Write {example}."
        )
    kinds = {parameter.kind for parameter in inspect.signature(inner.update).parameters.values()}
    if inspect.Parameter.VAR_KEYWORD in kinds:
        return optax.GradientTransformationExtraArgs(inner.init, inner.update)
    return optax.with_extra_args_support(optax.GradientTransformation(inner.init, inner.update))
