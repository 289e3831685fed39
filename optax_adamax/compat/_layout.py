"""Layouts: which array of a source framework becomes which parameter, and how its axes are ordered.

A layout is the function that moved the weights, or a mapping
``{source name: path or (path, axes)}``. `_plan` applies either.
"""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import optax

from optax_adamax.compat._paths import first_twice, near, paths

# The source's name of a parameter, or its number if the source has no names.
Key = str | int
# The path, or the path and the order of axes that makes the source's array the parameter; None:
# the source's array is left out.
Entry = str | tuple[str, Sequence[int]] | None
Layout = Mapping[Key, Entry] | Callable[[Any], Any]


class Place(NamedTuple):
    """The parameter that a source array becomes, and the order of the source's axes."""

    path: str
    axes: tuple[int, ...] | None
    shape: tuple[int, ...]

    def to_param(self, array: np.ndarray) -> np.ndarray:
        """Returns the source's array in the layout of the parameter if that can be done."""
        if self.axes is None:
            return array
        if array.ndim != len(self.axes):
            raise ValueError(
                f"The layout of {self.path!r} orders axes as {self.axes}, but the source's array "
                f"has shape {array.shape}."
            )
        array = array.transpose(self.axes)
        regroups = array.ndim != len(self.shape) and _are_groups_of(array.shape, self.shape)
        return array.reshape(self.shape) if regroups else array

    def to_source(self, array: np.ndarray, shape: tuple[int, ...] | None) -> np.ndarray:
        """Returns the parameter in the source's layout; `shape` is needed to regroup axes."""
        if self.axes is None:
            return np.array(array, order="C")
        if len(self.axes) != array.ndim:
            if shape is None:
                raise ValueError(
                    f"The layout of {self.path!r} regroups axes: give source_params, the source's "
                    f"parameters by name, whose shapes show how."
                )
            array = array.reshape([shape[axis] for axis in self.axes])
        return np.array(array.transpose(np.argsort(self.axes)), order="C")


def find_places(
    layout: Mapping[Key, Entry] | None, names: Iterable[Key], params: optax.Params
) -> dict[Key, Place]:
    """Returns where each source name goes; a name without an entry goes nowhere."""
    known, shapes = set(names), {path: jnp.shape(x) for path, x in paths(params).items()}
    if layout is None:
        numbers = [name for name in known if not isinstance(name, str)]
        if numbers:
            raise ValueError(
                f"The source has numbers for its parameters, {sorted(numbers)}: give their names "
                f"in this order as `names`, or a path for each number as `layout`."
            )
        layout = {name: name if name in shapes else str(name).replace(".", "/") for name in known}
    unknown = [name for name in layout if name not in known]
    if unknown:
        raise ValueError(
            f"layout has entries for {unknown}, but the source's parameters are "
            f"{sorted(known, key=str)}. If those are numbers, give the names in this order as "
            f"`names`."
        )
    places = {
        name: _find_place(name, entry, shapes)
        for name, entry in layout.items()
        if entry is not None
    }
    by_path: dict[str, Key] = {}
    for name, place in places.items():
        other = by_path.setdefault(place.path, name)
        if other != name:
            raise ValueError(f"{other!r} and {name!r} both go to {place.path!r}.")
    return places


def _find_place(name: Key, entry: Any, shapes: Mapping[str, tuple[int, ...]]) -> Place:
    is_pair = isinstance(entry, (tuple, list)) and len(entry) == 2
    path, axes = entry if is_pair else (entry, None)
    if not isinstance(path, str):
        raise TypeError(
            f"layout[{name!r}] must be a path or a pair of path and axes, but it is {entry!r}."
        )
    if path not in shapes:
        raise ValueError(
            f"{name!r} goes to {path!r}, but there is no such parameter. Similar paths are "
            f"{near(path, shapes)}. Give a path for each name as `layout`."
        )
    if axes is None:
        return Place(path, None, shapes[path])
    if sorted(axes) != list(range(len(axes))):
        raise ValueError(f"layout[{name!r}] has the axes {tuple(axes)}, which are no permutation.")
    return Place(path, tuple(axes), shapes[path])


def _are_groups_of(shape: Sequence[int], other: Sequence[int]) -> bool:
    """Whether each axis of one shape is a product of neighbouring axes of the other."""
    one, two = (set(itertools.accumulate((1, *s), lambda a, b: a * b)) for s in (shape, other))
    return max(one) == max(two) and (one <= two or two <= one)


def names_of_params(params: optax.Params) -> dict[Key, Entry]:
    """Returns the layout of a source that calls parameters by path, with "." for "/"."""
    names = [path.replace("/", ".") for path in paths(params)]
    twice = first_twice(names)
    if twice is not None:
        raise ValueError(f"Several parameters would be called {twice!r}: give `layout`.")
    return dict(zip(names, paths(params), strict=True))
