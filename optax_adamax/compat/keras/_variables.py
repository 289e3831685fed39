"""The variables of a Keras optimizer, which it keeps in one list."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeGuard, TypeVar

import jax
import numpy as np
import optax

from optax_adamax.compat import _arrays, _mapping, _state
from optax_adamax.compat._state import PeerMoments, PeerValue
from optax_adamax.compat.keras._transforms import is_accumulation, is_average

Kind = TypeVar("Kind")


class Layout(NamedTuple):
    """What a Keras optimizer keeps beside its moments, besides the count of calls."""

    learning_rate: bool  # a variable, unless it is a schedule
    average: bool
    gradient_accumulator: bool

    def slots(self, names: Sequence[str]) -> Iterator[tuple[str, str]]:
        """The kinds of all variables in order, each with the name of its parameter."""
        yield "iteration", ""
        if self.learning_rate:
            yield "learning_rate", ""
        for kind in ("average", "gradient_accumulator"):
            if getattr(self, kind):
                yield from ((kind, name) for name in names)
        for name in names:
            yield "momentum", name
            yield "norm", name


class KerasVariables(NamedTuple):
    """The variables by what they are."""

    iteration: PeerValue
    moments: dict[_mapping.Key, PeerMoments | None]
    averages: dict[str, PeerValue]
    sums: dict[str, PeerValue]


def find(state: optax.OptState, is_kind: Callable[[Any], TypeGuard[Kind]]) -> Kind | None:
    """The state of this kind within a state, if there is one.

    Raises:
      ValueError: there are several.
    """
    nodes = jax.tree.leaves(state, is_leaf=is_kind)
    found = [x for x in nodes if is_kind(x)]
    if len(found) > 1:
        raise ValueError(
            f"There are {len(found)} {type(found[0]).__name__} in this state, but an optimizer of "
            f"Keras has one: give the state of each compat.keras.adamax by itself."
        )
    return found[0] if found else None


def replace(
    state: optax.OptState, is_kind: Callable[[Any], TypeGuard[Any]], **fields: Any
) -> optax.OptState:
    """`state` with new fields in the states of this kind."""
    return jax.tree.map(lambda x: x._replace(**fields) if is_kind(x) else x, state, is_leaf=is_kind)


def read(variables: Any, state: optax.OptState, order: Sequence[str]) -> KerasVariables:
    """Sorts the variables of an optimizer that has what `state` has.

    Raises:
      ValueError: too many or too few of them, or one of another name.
    """
    _mapping.check_order(order)
    values = _in_order(variables)
    layout = Layout(
        learning_rate=True,
        average=find(state, is_average) is not None,
        gradient_accumulator=find(state, is_accumulation) is not None,
    )
    slots = list(layout.slots(order))
    if len(values) == len(slots) - 1:
        slots = list(layout._replace(learning_rate=False).slots(order))
    if len(values) != len(slots):
        kinds = list(dict.fromkeys(kind for kind, _ in slots))
        raise ValueError(
            f"There are {len(values)} variables, but an optimizer of {len(order)} parameters with "
            f"{kinds} has {len(slots)}, or one less where the learning rate is a schedule: give "
            f"`tx` the arguments and `order` the names of the parameters that Keras' had."
        )
    named: dict[tuple[str, str], PeerValue] = {}
    for i, ((kind, name), value) in enumerate(zip(slots, values, strict=True)):
        label = f"variables[{i}] ({kind}" + (f" of {name!r})" if name else ")")
        _check_name(label, kind, name, value, order)
        named[kind, name] = PeerValue(label, value)
    step = named["iteration", ""]
    return KerasVariables(
        iteration=step,
        moments={k: PeerMoments(named["momentum", k], named["norm", k], step) for k in order},
        averages={k: named["average", k] for k in order if layout.average},
        sums={k: named["gradient_accumulator", k] for k in order if layout.gradient_accumulator},
    )


def load_tree(
    tree: Any,
    variables: Mapping[str, PeerValue],
    targets: Mapping[_mapping.Key, _mapping.Target],
) -> Any:
    """`tree` with the peer's arrays."""
    ours = _mapping.paths(tree)
    arrays = {}
    for key, (label, value) in variables.items():
        path = targets[key].path
        array = targets[key].to_ours(label, _arrays.read_array(label, value), ours[path].shape)
        arrays[path] = PeerValue(label, array)
    return _state.put_arrays(tree, arrays, "value")


def dump_tree(
    tree: Any, order: Sequence[str], targets: Mapping[_mapping.Key, _mapping.Target]
) -> dict[str, np.ndarray]:
    """The arrays of `tree` by the peer's names and in its layout."""
    ours = _mapping.paths(tree)
    return {key: targets[key].to_peer(np.asarray(ours[targets[key].path])) for key in order}


def _check_name(label: str, kind: str, name: str, value: Any, order: Sequence[str]) -> None:
    """Refuses a variable that Keras calls otherwise; arrays, and those in a file, have no names."""
    variable_name = getattr(value, "name", None)
    if not isinstance(variable_name, str) or not hasattr(value, "path"):
        return
    if not variable_name.endswith(kind):
        raise ValueError(f"{label} is called {variable_name!r}.")
    param_name = variable_name.removesuffix(f"_{kind}")
    names = {x.replace("/", "_"): x for x in order}
    if name and param_name in names and names[param_name] != name:
        raise ValueError(
            f"{label} is called {variable_name!r}, so it is that of {names[param_name]!r}: give "
            f"`order` as the optimizer got the variables, [v.path for v in "
            f"model.trainable_variables]."
        )


def _in_order(variables: Any) -> list[Any]:
    """The variables as a list, from one or from what ``save_own_variables`` writes."""
    if not hasattr(variables, "keys"):
        return list(variables)
    wanted = [str(i) for i in range(len(variables))]
    missing = [key for key in wanted if key not in variables]
    if missing:
        raise ValueError(
            f"The variables must be numbered from 0 on, but there is no {missing[0]!r}: there are "
            f"{list(variables.keys())}."
        )
    return [variables[key] for key in wanted]
