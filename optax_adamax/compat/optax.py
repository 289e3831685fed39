"""`optax.adamax` and `optax.adamaxw`: the constructors, and their states in and out.

The constructors are in :mod:`optax_adamax`, too. Their first arguments are optax's.
"""

from collections.abc import Mapping
from typing import Any, TypeGuard

import jax
import optax

from optax_adamax import ScaleByAdamaxState, decode_state, repack_state, unpack_state
from optax_adamax._alias import adamax, adamaxw
from optax_adamax._nonfinite import HandleNonfiniteState
from optax_adamax._state import states_in
from optax_adamax.compat import _arrays, _comparison, _moments, _transfer
from optax_adamax.compat._layout import path_name
from optax_adamax.compat._moments import Moments

__all__ = ["adamax", "adamaxw", "dump_state", "load_state"]

Node = ScaleByAdamaxState | optax.ScaleByAdamState


def __dir__() -> list[str]:
    return list(__all__)


def load_state(
    source_state: optax.OptState, params: optax.Params, tx: optax.GradientTransformation
) -> optax.OptState:
    """Returns the state of `tx`, continued from `optax.adamax` or `optax.adamaxw`.

    Args:
      source_state: the state of optax's transformation, by itself or within others. Its ``mu``
        becomes ``m``, its ``nu`` becomes ``v``. The state of `optax.adam` has the same form; it
        raises if most of ``mu`` is greater than Adamax allows, as it is for gradients below 1.
      params: the parameters of both.
      tx: the transformation of this package, in the wrappers that optax's had.

    Returns:
      The state. Only the Adamax is replaced: every other state, such as the state of `optax.ema`,
      `optax.MultiSteps` or another optimizer in an `optax.partition`, is continued. If `tx` has
      other wrappers, then only moments and counts can be loaded, so `source_state` must have
      nothing else.

    Raises:
      ValueError: a state without Adamax or of other wrappers, a missing, surplus or misshapen
        entry, moments of another optimizer, or an infinity norm out of the range of
        ``v_dtype``.
      TypeError: an entry of the wrong type, or a `tx` without Adamax.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from optax_adamax.compat import optax as compat_optax
      >>> params = {"w": jnp.ones(2)}
      >>> source_state = optax.adamax(0.1).init(params)
      >>> state = compat_optax.load_state(source_state, params, compat_optax.adamax(0.1))
      >>> print(type(state[0]).__name__)
      ScaleByAdamaxState
    """
    template, source = tx.init(params), unpack_state(source_state, params)
    unpacked = unpack_state(template, params)
    states_in(unpacked)  # raises for a state without Adamax
    _check_has_optax(source, "source_state")
    state = _replace_nodes(source, _without_policy(unpacked))
    if state is None:
        moments = _moments.read_state(_renamed(source))
        _check_trained(moments, *_moments.shapes_of_nodes(unpacked))
        return _transfer.load(moments, params, tx, None)
    moments = _moments.read_state(state)
    _comparison.check_values(moments)
    _comparison.check_is_adamax(moments, tx, params)
    likes, treedef = jax.tree.flatten(unpacked, is_leaf=_is_policy)
    parts = zip(likes, treedef.flatten_up_to(state), strict=True)
    state = treedef.unflatten(
        [like._replace(inner_state=x) if _is_policy(like) else x for like, x in parts]
    )
    return repack_state(state, like=template)


def dump_state(
    state: optax.OptState, params: optax.Params, tx: optax.GradientTransformation
) -> optax.OptState:
    """Returns the state for optax's transformation, the inverse of :func:`load_state`.

    Args:
      state: of an :func:`optax_adamax.adamax` or :func:`optax_adamax.adamaxw`, by itself or within
        others.
      params: the parameters of both.
      tx: optax's transformation, an `optax.adamax` in the same wrappers.

    Returns:
      The state of `tx`.

    Raises:
      ValueError: `tx` has no `optax.adamax`, trains other parameters or has other wrappers.
      TypeError: a `state` without Adamax.
    """
    template = tx.init(params)
    source = decode_state(_without_policy(unpack_state(state, params)))
    unpacked = unpack_state(template, params)
    _check_has_optax(unpacked, "The state of tx")
    replaced = _replace_nodes(source, unpacked)
    if replaced is None:
        moments, renamed = _moments.read_state(source), _renamed(unpacked)
        _check_trained(moments, *_moments.shapes_of_nodes(renamed))
        replaced = _replace_nodes(_moments.fill(renamed, moments), unpacked)
    return repack_state(replaced, like=template)


def _replace_nodes(state: Any, template: Any) -> Any:
    """Returns `state` with each Adamax in the form of `template`, and everything else as it is.

    It is None if the wrappers differ, and the wrappers of `state` store nothing.

    Raises:
      ValueError: states of the wrappers of `state` would be lost.
    """
    likes, treedef = jax.tree.flatten(template, is_leaf=_is_node)
    try:
        parts = treedef.flatten_up_to(state)
    except ValueError:
        parts = []
    if len(parts) != len(likes) or not all(map(_fits, parts, likes)):
        stateless = lambda x: _is_node(x) or _moments.is_schedule(x)  # noqa: E731
        rest = jax.tree.map(lambda x: None if stateless(x) else x, state, is_leaf=stateless)
        lost = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(rest)]
        if lost:
            raise ValueError(
                f"The transformation must have the wrappers of the state, but its wrappers differ, "
                f"so {lost} would be lost. Give the transformation that continues these wrappers."
            )
        return None
    return treedef.unflatten([_convert(*pair) for pair in zip(parts, likes, strict=True)])


def _convert(part: Any, like: Any) -> Any:
    """Returns the state of one Adamax in the form of `like`, and any other state as it is."""
    if isinstance(like, ScaleByAdamaxState) and isinstance(part, optax.ScaleByAdamState):
        return _moments.fill_node(like, _read(part, like), int(_arrays.fetch(part.count)))
    if isinstance(like, optax.ScaleByAdamState) and isinstance(part, ScaleByAdamaxState):
        moments, count = _read(part, like), _arrays.put_like(_arrays.fetch(part.count), like.count)
        m, v = _moments.put_tree(like.mu, moments.m), _moments.put_tree(like.nu, moments.v)
        return like._replace(count=count, mu=m, nu=v)
    return part


def _read(part: Any, like: Any) -> Moments:
    """Returns the moments of one Adamax, which must be the moments that `like` has."""
    moments = _moments.read_node(_renamed(part))
    _check_trained(moments, *_moments.shapes_of_nodes(_renamed(like)))
    return moments


def _renamed(state: Any) -> Any:
    """Returns a decoded state in which optax's states have the names of this package's."""

    def rename(x: Any) -> Any:
        return ScaleByAdamaxState._make(x) if isinstance(x, optax.ScaleByAdamState) else x

    return decode_state(jax.tree.map(rename, state, is_leaf=_is_node))


def _check_trained(moments: Moments, *nodes: Mapping[str, Any]) -> None:
    """Raises ValueError if the nodes have other paths than the moments."""
    trained = sorted(path for node in nodes for path in node)
    if sorted(moments.m) != trained:
        raise ValueError(
            f"The transformation must train the parameters of the state, {sorted(moments.m)}, but "
            f"it trains {trained}. Give both the same parameters and masks."
        )


def _check_has_optax(state: Any, name: str) -> None:
    nodes = jax.tree.leaves(state, is_leaf=_is_node)
    if not any(isinstance(x, optax.ScaleByAdamState) for x in nodes):
        raise ValueError(
            f"{name} must contain a ScaleByAdamState of optax.adamax, but it does not. For a state "
            f"of this package, no conversion is needed."
        )


def _is_node(x: Any) -> bool:
    return isinstance(x, Node)


def _fits(part: Any, like: Any) -> bool:
    """Whether `part` of a state has the kind of `like`, or can be converted to it."""
    return _is_node(part) if _is_node(like) else jax.tree_util.all_leaves([part])


def _is_policy(x: Any) -> TypeGuard[HandleNonfiniteState]:
    return isinstance(x, HandleNonfiniteState)


def _without_policy(state: Any) -> Any:
    """Removes the state of the `nonfinite` policy, which optax does not have."""
    return jax.tree.map(lambda x: x.inner_state if _is_policy(x) else x, state, is_leaf=_is_policy)
