"""Moments out of and into the state of a chain, wherever in it they stand."""

import itertools
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_adamax import ScaleByAdamaxState, decode_state, encode_state
from optax_adamax._state import dtypes_of
from optax_adamax.compat import _arrays, _complex, _mapping
from optax_adamax.compat._mapping import Key, Names, Place


class Labelled(NamedTuple):
    """Something of the peer's and what to call it in an error."""

    label: str
    value: Any


class Theirs(NamedTuple):
    """What the peer keeps for one parameter."""

    m: Labelled
    v: Labelled
    step: Labelled


Node = ScaleByAdamaxState | optax.ScaleByAdamState


class Moments(NamedTuple):
    """The moments of one parameter, and the number of steps that made them."""

    m: np.ndarray
    v: np.ndarray
    step: int


def load(
    tx: optax.GradientTransformation,
    params: optax.Params,
    theirs: Mapping[Key, Theirs | None],
    names: Names | None,
) -> optax.OptState:
    """The state of `tx` with the moments of a peer.

    Args:
      tx: the transformation.
      params: its parameters.
      theirs: what the peer keeps for each parameter that it knows; None: nothing.
      names: see :mod:`optax_adamax.compat._mapping`.

    Raises:
      TypeError: an entry of the wrong type.
      ValueError: a missing, surplus or misshapen one, or steps that differ.
    """
    state = tx.init(params)
    route, trained = _mapping.places(theirs, params, names), read(state)
    known = {key: entry for key, entry in theirs.items() if entry is not None}
    surplus = [
        entry.m.label
        for key, entry in known.items()
        if key not in route or route[key].path not in trained
    ]
    if surplus:
        raise ValueError(
            f"There is no place for {surplus}: give `names` a path for each, to a parameter that "
            f"the transformation trains."
        )
    found = {
        route[key].path: _read(entry, route[key], trained[route[key].path])
        for key, entry in known.items()
    }
    called = {place.path: key for key, place in route.items()}
    check_complete(trained, found, called)
    return fill(state, found)


def dump(
    state: optax.OptState, params: optax.Params, keys: Iterable[Key], names: Names | None
) -> dict[Key, Moments]:
    """The moments by the peer's names and in its layout; a parameter not trained has none.

    Raises:
      ValueError: `names` does not lead to every parameter that is trained.
    """
    route, trained = _mapping.places(keys, params, names), read(state)
    check_complete(trained, {place.path for place in route.values()}, {})
    dumped = {}
    for key, place in route.items():
        if place.path in trained:
            m, v, step = trained[place.path]
            dumped[key] = Moments(place.theirs(m), place.theirs(v), step)
    return dumped


def read(state: optax.OptState, kind: type[Node] = ScaleByAdamaxState) -> dict[str, Moments]:
    """All moments in a state by path, in our layout.

    Raises:
      ValueError: there are none.
    """
    leaves = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, kind))
    nodes = [x for x in leaves if isinstance(x, kind)]
    if not nodes:
        raise ValueError(
            f"There is no {kind.__name__} in this state, which is a {type(state).__name__}."
        )
    found: dict[str, Moments] = {}
    for count, m, v in map(_decoded, nodes):
        by_path = _mapping.paths(v, _complex.is_parts)
        for path, x in _mapping.paths(m, _complex.is_parts).items():
            x, y = (np.asarray(_complex.join(z)) for z in (x, by_path[path]))
            found[path] = Moments(x, y, int(np.asarray(count)))
    return found


def fill(
    state: optax.OptState,
    moments: Mapping[str, Moments],
    kind: type[Node] = ScaleByAdamaxState,
) -> optax.OptState:
    """`state` with these moments; every other counter is set to that of the nearest moments."""

    def is_node(x: Any) -> bool:
        return isinstance(x, kind)

    leaves = jax.tree_util.tree_leaves_with_path(state, is_leaf=is_node)
    counts = {path: _count(node, moments) for path, node in leaves if is_node(node)}

    def put(path: Any, old: Any) -> Any:
        if is_node(old):
            count, m, v = _decoded(old)
            count = _place(np.asarray(counts[path]), count)
            node = kind(count, put_arrays(m, moments, "m"), put_arrays(v, moments, "v"))
            return encode_state(node, *dtypes_of(old)) if kind is ScaleByAdamaxState else node
        if path[-1:] == (jax.tree_util.GetAttrKey("count"),):
            nearest = max(counts, key=lambda other: _common(path, other))
            return _place(np.asarray(counts[nearest]), old)
        return old

    return jax.tree_util.tree_map_with_path(put, state, is_leaf=is_node)


def put_arrays(tree: Any, values: Mapping[str, Any], field: str) -> Any:
    """`tree` with the arrays ``values[path].field``."""

    def put(path: Any, old: Any) -> Any:
        return _place(getattr(values[_mapping.path_name(path)], field), old)

    return jax.tree_util.tree_map_with_path(put, tree, is_leaf=_complex.is_parts)


def check_complete(
    trained: Collection[str], found: Collection[str], called: Mapping[str, Key]
) -> None:
    """Refuses moments that do not cover every parameter, with the peer's name where it has one."""
    missing = [
        f"{path!r} (there {called[path]!r})" if path in called else repr(path)
        for path in trained
        if path not in found
    ]
    if missing:
        raise ValueError(
            f"There is nothing for {', '.join(missing)}, which the transformation trains: to "
            f"freeze parameters, put it and optax.set_to_zero() in an optax.partition."
        )


def single_step(moments: Mapping[Key, Moments]) -> int:
    """The number of steps, for a peer that has one for all parameters."""
    counts = {key: x.step for key, x in moments.items()}
    if len(set(counts.values())) != 1:
        raise ValueError(f"The parameters have taken different numbers of steps: {counts}.")
    return next(iter(counts.values()))


def _decoded(node: Node) -> Node:
    return decode_state(node) if isinstance(node, ScaleByAdamaxState) else node


def _read(theirs: Theirs, place: Place, ours: Moments) -> Moments:
    """The peer's moments of one parameter in our layout."""
    m, v = (
        place.ours(x.label, _arrays.read_array(x.label, x.value), mine.shape)
        for x, mine in ((theirs.m, ours.m), (theirs.v, ours.v))
    )
    for x, array, mine in ((theirs.m, m, ours.m), (theirs.v, v, ours.v)):
        if np.any(np.imag(array) != 0) and not np.iscomplexobj(mine):
            raise TypeError(f"{x.label} is complex, but that of {place.path!r} must be real.")
    if np.any(np.real(v) < 0) or np.any(np.imag(v) < 0):
        raise ValueError(f"{theirs.v.label} holds negative numbers, so it is no infinity norm.")
    return Moments(m, v, _arrays.read_step(*theirs.step))


def _count(node: Node, moments: Mapping[str, Moments]) -> int:
    """The number of steps of one transformation, which has one for all of its parameters."""
    by_path = {path: moments[path].step for path in _mapping.paths(node[1], _complex.is_parts)}
    if len(set(by_path.values())) > 1:
        raise ValueError(
            f"The parameters have taken different numbers of steps, {by_path}, but one "
            f"transformation counts for all of its own: put them in groups of their own."
        )
    return next(iter(by_path.values()), 0)


def _place(value: np.ndarray, old: Any) -> Any:
    """`value` in the dtype, and on the devices, of `old`."""
    if _complex.is_parts(old):
        return _complex.Parts(_place(np.real(value), old.real), _place(np.imag(value), old.imag))
    new = jnp.asarray(value if jnp.iscomplexobj(old) else np.real(value), old.dtype)
    return jax.device_put(new, old.sharding) if getattr(old, "committed", False) else new


def _common(path: Any, other: Any) -> int:
    """How many steps two paths share."""
    pairs = zip(path, other, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
