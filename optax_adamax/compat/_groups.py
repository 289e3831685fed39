"""Parameter groups: hyperparameters of their own for some of the parameters."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import jax
import optax

from optax_adamax.compat import _mapping

Group = Mapping[str, Any]
Groups = Sequence[Group] | Mapping[Hashable, Group]


def partition(
    make: Callable[..., optax.GradientTransformationExtraArgs],
    defaults: Group,
    groups: Groups | None,
    labels: Any,
    ignored: Sequence[str] = (),
) -> optax.GradientTransformationExtraArgs:
    """One transformation with the `defaults`, or one for each group.

    Args:
      make: makes a transformation of hyperparameters.
      defaults: the hyperparameters of a group that does not say otherwise.
      groups: a list of groups that choose their own parameters, or a dict of groups by label.
      labels: the tree of labels, or a function from the parameters to it.
      ignored: what a group may say without effect.

    Raises:
      TypeError: a group that is none, or that says what there is not.
      ValueError: labels without groups by label, or the reverse.
    """
    single = make(**defaults)
    by_label = isinstance(groups, Mapping)
    if by_label != (labels is not None):
        raise ValueError(
            "groups by label and labels go together: give groups as a dict from labels to "
            "hyperparameters, and labels as a tree like the parameters, or as a function from "
            "the parameters to it. Groups in a list choose their own parameters by 'params'."
        )
    if groups is None:
        return single
    named = dict(groups) if isinstance(groups, Mapping) else dict(enumerate(groups))
    if not named:
        raise ValueError("groups is empty: give at least one group, or None.")
    transforms = {
        label: _make(f"groups[{label!r}]", make, defaults, group, ("params", *ignored))
        for label, group in named.items()
    }
    if by_label:
        return optax.partition(transforms, labels)
    selectors = {label: group.get("params") for label, group in named.items()}
    return optax.partition(transforms, lambda params: _labels(selectors, params))


def _make(
    name: str,
    make: Callable[..., optax.GradientTransformationExtraArgs],
    defaults: Group,
    group: Group,
    beside: Sequence[str],
) -> optax.GradientTransformationExtraArgs:
    """The transformation of one group."""
    if not isinstance(group, Mapping):
        raise TypeError(f"{name} must be a dict, but it is a {type(group).__name__}.")
    unknown = [key for key in group if key not in defaults and key not in beside]
    if unknown:
        raise TypeError(f"{name} has {unknown}, but a group has only {[*beside, *defaults]}.")
    own = {key: value for key, value in group.items() if key in defaults}
    try:
        return make(**{**defaults, **own})
    except (TypeError, ValueError) as error:
        raise type(error)(f"In {name}: {error}") from error


def _labels(selectors: Mapping[Hashable, Any], params: optax.Params) -> Any:
    """The tree of labels that these selectors choose.

    Raises:
      ValueError: a parameter that no group chooses, or more than one, or a group of none.
    """
    if not jax.tree.leaves(params):  # optax.tree.map_params asks with a placeholder
        return params
    chosen: dict[str, list[Hashable]] = {path: [] for path in _mapping.paths(params)}
    for label, selector in selectors.items():
        for path in _chosen(f"groups[{label!r}]", selector, params):
            chosen[path].append(label)
    rest = [label for label, selector in selectors.items() if selector is None]
    for path, labels in chosen.items():
        if not labels and len(rest) == 1:
            labels.append(rest[0])
        if len(labels) != 1:
            where = f"the groups {labels}" if labels else "no group"
            raise ValueError(
                f"The parameter {path!r} is in {where}: it must be in one. A single group without "
                f"'params' takes what the others leave. To freeze parameters, put this and "
                f"optax.set_to_zero() in an optax.partition."
            )
    return jax.tree_util.tree_map_with_path(
        lambda path, _: chosen[_mapping.path_name(path)][0], params
    )


def _chosen(name: str, selector: Any, params: optax.Params) -> list[str]:
    """The paths of the parameters that a pattern, a list of paths, a mask or a function chooses."""
    if selector is None:
        return []
    if isinstance(selector, str):
        return _mapping.matching(name, selector, params)
    if isinstance(selector, (list, tuple)) and all(isinstance(x, str) for x in selector):
        known = _mapping.paths(params)
        for path in selector:
            if path not in known:
                raise ValueError(
                    f"{name} has {path!r}, which is no parameter: near it are "
                    f"{_mapping.near(path, known)}."
                )
        return list(selector)
    mask = selector(params) if callable(selector) else selector
    whole = jax.tree.map(lambda flag, below: jax.tree.map(lambda _: flag, below), mask, params)
    return [path for path, flag in _mapping.paths(whole).items() if flag]
