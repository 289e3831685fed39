"""The ``state_dict`` of an optimizer, which Lucid has as PyTorch has it."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import optax

from optax_adamax.compat import _state
from optax_adamax.compat._mapping import Key, Names
from optax_adamax.compat._state import Labelled, Theirs

FIELDS = ("exp_avg", "exp_inf", "step")


def load(
    state_dict: Mapping[str, Any],
    params: optax.Params,
    tx: optax.GradientTransformation,
    names: Names | None,
    order: Sequence[str] | None,
) -> optax.OptState:
    """See `compat.torch.load_state`."""
    for field in ("state", "param_groups"):
        if not isinstance(state_dict, Mapping) or field not in state_dict:
            raise ValueError(
                f"There is no {field!r} in what was given: it must be the state_dict of an "
                f"optimizer, not of a model."
            )
    keys = keys_by_id(state_dict["param_groups"], order)
    entries = state_dict["state"]
    unknown = [f"state[{i!r}]" for i in entries if i not in keys]
    if unknown:
        raise ValueError(f"{unknown} belong to no parameter of 'param_groups'.")
    theirs = {key: _read(i, key, entries[i]) if i in entries else None for i, key in keys.items()}
    return _state.load(tx, params, theirs, names)


def dump(
    state: optax.OptState,
    params: optax.Params,
    param_groups: Sequence[Mapping[str, Any]],
    names: Names | None,
    order: Sequence[str] | None,
    to_array: Callable[[np.ndarray], Any],
    to_step: Callable[[int], Any],
) -> dict[str, Any]:
    """See `compat.torch.dump_state`."""
    keys = keys_by_id(param_groups, order)
    found = _state.dump(state, params, list(keys.values()), names)
    entries = {
        i: {
            "step": to_step(found[key].step),
            "exp_avg": to_array(found[key].m),
            "exp_inf": to_array(found[key].v),
        }
        for i, key in keys.items()
        if key in found
    }
    return {"state": entries, "param_groups": [dict(group) for group in param_groups]}


def keys_by_id(
    param_groups: Sequence[Mapping[str, Any]], order: Sequence[str] | None
) -> dict[Key, Key]:
    """The name of each parameter by what it is called in the state dict.

    Raises:
      ValueError: groups without parameters, or an `order` that does not fit them.
    """
    if not all("params" in group for group in param_groups):
        raise ValueError("Each of param_groups must have the entry 'params', a list of numbers.")
    ids = [i for group in param_groups for i in group["params"]]
    if any("param_names" in group for group in param_groups):
        known = [name for group in param_groups for name in group.get("param_names", ())]
        if order is not None and list(order) != known:
            raise ValueError(f"order is {list(order)}, but the param_groups say {known}.")
        order = known
    if order is None:
        return {i: i for i in ids}
    if len(order) != len(ids):
        raise ValueError(f"order has {len(order)} names for {len(ids)} parameters: {list(order)}.")
    return dict(zip(ids, order, strict=True))


def _read(number: Key, key: Key, entry: Mapping[str, Any]) -> Theirs:
    """The moments of one parameter."""
    where = f"state[{number!r}]" + ("" if key == number else f" ({key!r})")
    if not isinstance(entry, Mapping):
        raise TypeError(f"{where} must be a dict, but it is a {type(entry).__name__}.")
    missing = [field for field in FIELDS if field not in entry]
    surplus = [field for field in entry if field not in FIELDS]
    if missing:
        raise ValueError(f"{where} has no {missing}: it has {list(entry)}.")
    if surplus:
        raise ValueError(f"{where} has {surplus}, which Adamax does not keep.")
    m, v, step = (Labelled(f"{where}[{field!r}]", entry[field]) for field in FIELDS)
    return Theirs(m, v, step)
