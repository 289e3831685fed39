"""Parameter groups: some parameters have hyperparameters of their own."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import jax
import optax

from optax_adamax.compat import _arguments, _paths

Group = Mapping[str, Any]
Groups = Sequence[Group] | Mapping[Hashable, Group]


def partition(
    make: Callable[..., optax.GradientTransformationExtraArgs],
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
            "A dict of groups and labels need each other. Pass groups as a dict from labels to "
            "hyperparameters, and labels as a tree like the parameters or as a function from the "
            "parameters to that tree. Groups in a list choose parameters with 'params'."
        )
    if groups is None:
        return single
    if not isinstance(groups, (list, tuple, Mapping)):
        raise TypeError(f"groups must be a list or a dict of groups, but got {groups!r}.")
    if not groups:
        raise ValueError("groups is empty. Pass at least one group, or None.")
    named = dict(groups) if isinstance(groups, Mapping) else dict(enumerate(groups))
    known = [*defaults, *ignored] if by_label else ["params", *defaults, *ignored]
    transforms = {
        label: _make(f"groups[{label!r}]", make, defaults, group, known)
        for label, group in named.items()
    }
    if by_label:
        return optax.partition(transforms, labels)
    patterns = {
        i: _arguments.compile_patterns(f"groups[{i}]['params']", group["params"])
        for i, group in named.items()
        if "params" in group
    }
    rest = [i for i in named if i not in patterns]
    if len(rest) > 1:
        raise ValueError(f"Only one group can have no 'params', but the groups {rest} have none.")
    return optax.partition(transforms, lambda params: _labels(patterns, rest, params))


def _make(
    name: str,
    make: Callable[..., optax.GradientTransformationExtraArgs],
    defaults: Group,
    group: Any,
    known: Sequence[str],
) -> optax.GradientTransformationExtraArgs:
    """Builds the transformation of one group."""
    if not isinstance(group, Mapping):
        raise TypeError(f"{name} must be a dict, but it is a {type(group).__name__}.")
    unknown = [key for key in group if key not in known]
    if unknown:
        raise TypeError(f"{name} has the unknown keys {unknown}. The known keys are {known}.")
    try:
        return make(**{key: group.get(key, default) for key, default in defaults.items()})
    except (TypeError, ValueError) as error:
        raise type(error)(f"In {name}: {error}") from error


def _labels(patterns: Mapping[Any, Any], rest: Sequence[Any], params: optax.Params) -> Any:
    """Returns the group of each parameter, as a tree like the parameters."""
    if not jax.tree.leaves(params):  # the placeholder of optax.tree.map_params
        return params
    chosen: dict[str, list[Any]] = {path: [] for path in _paths.paths(params)}
    for i, compiled in patterns.items():
        for path in _arguments.matching(f"groups[{i}]['params']", compiled, chosen):
            chosen[path].append(i)
    for path, found in chosen.items():
        if len(found or rest) != 1:
            where = f"the groups {found}" if found else "no group"
            raise ValueError(
                f"The parameter {path!r} is in {where}, but it must be in one. A group without "
                f"'params' takes all parameters that the others leave. To freeze parameters, put "
                f"this transformation and optax.set_to_zero() in an optax.partition."
            )
    return jax.tree_util.tree_map_with_path(
        lambda path, _: (chosen[_paths.path_name(path)] or rest)[0], params
    )
