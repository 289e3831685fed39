"""Loads the moments of a source framework into a state, and dumps them in its names and layout."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import optax

from optax_adamax import repack_state, unpack_state
from optax_adamax.compat import _arrays, _layout, _moments, _plan
from optax_adamax.compat._layout import Key, Layout, Place
from optax_adamax.compat._measure import measure
from optax_adamax.compat._moments import Moments, check_finite
from optax_adamax.compat._paths import paths
from optax_adamax.compat._plan import Plan

Missing = Literal["raise", "zero"]


def load(
    source: Moments,
    params: optax.Params,
    tx: optax.GradientTransformation,
    layout: Layout | None,
    names: Iterable[Key] = (),
    *,
    missing: Missing = "raise",
    source_params: Mapping[str, Any] | None = None,
    groups: Sequence[Mapping[Key, float | None]] = (),
    example: Any = None,
) -> optax.OptState:
    """Returns the state of `tx` with these moments, by source name.

    Args:
      names: of all parameters of the source, with moments or without.
      groups: the learning rate of each source name, for each group of the source.
      example: an array as the source has it; a function as `layout` gets such arrays.
    """
    if missing not in ("raise", "zero"):
        raise ValueError(f"missing must be 'raise' or 'zero', but {missing!r} was given.")
    template = tx.init(params)
    state = unpack_state(template, params)
    nodes = _moments.find_trained(state)
    trained = {path: x for node in nodes for path, x in node.items()}
    known = list(dict.fromkeys((*source.m, *names)))
    if isinstance(layout, Mapping):
        source = source.of(name for name in source.m if layout.get(name, "") is not None)
    else:
        source = _with_zeros(source, source_params or {}) if callable(layout) else source
    shapes, make = {name: x.shape for name, x in source.m.items()}, _arrays.maker_like(example)
    plan = _plan.plan_load(layout, known, shapes, params, make)
    loaded = _move(plan, source)
    _check_values(loaded, plan, trained)
    absent = [k for k, x in trained.items() if loaded.step.get(k) is None and x.size]
    if missing == "raise" and absent:
        _raise_absent(
            absent, {} if callable(layout) else _layout.find_places(layout, known, params)
        )
    moments = _with_zeros(loaded, trained).of(trained)
    check_is_adamax(moments, tx, params)
    if groups:
        check_groups(nodes, plan.origins, groups)
        rates = {name: rate for group in groups for name, rate in group.items()}
        check_rates(tx, params, moments.step, plan.origins, rates)
    return repack_state(_moments.fill(state, moments), like=template)


def dump(
    state: optax.OptState,
    params: optax.Params,
    layout: Layout | None,
    names: Iterable[Key] | None = None,
    source_params: Mapping[str, Any] | None = None,
) -> Moments:
    """Returns the moments by source name; those of parameters that are not trained are left out."""
    moments = _moments.read_state(unpack_state(state, params))
    plan = _plan.plan_dump(layout, names, params, source_params)
    dumped = _move(plan, _with_zeros(moments, paths(params)))
    return dumped.of(name for name, step in dumped.step.items() if step is not None)


def single_step(moments: Moments) -> int:
    """Returns the number of steps, for a framework that has one for all parameters."""
    if len(set(moments.step.values())) > 1:
        raise ValueError(f"The parameters have taken different numbers of steps: {moments.step}.")
    return next(iter(moments.step.values()), None) or 0


def _move(plan: Plan, moments: Moments) -> Moments:
    """Returns the moments by their new names."""
    unused = [name for name in plan.unused if moments.step[name] is not None]
    if unused:
        raise ValueError(
            f"The layout has no place for the moments of {unused}. Give each a path; None leaves "
            f"it out."
        )
    taken: dict[Any, int | None] = {}
    for target, names in plan.origins.items():
        steps = {name: moments.step[name] for name in names if moments.step[name] is not None}
        if len(set(steps.values())) > 1:
            raise ValueError(
                f"{target!r} consists of parameters with different numbers of steps, {steps}."
            )
        taken[target] = next(iter(steps.values()), None)
    return Moments(plan.move(moments.m), plan.move(moments.v), taken)


def _with_zeros(moments: Moments, arrays: Mapping[Any, Any]) -> Moments:
    """Returns the moments, with zeros and no step for further arrays."""
    new = {name: x for name, x in arrays.items() if name not in moments.m}
    zeros = {name: np.zeros(tuple(np.shape(x)), np.float32) for name, x in new.items()}
    return Moments(moments.m | zeros, moments.v | zeros, moments.step | dict.fromkeys(new))


def _check_values(moments: Moments, plan: Plan, trained: Mapping[str, Any]) -> None:
    """Raises if moments have no place or cannot be those of their parameters."""
    for path, step in moments.step.items():
        v, names = moments.v[path], plan.origins[path]
        if path not in trained:
            if step is None:
                continue
            raise ValueError(
                f"The source has moments of {names} for {path!r}, which the transformation does "
                f"not train: train it, or leave them out by None in `layout`."
            )
        if np.any(np.real(v) < 0) or np.any(np.imag(v) < 0):
            raise ValueError(
                f"The infinity norm of {names} has negative elements, so it is not one of Adamax."
            )


def _raise_absent(absent: Sequence[str], places: Mapping[Key, Place]) -> None:
    there = {place.path: f" (there {name!r})" for name, place in places.items()}
    raise ValueError(
        f"There are no moments for {', '.join(repr(k) + there.get(k, '') for k in absent)}, which "
        f"the transformation trains. To freeze parameters, use optax.set_to_zero() in an "
        f"optax.partition. To start them at zero, give missing='zero'."
    )


def check_is_adamax(
    moments: Moments, tx: optax.GradientTransformation, params: optax.Params
) -> None:
    """Raises ValueError for moments that Adamax cannot have, such as those of Adam.

    For b1 < b2, Adamax has ``|m| <= K v`` with ``K = (1 - b1) / (1 - b1 / b2)``. Adam's v is a
    mean of squares: if gradients are below 1, it is less than m. Other b1 and b2 bound nothing.
    """

    check_finite(moments)

    def count(largest: Mapping[str, float]) -> int:
        m, v = moments.m, moments.v
        beyond = [np.count_nonzero(np.abs(m[k]) > largest[k] * np.abs(v[k])) for k in m]
        return int(sum(beyond))

    total = sum(np.count_nonzero(m) for m in moments.m.values())
    if 2 * count(dict.fromkeys(moments.m, 1.25)) <= total:
        return
    measured = measure(tx, params, moments.step)
    bounds = {path: 1.25 * measured[path].largest_ratio for path in moments.m if path in measured}
    beyond = count(dict.fromkeys(moments.m, float("inf")) | bounds)
    if 2 * beyond > total:
        raise ValueError(
            f"This is not a state of Adamax: |m| exceeds its bound in {beyond} of {total} "
            f"elements, which is {min(bounds.values()) / 1.25:.4g} v for the b1 and b2 of the "
            f"transformation. The state of Adam, where v is a mean of squares, looks like this."
        )


def check_groups(
    nodes: Sequence[Mapping[str, Any]],
    origins: Mapping[str, Sequence[Key]],
    groups: Sequence[Mapping[Key, Any]],
) -> None:
    """Raises ValueError if the groups of the source overlap those of the transformation."""
    group_of = {name: i for i, group in enumerate(groups) for name in group}
    overlap = [
        {group_of[name] for path in node for name in origins.get(path, ()) if name in group_of}
        for node in nodes
    ]
    for i, group in enumerate(groups):
        shared = [k for k, found in enumerate(overlap) if i in found]
        if len(shared) > 1 and any(len(overlap[k]) > 1 for k in shared):
            raise ValueError(
                f"The groups of the source are not those of the transformation: group {i}, "
                f"{list(group)}, is in {len(shared)} groups here, some of which have parameters "
                f"of other groups too. Give the names of each group in the order of the optimizer."
            )


def check_rates(
    tx: optax.GradientTransformation,
    params: optax.Params,
    steps: Mapping[str, int | None],
    origins: Mapping[str, Sequence[Key]],
    rates: Mapping[Key, float | None],
) -> None:
    """Compares the constant learning rates of `tx` with those of the source.

    Warns:
      UserWarning: a rate of the transformation differs.

    Raises:
      ValueError: two groups have their rates in the reverse order.
    """
    if not any(rates.values()):
        return
    now, start = (measure(tx, params, at) for at in (steps, dict.fromkeys(steps, 0)))
    pairs: dict[tuple[float, float], str] = {}
    for path, names in origins.items():
        theirs = {rates.get(name) for name in names}
        ours = now[path].rate if path in now else None
        if ours is None or len(theirs) != 1 or not _are_close(ours, start[path].rate):
            continue
        rate = theirs.pop()
        if rate is not None:
            pairs.setdefault((float(f"{ours:.3g}"), rate), path)
    for (low, theirs), path in pairs.items():
        for (high, others), other in pairs.items():
            if low < high and theirs > others:
                raise ValueError(
                    f"The groups of the source are not those of the transformation: {path!r} has "
                    f"the learning rate {low:g} here and {theirs:g} there, {other!r} {high:g} here "
                    f"and {others:g} there. Give the names of each group in the order of the "
                    f"optimizer, or give the groups their rates."
                )
    differing = {path: pair for pair, path in pairs.items() if not _are_close(*pair)}
    if differing:
        listed = ", ".join(
            f"{ours:g} here and {theirs:g} in the checkpoint (for {path!r})"
            for path, (ours, theirs) in differing.items()
        )
        warnings.warn(
            f"The learning rates differ: {listed}. The transformation is used as it is; give it "
            f"the checkpoint's rate, or a schedule.",
            stacklevel=4,
        )


def _are_close(one: float, other: float | None) -> bool:
    return other is not None and abs(one - other) <= 0.01 * max(abs(one), abs(other))
