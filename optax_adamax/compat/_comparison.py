"""Compares loaded moments, groups and hyperparameters with the transformation."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_adamax import repack_state, unpack_state
from optax_adamax._state import is_adamax_state
from optax_adamax.compat import _moments
from optax_adamax.compat._layout import Key, paths
from optax_adamax.compat._moments import Moments

Origins = Mapping[str, Sequence[Key]]  # names of the source's arrays for each path
LATE = 2**30  # so many steps that 1 - b1**t is 1
MAX_CALLS = 16  # a longer accumulation of gradients is not measured
# Relative differences that are not reported, in the order of the fields of `Hyperparameters`. An
# int8 m rounds b1 by up to 4 %, and a uint8 v rounds weight decay by up to 12.5 %.
TOLERANCES = {"learning rate": 0.01, "b1": 0.045, "b2": 1e-4, "L2 weight decay": 0.13}
ORDER = "Give the names of each group in the order of the optimizer"


class Hyperparameters(NamedTuple):
    """Hyperparameters of one parameter; None: unknown."""

    learning_rate: float | None
    b1: float | None = None
    b2: float | None = None
    l2_decay: float | None = None  # weight decay that is added to the gradient


def measure(
    tx: optax.GradientTransformation, params: optax.Params, steps: Mapping[str, int | None]
) -> dict[str, Hyperparameters]:
    """Measures the hyperparameters of each path by a step on three elements per parameter.

    All gradients are 0, whatever wraps the transformation. The storage formats round m and v.

    - Parameter 0, moments 1: m becomes b1, v becomes b2, and the update becomes minus the learning
      rate times m / v.
    - Parameter 1, moments 0: v becomes the L2 weight decay plus eps.
    - Parameter 0, moments 0: v becomes eps.

    Args:
      tx: the transformation.
      params: the parameters, of which trees and numbers of axes are used.
      steps: the counts of the schedules for each trained path.

    Returns:
      The hyperparameters. The learning rate is None if the parameter does not move or b1 is 0.
      The dict is empty if `update` raises for gradients and parameters of this size.

    Warns:
      UserWarning: `update` raises, so nothing can be compared.
    """
    # `sharding.shard` accepts only arrays of true shapes. Its inner transformation is measured.
    tx = optax.with_extra_args_support(getattr(getattr(tx.update, "__self__", tx), "inner", tx))
    small = jax.tree.map(lambda p: _three_elements(p, 0.0, 1.0, 0.0), params)
    start = {path: _three_elements(p, 1.0, 0.0, 0.0) for path, p in paths(params).items()}
    zeros = jax.tree.map(jnp.zeros_like, small)

    def age(node: Any) -> Any:
        late = is_adamax_state(node)
        return node._replace(count=jnp.full_like(node.count, LATE)) if late else node

    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        try:
            template = tx.init(small)
            moments = Moments(start, start, dict(steps))
            filled = _moments.fill(unpack_state(template, small), moments)
            aged = jax.tree.map(age, filled, is_leaf=is_adamax_state)
            state, before = repack_state(aged, like=template), _moments.read_state(aged)
            updates, after = zeros, before
            for _ in range(MAX_CALLS):  # calls that only accumulate gradients do not change m
                # The value is for optax.contrib.reduce_on_plateau. Others ignore it.
                updates, state = tx.update(zeros, state, small, value=jnp.zeros(()))
                after = _moments.read_state(unpack_state(state, small))
                if any(np.any(m != before.m[path]) for path, m in after.m.items()):
                    break
        except Exception as error:  # `tx` may be anything, and may need more than gradients
            warnings.warn(
                f"The hyperparameters of the transformation must be measurable to compare them "
                f"with the checkpoint, but a step on arrays of three elements raised "
                f"{type(error).__name__}: {error}. Compare them yourself.",
                stacklevel=6,
            )
            return {}
    moved, measured = paths(updates), {}
    for path in after.m:
        m, v, update = (np.real(x[path]).ravel().tolist() for x in (after.m, after.v, moved))
        learning_rate = -update[0] * v[0] / m[0] if m[0] and update[0] else None
        measured[path] = Hyperparameters(learning_rate, m[0], v[0], l2_decay=v[1] - v[2])
    return measured


def _three_elements(parameter: Any, *values: float) -> jax.Array:
    """Returns an array of float32 or wider with the axes of the parameter, but at least one."""
    dtype = np.result_type(jnp.result_type(parameter), np.float32)
    return jnp.asarray(values, dtype).reshape((1,) * (jnp.ndim(parameter) - 1) + (3,))


def check_values(moments: Moments) -> None:
    """Raises ValueError if a moment is not finite, or an infinity norm is negative."""
    for name, tree in (("first moment", moments.m), ("infinity norm", moments.v)):
        for path, x in tree.items():
            bad = np.argwhere(~np.isfinite(x))
            if len(bad):
                raise ValueError(
                    f"The {name} of {path!r} must be finite, but {len(bad)} of {np.size(x)} "
                    f"elements are NaN or infinite, the first at index {tuple(map(int, bad[0]))}. "
                    f"The saved run had diverged: load an older checkpoint."
                )
    for path, v in moments.v.items():
        if np.any(np.real(v) < 0) or np.any(np.imag(v) < 0):
            raise ValueError(
                f"The infinity norm of {path!r} must not be negative, but some elements are. Load "
                f"the state of an Adamax."
            )


def check_is_adamax(
    moments: Moments, tx: optax.GradientTransformation, params: optax.Params
) -> None:
    """Raises ValueError for moments that Adamax cannot have, such as the moments of Adam.

    For b1 < b2, Adamax has ``|m| <= K v`` with ``K = (1 - b1) / (1 - b1 / b2)``. Adam's v is a
    mean of squares: if gradients are below 1, it is less than m. Other b1 and b2 bound nothing.
    """
    total = sum(np.count_nonzero(m) for m in moments.m.values())

    def count(bounds: Mapping[str, float]) -> int:
        """Counts the elements with |m| / v above their bound, and 25 % for rounding."""
        beyond = (np.abs(m) > 1.25 * bounds[k] * np.abs(moments.v[k]) for k, m in moments.m.items())
        return int(sum(map(np.count_nonzero, beyond)))

    if 2 * count(dict.fromkeys(moments.m, 1.0)) <= total:  # K >= 1
        return
    measured = measure(tx, params, moments.step)
    bounds = {path: _largest_ratio(measured.get(path)) for path in moments.m}
    beyond = count(bounds)
    if 2 * beyond > total:
        raise ValueError(
            f"The state must come from an Adamax, for which |m| is at most "
            f"{min(bounds.values()):.4g} v with the b1 and b2 of the transformation, but |m| is "
            f"larger in {beyond} of {total} elements. Load the state of an Adamax: Adam's v is a "
            f"mean of squares, so its state looks like this."
        )


def _largest_ratio(known: Hyperparameters | None) -> float:
    if known is None or known.b1 is None or known.b2 is None or known.b1 >= known.b2:
        return np.inf
    return (1 - known.b1) / (1 - known.b1 / known.b2)


def check_groups(
    nodes: Sequence[Mapping[str, Any]], origins: Origins, groups: Sequence[Mapping[Key, Any]]
) -> None:
    """Raises ValueError if the groups of the source overlap the groups of the transformation.

    Args:
      nodes: the paths of each Adamax in the transformation.
      origins: the source names of each path.
      groups: the source names of each group.
    """
    group_of = {name: i for i, group in enumerate(groups) for name in group}
    overlap = [
        {group_of[name] for path in node for name in origins.get(path, ()) if name in group_of}
        for node in nodes
    ]
    for i, group in enumerate(groups):
        shared = [found for found in overlap if i in found]
        if len(shared) > 1 and any(len(found) > 1 for found in shared):
            raise ValueError(
                f"The groups of the source must be groups of the transformation, but group {i}, "
                f"{list(group)}, is spread over {len(shared)} groups of the transformation, some "
                f"of which have parameters of other groups, too. {ORDER}."
            )


def check_hyperparameters(
    tx: optax.GradientTransformation,
    params: optax.Params,
    steps: Mapping[str, int | None],
    origins: Origins,
    saved: Mapping[Key, Hyperparameters],
) -> None:
    """Compares the constant hyperparameters of `tx` with the known ones of the source.

    Warns:
      UserWarning: a hyperparameter of the transformation differs.

    Raises:
      ValueError: two groups have their learning rates or weight decays in the reverse order.
    """
    if not any(value is not None for values in saved.values() for value in values):
        return
    now = measure(tx, params, steps)
    start = measure(tx, params, dict.fromkeys(steps, 0)) if now else {}
    found: dict[tuple[str, float, float], str] = {}  # name, new value, saved value, and a path
    for path, names in origins.items():
        for i, name in enumerate(TOLERANCES) if path in now else ():
            value, before = now[path][i], start[path][i]
            values = {saved[origin][i] for origin in names if origin in saved}
            old = values.pop() if len(values) == 1 else None
            if value is not None and old is not None and value == before:  # else a schedule
                found.setdefault((name, float(f"{value:.4g}"), old), path)
    for name, new, old in found:
        for other_name, other_new, other_old in found:
            in_groups = name == other_name and name in ("learning rate", "L2 weight decay")
            if in_groups and _is_less(name, new, other_new) and _is_less(name, other_old, old):
                raise ValueError(
                    f"The groups of the source must be groups of the transformation, but the "
                    f"{name} of {found[name, new, old]!r} and of "
                    f"{found[name, other_new, other_old]!r} is {new:g} and {other_new:g} in the "
                    f"transformation, and {old:g} and {other_old:g} in the source. {ORDER}, or "
                    f"give the groups of the transformation these values."
                )
    differing = [
        f"{name} {new:g} instead of {old:g} for {path!r}"
        for (name, new, old), path in found.items()
        if not _are_close(name, new, old)
    ]
    if differing:
        warnings.warn(
            f"The transformation should have the hyperparameters of the checkpoint, but it has "
            f"{', '.join(differing)}. To continue with the checkpoint's, give them to the "
            f"transformation. If they change during the run, give schedules.",
            stacklevel=4,
        )


def _is_less(name: str, one: float, other: float) -> bool:
    return one < other and not _are_close(name, one, other)


def _are_close(name: str, one: float, other: float) -> bool:
    return abs(one - other) <= TOLERANCES[name] * max(abs(one), abs(other))
