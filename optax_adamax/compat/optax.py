"""`optax.adamax` and `optax.adamaxw`: the constructors, and optax's state in and out.

The constructors are those of :mod:`optax_adamax`, whose arguments begin as optax's do.
"""

import optax

from optax_adamax._alias import adamax, adamaxw
from optax_adamax.compat import _state
from optax_adamax.compat._mapping import Key
from optax_adamax.compat._state import Labelled, Theirs

__all__ = ["adamax", "adamaxw", "dump_state", "load_state"]


def load_state(
    theirs: optax.OptState, params: optax.Params, tx: optax.GradientTransformation
) -> optax.OptState:
    """The state of `tx`, continued from `optax.adamax` or `optax.adamaxw`.

    Args:
      theirs: the state of optax's transformation, by itself or within others. It looks as that of
        `optax.adam` does, whose ``nu`` is another thing.
      params: the parameters of both.
      tx: our transformation, an :func:`optax_adamax.adamax` by itself or within others.

    Returns:
      The state. Counters of schedules stand at the step of their parameters.

    Raises:
      ValueError: no such state, or a missing, surplus or misshapen entry.
      TypeError: an entry of the wrong type.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from optax_adamax.compat import optax as compat_optax
      >>> params = {"w": jnp.ones(2)}
      >>> theirs = optax.adamax(0.1).init(params)
      >>> state = compat_optax.load_state(theirs, params, compat_optax.adamax(0.1))
      >>> print(type(state[0]).__name__)
      ScaleByAdamaxState
    """
    entries: dict[Key, Theirs | None] = {
        path: Theirs(
            Labelled(f"mu of {path!r}", m), Labelled(f"nu of {path!r}", v), Labelled("count", count)
        )
        for path, (m, v, count) in _state.read(theirs, optax.ScaleByAdamState).items()
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
    found, theirs = _state.read(state), tx.init(params)
    expected = _state.read(theirs, optax.ScaleByAdamState)
    _state.check_complete(expected, found, {})
    _state.check_complete(found, expected, {})
    return _state.fill(theirs, found, optax.ScaleByAdamState)
