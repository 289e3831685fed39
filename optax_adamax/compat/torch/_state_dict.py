"""The ``state_dict`` of `torch.optim.Adamax`, in and out."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import optax

from optax_adamax.compat import _arrays, _params, _transfer
from optax_adamax.compat._layout import Entry, Key, Layout
from optax_adamax.compat._moments import Moments
from optax_adamax.compat._paths import check_order
from optax_adamax.compat._transfer import Missing

FIELDS = ("exp_avg", "exp_inf", "step")
Names = Sequence[str] | Sequence[Sequence[str]]


def load_state(
    state_dict: Mapping[str, Any],
    params: optax.Params,
    tx: optax.GradientTransformation,
    layout: Layout | None = None,
    *,
    names: Names | None = None,
    missing: Missing = "raise",
    source_params: Mapping[str, Any] | None = None,
) -> optax.OptState:
    """Returns the state of `tx`, continued from PyTorch.

    Args:
      state_dict: of a `torch.optim.Adamax`: ``optimizer.state_dict()``, or the result of
        `torch.load`. Its tensors may be NumPy arrays, or anything that NumPy can read.
      params: the parameters.
      tx: the transformation, an :func:`adamax` by itself or within others. Its hyperparameters are
        used, those of the state dict are not; a constant learning rate that differs is a warning.
      layout: the function that moved the weights, from arrays by name to a tree like `params`; it
        is called with m, with v and with marks, and must only move elements. Or a mapping: for each
        parameter's name in PyTorch its path in `params`, such as ``"params/Dense_0/kernel"``, or a
        pair of path and the order of axes that makes PyTorch's array the parameter, or None to
        leave it out. If the parameter has another number of axes than the pair, neighbouring axes
        are grouped or divided. None: the name with "/" for ".". :func:`flax_names` makes a mapping
        for Flax.
      names: the names of the parameters as the optimizer has them, because a state dict has only
        numbers: a list for each group, as :func:`names_of` returns them; for a single group a list
        of strings is enough, ``[name for name, _ in model.named_parameters()]``. None: the
        ``param_names`` of the state dict if there are any (the optimizer was given
        ``model.named_parameters()``), else the numbers are the names.
      missing: parameters without moments, because they never had a gradient, ``"raise"`` an error
        or start at ``"zero"``. One group has one count: the first steps of such a parameter are
        shorter than in PyTorch, by ``1 - betas[0]**t``, unless it is in a group of its own.
      source_params: ``model.state_dict()``, of which a function as `layout` needs the shapes for
        parameters without moments.

    Returns:
      The state. The counts of Adamax, of schedules in its chain and of
      :func:`optax.inject_hyperparams` around it are set. Other counters (of another optimizer, of
      :func:`optax.ema`, of `optax.MultiSteps`) have the values of `tx.init`.

    Raises:
      ValueError: a missing, surplus or misshapen entry, parameters of one group that have taken
        different numbers of steps, names that do not fit, groups that are not those of `tx`,
        moments that are not those of Adamax, or an infinity norm out of the range of ``v_dtype``.
      TypeError: an entry of the wrong type, or the name of a file.

    Warns:
      UserWarning: the learning rate of `tx` is constant and differs from that of the state dict.

    Example:
      >>> import jax.numpy as jnp, numpy as np, optax
      >>> from optax_adamax.compat import torch as compat_torch
      >>> state_dict = {
      ...     "state": {0: {"step": 25.0, "exp_avg": np.ones((3, 2)), "exp_inf": np.ones((3, 2))}},
      ...     "param_groups": [{"lr": 2e-3, "betas": (0.9, 0.999), "params": [0]}],
      ... }
      >>> params = {"kernel": jnp.zeros((2, 3))}
      >>> tx = compat_torch.adamax(lr=2e-3)
      >>> layout = {"weight": ("kernel", (1, 0))}
      >>> state = compat_torch.load_state(state_dict, params, tx, layout, names=["weight"])
      >>> print(optax.tree.get(state, "count"), optax.tree.get(state, "m")["kernel"].shape)
      25 (2, 3)
      >>> from_torch = lambda arrays: {"kernel": jnp.asarray(arrays["weight"]).T}
      >>> state = compat_torch.load_state(state_dict, params, tx, from_torch, names=["weight"])
    """
    _arrays.check_is_read("The state_dict of an optimizer", state_dict)
    for field in ("state", "param_groups"):
        if field not in state_dict:
            raise ValueError(
                f"There is no {field!r} in what was given: it must be the state_dict of an "
                f"optimizer, not of a model."
            )
    groups = _name_groups(state_dict["param_groups"], names)
    name_of = {number: name for group in groups for number, name in group.items()}
    entries = state_dict["state"]
    unknown = [f"state[{number!r}]" for number in entries if number not in name_of]
    if unknown:
        raise ValueError(f"{unknown} belong to no parameter of 'param_groups'.")
    source = Moments({}, {}, {})
    for number, name in name_of.items():
        if number in entries:
            _read(number, name, entries[number], source)
    rates = [_rate(group) for group in state_dict["param_groups"]]
    return _transfer.load(
        source,
        params,
        tx,
        layout,
        name_of.values(),
        missing=missing,
        source_params=source_params,
        groups=[dict.fromkeys(g.values(), rate) for g, rate in zip(groups, rates, strict=True)],
        example=next((entry["exp_avg"] for entry in entries.values()), None),
    )


def dump_state(
    state: optax.OptState,
    params: optax.Params,
    param_groups: Sequence[Mapping[str, Any]],
    layout: Layout | None = None,
    *,
    names: Names | None = None,
    source_params: Mapping[str, Any] | None = None,
    to_array: Callable[[np.ndarray], Any] = np.asarray,
) -> dict[str, Any]:
    """Returns the state as a state dict for PyTorch, the inverse of :func:`load_state`.

    Args:
      state: of an :func:`adamax`, by itself or within others.
      params: the parameters.
      param_groups: those of the optimizer that is to continue,
        ``optimizer.state_dict()["param_groups"]``, because an optax state has no hyperparameters.
        Set ``"lr"`` there, or in the optimizer, if a schedule has changed it.
      layout: a mapping as for :func:`load_state`, or the function that moves weights back, from a
        tree like `params` to arrays by name.
      names: see :func:`load_state`.
      source_params: ``model.state_dict()``, of which a mapping that regroups axes needs the
        shapes.
      to_array: makes a tensor from a NumPy array: `torch.from_numpy` for
        ``optimizer.load_state_dict``.

    Returns:
      The state dict. Moments are float32, or float64 if the state has float64 moments;
      ``load_state_dict`` casts them to the dtypes of PyTorch's parameters.

    Raises:
      ValueError: names or a layout that do not fit.
    """
    groups = _name_groups(param_groups, names)
    name_of = {number: name for group in groups for number, name in group.items()}
    moments = _transfer.dump(state, params, layout, name_of.values(), source_params)
    entries = {
        number: {
            "step": to_array(np.array(moments.step[name], np.float32)),
            "exp_avg": to_array(moments.m[name]),
            "exp_inf": to_array(moments.v[name]),
        }
        for number, name in name_of.items()
        if name in moments.step
    }
    copies = [{**group, "params": list(group["params"])} for group in param_groups]
    return {"state": entries, "param_groups": copies}


def names_of(optimizer: Any, model: Any) -> list[list[str]]:
    """Returns the names of an optimizer's parameters, a list for each group.

    Save them with the optimizer's state dict, which has only numbers.

    Args:
      optimizer: a `torch.optim.Optimizer`.
      model: a `torch.nn.Module` that has all parameters of the optimizer.

    Returns:
      The names, matched by the identity of parameters.

    Raises:
      ValueError: a parameter of the optimizer that the model does not have.

    Example:
      >>> from types import SimpleNamespace
      >>> from optax_adamax.compat import torch as compat_torch
      >>> weight, bias = object(), object()  # parameters of PyTorch
      >>> model = SimpleNamespace(named_parameters=lambda: [("weight", weight), ("bias", bias)])
      >>> optimizer = SimpleNamespace(param_groups=[{"params": [bias]}, {"params": [weight]}])
      >>> compat_torch.names_of(optimizer, model)
      [['bias'], ['weight']]
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = [group["params"] for group in optimizer.param_groups]
    for i, group in enumerate(groups):
        for j, parameter in enumerate(group):
            if id(parameter) not in names:
                raise ValueError(
                    f"Parameter {j} of group {i} is not one of model.named_parameters(): give the "
                    f"module that has all parameters of the optimizer."
                )
    return [[names[id(parameter)] for parameter in group] for group in groups]


def flax_names(params: optax.Params, modules: Mapping[str, str] | None = None) -> dict[Key, Entry]:
    """Returns a layout for :func:`load_state` if `params` are those of a Flax module.

    Flax's ``kernel`` is the transpose of PyTorch's ``weight``, for linear layers and for
    convolutions of any dimension; ``scale`` of a norm and ``embedding`` are called ``weight``, and
    ``batch_stats`` are ``running_mean`` and ``running_var``. Transposed convolutions, attention
    and recurrent cells have other layouts: add their entries by hand, or use a function. So does
    a linear layer after a flattened image, whose inputs PyTorch orders by channel, row and column,
    Flax by row, column and channel.

    Args:
      params: the parameters of the Flax module, under ``"params"`` or not.
      modules: names of PyTorch's modules by the paths of Flax's, where they differ in more than
        "." for "/". A path stands for everything below it.

    Returns:
      The entries by PyTorch's names.

    Raises:
      ValueError: an entry of `modules` that is not a module of `params`.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_adamax.compat import torch as compat_torch
      >>> params = {"Dense_0": {"bias": jnp.zeros(3), "kernel": jnp.zeros((2, 3))}}
      >>> compat_torch.flax_names(params, {"Dense_0": "fc1"})
      {'fc1.bias': 'Dense_0/bias', 'fc1.weight': ('Dense_0/kernel', (1, 0))}
    """
    return _params.flax_names(params, modules, channels_last=False)


def _name_groups(
    param_groups: Sequence[Mapping[str, Any]], names: Names | None
) -> list[dict[Key, Key]]:
    """Returns the name of each parameter by its number, for each group.

    Raises:
      ValueError: groups without parameters, or `names` that do not fit them.
    """
    if not all("params" in group for group in param_groups):
        raise ValueError("Each of param_groups must have the entry 'params', a list of numbers.")
    numbers = [list(group["params"]) for group in param_groups]
    listed: list[list[Key]] | None = None
    if names is not None:
        listed = [[names] if isinstance(names, str) else list(names) for names in names]
        if listed and all(isinstance(name, str) for name in names):
            if len(numbers) > 1:
                raise ValueError(
                    f"The optimizer has {len(numbers)} groups, whose order may differ from that of "
                    f"model.named_parameters(): give `names` as a list for each group, "
                    f"names_of(optimizer, model)."
                )
            listed = [[name for group in listed for name in group]]
    if any("param_names" in group for group in param_groups):
        known = [list(group.get("param_names", ())) for group in param_groups]
        if listed not in (None, known):
            raise ValueError(f"names is {listed}, but param_groups has the param_names {known}.")
        listed = known
    listed = numbers if listed is None else listed
    lengths = [len(group) for group in listed], [len(group) for group in numbers]
    if lengths[0] != lengths[1]:
        raise ValueError(
            f"names has {lengths[0]} names, but the groups have {lengths[1]} parameters: {listed}."
        )
    check_order([name for group in listed for name in group])
    return [dict(zip(*pair, strict=True)) for pair in zip(numbers, listed, strict=True)]


def _rate(group: Mapping[str, Any]) -> float | None:
    try:
        return float(group["lr"])
    except (KeyError, TypeError, ValueError):
        return None


def _read(number: Key, name: Key, entry: Any, source: Moments) -> None:
    """Adds the moments of one parameter to `source`."""
    where = f"state[{number!r}]" + ("" if name == number else f" ({name!r})")
    if not isinstance(entry, Mapping):
        raise TypeError(f"{where} must be a dict, but it is a {type(entry).__name__}.")
    missing = [field for field in FIELDS if field not in entry]
    surplus = [field for field in entry if field not in FIELDS]
    if missing:
        raise ValueError(f"{where} has no {missing}: it has {list(entry)}.")
    if surplus:
        raise ValueError(f"{where} has {surplus}, which Adamax does not have.")
    source.m[name] = _arrays.read_array(f"{where}['exp_avg']", entry["exp_avg"])
    source.v[name] = _arrays.read_array(f"{where}['exp_inf']", entry["exp_inf"])
    source.step[name] = _arrays.read_step(f"{where}['step']", entry["step"])
    if source.m[name].shape != source.v[name].shape:
        shapes = f"{source.m[name].shape} and {source.v[name].shape}"
        raise ValueError(f"{where}: 'exp_avg' and 'exp_inf' have the shapes {shapes}.")
