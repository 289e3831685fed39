"""Checks of arguments that several constructors share, and parameter groups."""

import functools
import math
import re
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, ParamSpec, TypeVar

import jax
import optax

from optax_adamax import _checks
from optax_adamax._messages import describe_value
from optax_adamax.compat._layout import near, path_name, paths

Arguments = ParamSpec("Arguments")
Transformation = TypeVar("Transformation")
Make = Callable[..., optax.GradientTransformationExtraArgs]
Group = Mapping[str, Any]
Groups = Sequence[Group] | Mapping[Hashable, Group]


def without_params(
    constructor: Callable[Arguments, Transformation],
) -> Callable[Arguments, Transformation]:
    """Explains that the constructor has no parameters before ``lr``, unlike in PyTorch."""

    @functools.wraps(constructor)
    def checked(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Transformation:
        if "params" in kwargs or (args and "lr" in kwargs):
            raise TypeError(
                "The first argument of adamax must be lr, but parameters were given, too. Remove "
                "them, and pass them to tx.init(params) instead."
            )
        return constructor(*args, **kwargs)

    return checked


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
    _checks.check_rate(name, value)
    return value if callable(value) else number(name, value)


def pair(betas: Any) -> tuple[Any, Any]:
    """Returns the decay rates in `betas`, both in [0, 1) as PyTorch and MLX require."""
    # A set has no order, and the values of a dict may be meant instead of its keys.
    if not isinstance(betas, (list, tuple)) or len(betas) != 2:
        error = ValueError if isinstance(betas, (list, tuple)) else TypeError
        raise error(
            f"betas must be a pair of numbers, but {describe_value(betas)} was given. Write "
            f"(0.9, 0.999)."
        )
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
            f"{name} must be a pattern or a list of patterns, but {describe_value(patterns)} was "
            f"given. Write a regular expression that is searched in the paths of the parameters, "
            f"such as 'head/.*kernel'."
        )
    try:
        if "" in listed:
            raise re.error("an empty pattern matches every parameter")
        return [re.compile(x) for x in listed]
    except re.error as error:
        raise ValueError(
            f"{name} must be a valid pattern, but {patterns!r} was given: {error}. Write a regular "
            f"expression."
        ) from error


def matching(
    name: str,
    patterns: Sequence[re.Pattern[str]],
    paths: Iterable[str],
    part: Callable[[str], str] = str,
) -> set[str]:
    """Returns the paths whose `part` contains one of the patterns.

    Raises:
      ValueError: a pattern without a match.
    """
    found = {x: {path for path in paths if x.search(part(path))} for x in patterns}
    for pattern, matched in found.items():
        if not matched:
            raise ValueError(
                f"{name} must match a parameter, but {pattern.pattern!r} matches none. Similar "
                f"paths are {near(pattern.pattern, paths)}."
            )
    return set().union(*found.values())


def partition(
    make: Make,
    defaults: Group,
    groups: Groups | None,
    labels: Any,
    ignored: Sequence[str] = (),
) -> optax.GradientTransformationExtraArgs:
    """Builds one transformation from the `defaults`, or one per group.

    Args:
      make: builds a transformation from hyperparameters.
      defaults: the hyperparameters that a group does not set.
      groups: groups with patterns in a list, or groups in a dict by label.
      labels: the tree of labels, or a function from the parameters to it.
      ignored: keys without effect in a group.

    Raises:
      TypeError: a group is not a dict, or has an unknown key.
      ValueError: labels without groups by label, or the reverse.
    """
    single = make(**defaults)
    by_label = isinstance(groups, Mapping)
    if by_label != (labels is not None):
        raise ValueError(
            "A dict of groups and labels must be given together, but only one was given. Pass "
            "groups as a dict from labels to hyperparameters, and labels as a tree like the "
            "parameters or as a function from the parameters to that tree. Groups in a list choose "
            "parameters with 'params'."
        )
    if groups is None:
        return single
    if not isinstance(groups, (list, tuple, Mapping)) or not groups:
        error = ValueError if isinstance(groups, (list, tuple, Mapping)) else TypeError
        raise error(
            f"groups must be a list or a dict of groups, but {describe_value(groups)} was given. "
            f"Pass at least one group, or None."
        )
    named = dict(groups) if isinstance(groups, Mapping) else dict(enumerate(groups))
    known = [*([] if by_label else ["params"]), *defaults, *ignored]
    transforms = {
        label: _make(f"groups[{label!r}]", make, defaults, group, known)
        for label, group in named.items()
    }
    if by_label:
        return optax.partition(transforms, labels)
    patterns = {
        i: compile_patterns(f"groups[{i}]['params']", group["params"])
        for i, group in named.items()
        if "params" in group
    }
    rest = [i for i in named if i not in patterns]
    if len(rest) > 1:
        raise ValueError(
            f"At most one group may be without 'params', but the groups {rest} are. Write a "
            f"pattern for each of the others."
        )
    return optax.partition(transforms, lambda params: _labels(patterns, rest, params))


def _make(
    name: str, make: Make, defaults: Group, group: Any, known: Sequence[str]
) -> optax.GradientTransformationExtraArgs:
    """Builds the transformation of one group."""
    if not isinstance(group, Mapping):
        raise TypeError(
            f"{name} must be a dict of hyperparameters, but {describe_value(group)} was given. "
            f"Write {{'params': pattern, ...}}."
        )
    unknown = [key for key in group if key not in known]
    if unknown:
        raise TypeError(
            f"{name} must have only the keys {known}, but it has {unknown}. Remove them."
        )
    try:
        return make(**{key: group.get(key, default) for key, default in defaults.items()})
    except (TypeError, ValueError) as error:
        raise type(error)(f"In {name}: {error}") from error


def _labels(patterns: Mapping[Any, Any], rest: Sequence[Any], params: optax.Params) -> Any:
    """Returns the group of each parameter, as a tree like the parameters."""
    if not jax.tree.leaves(params):  # the placeholder of optax.tree.map_params
        return params
    chosen: dict[str, list[Any]] = {path: [] for path in paths(params)}
    for i, compiled in patterns.items():
        for path in matching(f"groups[{i}]['params']", compiled, chosen):
            chosen[path].append(i)
    for path, found in chosen.items():
        if len(found or rest) != 1:
            given = f"in the groups {found}" if found else "in no group"
            raise ValueError(
                f"Each parameter must be in one group, but {path!r} is {given}. A group without "
                f"'params' gets all parameters that are in no other group. To freeze parameters, "
                f"put this transformation and optax.set_to_zero() in an optax.partition."
            )
    return jax.tree_util.tree_map_with_path(
        lambda path, _: (chosen[path_name(path)] or rest)[0], params
    )
