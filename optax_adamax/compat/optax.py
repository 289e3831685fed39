"""`optax.adamax` and `optax.adamaxw`: the constructors, and optax's state in and out.

The constructors are those of :mod:`optax_adamax`, whose arguments begin as optax's do.
"""

import optax

from optax_adamax import repack_state, unpack_state
from optax_adamax._alias import adamax, adamaxw
from optax_adamax.compat import _state
from optax_adamax.compat._mapping import Key
from optax_adamax.compat._state import PeerMoments, PeerValue

__all__ = ["adamax", "adamaxw", "dump_state", "load_state"]


def __dir__() -> list[str]:
    return list(__all__)


def load_state(
    peer_state: optax.OptState, params: optax.Params, tx: optax.GradientTransformation
) -> optax.OptState:
    """The state of `tx`, continued from `optax.adamax` or `optax.adamaxw`.

    Args:
      peer_state: the state of optax's transformation, by itself or within others. Its ``mu`` is
        our ``m``, its ``nu`` our ``v``. The state of `optax.adam` has the same form. It is refused
        where gradients were smaller than 1, for ``mu`` is then greater than ``nu``; else nothing
        tells the two apart.
      params: the parameters of both.
      tx: our transformation, an :func:`optax_adamax.adamax` by itself or within others.

    Returns:
      The state. Beside the count of Adamax, those of the schedules in its chain and of
      :func:`optax.inject_hyperparams` around it are set. Other counters (of another optimizer, of
      :func:`optax.ema`, of `optax.MultiSteps`) stand where `tx.init` puts them.

    Raises:
      ValueError: no such state, a missing, surplus or misshapen entry, moments that are not those
        of Adamax, or an infinity norm out of the range of ``v_dtype``.
      TypeError: an entry of the wrong type.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from optax_adamax.compat import optax as compat_optax
      >>> params = {"w": jnp.ones(2)}
      >>> peer_state = optax.adamax(0.1).init(params)
      >>> state = compat_optax.load_state(peer_state, params, compat_optax.adamax(0.1))
      >>> print(type(state[0]).__name__)
      ScaleByAdamaxState
    """
    found = _state.read(unpack_state(peer_state, params), optax.ScaleByAdamState)
    entries: dict[Key, PeerMoments | None] = {
        path: PeerMoments(
            PeerValue(f"mu of {path!r}", m),
            PeerValue(f"nu of {path!r}", v),
            PeerValue("count", count),
        )
        for path, (m, v, count) in found.items()
    }
    return _state.load(tx, params, entries, None)


def dump_state(
    state: optax.OptState, params: optax.Params, tx: optax.GradientTransformation
) -> optax.OptState:
    """The state of optax's transformation, continued from ours; the inverse of `load_state`.

    Args:
      state: of an :func:`optax_adamax.adamax` or :func:`optax_adamax.adamaxw`, by itself or within
        others.
      params: the parameters of both.
      tx: optax's transformation, an `optax.adamax` by itself or within others.

    Returns:
      The state of `tx`.

    Raises:
      ValueError: `tx` is none of those, or trains other parameters.
    """
    found, template = _state.read(unpack_state(state, params)), tx.init(params)
    peer_state = unpack_state(template, params)
    expected = _state.read(peer_state, optax.ScaleByAdamState)
    _state.check_complete(expected, found, {})
    _state.check_complete(found, expected, {})
    filled = _state.fill(peer_state, found, optax.ScaleByAdamState)
    return repack_state(filled, like=template)
