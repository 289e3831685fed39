"""`torch.optim.Adamax`: its constructor, and its ``state_dict`` in and out."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import optax
from jax.typing import DTypeLike

from optax_adamax import _checks
from optax_adamax._transform import scale_by_adamax
from optax_adamax.compat import _arguments, _complex, _groups, _mapping, _state_dict
from optax_adamax.compat._mapping import Entry, Key, Names, dump_params, load_params

__all__ = ["adamax", "dump_params", "dump_state", "flax_names", "load_params", "load_state"]


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
    groups: _groups.Groups | None = None,
    labels: Any = None,
    m_dtype: DTypeLike | None = None,
    v_dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""`torch.optim.Adamax` without its first argument: optax gives ``init`` the parameters.

    .. math::

        g_t &\leftarrow \pm g_t + \lambda \theta_{t-1} \\
        m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t \\
        u_t &= \max(\beta_2 u_{t-1}, |g_t| + \varepsilon) \\
        \theta_t &= \theta_{t-1} - \gamma m_t / ((1 - \beta_1^t) u_t)

    Complex parameters are pairs of reals, as in PyTorch. The gradient of a real function of
    complex parameters is conjugate in JAX to that of PyTorch: take ``jnp.conj`` of what
    :func:`jax.grad` returns.

    Args:
      lr: :math:`\gamma` >= 0, a number or a schedule of the step count.
      betas: decay rates of the first moment and of the infinity norm, both in [0, 1).
      eps: :math:`\varepsilon` >= 0, in the units of the gradient.
      weight_decay: :math:`\lambda` >= 0 of an L2 penalty, added to the gradient.
      foreach: accepted and of no effect: XLA fuses.
      maximize: whether to climb, by changing the sign of the gradient (not of the weight decay).
      differentiable: accepted and of no effect: an optax update can always be differentiated.
      capturable: accepted and of no effect: `jax.jit` takes the place of CUDA graphs.
      groups: PyTorch's parameter groups, each a dict of the hyperparameters in which it differs.
        In a list each chooses its parameters by ``"params"``: a pattern, searched in the
        parameter's path (``"head/.*kernel"``), a tree of booleans like the parameters (or a prefix
        of it), or a function from the parameters to such a tree; one without ``"params"`` takes
        the rest. Or a dict of groups by label, with `labels`.
      labels: a tree of labels like the parameters (or a prefix of it), or a function from the
        parameters to it, as in :func:`optax.partition`.
      m_dtype: dtype in which the first moment is kept, see :func:`optax_adamax.scale_by_adamax`.
      v_dtype: dtype in which the infinity norm is kept, likewise.

    Returns:
      The transformation. With weight decay its ``update`` needs the parameters as its third
      argument.

    Where PyTorch goes wrong we do not follow: with bfloat16 parameters its u never decays, in
    float16 a zero gradient gives NaN, and so does one with ``eps=0`` in every dtype.

    Raises:
      ValueError: a hyperparameter out of range; from ``init``, a parameter in no group or in two.
      TypeError: a hyperparameter of the wrong type.

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
    del foreach, differentiable, capturable

    def make(
        lr: Any, betas: Any, eps: Any, weight_decay: Any, maximize: Any
    ) -> optax.GradientTransformationExtraArgs:
        b1, b2 = _arguments.check_betas(betas)
        _checks.check_rate("lr", lr)
        _checks.check_flag("maximize", maximize)
        return _complex.by_parts(
            optax.chain(
                *([optax.scale(-1.0)] if maximize else []),
                *_arguments.l2_decay(weight_decay),
                scale_by_adamax(b1, b2, eps, m_dtype=m_dtype, v_dtype=v_dtype),
                optax.scale_by_learning_rate(lr),
            )
        )

    defaults = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, maximize=maximize)
    ignored = ("foreach", "differentiable", "capturable")
    return _groups.partition(make, defaults, groups, labels, ignored)


def load_state(
    state_dict: Mapping[str, Any],
    params: optax.Params,
    tx: optax.GradientTransformation,
    names: Names | None = None,
    *,
    order: Sequence[str] | None = None,
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

    Returns:
      The state. Counters of schedules stand at the step of their parameters.

    Raises:
      ValueError: a missing, surplus or misshapen entry, parameters of one group that have taken
        different numbers of steps, or names that do not fit.
      TypeError: an entry of the wrong type.

    Example:
      >>> import numpy as np, jax.numpy as jnp
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
    return _state_dict.load(state_dict, params, tx, names, order)


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
    return _state_dict.dump(
        state,
        params,
        param_groups,
        names,
        order,
        to_array,
        to_step=lambda step: to_array(np.array(step, np.float32)),
    )


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
