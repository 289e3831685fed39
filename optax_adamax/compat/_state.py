"""Moments out of and into the state of a chain, wherever in it they stand.

Of :mod:`optax_adamax` this module alone knows how a state is kept.
"""

from collections.abc import Collection, Iterable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import DTypeLike

from optax_adamax import (
    ScaleByAdamaxState,
    decode_state,
    encode_state,
    repack_state,
    unpack_state,
)
from optax_adamax._state import dtypes_of
from optax_adamax._v_formats import v_format_of
from optax_adamax.compat import _arrays, _counters, _mapping
from optax_adamax.compat._complex import Parts, is_parts, join
from optax_adamax.compat._counters import Path
from optax_adamax.compat._mapping import Key, Names, Target

Missing = Literal["refuse", "zero"]
Node = ScaleByAdamaxState | optax.ScaleByAdamState


class PeerValue(NamedTuple):
    """An array or number of the peer's, and what to call it in an error."""

    label: str
    value: Any


class PeerMoments(NamedTuple):
    """What the peer keeps for one parameter."""

    m: PeerValue
    v: PeerValue
    step: PeerValue


class Moments(NamedTuple):
    """The moments of one parameter, and the number of steps that made them; None: no step yet."""

    m: np.ndarray
    v: np.ndarray
    step: int | None


def load(
    tx: optax.GradientTransformation,
    params: optax.Params,
    peer_state: Mapping[Key, PeerMoments | None],
    names: Names | None,
    missing: Missing = "refuse",
) -> optax.OptState:
    """The state of `tx` with the moments of a peer.

    Args:
      tx: the transformation.
      params: its parameters.
      peer_state: what the peer keeps for each parameter that it knows; None: nothing.
      names: see :mod:`optax_adamax.compat._mapping`.
      missing: whether a parameter for which there is nothing starts at zero.

    Raises:
      TypeError: an entry of the wrong type.
      ValueError: a missing, surplus or misshapen one, or steps that differ.
    """
    if missing not in ("refuse", "zero"):
        raise ValueError(f"missing must be 'refuse' or 'zero', but {missing!r} was given.")
    template = tx.init(params)
    state = unpack_state(template, params)
    targets, trained = _mapping.find_targets(peer_state, params, names), read(state)
    known = {key: moments for key, moments in peer_state.items() if moments is not None}
    surplus = [
        moments.m.label
        for key, moments in known.items()
        if key not in targets or targets[key].path not in trained
    ]
    if surplus:
        raise ValueError(
            f"There is no place for {surplus}: give `names` a path for each, to a parameter that "
            f"the transformation trains."
        )
    found = {
        targets[key].path: _read(moments, targets[key], trained[targets[key].path])
        for key, moments in known.items()
    }
    _check_is_adamax(found)
    if missing == "zero":
        zeros = {path: x._replace(step=None) for path, x in trained.items()}
        found = zeros | found
    keys = {target.path: key for key, target in targets.items()}
    check_complete(trained, found, keys, " To start it at zero, give missing='zero'.")
    return repack_state(fill(state, found), like=template)


def dump(
    state: optax.OptState, params: optax.Params, keys: Iterable[Key], names: Names | None
) -> dict[Key, Moments]:
    """The moments by the peer's names and in its layout; a parameter not trained has none.

    Raises:
      ValueError: `names` does not lead to every parameter that is trained.
    """
    targets = _mapping.find_targets(keys, params, names)
    trained = read(unpack_state(state, params))
    check_complete(trained, {target.path for target in targets.values()}, {})
    dumped = {}
    for key, target in targets.items():
        if target.path in trained:
            m, v, step = trained[target.path]
            dumped[key] = Moments(target.to_peer(m), target.to_peer(v), step)
    return dumped


def read(state: optax.OptState, kind: type[Node] = ScaleByAdamaxState) -> dict[str, Moments]:
    """All moments in an unpacked state by path, in our layout.

    Raises:
      ValueError: there are none, or two for one parameter.
    """
    nodes = [node for _, node in _counters.find(state, lambda x: isinstance(x, kind))]
    if not nodes:
        fields = (
            " m and v of Adamax are mu and nu in optax's." if kind is ScaleByAdamaxState else ""
        )
        raise ValueError(
            f"There is no {kind.__name__} in this state, which is a {type(state).__name__}.{fields}"
        )
    found: dict[str, Moments] = {}
    for count, m, v in map(_decoded, nodes):
        by_path = _mapping.paths(v, is_parts)
        for path, x in _mapping.paths(m, is_parts).items():
            if path in found:
                raise ValueError(f"There are two {kind.__name__} with moments of {path!r}.")
            x, y = (np.asarray(join(z)) for z in (x, by_path[path]))
            found[path] = Moments(x, y, int(np.asarray(count)))
    return found


def fill(
    state: optax.OptState, moments: Mapping[str, Moments], kind: type[Node] = ScaleByAdamaxState
) -> optax.OptState:
    """`state` with these moments, their counts, and the counts of their schedules."""

    def is_node(x: Any) -> bool:
        return isinstance(x, kind)

    counts = {path: _count(node, moments) for path, node in _counters.find(state, is_node)}
    schedules = _counters.of_schedules(state, counts)

    def put(path: Path, old: Any) -> Any:
        if is_node(old):
            return _filled(old, counts[path], moments)
        return _put_like(np.asarray(schedules[path]), old) if path in schedules else old

    return jax.tree_util.tree_map_with_path(put, state, is_leaf=is_node)


def put_arrays(tree: Any, values: Mapping[str, Any], field: str) -> Any:
    """`tree` with the arrays ``values[path].field``."""

    def put(path: Path, old: Any) -> Any:
        return _put_like(getattr(values[_mapping.path_name(path)], field), old)

    return jax.tree_util.tree_map_with_path(put, tree, is_leaf=is_parts)


def check_complete(
    trained: Collection[str], found: Collection[str], keys: Mapping[str, Key], advice: str = ""
) -> None:
    """Refuses moments that do not cover every parameter, with the peer's name where it has one."""
    missing = [
        f"{path!r} (there {keys[path]!r})" if path in keys else repr(path)
        for path in trained
        if path not in found
    ]
    if missing:
        raise ValueError(
            f"There is nothing for {', '.join(missing)}, which the transformation trains: to "
            f"freeze parameters, put it and optax.set_to_zero() in an optax.partition.{advice}"
        )


def single_step(moments: Mapping[Key, Moments]) -> int:
    """The number of steps, for a peer that has one for all parameters."""
    counts = {key: x.step for key, x in moments.items()}
    if len(set(counts.values())) != 1:
        raise ValueError(f"The parameters have taken different numbers of steps: {counts}.")
    return next(iter(counts.values())) or 0


def _decoded(node: Node) -> Node:
    return decode_state(node) if isinstance(node, ScaleByAdamaxState) else node


def _filled(old: Node, step: int, moments: Mapping[str, Moments]) -> Node:
    """A node with these moments in its format."""
    count, m, v = _decoded(old)
    paths = _mapping.paths(m, is_parts)
    count = _put_like(np.asarray(step), count)
    m, v = put_arrays(m, moments, "m"), put_arrays(v, moments, "v")
    if isinstance(old, optax.ScaleByAdamState):
        return optax.ScaleByAdamState(count, m, v)
    m_dtype, v_dtype = dtypes_of(old)
    for path in paths:
        _check_range(path, moments[path].v, v_dtype)
    return encode_state(ScaleByAdamaxState(count, m, v), m_dtype, v_dtype)


def _check_range(path: str, v: np.ndarray, v_dtype: DTypeLike | None) -> None:
    """Refuses an infinity norm whose largest element does not fit into the format.

    Smaller elements below the range are taken: a v that decays ends there in any run.
    """
    limits, largest = v_format_of(v_dtype).range, np.max(np.real(v), initial=0.0)
    if largest == 0 or limits[0] <= largest <= limits[1]:
        return
    raise ValueError(
        f"The infinity norm of {path!r} is {largest:.3g} where it is largest, but "
        f"v_dtype={v_dtype} holds {limits[0]:.2g} to {limits[1]:.3g}: take v_dtype='bfloat16'. Or "
        f"bring the gradients into that range by optax.scale(c) before the transformation, and "
        f"multiply the moments to be loaded with c as well."
    )


def _check_is_adamax(found: Mapping[str, Moments]) -> None:
    """Refuses moments that Adamax does not make. Those of Adam are kept under the same names.

    For b1 < b2 Adamax keeps ``|m| <= (1 - b1) / (1 - b1 / b2) v``, hardly more than v, and for
    other decay rates few elements are far beyond. Adam's v is a mean of squares: where gradients
    are smaller than 1 it is smaller than m.
    """
    beyond = sum(np.count_nonzero(np.abs(x.m) > 1.25 * np.abs(x.v)) for x in found.values())
    total = sum(np.count_nonzero(x.m) for x in found.values())
    if 2 * beyond > total:
        raise ValueError(
            f"This is no state of Adamax: in {beyond} of {total} elements |m| is greater than "
            f"1.25 v, though v is a maximum of gradients of which m is a mean. The state of Adam, "
            f"in which v is a mean of squares, looks the same otherwise."
        )


def _read(peer: PeerMoments, target: Target, ours: Moments) -> Moments:
    """The peer's moments of one parameter in our layout."""
    m, v = (
        target.to_ours(x.label, _arrays.read_array(x.label, x.value), own.shape)
        for x, own in ((peer.m, ours.m), (peer.v, ours.v))
    )
    for x, array, own in ((peer.m, m, ours.m), (peer.v, v, ours.v)):
        if np.any(np.imag(array) != 0) and not np.iscomplexobj(own):
            raise TypeError(f"{x.label} is complex, but that of {target.path!r} must be real.")
    if np.any(np.real(v) < 0) or np.any(np.imag(v) < 0):
        raise ValueError(f"{peer.v.label} holds negative numbers, so it is no infinity norm.")
    return Moments(m, v, _arrays.read_step(*peer.step))


def _count(node: Node, moments: Mapping[str, Moments]) -> int:
    """The number of steps of one transformation, which has one for all of its parameters."""
    steps = {path: moments[path].step for path in _mapping.paths(_decoded(node)[1], is_parts)}
    steps = {path: step for path, step in steps.items() if step is not None}
    if len(set(steps.values())) > 1:
        raise ValueError(
            f"The parameters have taken different numbers of steps, {steps}, but one "
            f"transformation counts for all of its own: put them in groups of their own."
        )
    return next(iter(steps.values()), 0)


def _put_like(value: np.ndarray, old: Any) -> Any:
    """`value` in the dtype, and on the devices, of `old`."""
    if is_parts(old):
        return Parts(_put_like(np.real(value), old.real), _put_like(np.imag(value), old.imag))
    new = jnp.asarray(value if jnp.iscomplexobj(old) else np.real(value), old.dtype)
    return jax.device_put(new, old.sharding) if getattr(old, "committed", False) else new
