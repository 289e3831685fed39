"""Plans: layouts that were shown to move elements and to do nothing else."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from optax_adamax.compat import _arrays
from optax_adamax.compat._layout import Key, Layout, find_places, names_of_params
from optax_adamax.compat._paths import near, path_name, paths

Arrays = Mapping[Any, np.ndarray]
Move = Callable[[Arrays], dict[Any, np.ndarray]]
# Marks of arrays are odd, and no format of half precision represents an odd number above 2048.
FIRST_MARK = 2049
# Positions in an array are marked with this period, a prime, which float32 represents.
PERIOD = 1048573


class Plan(NamedTuple):
    """A layout that was shown to move elements and to do nothing else."""

    move: Move
    origins: dict[Any, list[Any]]  # names of the arrays whose elements each new array has
    unused: list[Any]  # names of the arrays that have no place


def plan_load(
    layout: Layout | None,
    names: Iterable[Key],
    shapes: Mapping[Any, Sequence[int]],
    params: optax.Params,
    make: Callable[[np.ndarray], Any] = np.asarray,
) -> Plan:
    """Returns the plan from source names to paths.

    Args:
      layout: None: the names are paths, with "." for "/".
      names: the names of the source's parameters.
      shapes: those of the arrays that it is for.
      params: the parameters.
      make: makes an array of the source framework, which a function gets.

    Raises:
      TypeError: an entry of `layout` of the wrong type.
      ValueError: an entry for an unknown name or for no parameter, a wrong shape, or a function
        that does not only move elements.
    """
    targets = {path: tuple(np.shape(x)) for path, x in paths(params).items()}
    if not callable(layout):
        places = find_places(layout, names, params)

        def apply(arrays: Arrays) -> dict[Any, np.ndarray]:
            return {p.path: p.to_param(arrays[k]) for k, p in places.items() if k in arrays}

        return _check(apply, shapes, targets)

    def call(arrays: Arrays) -> dict[Any, np.ndarray]:
        try:
            tree = layout({name: make(np.array(x)) for name, x in arrays.items()})
        except (KeyError, IndexError) as error:
            raise ValueError(
                f"The layout looks for {error}, but the source has only {list(arrays)}. Give the "
                f"names of the parameters as `names`; for parameters without moments also give "
                f"source_params, the source's parameters by name."
            ) from error
        return _read_all(paths(tree))

    return _check_each_once(_check(call, shapes, targets), shapes)


def plan_dump(
    layout: Layout | None,
    names: Iterable[Key] | None,
    params: optax.Params,
    source_params: Mapping[str, Any] | None = None,
) -> Plan:
    """Returns the plan from paths to source names, the inverse of `plan_load`.

    Args:
      layout: a function leads from a tree like `params` to the source's arrays by name.
      names: those of the source's parameters; None: those of the layout.
      params: the parameters.
      source_params: the source's parameters by name, whose shapes are needed to regroup axes.
    """
    sources = {path: tuple(np.shape(x)) for path, x in paths(params).items()}
    shapes = {name: tuple(np.shape(x)) for name, x in (source_params or {}).items()}
    if layout is None and names is None:
        layout = names_of_params(params)
    if callable(layout):

        def call(arrays: Arrays) -> dict[Any, np.ndarray]:
            copies = {path: np.array(x) for path, x in arrays.items()}
            tree = jax.tree_util.tree_map_with_path(lambda p, _: copies[path_name(p)], params)
            return _read_all(layout(tree))

        targets = None if names is None else {name: shapes.get(str(name)) for name in names}
        return _check_each_once(_check(call, sources, targets), sources)
    places = find_places(layout, layout or () if names is None else names, params)

    def apply(arrays: Arrays) -> dict[Any, np.ndarray]:
        return {
            name: place.to_source(arrays[place.path], shapes.get(str(name)))
            for name, place in places.items()
        }

    return _check(apply, sources, {name: shapes.get(str(name)) for name in places})


def _read_all(arrays: Mapping[Any, Any]) -> dict[Any, np.ndarray]:
    return {name: _arrays.read_array(f"The layout's {name!r}", x) for name, x in arrays.items()}


def _check(
    move: Move,
    sources: Mapping[Any, Sequence[int]],
    targets: Mapping[Any, Sequence[int] | None] | None,
) -> Plan:
    """Calls `move` with an array of marks for each source, and returns the plan.

    Raises:
      ValueError: `move` computes with elements, repeats some of an array or uses only a part of
        them, or makes an array of an unknown name or of a wrong shape.
    """
    names = list(sources)
    marks = {
        name: np.broadcast_to(np.float32(FIRST_MARK + 2 * i), tuple(sources[name]))
        for i, name in enumerate(names)
    }
    used, origins = dict.fromkeys(names, 0), {}
    for target, array in move(marks).items():
        origins[target] = []
        for mark, count in _count_marks(np.real(array)):
            number, remainder = divmod(mark - FIRST_MARK, 2)
            if remainder or not 0 <= number < len(names) or np.any(np.imag(array)):
                raise ValueError(
                    f"The layout computes the elements of {target!r}. It must only move elements, "
                    f"without arithmetic, constants or a cast to half precision."
                )
            origins[target].append(names[int(number)])
            used[names[int(number)]] += count
        if targets is None:
            continue
        if target not in targets:
            raise ValueError(
                f"The layout makes {target!r} of {origins[target]}, but there is no such "
                f"parameter. Similar names are {near(str(target), map(str, targets))}."
            )
        expected = targets[target]
        if expected is not None and array.shape != tuple(expected):
            raise ValueError(
                f"The layout makes an array of shape {array.shape} of {origins[target]} for the "
                f"parameter {target!r}, which has shape {tuple(expected)}."
            )
    for name, count in used.items():
        if count not in (0, size := int(np.prod(sources[name]))):
            raise ValueError(
                f"The layout uses {count} elements of {name!r}, which has {size}: it must move "
                f"each element to one place."
            )
    unused = [name for name, count in used.items() if not count and np.prod(sources[name])]
    return Plan(move, origins, unused)


def _check_each_once(plan: Plan, sources: Mapping[Any, Sequence[int]]) -> Plan:
    """Raises ValueError if a function repeats an element in place of another of the same array."""
    positions = {
        name: (FIRST_MARK + 2.0 * (np.arange(np.prod(shape)) % PERIOD)).reshape(shape)
        for name, shape in sources.items()
    }
    moved = plan.move({name: x.astype(np.float32) for name, x in positions.items()})
    used = {name for names in plan.origins.values() for name in names}
    before, after = (
        [sum(int(np.sum(np.real(x).astype(np.int64) ** power)) for x in arrays) for power in (1, 2)]
        for arrays in ([positions[name] for name in used], moved.values())
    )
    if before != after:
        raise ValueError(
            f"The layout repeats elements of {list(used)} and loses others: it must move each "
            f"element to one place."
        )
    return plan


def _count_marks(array: np.ndarray) -> list[tuple[float, int]]:
    """Returns the distinct elements and how often each occurs."""
    if array.size and np.all(array == array.flat[0]):
        return [(float(array.flat[0]), array.size)]
    marks, counts = np.unique(array, return_counts=True)
    return list(zip(marks.tolist(), counts.tolist(), strict=True))
