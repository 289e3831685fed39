"""The constructor of `torch.optim.Adamax`."""

from typing import Any

import optax
from jax.typing import DTypeLike

from optax_adamax import _checks
from optax_adamax._transform import scale_by_adamax
from optax_adamax.compat import _arguments, _groups
from optax_adamax.compat._arithmetic import compute_in_float32

# Keys in the groups of an optimizer or a state dict that change nothing: options of PyTorch's
# implementation, names, and the notes of LRScheduler, OneCycleLR, CyclicLR and SWALR.
_IGNORED = (
    *("foreach", "differentiable", "capturable", "param_names", "initial_lr", "max_lr", "min_lr"),
    *("max_momentum", "base_momentum", "swa_lr"),
)


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
    groups: _groups.Groups | None = None,
    labels: Any = None,
    m_dtype: DTypeLike | None = None,
    v_dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Adamax with the arguments of `torch.optim.Adamax`, except the parameters.

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
        arguments above. In a list, ``"params"`` chooses the parameters of a group. It is a regular
        expression that is searched in the paths of the parameters (``"head/.*kernel"``), or a list
        of them, which may be empty. One group without ``"params"`` gets all other parameters. With
        `labels`, pass a dict of groups by label. Keys that PyTorch and its schedulers add to groups
        (``foreach``, ``param_names``, ``initial_lr``, ``max_lr`` and others) have no effect.
      labels: a tree of labels like the parameters (or a prefix of it), or a function from the
        parameters to that tree, as in :func:`optax.partition`.
      m_dtype: storage dtype of the first moment, see :func:`optax_adamax.scale_by_adamax`.
      v_dtype: storage dtype of the infinity norm, see :func:`optax_adamax.scale_by_adamax`.

    Returns:
      The transformation. With weight decay, ``update`` needs the parameters. All arithmetic is in
      float32 or float64. The updates have the wider of the dtypes of gradient and parameter.

    Deliberate differences from PyTorch: with bfloat16 parameters, PyTorch's u never decays. In
    float16, and with ``eps=0`` in every dtype, a zero gradient gives NaN there.

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
    return _groups.partition(make, defaults, groups, labels, _IGNORED)
