"""The constructor of `torch.optim.Adamax`."""

from typing import Any

import optax
from jax.typing import DTypeLike

from optax_adamax import _checks
from optax_adamax._transform import scale_by_adamax
from optax_adamax.compat import _arguments, _groups
from optax_adamax.compat._arithmetic import compute_in_float32, split_complex


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
      differentiable: accepted and of no effect: an update of float32 state can be differentiated.
      capturable: accepted and of no effect: `jax.jit` takes the place of CUDA graphs.
      groups: PyTorch's parameter groups, each a dict of the hyperparameters in which it differs.
        In a list each chooses its parameters by ``"params"``: a pattern, searched in the
        parameter's path (``"head/.*kernel"``), a list of paths, a tree of booleans like the
        parameters (or a prefix of it), or a function from the parameters to such a tree; one
        without ``"params"`` takes the rest. Or a dict of groups by label, with `labels`. What a
        group copied from PyTorch says beside that (``foreach``, ``initial_lr``) has no effect.
      labels: a tree of labels like the parameters (or a prefix of it), or a function from the
        parameters to it, as in :func:`optax.partition`.
      m_dtype: dtype in which the first moment is kept, see :func:`optax_adamax.scale_by_adamax`.
      v_dtype: dtype in which the infinity norm is kept, likewise.

    Returns:
      The transformation. With weight decay its ``update`` needs the parameters as its third
      argument. All of its arithmetic is in float32 at least; the updates have the wider dtype of
      gradient and parameter.

    Where PyTorch goes wrong we do not follow: with bfloat16 parameters its u never decays, in
    float16 a zero gradient gives NaN, and so does one with ``eps=0`` in every dtype.

    Raises:
      ValueError: a hyperparameter out of range; from ``init``, a parameter in no group or in two,
        or a pattern or path of a group that is that of no parameter.
      TypeError: a hyperparameter of the wrong type, or parameters.

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
        chain = optax.chain(
            *([optax.scale(-1.0)] if maximize else []),
            *_arguments.l2_decay(weight_decay),
            scale_by_adamax(b1, b2, eps, m_dtype=m_dtype, v_dtype=v_dtype),
            optax.scale_by_learning_rate(lr),
        )
        return compute_in_float32(split_complex(chain))

    defaults = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, maximize=maximize)
    ignored = ("foreach", "differentiable", "capturable", "initial_lr")
    return _groups.partition(make, defaults, groups, labels, ignored)
