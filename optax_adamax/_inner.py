"""Conversion of the first argument of a wrapper to an optax transformation."""

import inspect
from typing import Any

import optax

from optax_adamax._messages import describe_value


def as_transformation(inner: Any, example: str) -> optax.GradientTransformationExtraArgs:
    """Returns `inner` as a transformation whose `update` accepts extra arguments.

    Args:
      inner: an optax transformation, or an object with `init` and `update`, for example
        `optax.MultiSteps`.
      example: a correct call of the wrapper. The error message contains it.

    Raises:
      TypeError: `init` or `update` is missing.
    """
    if isinstance(inner, optax.GradientTransformation):
        return optax.with_extra_args_support(inner)
    methods = [getattr(inner, name, None) for name in ("init", "update")]
    if isinstance(inner, type) or not all(map(callable, methods)):
        raise TypeError(
            f"The first argument must be an optax transformation, or an object with init and "
            f"update, but {describe_value(inner)} was given. Write {example}."
        )
    kinds = {parameter.kind for parameter in inspect.signature(inner.update).parameters.values()}
    if inspect.Parameter.VAR_KEYWORD in kinds:
        return optax.GradientTransformationExtraArgs(inner.init, inner.update)
    return optax.with_extra_args_support(optax.GradientTransformation(inner.init, inner.update))
