"""The parameters themselves, and layouts for those of Flax modules."""

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax

from optax_adamax.compat import _arrays, _plan
from optax_adamax.compat._layout import Entry, Key, Layout
from optax_adamax.compat._moments import put_tree
from optax_adamax.compat._paths import paths

BUFFERS = ("running_mean", "running_var")  # of PyTorch's and MLX's BatchNorm


def load_params(
    source_params: Mapping[str, Any], params: optax.Params, layout: Layout | None = None
) -> optax.Params:
    """Returns the source's parameters as a tree like `params`.

    Arrays for which `layout` has no place raise an error, except for arrays of integers, the
    statistics of batch norms (to load them, give a tree that has them) and a second name of an
    array that has a place, as tied weights have it in PyTorch. Other buffers are left out by the
    entry None, or by ``dict(model.named_parameters())`` instead of ``model.state_dict()``.

    Args:
      source_params: the source's arrays by name.
      params: the parameters, of which structure, shapes, dtypes and shardings are used.
      layout: see `load_state`.

    Returns:
      A tree like `params`. Each array has the dtype and the sharding of its template.

    Raises:
      TypeError: an array that cannot be read.
      ValueError: a missing, surplus or misshapen array.
    """
    _arrays.check_is_read("A mapping of the source's parameters by name", source_params)
    by_path, named = paths(params), dict(layout) if isinstance(layout, Mapping) else {}
    values = {
        name: x
        for name, x in source_params.items()
        if named.get(name, "") is not None
        and (name in named or not _is_integer(x))
        and (layout is not None or not _is_buffer(name) or name.replace(".", "/") in by_path)
    }
    arrays = {name: _arrays.read_array(repr(name), x) for name, x in values.items()}
    shapes, names = {name: x.shape for name, x in arrays.items()}, [*named, *values]
    make = _arrays.maker_like(next(iter(values.values()), None))
    unknown = [name for name in named if name not in source_params]
    if unknown:
        raise ValueError(f"layout has entries for {unknown}, but there are {list(source_params)}.")
    plan = _plan.plan_load(layout, names, shapes, params, make)
    tied = {_memory_of(values[k]) for origin in plan.origins.values() for k in origin}
    surplus = [k for k in plan.unused if not _is_buffer(k) and _memory_of(values[k]) not in tied]
    if surplus:
        raise ValueError(
            f"The layout has no place for {surplus}. If they are buffers, give "
            f"dict(model.named_parameters()), or the entry None for each."
        )
    missing = [path for path in by_path if path not in plan.origins]
    if missing:
        raise ValueError(f"There is nothing for the parameters {missing}.")
    return put_tree(params, plan.move(arrays))


def dump_params(
    params: optax.Params,
    layout: Layout | None = None,
    *,
    source_params: Mapping[str, Any] | None = None,
    to_array: Callable[[np.ndarray], Any] = np.asarray,
) -> dict[str, Any]:
    """Returns the parameters as the source's arrays by name, the inverse of :func:`load_params`.

    Args:
      params: the parameters.
      layout: a mapping as for `load_state`, or the function that moves weights back. None: the
        names are the paths with "." for "/".
      source_params: the source's parameters by name. Only their shapes are used, by a mapping that
        regroups axes.
      to_array: makes an array of the source framework from a NumPy array.

    Returns:
      The arrays by name.

    Raises:
      ValueError: a layout that does not lead to every parameter.
    """
    plan = _plan.plan_dump(layout, None, params, source_params)
    if plan.unused:
        raise ValueError(f"The layout does not lead to {plan.unused}.")
    arrays = {path: _arrays.fetch(x) for path, x in paths(params).items()}
    return {str(name): to_array(x) for name, x in plan.move(arrays).items()}


def flax_names(
    params: optax.Params, modules: Mapping[str, str] | None, *, channels_last: bool
) -> dict[Key, Entry]:
    """Returns a layout for the parameters of Flax modules, see `compat.torch.flax_names`.

    Args:
      params: the parameters of the Flax module.
      modules: names of the source's modules by the paths of Flax's.
      channels_last: whether the source's convolutions are (out, *space, in) or
        (out, in, *space).
    """
    modules, used, names = dict(modules or {}), set(), {}
    renamed = {"kernel": "weight", "scale": "weight", "embedding": "weight"}
    for path, leaf in paths(params).items():
        parts = path.split("/")
        statistics = (
            {"mean": "running_mean", "var": "running_var"} if parts[0] == "batch_stats" else {}
        )
        parts = parts[1:] if parts[0] in ("params", "batch_stats") else parts
        module, name = parts[:-1], parts[-1]
        for length in range(len(module), 0, -1):
            known = "/".join(module[:length])
            if known in modules:
                module = [modules[known], *module[length:]]
                used.add(known)
                break
        key, ndim = ".".join([*module, (renamed | statistics).get(name, name)]), jnp.ndim(leaf)
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


def _is_buffer(name: str) -> bool:
    return str(name).rsplit(".", 1)[-1] in BUFFERS


def _is_integer(value: Any) -> bool:
    dtype = str(getattr(value, "dtype", "")).rsplit(".", 1)[-1]
    return dtype.startswith(("int", "uint", "bool"))


def _memory_of(value: Any) -> Any:
    """What two names of one array have in common."""
    if hasattr(value, "data_ptr"):
        return value.data_ptr(), tuple(value.shape)
    return (value.ctypes.data, value.shape) if isinstance(value, np.ndarray) else id(value)
