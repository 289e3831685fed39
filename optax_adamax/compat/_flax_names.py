"""The layout of a Flax module whose parameters come from PyTorch, Lucid or MLX."""

from collections.abc import Mapping

import jax.numpy as jnp
import optax

from optax_adamax.compat._layout import Entry, Key, paths


def flax_names(
    params: optax.Params, modules: Mapping[str, str] | None, *, channels_last: bool
) -> dict[Key, Entry]:
    """Returns a layout for the parameters of Flax modules, see `compat.torch.flax_names`.

    Args:
      params: the parameters of the Flax module.
      modules: names of the source's modules by the paths of Flax's.
      channels_last: whether the source's convolutions are (out, *space, in) or (out, in, *space).
    """
    modules, used = dict(modules or {}), set()
    names: dict[Key, Entry] = {}
    for path, leaf in paths(params).items():
        renamed = {"kernel": "weight", "scale": "weight", "embedding": "weight"}
        collection, _, below = path.partition("/")
        if collection == "batch_stats":
            renamed |= {"mean": "running_mean", "var": "running_var"}
        *module, name = (below if collection in ("params", "batch_stats") else path).split("/")
        for length in range(len(module), 0, -1):
            known = "/".join(module[:length])
            if known in modules:
                module = [modules[known], *module[length:]]
                used.add(known)
                break
        key, ndim = ".".join([*module, renamed.get(name, name)]), jnp.ndim(leaf)
        if name != "kernel" or ndim < 2:
            names[key] = path
        elif ndim == 2 or channels_last:
            names[key] = (path, (*range(1, ndim), 0))
        else:
            names[key] = (path, (*range(2, ndim), 1, 0))
    unused = sorted(set(modules) - used)
    if unused:
        raise ValueError(f"modules must have paths of modules in params, but {unused} are not.")
    return names
