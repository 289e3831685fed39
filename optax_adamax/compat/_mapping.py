"""Whose array is whose: the peer's names of the parameters, and the paths in our tree.

A path is that of :func:`jax.tree_util.keystr` with ``simple=True`` and ``separator="/"``, for
example ``"params/Dense_0/kernel"``.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_adamax.compat import _arrays

# What the peer calls a parameter: a name, or its number where the peer keeps no names.
Key = str | int
# The path, or the path and the permutation of axes that makes the peer's array ours.
Entry = str | tuple[str, Sequence[int]]
Names = Mapping[Key, Entry]


class Place(NamedTuple):
    """Where the peer's array goes, and how it is turned on the way."""

    path: str
    axes: tuple[int, ...] | None

    def ours(self, label: str, array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """Our layout of the peer's `array`; refuses it if that is not `shape`."""
        turned = array
        if self.axes is not None and array.ndim == len(self.axes):
            turned = array.transpose(self.axes)
        if turned.shape != shape:
            how = "" if self.axes is None else f" before its axes are permuted to {self.axes}"
            raise ValueError(
                f"{label} has shape {array.shape}{how}, but the parameter {self.path!r} has shape "
                f"{shape}."
            )
        return turned

    def theirs(self, array: np.ndarray) -> np.ndarray:
        """The peer's layout of our array, in memory of its own."""
        if self.axes is not None:
            array = array.transpose(np.argsort(self.axes))
        return np.array(array, order="C")


def paths(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> dict[str, Any]:
    """The leaves of a tree by path."""
    return {
        path_name(path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)
    }


def path_name(path: Any) -> str:
    """The name of a path of :mod:`jax.tree_util`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def places(keys: Iterable[Key], params: optax.Params, names: Names | None) -> dict[Key, Place]:
    """Where the parameters that the peer calls `keys` go; those not in `names` go nowhere.

    Args:
      keys: what the peer calls its parameters.
      params: our parameters.
      names: None: names are paths, with "." for "/".

    Raises:
      TypeError: an entry of `names` of the wrong type.
      ValueError: one that leads to no parameter, comes from none, or permutes wrongly.
    """
    keys, shapes = list(keys), {path: jnp.shape(x) for path, x in paths(params).items()}
    if names is None:
        numbers = [key for key in keys if not isinstance(key, str)]
        if numbers:
            raise ValueError(
                f"The parameters have only numbers here, {numbers}: give their names in this order "
                f"as `order`, or a path for each number as `names`."
            )
        names = {key: key if key in shapes else str(key).replace(".", "/") for key in keys}
    unknown = [key for key in names if key not in keys]
    if unknown:
        raise ValueError(
            f"names has entries for {unknown}, but the parameters are {keys}. Where those are "
            f"numbers, give the names in this order as `order`."
        )
    found = {key: _place(key, entry, shapes) for key, entry in names.items()}
    by_path: dict[str, Key] = {}
    for key, place in found.items():
        if place.path in by_path:
            raise ValueError(f"{by_path[place.path]!r} and {key!r} both go to {place.path!r}.")
        by_path[place.path] = key
    return found


def _place(key: Key, entry: Entry, shapes: Mapping[str, tuple[int, ...]]) -> Place:
    path, axes = (entry, None) if isinstance(entry, str) else entry
    if not isinstance(path, str):
        raise TypeError(
            f"names[{key!r}] must be a path or a pair of path and axes, but it is {entry!r}."
        )
    if path not in shapes:
        raise ValueError(
            f"{key!r} goes to {path!r}, which is no parameter: there are {list(shapes)}. Give "
            f"`names`."
        )
    if axes is None:
        return Place(path, None)
    if sorted(axes) != list(range(len(shapes[path]))):
        raise ValueError(
            f"names[{key!r}] permutes the axes to {tuple(axes)}, but {path!r} has shape "
            f"{shapes[path]}."
        )
    return Place(path, tuple(axes))


def load_params(
    theirs: Mapping[str, Any], params: optax.Params, names: Names | None = None
) -> optax.Params:
    """The peer's parameters as ours.

    Args:
      theirs: the peer's arrays by name.
      params: ours, of which only structure, shapes and dtypes count.
      names: see `load_state`.

    Returns:
      A tree like `params`.

    Raises:
      TypeError: an array that cannot be read.
      ValueError: a missing, surplus or misshapen array.
    """
    route, mine = places(theirs, params, names), paths(params)
    surplus = [key for key in theirs if key not in route]
    if surplus:
        raise ValueError(f"names has no entry for {surplus}.")
    arrays = {
        place.path: place.ours(
            repr(key), _arrays.read_array(repr(key), theirs[str(key)]), jnp.shape(mine[place.path])
        )
        for key, place in route.items()
    }
    missing = [path for path in mine if path not in arrays]
    if missing:
        raise ValueError(f"There is nothing for the parameters {missing}.")
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: jnp.asarray(arrays[path_name(path)], jnp.result_type(leaf)), params
    )


def dump_params(
    params: optax.Params,
    names: Names | None = None,
    *,
    to_array: Callable[[np.ndarray], Any] = np.asarray,
) -> dict[str, Any]:
    """Our parameters as the peer's, the inverse of :func:`load_params`.

    Args:
      params: our parameters.
      names: see `load_state`. None: the paths with "." for "/".
      to_array: what makes an array of the peer's of a NumPy array.

    Returns:
      The peer's arrays by name.

    Raises:
      ValueError: names that do not lead to every parameter.
    """
    mine = paths(params)
    names = {path.replace("/", "."): path for path in mine} if names is None else names
    route = places(names, params, names)
    missing = sorted(set(mine) - {place.path for place in route.values()})
    if missing:
        raise ValueError(f"names does not lead to {missing}.")
    return {
        str(key): to_array(place.theirs(np.asarray(mine[place.path])))
        for key, place in route.items()
    }


def flax_names(
    params: optax.Params, modules: Mapping[str, str] | None, *, channels_last: bool
) -> dict[Key, Entry]:
    """Names and permutations for the parameters of Flax modules, see `compat.torch.flax_names`.

    Args:
      params: the parameters of the Flax module.
      modules: names of the peer's modules by the paths of Flax's.
      channels_last: whether the peer's convolutions are (out, *space, in), else (out, in, *space).
    """
    modules, used, names = dict(modules or {}), set(), {}
    for path, leaf in paths(params).items():
        parts = path.split("/")
        parts = parts[1:] if parts[0] == "params" else parts
        parts = parts[:-1] if parts[-1] == "value" else parts  # an nnx.Param's own path
        module, name = parts[:-1], parts[-1]
        for length in range(len(module), 0, -1):
            known = "/".join(module[:length])
            if known in modules:
                module = [modules[known], *module[length:]]
                used.add(known)
                break
        peer = {"kernel": "weight", "scale": "weight", "embedding": "weight"}.get(name, name)
        ndim = jnp.ndim(leaf)
        key = ".".join([*module, peer])
        if name != "kernel" or ndim < 2:
            names[key] = path
        elif ndim == 2 or channels_last:
            names[key] = (path, (*range(1, ndim), 0))
        else:
            names[key] = (path, (*range(2, ndim), 1, 0))
    unused = sorted(set(modules) - used)
    if unused:
        raise ValueError(f"modules has {unused}, but params has no such modules.")
    return names
