"""Which array of a peer is which of ours: the peer's names, and the paths in our tree.

A path is that of :func:`jax.tree_util.keystr` with ``simple=True`` and ``separator="/"``, for
example ``"params/Dense_0/kernel"``, without the box that Flax may put around an array.
"""

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_adamax import _paths
from optax_adamax.compat import _arrays

# What the peer calls a parameter: a name, or its number where the peer keeps no names.
Key = str | int
# The path, or the path and the permutation of axes that makes the peer's array ours.
Entry = str | tuple[str, Sequence[int]]
Names = Mapping[Key, Entry]


class Target(NamedTuple):
    """Where the peer's array goes, and how its axes are permuted on the way."""

    path: str
    axes: tuple[int, ...] | None

    def to_ours(self, label: str, array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """Our layout of the peer's `array`; refuses it if that is not `shape`."""
        permuted = array
        if self.axes is not None and array.ndim == len(self.axes):
            permuted = array.transpose(self.axes)
        if permuted.shape != shape:
            how = "" if self.axes is None else f" before its axes are permuted to {self.axes}"
            raise ValueError(
                f"{label} has shape {array.shape}{how}, but the parameter {self.path!r} has shape "
                f"{shape}."
            )
        return permuted

    def to_peer(self, array: np.ndarray) -> np.ndarray:
        """The peer's layout of our array, in memory of its own."""
        if self.axes is not None:
            array = array.transpose(np.argsort(self.axes))
        return np.array(array, order="C")


def paths(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> dict[str, Any]:
    """The leaves of a tree by path.

    Raises:
      ValueError: two leaves have one path.
    """
    named = _paths.named_leaves(tree, "/", is_leaf)
    by_path = dict(named)
    if len(by_path) < len(named):
        raise ValueError(
            f"Several parameters have the path {first_twice([path for path, _ in named])!r}, so "
            f"that no name can tell them apart: rename one of them, without '/' in a key."
        )
    return by_path


def path_name(path: Any) -> str:
    """The path of a leaf as a name."""
    return _paths.path_name(path, "/")


def first_twice(names: Sequence[str]) -> str | None:
    """The first name that occurs twice, if there is one."""
    return next((name for i, name in enumerate(names) if name in names[:i]), None)


def check_order(order: Sequence[str]) -> None:
    """Refuses an order in which a name stands twice."""
    twice = first_twice(order)
    if twice is not None:
        raise ValueError(
            f"The names of the parameters have {twice!r} twice: give each parameter a name of its "
            f"own in `order`, such as '0:{twice}', and `names` with a path for each."
        )


def last_part(path: str) -> str:
    """The parameter's own name, without that of its module."""
    return path.rsplit("/", 1)[-1]


def near(wanted: str, known: Iterable[str]) -> list[str]:
    """The three names that are most like a name or pattern that nothing has."""
    plain = re.sub(r"[^\w/]", "", wanted)

    def likeness(name: str) -> float:
        candidates = (name, last_part(name))
        return max(difflib.SequenceMatcher(None, plain, x).ratio() for x in candidates)

    return sorted(known, key=likeness, reverse=True)[:3]


def peer_names(params: optax.Params) -> dict[Key, Entry]:
    """Names for a peer that calls parameters by our paths, with "." for "/".

    Raises:
      ValueError: two parameters would have one name.
    """
    names = [path.replace("/", ".") for path in paths(params)]
    twice = first_twice(names)
    if twice is not None:
        raise ValueError(f"Several parameters would be called {twice!r}: give `names`.")
    return dict(zip(names, paths(params), strict=True))


def find_targets(
    keys: Iterable[Key], params: optax.Params, names: Names | None
) -> dict[Key, Target]:
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
    targets = {key: _target(key, entry, shapes) for key, entry in names.items()}
    by_path: dict[str, Key] = {}
    for key, target in targets.items():
        if target.path in by_path:
            raise ValueError(f"{by_path[target.path]!r} and {key!r} both go to {target.path!r}.")
        by_path[target.path] = key
    return targets


def _target(key: Key, entry: Entry, shapes: Mapping[str, tuple[int, ...]]) -> Target:
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
        return Target(path, None)
    if sorted(axes) != list(range(len(shapes[path]))):
        raise ValueError(
            f"names[{key!r}] permutes the axes to {tuple(axes)}, but {path!r} has shape "
            f"{shapes[path]}."
        )
    return Target(path, tuple(axes))


def load_params(
    peer_params: Mapping[str, Any], params: optax.Params, names: Names | None = None
) -> optax.Params:
    """The peer's parameters as ours.

    Args:
      peer_params: the peer's arrays by name.
      params: ours, of which only structure, shapes and dtypes count.
      names: see `load_state`.

    Returns:
      A tree like `params`.

    Raises:
      TypeError: an array that cannot be read.
      ValueError: a missing, surplus or misshapen array.
    """
    targets, params_by_path = find_targets(peer_params, params, names), paths(params)
    surplus = [key for key in peer_params if key not in targets]
    if surplus:
        raise ValueError(f"names has no entry for {surplus}.")
    arrays = {
        target.path: target.to_ours(
            repr(key),
            _arrays.read_array(repr(key), peer_params[str(key)]),
            jnp.shape(params_by_path[target.path]),
        )
        for key, target in targets.items()
    }
    missing = [path for path in params_by_path if path not in arrays]
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
    params_by_path = paths(params)
    names = peer_names(params) if names is None else names
    targets = find_targets(names, params, names)
    missing = sorted(set(params_by_path) - {target.path for target in targets.values()})
    if missing:
        raise ValueError(f"names does not lead to {missing}.")
    return {
        str(key): to_array(target.to_peer(np.asarray(params_by_path[target.path])))
        for key, target in targets.items()
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
        module, name = parts[:-1], parts[-1]
        for length in range(len(module), 0, -1):
            known = "/".join(module[:length])
            if known in modules:
                module = [modules[known], *module[length:]]
                used.add(known)
                break
        peer_name = {"kernel": "weight", "scale": "weight", "embedding": "weight"}.get(name, name)
        ndim = jnp.ndim(leaf)
        key = ".".join([*module, peer_name])
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
