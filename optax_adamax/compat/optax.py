"""`optax.adamax` and `optax.adamaxw`: the constructors, and optax's state in and out.

The constructors are those of :mod:`optax_adamax`, whose first arguments are optax's.
"""

from typing import Any, TypeGuard

import jax
import optax

from optax_adamax import ScaleByAdamaxState, repack_state, unpack_state
from optax_adamax._alias import adamax, adamaxw
from optax_adamax._nonfinite import HandleNonfiniteState
from optax_adamax.compat import _moments, _transfer

__all__ = ["adamax", "adamaxw", "dump_state", "load_state"]


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
      The state. Only the Adamax is replaced: every other state, such as that of `optax.ema`,
      `optax.MultiSteps` or another optimizer in an `optax.partition`, is continued. If `tx` has
      other wrappers, then only moments and counts can be loaded, so `source_state` must have
      nothing else.

    Raises:
      ValueError: a state without Adamax or of other wrappers, a missing, surplus or misshapen
        entry, moments that are not those of Adamax, or an infinity norm out of the range of
        ``v_dtype``.
      TypeError: an entry of the wrong type.

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
    state = _moments.replace_nodes(
        source, _without_policy(unpacked), optax.ScaleByAdamState, ScaleByAdamaxState
    )
    if state is None:
        return _transfer.load(_moments.read_state(source, optax.ScaleByAdamState), params, tx, None)
    _transfer.check_is_adamax(_moments.read_state(state), tx, params)
    likes, treedef = jax.tree.flatten(unpacked, is_leaf=_is_policy)
    parts = zip(likes, treedef.flatten_up_to(state), strict=True)
    state = treedef.unflatten(
        [like._replace(inner_state=x) if _is_policy(like) else x for like, x in parts]
    )
    return repack_state(state, like=template)


def _is_policy(x: Any) -> TypeGuard[HandleNonfiniteState]:
    return isinstance(x, HandleNonfiniteState)


def _without_policy(state: Any) -> Any:
    """Returns a state without that of `nonfinite`, which optax does not have."""
    return jax.tree.map(lambda x: x.inner_state if _is_policy(x) else x, state, is_leaf=_is_policy)


def dump_state(
    state: optax.OptState, params: optax.Params, tx: optax.GradientTransformation
) -> optax.OptState:
    """Returns the state of optax's transformation, the inverse of `load_state`.

    Args:
      state: of an :func:`optax_adamax.adamax` or :func:`optax_adamax.adamaxw`, by itself or within
        others.
      params: the parameters of both.
      tx: optax's transformation, an `optax.adamax` in the same wrappers.

    Returns:
      The state of `tx`.

    Raises:
      ValueError: `tx` has no `optax.adamax`, trains other parameters or has other wrappers.
    """
    template, source = tx.init(params), _without_policy(unpack_state(state, params))
    unpacked = unpack_state(template, params)
    replaced = _moments.replace_nodes(source, unpacked, ScaleByAdamaxState, optax.ScaleByAdamState)
    if replaced is None:
        moments = _moments.read_state(source)
        nodes = _moments.find_trained(unpacked, optax.ScaleByAdamState)
        trained = {path for node in nodes for path in node}
        if trained != set(moments.m):
            raise ValueError(
                f"The state has moments for {sorted(moments.m)}, but the transformation trains "
                f"{sorted(trained)}."
            )
        replaced = _moments.fill(unpacked, moments, optax.ScaleByAdamState)
    return repack_state(replaced, like=template)
