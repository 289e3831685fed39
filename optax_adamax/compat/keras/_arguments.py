"""The arguments of Keras' optimizers, each as the check or the link that it asks for."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import optax

from optax_adamax import _checks
from optax_adamax.compat import _mapping
from optax_adamax.compat.keras import _transforms

Exclusion = Sequence[str] | Callable[[optax.Params], Any] | Any


def check_rate(learning_rate: Any) -> None:
    """Refuses what is neither a schedule nor a float >= 0."""
    if isinstance(learning_rate, int):
        raise ValueError(
            f"learning_rate must be a float or a schedule, but {learning_rate!r} was given: Keras "
            f"refuses integers."
        )
    _checks.check_rate("learning_rate", learning_rate)


def check_steps(gradient_accumulation_steps: Any) -> int:
    """The number of calls to an update."""
    if not gradient_accumulation_steps:
        return 1
    if not isinstance(gradient_accumulation_steps, int):
        raise TypeError(
            f"gradient_accumulation_steps must be an integer >= 2 or None, but "
            f"{gradient_accumulation_steps!r} was given."
        )
    if gradient_accumulation_steps < 2:
        raise ValueError(
            f"gradient_accumulation_steps must be an integer >= 2 or None, but "
            f"{gradient_accumulation_steps} was given."
        )
    return gradient_accumulation_steps


def check_average(use_ema: Any, momentum: Any, overwrite_frequency: Any) -> None:
    """Refuses what cannot be arguments of a moving average; without one, anything goes."""
    _checks.check_flag("use_ema", use_ema)
    if not use_ema:
        return
    _checks.check_scalar("ema_momentum", momentum, 0.0, 1.0, closed=True)
    if overwrite_frequency is not None and (
        not isinstance(overwrite_frequency, int) or overwrite_frequency < 1
    ):
        raise ValueError(
            f"ema_overwrite_frequency must be an integer >= 1 or None, but "
            f"{overwrite_frequency!r} was given."
        )


def unscale(loss_scale_factor: float | None) -> list[optax.GradientTransformation]:
    """The link that takes the scale of the loss out of the gradient, if there is one."""
    if loss_scale_factor is None:
        return []
    _checks.check_scalar("loss_scale_factor", loss_scale_factor, 0.0, float("inf"))
    if loss_scale_factor == 0:
        raise ValueError("loss_scale_factor must be greater than 0, but 0 was given.")
    return [optax.scale(1 / loss_scale_factor)]


def limit(
    clipnorm: float | None, clipvalue: float | None, global_clipnorm: float | None
) -> list[optax.GradientTransformation]:
    """The link that limits the gradient, if there is one."""
    links = {
        "clipnorm": (clipnorm, _transforms.clip_each),
        "clipvalue": (clipvalue, optax.clip),
        "global_clipnorm": (global_clipnorm, optax.clip_by_global_norm),
    }
    given = {name: most for name, (most, _) in links.items() if most is not None}
    if len(given) > 1:
        raise ValueError(f"At most one limit of the gradient can be given, but there are {given}.")
    return [links[name][1](most) for name, most in given.items() if most > 0]


def decay(
    weight_decay: float | None, exclude: Exclusion | None
) -> list[optax.GradientTransformation]:
    """The link of decoupled weight decay, if there is one."""
    if weight_decay is None:
        return []
    _checks.check_scalar("weight_decay", weight_decay, 0.0, float("inf"))
    if exclude is None:
        return [optax.add_decayed_weights(weight_decay)]

    def decayed(params: optax.Params) -> Any:
        excluded = exclude(params) if callable(exclude) else exclude
        patterns = _patterns(excluded)
        if patterns is None:
            return jax.tree.map(lambda flag: not flag, excluded)
        if not jax.tree.leaves(params):  # optax.tree.map_params asks with a placeholder
            return params
        found = [
            _mapping.matching("exclude_from_weight_decay", x, params, _mapping.last_part)
            for x in patterns
        ]
        return jax.tree_util.tree_map_with_path(
            lambda path, _: not any(_mapping.path_name(path) in paths for paths in found), params
        )

    return [optax.add_decayed_weights(weight_decay, decayed)]


def _patterns(exclude: Any) -> list[str] | None:
    if isinstance(exclude, str):
        return [exclude]
    if isinstance(exclude, (list, tuple)) and all(isinstance(x, str) for x in exclude):
        return list(exclude)
    return None


def by_updates(learning_rate: Any, steps: int) -> Any:
    """A schedule of calls as a schedule of updates: Keras reads it at the last call of each."""
    if not callable(learning_rate) or steps == 1:
        return learning_rate
    return lambda count: learning_rate((count + 1) * steps - 1)
