"""Layouts: which array of a source framework becomes which parameter, with axes in which order.

A layout is the function that moved the weights, or a mapping
``{source name: path or (path, axes)}``. Both become a `Plan`, after a check that they only move
elements.

A path is the name of a leaf in a tree: :func:`jax.tree_util.keystr` with ``simple=True`` and
``separator="/"``, for example ``"params/Dense_0/kernel"``, without the variable in which Flax may
wrap the array.
"""

import difflib
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from optax_adamax import _paths
from optax_adamax.compat import _arrays

# The source's name of a parameter, or its number if the source has no names.
Key = str | int
# A path, or a pair of the path and the order of axes that makes the source's array the parameter.
# None leaves the source's array out.
Entry = str | tuple[str, Sequence[int]] | None
Layout = Mapping[Key, Entry] | Callable[[Any], Any]
Arrays = Mapping[Any, np.ndarray]
Shapes = Mapping[Any, tuple[int, ...] | None]

# The bits of the first mark, the float32 -1.0000001. The mark of the next element has the next
# bits. Arithmetic, `abs` and casts to half precision change marks; moving them does not.
FIRST_MARK = 0xBF800001
MAX_MARKS = 2**30 - 2  # marks that are finite
OWN_NAMES = (
    "Give each parameter a name of its own in `names`, such as '0:name' and '1:name', and `layout` "
    "with a path for each."
)


class Plan(NamedTuple):
    """A layout that only moves elements."""

    move: Callable[[Arrays], dict[Any, np.ndarray]]
    origins: dict[Any, list[Any]]  # for each new array, the arrays whose elements it has
    unused: list[Any]  # names of the arrays without a place


class Place(NamedTuple):
    """The parameter that a source array becomes, and the order of the source's axes."""

    path: str
    axes: tuple[int, ...] | None
    shape: tuple[int, ...]

    def to_param(self, array: np.ndarray) -> np.ndarray:
        """Permutes the axes of the source's array, and regroups neighbouring axes if needed."""
        if self.axes is None:
            return array
        if array.ndim != len(self.axes):
            raise ValueError(
                f"The layout of {self.path!r} must name each axis of the source's array, but it is "
                f"{self.axes} for an array of shape {array.shape}."
            )
        array = array.transpose(self.axes)
        regroups = array.ndim != len(self.shape) and _is_regrouping(array.shape, self.shape)
        return array.reshape(self.shape) if regroups else array

    def to_source(self, array: np.ndarray, shape: tuple[int, ...] | None) -> np.ndarray:
        """Reverses `to_param`, into an array of `shape`, which only regrouped axes need."""
        if self.axes is None:
            return np.array(array, order="C")
        if len(self.axes) != array.ndim:
            if shape is None:
                raise ValueError(
                    f"source_params must have the array of {self.path!r}, because its layout "
                    f"regroups axes, but it does not. Give the source's parameters by name."
                )
            array = array.reshape([shape[axis] for axis in self.axes])
        return np.array(array.transpose(np.argsort(self.axes)), order="C")


def paths(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> dict[str, Any]:
    """Returns the leaves of a tree by path.

    Raises:
      ValueError: two leaves have one path.
    """
    named = _paths.named_leaves(tree, "/", is_leaf)
    check_unique([path for path, _ in named], "Rename one of them, without '/' in a key.")
    return dict(named)


def path_name(path: Any) -> str:
    """Returns the path of a leaf as a name."""
    return _paths.path_name(path, "/")


def check_unique(names: Iterable[Key], advice: str) -> None:
    """Raises ValueError if a name of parameters occurs twice."""
    seen: set[Key] = set()
    for name in names:
        if name in seen:
            raise ValueError(
                f"The parameters must have different names, but {name!r} was given twice. {advice}"
            )
        seen.add(name)


def near(wanted: str, known: Iterable[str]) -> list[str]:
    """Returns the three names that are most similar to an unknown name or pattern."""
    return difflib.get_close_matches(wanted, list(known), n=3, cutoff=0.0)


def shapes_of(arrays: Mapping[Any, Any]) -> dict[Any, tuple[int, ...]]:
    """Returns the shapes of arrays of any framework."""
    return {name: tuple(np.shape(x)) for name, x in arrays.items()}


def plan_load(
    layout: Layout | None,
    names: Iterable[Key],
    shapes: Mapping[Any, tuple[int, ...]],
    params: optax.Params,
    make: Callable[[np.ndarray], Any] = np.asarray,
) -> Plan:
    """Returns the plan from source names to paths.

    Args:
      layout: None: the names are paths, with "." for "/".
      names: the names of all parameters of the source.
      shapes: the shapes of the arrays to move.
      params: the parameters.
      make: makes the arrays that a function as `layout` receives.

    Raises:
      TypeError: an entry of `layout` of the wrong type.
      ValueError: an entry for an unknown name or for no parameter, a wrong shape, or a function
        that does not only move elements.
    """
    if callable(layout):

        def move(arrays: Arrays) -> dict[Any, np.ndarray]:
            try:
                tree = layout({name: make(np.array(x)) for name, x in arrays.items()})
            except (KeyError, IndexError) as error:
                raise ValueError(
                    f"The layout must read only {list(arrays)}, but it reads {error}. Give the "
                    f"parameters' names as `names`, and source_params for those without moments."
                ) from error
            return _read_all(paths(tree))

    else:
        places = find_places(layout, names, params)

        def move(arrays: Arrays) -> dict[Any, np.ndarray]:
            return {p.path: p.to_param(arrays[k]) for k, p in places.items() if k in arrays}

    return _check(move, shapes, shapes_of(paths(params)))


def plan_dump(
    layout: Layout | None,
    names: Iterable[Key] | None,
    params: optax.Params,
    source_params: Mapping[str, Any] | None = None,
) -> Plan:
    """Returns the plan from paths to source names, the inverse of `plan_load`.

    Args:
      layout: a mapping as for `plan_load`, or a function from a tree like `params` to the source's
        arrays by name.
      names: the names of the source's parameters. None: the names in the layout.
      params: the parameters.
      source_params: the source's parameters by name, whose shapes are needed to regroup axes.
    """
    shapes = shapes_of(source_params or {})
    if layout is None and names is None:
        dotted = [path.replace("/", ".") for path in paths(params)]
        check_unique(dotted, "Give a name for each path as `layout`.")
        layout = dict(zip(dotted, paths(params), strict=True))
    if callable(layout):

        def move(arrays: Arrays) -> dict[Any, np.ndarray]:
            copies = {path: np.array(x) for path, x in arrays.items()}
            tree = jax.tree_util.tree_map_with_path(lambda p, _: copies[path_name(p)], params)
            return _read_all(layout(tree))

        targets = None if names is None else {name: shapes.get(name) for name in names}
    else:
        places = find_places(layout, layout or () if names is None else names, params)

        def move(arrays: Arrays) -> dict[Any, np.ndarray]:
            return {k: p.to_source(arrays[p.path], shapes.get(k)) for k, p in places.items()}

        targets = {name: shapes.get(name) for name in places}
    return _check(move, shapes_of(paths(params)), targets)


def find_places(
    layout: Mapping[Key, Entry] | None, names: Iterable[Key], params: optax.Params
) -> dict[Key, Place]:
    """Returns the place of each source name in a mapping; names without an entry have none."""
    known, shapes = dict.fromkeys(names), shapes_of(paths(params))
    if layout is None:
        numbers = [name for name in known if not isinstance(name, str)]
        if numbers:  # also if the paths are numbers, because the orders may differ
            raise ValueError(
                f"The parameters of the source must have names, but they have only the numbers "
                f"{numbers}. Give their names in this order as `names`, or their paths as `layout`."
            )
        layout = {k: str(k) if k in shapes else str(k).replace(".", "/") for k in known}
    unknown = [name for name in layout if name not in known]
    if unknown:
        raise ValueError(
            f"The layout must have entries only for parameters of the source, but {unknown} are "
            f"not in {sorted(known, key=str)}. If those are numbers, give their names as `names`."
        )
    entries = {name: entry for name, entry in layout.items() if entry is not None}
    places = {name: _read_entry(name, entry, shapes) for name, entry in entries.items()}
    check_unique([place.path for place in places.values()], "Correct the layout.")
    return places


def _read_entry(name: Key, entry: Any, shapes: Mapping[str, tuple[int, ...]]) -> Place:
    is_pair = isinstance(entry, (tuple, list)) and len(entry) == 2
    path, axes = entry if is_pair else (entry, None)
    if not isinstance(path, str):
        raise TypeError(
            f"layout[{name!r}] must be a path or a pair of path and axes, but {entry!r} was given."
        )
    if path not in shapes:
        raise ValueError(
            f"{name!r} must have the path of a parameter, but {path!r} is not one. Similar paths "
            f"are {near(path, shapes)}. Give a path for each name as `layout`."
        )
    if axes is not None and sorted(axes) != list(range(len(axes))):
        raise ValueError(
            f"The axes of layout[{name!r}] must be a permutation, but {tuple(axes)} was given."
        )
    return Place(path, None if axes is None else tuple(axes), shapes[path])


def _is_regrouping(shape: Sequence[int], other: Sequence[int]) -> bool:
    """Whether the axes of one shape are products of neighbouring axes of the other."""
    one, two = (set(itertools.accumulate((1, *s), lambda a, b: a * b)) for s in (shape, other))
    return max(one) == max(two) and (one <= two or two <= one)


def _read_all(arrays: Mapping[Any, Any]) -> dict[Any, np.ndarray]:
    return {name: _arrays.read_array(f"The layout's {name!r}", x) for name, x in arrays.items()}


def _check(
    move: Callable[[Arrays], dict[Any, np.ndarray]],
    sources: Mapping[Any, tuple[int, ...]],
    targets: Shapes | None,
) -> Plan:
    """Calls `move` with arrays in which every element has its own mark, and returns the plan.

    Raises:
      ValueError: `move` computes with elements, repeats or loses some of an array, or makes an
        array of an unknown name or of a wrong shape.
    """
    names, sizes = list(sources), [int(np.prod(shape)) for shape in sources.values()]
    starts = np.cumsum([0, *sizes])
    total, used, origins = int(starts[-1]), np.zeros(len(names), np.int64), {}
    seen = np.zeros(total, bool)
    for low in range(0, max(total, 1), MAX_MARKS):
        marks = {k: _mark(starts[i] - low, shape) for i, (k, shape) in enumerate(sources.items())}
        for target, array in move(marks).items():
            bits = np.ascontiguousarray(np.real(array), np.float32).view(np.uint32).ravel()
            number = bits[bits != 0] if total > MAX_MARKS else bits
            number = number.astype(np.int64) - FIRST_MARK + low
            if np.any((number < low) | (number >= total)) or np.any(np.imag(array)):
                raise ValueError(
                    f"The layout must only move elements, but it computes elements of {target!r}. "
                    f"Remove arithmetic, constants and casts to half precision."
                )
            index = np.searchsorted(starts, number, side="right") - 1
            counts = np.bincount(index, minlength=len(names))
            found = [names[i] for i in np.flatnonzero(counts)]
            origins[target] = list(dict.fromkeys((*origins.get(target, ()), *found)))
            used += counts
            seen[number] = True
            _check_target(target, array.shape, origins[target], targets)
    for i, name in enumerate(names):
        distinct = int(np.count_nonzero(seen[starts[i] : starts[i + 1]]))
        if used[i] != distinct or distinct not in (0, sizes[i]):
            raise ValueError(
                f"The layout must move each element of {name!r} to one place, but it repeats "
                f"{used[i] - distinct} of the {sizes[i]} elements and loses {sizes[i] - distinct}."
            )
    return Plan(move, origins, [k for i, k in enumerate(names) if sizes[i] and not used[i]])


def _mark(first: int, shape: tuple[int, ...]) -> np.ndarray:
    """Returns an array of marks, the first of which has this number; 0 beyond the last mark."""
    number = np.arange(first, first + int(np.prod(shape)))
    marks = (number + FIRST_MARK).astype(np.uint32).view(np.float32)
    return np.where((number >= 0) & (number < MAX_MARKS), marks, np.float32(0)).reshape(shape)


def _check_target(
    target: Any, shape: tuple[int, ...], names: list[Any], targets: Shapes | None
) -> None:
    """Raises ValueError if an array that a layout makes of these names is not wanted."""
    if targets is None:
        return
    if target not in targets:
        raise ValueError(
            f"The layout must make only arrays of known names, but it makes {target!r} of {names}. "
            f"Similar names are {near(str(target), map(str, targets))}."
        )
    expected = targets[target]
    if expected is not None and shape != expected:
        raise ValueError(
            f"The layout must make an array of shape {expected} for {target!r}, but it makes one "
            f"of shape {shape} of {names}. Transpose or reshape it."
        )
