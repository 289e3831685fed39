"""The ``state_dict`` of `torch.optim.Adamax`, in and out."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import optax

from optax_adamax.compat import _mapping, _state
from optax_adamax.compat._mapping import Entry, Key, Names
from optax_adamax.compat._state import Missing, PeerMoments, PeerValue

FIELDS = ("exp_avg", "exp_inf", "step")


def load_state(
    state_dict: Mapping[str, Any],
    params: optax.Params,
    tx: optax.GradientTransformation,
    names: Names | None = None,
    *,
    order: Sequence[str] | None = None,
    missing: Missing = "refuse",
) -> optax.OptState:
    """The state of `tx`, continued from PyTorch.

    Args:
      state_dict: of a `torch.optim.Adamax`: ``optimizer.state_dict()``, or what `torch.load`
        reads. Its tensors may be NumPy arrays, or whatever NumPy can read.
      params: our parameters.
      tx: our transformation, an :func:`adamax` by itself or within others. The hyperparameters
        are those it was made with: the ones in the state dict are not read.
      names: for each parameter's name in PyTorch its path in `params`, such as
        ``"params/Dense_0/kernel"``, or a pair of path and the permutation of axes that makes
        PyTorch's array ours. None: the name with "/" for ".", nothing permuted.
        :func:`flax_names` makes them for Flax.
      order: the names in the order in which the optimizer got the parameters,
        ``[name for name, _ in model.named_parameters()]``: a state dict has numbers. None: the
        ``param_names`` in the state dict if there are any (the optimizer was given
        ``model.named_parameters()``), else the numbers are the names.
      missing: what becomes of a parameter for which there is nothing, because it never had a
        gradient: ``"refuse"`` it, or start it at ``"zero"``. One group has one count here: the
        first steps of a parameter among older ones are shorter than in PyTorch, by
        ``1 - betas[0]**t``, unless it is in a group of its own.

    Returns:
      The state. Beside the count of Adamax, those of the schedules in its chain and of
      :func:`optax.inject_hyperparams` around it are set. Other counters (of another optimizer, of
      :func:`optax.ema`, of `optax.MultiSteps`) stand where `tx.init` puts them.

    Raises:
      ValueError: a missing, surplus or misshapen entry, parameters of one group that have taken
        different numbers of steps, names that do not fit, moments that are not those of Adamax,
        or an infinity norm out of the range of ``v_dtype``.
      TypeError: an entry of the wrong type.

    Example:
      >>> import jax.numpy as jnp, numpy as np, optax
      >>> from optax_adamax.compat import torch as compat_torch
      >>> state_dict = {
      ...     "state": {0: {"step": 25.0, "exp_avg": np.ones((3, 2)), "exp_inf": np.ones((3, 2))}},
      ...     "param_groups": [{"lr": 2e-3, "betas": (0.9, 0.999), "params": [0]}],
      ... }
      >>> params = {"kernel": jnp.zeros((2, 3))}
      >>> tx = compat_torch.adamax(lr=2e-3)
      >>> names = {"weight": ("kernel", (1, 0))}
      >>> state = compat_torch.load_state(state_dict, params, tx, names, order=["weight"])
      >>> print(optax.tree.get(state, "count"), optax.tree.get(state, "m")["kernel"].shape)
      25 (2, 3)
    """
    for field in ("state", "param_groups"):
        if not isinstance(state_dict, Mapping) or field not in state_dict:
            raise ValueError(
                f"There is no {field!r} in what was given: it must be the state_dict of an "
                f"optimizer, not of a model."
            )
    keys = _keys_by_id(state_dict["param_groups"], order)
    entries = state_dict["state"]
    unknown = [f"state[{i!r}]" for i in entries if i not in keys]
    if unknown:
        raise ValueError(f"{unknown} belong to no parameter of 'param_groups'.")
    peer_state = {
        key: _read(i, key, entries[i]) if i in entries else None for i, key in keys.items()
    }
    return _state.load(tx, params, peer_state, names, missing)


def dump_state(
    state: optax.OptState,
    params: optax.Params,
    param_groups: Sequence[Mapping[str, Any]],
    names: Names | None = None,
    *,
    order: Sequence[str] | None = None,
    to_array: Callable[[np.ndarray], Any] = np.asarray,
) -> dict[str, Any]:
    """The state as a state dict for PyTorch, the inverse of :func:`load_state`.

    Args:
      state: of an :func:`adamax`, by itself or within others.
      params: our parameters.
      param_groups: those of the optimizer that is to continue,
        ``optimizer.state_dict()["param_groups"]``: optax has no hyperparameters in its state.
      names: see :func:`load_state`.
      order: see :func:`load_state`.
      to_array: what makes a tensor of a NumPy array: `torch.from_numpy` for
        ``optimizer.load_state_dict``.

    Returns:
      The state dict. Moments are in float32, or in float64 where ours are, which
      ``load_state_dict`` casts to the dtypes of PyTorch's parameters.

    Raises:
      ValueError: names that do not fit.
    """
    keys = _keys_by_id(param_groups, order)
    found = _state.dump(state, params, list(keys.values()), names)
    entries = {
        i: {
            "step": to_array(np.array(found[key].step, np.float32)),
            "exp_avg": to_array(found[key].m),
            "exp_inf": to_array(found[key].v),
        }
        for i, key in keys.items()
        if key in found
    }
    return {"state": entries, "param_groups": [dict(group) for group in param_groups]}


def flax_names(params: optax.Params, modules: Mapping[str, str] | None = None) -> dict[Key, Entry]:
    """Names for :func:`load_state` where `params` are those of a Flax module.

    Flax's ``kernel`` is the transpose of PyTorch's ``weight``, for linear layers and for
    convolutions of any dimension; ``scale`` of a norm and ``embedding`` are called ``weight``.
    Transposed convolutions, attention and recurrent cells are laid out otherwise: write their
    entries by hand. So is a linear layer behind a flattened image, whose inputs PyTorch orders by
    channel, row and column, Flax by row, column and channel.

    Args:
      params: the parameters of the Flax module, under ``"params"`` or not.
      modules: names of PyTorch's modules by the paths of Flax's, where they differ in more than
        "." for "/". A path stands for what is below it too.

    Returns:
      The entries by PyTorch's names.

    Raises:
      ValueError: an entry of `modules` that is no module of `params`.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_adamax.compat import torch as compat_torch
      >>> params = {"Dense_0": {"bias": jnp.zeros(3), "kernel": jnp.zeros((2, 3))}}
      >>> compat_torch.flax_names(params, {"Dense_0": "fc1"})
      {'fc1.bias': 'Dense_0/bias', 'fc1.weight': ('Dense_0/kernel', (1, 0))}
    """
    return _mapping.flax_names(params, modules, channels_last=False)


def _keys_by_id(
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
    _mapping.check_order(order)
    return dict(zip(ids, order, strict=True))


def _read(number: Key, key: Key, entry: Mapping[str, Any]) -> PeerMoments:
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
    m, v, step = (PeerValue(f"{where}[{field!r}]", entry[field]) for field in FIELDS)
    return PeerMoments(m, v, step)
