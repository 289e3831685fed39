"""`torch.optim.Adamax`: its constructor, and its ``state_dict`` in and out."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import optax
from jax.typing import DTypeLike

from optax_adamax import _checks
from optax_adamax._messages import describe_value
from optax_adamax._transform import scale_by_adamax
from optax_adamax.compat import _arguments, _arrays, _flax_names, _layout, _transfer
from optax_adamax.compat._arithmetic import compute_in_float32
from optax_adamax.compat._comparison import Hyperparameters
from optax_adamax.compat._layout import Entry as Entry
from optax_adamax.compat._layout import Key as Key
from optax_adamax.compat._layout import Layout as Layout
from optax_adamax.compat._moments import Moments
from optax_adamax.compat._transfer import Missing, dump_params, load_params

__all__ = [
    "adamax",
    "dump_params",
    "dump_state",
    "flax_names",
    "load_params",
    "load_state",
    "names_of",
]

Names = Sequence[str] | Sequence[Sequence[str]]
_FIELDS = ("exp_avg", "exp_inf", "step")
# Keys in the groups of an optimizer or a state dict that change nothing: options of PyTorch's
# implementation, names, and the notes of LRScheduler, OneCycleLR, CyclicLR and SWALR.
_IGNORED = (
    *("foreach", "differentiable", "capturable", "param_names", "initial_lr", "max_lr", "min_lr"),
    *("max_momentum", "base_momentum", "swa_lr"),
)


def __dir__() -> list[str]:
    return list(__all__)


@_arguments.without_params
def adamax(
    lr: optax.ScalarOrSchedule = 2e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0,
    foreach: bool | None = None,
    *,
    maximize: bool = False,
    differentiable: bool = False,
    capturable: bool = False,
    groups: _arguments.Groups | None = None,
    labels: Any = None,
    m_dtype: DTypeLike | None = None,
    v_dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Returns Adamax with the arguments of `torch.optim.Adamax`, except the parameters.

    .. math::

        g_t &\leftarrow \pm g_t + \lambda \theta_{t-1} \\
        m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t \\
        u_t &= \max(\beta_2 u_{t-1}, |g_t| + \varepsilon) \\
        \theta_t &= \theta_{t-1} - \gamma m_t / ((1 - \beta_1^t) u_t)

    As in PyTorch, complex parameters are pairs of reals. The gradient of a real function of
    complex parameters in JAX is the conjugate of the gradient in PyTorch. Pass the ``jnp.conj`` of
    the result of :func:`jax.grad`.

    Args:
      lr: :math:`\gamma` >= 0, a number or a schedule of the step count.
      betas: decay rates of the first moment and of the infinity norm, both in [0, 1).
      eps: :math:`\varepsilon` >= 0, in the units of the gradient.
      weight_decay: :math:`\lambda` >= 0 of an L2 penalty, added to the gradient.
      foreach: has no effect, because XLA fuses operations.
      maximize: whether to change the sign of the gradient (not of the weight decay).
      differentiable: has no effect: updates of float32 state are always differentiable.
      capturable: has no effect, because `jax.jit` replaces CUDA graphs.
      groups: PyTorch's parameter groups, each a dict of the hyperparameters that differ from the
        arguments above. In a list, ``"params"`` chooses the parameters of a group: a regular
        expression that is searched in the paths of the parameters (``"head/.*kernel"``), or a list
        of them, which may be empty. One group without ``"params"`` gets all other parameters. With
        `labels`, pass a dict of groups by label. Other keys that PyTorch and its schedulers write
        into groups (``foreach``, ``param_names``, ``initial_lr``, ``max_lr``) have no effect.
      labels: a tree of labels like the parameters (or a prefix of it), or a function from the
        parameters to that tree, as in :func:`optax.partition`.
      m_dtype: storage dtype of the first moment, see :func:`optax_adamax.scale_by_adamax`.
      v_dtype: storage dtype of the infinity norm.

    Returns:
      The transformation. With weight decay, ``update`` needs the parameters. All arithmetic is in
      float32 or float64. The updates have the wider of the dtypes of gradient and parameter.

    Deliberate differences from PyTorch: with bfloat16 parameters, PyTorch's u never decays. In
    float16, and with ``eps=0`` in every dtype, PyTorch's update for a zero gradient is NaN.

    Raises:
      ValueError: a hyperparameter is out of range; from ``init``, a parameter is in no group or in
        two, or no parameter matches a pattern.
      TypeError: an argument has the wrong type, or parameters were passed.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from optax_adamax.compat import torch as compat_torch
      >>> tx = compat_torch.adamax(lr=2e-3, weight_decay=0.1)
      >>> params = jnp.array([1.0, 2.0])
      >>> state = tx.init(params)
      >>> updates, state = tx.update(jnp.array([0.1, -0.3]), state, params)
      >>> print(optax.apply_updates(params, updates))
      [0.998 2.002]
      >>> tx = compat_torch.adamax(groups=[{"params": "bias$", "lr": 0.1}, {"weight_decay": 0.1}])
    """
    if foreach is not None:
        _checks.check_flag("foreach", foreach)
    _checks.check_flag("differentiable", differentiable)
    _checks.check_flag("capturable", capturable)

    def make(
        lr: Any, betas: Any, eps: Any, weight_decay: Any, maximize: Any
    ) -> optax.GradientTransformationExtraArgs:
        _checks.check_flag("maximize", maximize)
        chain = optax.chain(
            *([optax.scale(-1.0)] if maximize else []),
            *_arguments.l2_decay(weight_decay),
            scale_by_adamax(*_arguments.pair(betas), eps, m_dtype=m_dtype, v_dtype=v_dtype),
            optax.scale_by_learning_rate(_arguments.rate("lr", lr)),
        )
        return compute_in_float32(chain, split_complex=True)

    defaults = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, maximize=maximize)
    return _arguments.partition(make, defaults, groups, labels, _IGNORED)


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
        used. A constant learning rate, b1, b2 or L2 weight decay that differs from the state
        dict's is a warning; eps and maximize are not compared.
      layout: the function that moved the weights, from arrays by name to a tree like `params`. It
        must only move elements, and is called with m, with v, and first with marked arrays, which
        show that. Or a mapping from each parameter's name in PyTorch to its path in `params`, such
        as ``"params/Dense_0/kernel"``, or to a pair of the path and the order of axes that makes
        PyTorch's array the parameter, or to None to leave it out. If the parameter has another
        number of axes than the pair, neighbouring axes are merged or divided. None: the name with
        "/" for ".". :func:`flax_names` makes a mapping for Flax.
      names: the names of the parameters in the order of the optimizer, because a state dict has
        only numbers. A list for each group, as :func:`names_of` returns them; for a single group a
        list of strings is enough, ``[name for name, _ in model.named_parameters()]``. None: the
        ``param_names`` of the state dict, which it has if the optimizer was given
        ``model.named_parameters()``. Otherwise the numbers are the names.
      missing: for parameters without moments, because they never had a gradient: ``"raise"`` an
        error, or start at ``"zero"``. One group has one count, so the first steps of such a
        parameter are shorter than in PyTorch, by the factor ``1 - betas[0]**t``, unless it is in a
        group of its own.
      source_params: ``model.state_dict()``, of which a function as `layout` needs the shapes for
        parameters without moments.

    Returns:
      The state. `load_state` sets the counts of Adamax, of schedules in its chain, and of
      :func:`optax.inject_hyperparams` around it. Other counters (of another optimizer, of
      :func:`optax.ema`, of `optax.MultiSteps`) have the values of `tx.init`.

    Raises:
      ValueError: a missing, surplus or misshapen entry, parameters of one group that have taken
        different numbers of steps, names that do not fit, groups that are not groups of `tx`,
        moments of another optimizer, or an infinity norm out of the range of ``v_dtype``.
      TypeError: an entry of the wrong type, the name of a file, or a `tx` without Adamax.

    Warns:
      UserWarning: a constant hyperparameter of `tx` differs from the state dict's, or they
        cannot be measured because ``tx.update`` needs more than gradients.

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
    _arrays.check_is_read("the state_dict of an optimizer", state_dict)
    if not {"state", "param_groups"} <= set(state_dict):
        raise ValueError(
            f"The argument must be the state_dict of an optimizer, with the keys 'state' and "
            f"'param_groups', but {describe_value(state_dict)} was given. Pass "
            f"optimizer.state_dict(), or the entry in which a checkpoint contains it, such as "
            f"checkpoint['optimizer']. The model's is for load_params."
        )
    groups = _name_groups(state_dict["param_groups"], names)
    name_of = {number: name for group in groups for number, name in group.items()}
    entries = state_dict["state"]
    unknown = [number for number in entries if number not in name_of]
    if unknown:
        raise ValueError(
            f"'param_groups' must have the numbers of all parameters with moments, but {unknown} "
            f"are missing. Pass the state_dict as PyTorch has saved it."
        )
    source = Moments({}, {}, {})
    for number, name in name_of.items():
        if number in entries:
            entry = entries[number]
            if not isinstance(entry, Mapping) or set(entry) != set(_FIELDS):
                raise ValueError(
                    f"state[{number!r}] of {name!r} must be a dict with the entries {_FIELDS} of "
                    f"Adamax, but {describe_value(entry)} was given. Pass the state_dict of a "
                    f"torch.optim.Adamax."
                )
            source.add(name, *(entry[field] for field in _FIELDS))
    saved = [_read_hyperparameters(group) for group in state_dict["param_groups"]]
    return _transfer.load(
        source,
        params,
        tx,
        layout,
        name_of.values(),
        missing=missing,
        source_params=source_params,
        groups=[dict.fromkeys(g.values(), x) for g, x in zip(groups, saved, strict=True)],
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
      param_groups: the groups of the optimizer that continues the run,
        ``optimizer.state_dict()["param_groups"]``, because an optax state has no hyperparameters.
        If a schedule has changed the learning rate, set their ``"lr"``.
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
                    f"The model must have all parameters of the optimizer, but parameter {j} of "
                    f"group {i} is not in model.named_parameters(). Pass the whole module."
                )
    return [[names[id(parameter)] for parameter in group] for group in groups]


def flax_names(params: optax.Params, modules: Mapping[str, str] | None = None) -> dict[Key, Entry]:
    """Returns a layout for :func:`load_state` for the parameters of a Flax module.

    Flax's ``kernel`` is the transpose of PyTorch's ``weight``, for linear layers and for
    convolutions of any dimension. ``scale`` of a norm and ``embedding`` are called ``weight``, and
    ``batch_stats`` are ``running_mean`` and ``running_var``. Transposed convolutions, attention
    and recurrent cells have other layouts: add their entries by hand, or use a function. A linear
    layer after a flattened image needs a function, too, because PyTorch orders its inputs by
    channel, row and column, and Flax by row, column and channel.

    Args:
      params: the parameters of the Flax module, under ``"params"`` or not.
      modules: names of PyTorch's modules by the paths of Flax's, where they differ in more than
        "." for "/". A path applies to all paths below it.

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
    return _flax_names.flax_names(params, modules, channels_last=False)


def _name_groups(
    param_groups: Sequence[Mapping[str, Any]], names: Names | None
) -> list[dict[Key, Key]]:
    """Returns the name of each parameter by its number, for each group.

    Raises:
      ValueError: groups without parameters, or `names` that do not fit them.
    """
    if not all("params" in group for group in param_groups):
        raise ValueError(
            "Each of param_groups must have the entry 'params', but one has none. Pass "
            'optimizer.state_dict()["param_groups"].'
        )
    numbers: list[list[Key]] = [list(group["params"]) for group in param_groups]
    listed: list[list[Key]] | None = None
    if names is not None:
        given: list[Any] = list(names)
        is_flat = bool(given) and all(isinstance(name, str) for name in given)
        listed = [given] if is_flat else [list(group) for group in given]
    if any("param_names" in group for group in param_groups):
        known = [list(group.get("param_names", ())) for group in param_groups]
        if listed not in (None, known):
            raise ValueError(
                f"names must be the param_names of param_groups, {known}, but {listed} was given. "
                f"Leave it out."
            )
        listed = known
    listed = numbers if listed is None else listed
    lengths, wanted = ([len(group) for group in groups] for groups in (listed, numbers))
    if lengths != wanted:
        raise ValueError(
            f"names must have a list for each group of parameters, with {wanted} names, but "
            f"{lengths} were given: {listed}. Give names_of(optimizer, model), because groups may "
            f"have another order than model.named_parameters()."
        )
    _layout.check_unique([name for group in listed for name in group], _layout.OWN_NAMES)
    return [dict(zip(*pair, strict=True)) for pair in zip(numbers, listed, strict=True)]


def _read_hyperparameters(group: Mapping[str, Any]) -> Hyperparameters:
    """Returns the hyperparameters of a group; a group that was written by hand may have none."""
    betas = group.get("betas") or (None, None)
    values = (group.get("lr"), *betas, group.get("weight_decay"))
    return Hyperparameters(*(None if x is None else float(x) for x in values))
