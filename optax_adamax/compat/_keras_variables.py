"""The variables of a Keras optimizer, which it keeps in one list."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
import optax

from optax_adamax.compat import _arrays, _mapping, _state
from optax_adamax.compat._keras_links import AccumulateState, AverageState
from optax_adamax.compat._state import Labelled, Theirs

Kind = TypeVar("Kind", AccumulateState, AverageState)


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

    iteration: Labelled
    moments: dict[_mapping.Key, Theirs | None]
    averages: dict[str, Labelled]
    sums: dict[str, Labelled]


def find(state: optax.OptState, kind: type[Kind]) -> Kind | None:
    """The one state of this kind within a state, if there is one."""
    leaves = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, kind))
    return next((x for x in leaves if isinstance(x, kind)), None)


def replace(state: optax.OptState, kind: type[Kind], **fields: Any) -> optax.OptState:
    """`state` with new fields in the states of this kind."""
    return jax.tree.map(
        lambda x: x._replace(**fields) if isinstance(x, kind) else x,
        state,
        is_leaf=lambda x: isinstance(x, kind),
    )


def read(variables: Any, state: optax.OptState, order: Sequence[str]) -> KerasVariables:
    """Sorts the variables of an optimizer that has what `state` has.

    Raises:
      ValueError: too many or too few of them, or one of another name.
    """
    values = _in_order(variables)
    layout = Layout(
        learning_rate=True,
        average=find(state, AverageState) is not None,
        gradient_accumulator=find(state, AccumulateState) is not None,
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
    named: dict[tuple[str, str], Labelled] = {}
    for i, ((kind, name), value) in enumerate(zip(slots, values, strict=True)):
        label = f"variables[{i}] ({kind}" + (f" of {name!r})" if name else ")")
        known = getattr(value, "name", None)
        if isinstance(known, str) and not known.endswith(kind):
            raise ValueError(f"{label} is called {known!r}.")
        named[kind, name] = Labelled(label, value)
    step = named["iteration", ""]
    return KerasVariables(
        iteration=step,
        moments={k: Theirs(named["momentum", k], named["norm", k], step) for k in order},
        averages={k: named["average", k] for k in order if layout.average},
        sums={k: named["gradient_accumulator", k] for k in order if layout.gradient_accumulator},
    )


def load_trees(
    tree: Any, theirs: Mapping[str, Labelled], route: Mapping[_mapping.Key, _mapping.Place]
) -> Any:
    """`tree` with the peer's arrays."""
    ours = _mapping.paths(tree)
    arrays = {}
    for key, (label, value) in theirs.items():
        place = route[key]
        array = _arrays.read_array(label, value)
        arrays[place.path] = Labelled(label, place.ours(label, array, ours[place.path].shape))
    return _state.put_arrays(tree, arrays, "value")


def dump_tree(
    tree: Any, order: Sequence[str], route: Mapping[_mapping.Key, _mapping.Place]
) -> dict[str, np.ndarray]:
    """The arrays of `tree` by the peer's names and in its layout."""
    ours = _mapping.paths(tree)
    return {key: route[key].theirs(np.asarray(ours[route[key].path])) for key in order}


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
