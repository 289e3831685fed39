"""The variables of a Keras optimizer, which it stores in one list."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from optax_adamax.compat import _arrays
from optax_adamax.compat._paths import check_order

# The last or second part of a variable's name in Keras 2, where `v` or `u` is the infinity norm.
KERAS_2_KINDS = {"m": "momentum", "u": "norm", "v": "norm"}


class Slots(NamedTuple):
    """The variables that an optimizer has besides its moments and the count of calls."""

    learning_rate: bool  # a variable, unless it is a schedule
    average: bool
    gradient_accumulator: bool

    def order(self, names: Sequence[str]) -> Iterator[tuple[str, str]]:
        """Yields kind and parameter of all variables in the order of Keras 3."""
        yield "iteration", ""
        if self.learning_rate:
            yield "learning_rate", ""
        for kind in ("average", "gradient_accumulator"):
            if getattr(self, kind):
                yield from ((kind, name) for name in names)
        for name in names:
            yield "momentum", name
            yield "norm", name


class Variables(NamedTuple):
    """The variables of an optimizer by kind; the arrays by the names of their parameters."""

    iteration: int
    learning_rate: float | None
    arrays: dict[str, dict[Any, np.ndarray]]


def read_variables(variables: Any, slots: Slots, names: Sequence[str]) -> Variables:
    """Sorts the variables of an optimizer.

    Args:
      variables: see `load_state`.
      slots: the kinds of variables that it has; the learning rate may be absent.
      names: the names of the parameters.

    Raises:
      TypeError: a variable of the wrong type.
      ValueError: too many or too few variables, or one of another name or shape.
    """
    check_order(names)
    labels, values = _in_order(variables)
    expected = list(slots.order(names))
    if len(values) == len(expected) - 1:
        expected = list(slots._replace(learning_rate=False).order(names))
    if len(values) != len(expected):
        kinds = list(dict.fromkeys(kind for kind, _ in expected))
        raise ValueError(
            f"There are {len(values)} variables, but an optimizer of {len(names)} parameters with "
            f"{kinds} has {len(expected)}, or one less if the learning rate is a schedule. Give "
            f"`tx` the arguments and `names` the parameters that Keras' optimizer had."
        )
    scalars, arrays = {}, {}
    for i, ((kind, name), label, value) in enumerate(zip(expected, labels, values, strict=True)):
        where = f"variables[{i}] ({kind}" + (f" of {name!r})" if name else ")")
        _check_name(where, kind, name, label, names)
        if name:
            arrays.setdefault(kind, {})[name] = _arrays.read_array(where, value)
        else:
            scalars[kind] = (where, value)
    for kind, of_kind in arrays.items():
        for name, array in of_kind.items():
            shape = arrays["momentum"][name].shape
            if array.shape != shape:
                raise ValueError(
                    f"The {kind} of {name!r} has shape {array.shape}, but its momentum has "
                    f"{shape}. If Keras 2 wrote the variables, all momenta may come before all "
                    f"norms: give momentum and norm of each parameter in turn."
                )
    rate = scalars.get("learning_rate")
    return Variables(
        iteration=_arrays.read_step(*scalars["iteration"]),
        learning_rate=None if rate is None else float(_arrays.read_array(*rate)),
        arrays=arrays,
    )


def _in_order(variables: Any) -> tuple[list[str], list[Any]]:
    """Returns names, empty if unknown, and values in the order of Keras 3."""
    if not hasattr(variables, "keys"):
        _arrays.check_is_read("A list of variables, or a mapping of them", variables, object)
        values = list(variables)
        has_names = [isinstance(getattr(x, "path", None), str) for x in values]
        names = [x.name if has else "" for x, has in zip(values, has_names, strict=True)]
        return names, values
    if "optimizer_weights" in variables:
        variables = variables["optimizer_weights"]
    if "weight_names" in getattr(variables, "attrs", {}):  # a legacy file model.h5
        names = [x.decode() if isinstance(x, bytes) else x for x in variables.attrs["weight_names"]]
        return _from_keras_2(names, [variables[name] for name in names])
    wanted = [str(i) for i in range(len(variables))]
    missing = [key for key in wanted if key not in variables]
    if missing:
        raise ValueError(
            f"The variables must be numbered from 0 on, but there is no {missing[0]!r}: there are "
            f"{list(variables.keys())}."
        )
    return [""] * len(wanted), [variables[key] for key in wanted]


def _from_keras_2(names: list[str], values: list[Any]) -> tuple[list[str], list[Any]]:
    """Returns names and values in the order of Keras 3, if the names are those of Keras 2."""
    by_kind: dict[str, list[tuple[str, Any]]] = {"momentum": [], "norm": [], "": []}
    for name, value in zip(names, values, strict=True):
        parts = name.removesuffix(":0").split("/")
        found = [i for i in (len(parts) - 1, 1) if len(parts) > 2 and parts[i] in KERAS_2_KINDS]
        kind = KERAS_2_KINDS[parts.pop(found[0])] if found else ""
        by_kind[kind].append((f"{'_'.join(parts[1:])}_{kind}" if kind else "", value))
    if not by_kind["momentum"]:
        return [name.rsplit("/", 1)[-1] for name in names], values
    pairs = zip(by_kind["momentum"], by_kind["norm"], strict=True)
    ordered = [*by_kind[""], *(x for pair in pairs for x in pair)]
    return [name for name, _ in ordered], [value for _, value in ordered]


def _check_name(where: str, kind: str, name: str, label: str, names: Sequence[str]) -> None:
    """Raises ValueError if the variable has the name of another; arrays have no names."""
    if not label:
        return
    if not label.endswith(kind):
        raise ValueError(f"{where} is called {label!r}.")
    parameter, known = label.removesuffix(f"_{kind}"), {x.replace("/", "_"): x for x in names}
    if name and known.get(parameter, name) != name:
        raise ValueError(
            f"{where} is called {label!r}, so it is that of {known[parameter]!r}. Give `names` in "
            f"the order of the optimizer, [v.path for v in model.trainable_variables]."
        )
