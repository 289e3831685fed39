"""The constructor of `lucid.optim.Adamax`.

Lucid's parameters have the layout of PyTorch's. Lucid 3 does not save the moments of Adamax.
`compat.torch.load_state` reads the files of Lucid 2, which have the form of PyTorch's state dict.
"""

from typing import Any

import optax
from jax.typing import DTypeLike

from optax_adamax import _checks
from optax_adamax._transform import scale_by_adamax
from optax_adamax.compat import _arguments
from optax_adamax.compat._arithmetic import compute_in_float32
from optax_adamax.compat._transfer import dump_params, load_params
from optax_adamax.compat.torch import flax_names

__all__ = ["adamax", "dump_params", "flax_names", "load_params"]


def __dir__() -> list[str]:
    return list(__all__)


@_arguments.without_params
def adamax(
    lr: optax.ScalarOrSchedule = 2e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0,
    *,
    groups: _arguments.Groups | None = None,
    labels: Any = None,
    m_dtype: DTypeLike | None = None,
    v_dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Returns Adamax with the arguments of `lucid.optim.Adamax`, except the parameters.

    .. math::

        g_t &\leftarrow g_t + \lambda \theta_{t-1} \\
        m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t \\
        u_t &= \max(\beta_2 u_{t-1}, |g_t|) \\
        \theta_t &= \theta_{t-1} - \eta m_t / ((1 - \beta_1^t) (u_t + \varepsilon))

    Args:
      lr: :math:`\eta` >= 0, a number or a schedule of the step count.
      betas: decay rates of the first moment and of the infinity norm, both in [0, 1).
      eps: :math:`\varepsilon` >= 0, in the units of the gradient.
      weight_decay: :math:`\lambda` >= 0 of an L2 penalty, added to the gradient.
      groups: Lucid's parameter groups, dicts with their own ``lr``, ``beta1``, ``beta2``, ``eps``
        and ``weight_decay``. They choose parameters as in
        :func:`optax_adamax.compat.torch.adamax`.
      labels: see :func:`optax_adamax.compat.torch.adamax`.
      m_dtype: storage dtype of the first moment, see :func:`optax_adamax.scale_by_adamax`.
      v_dtype: storage dtype of the infinity norm.

    Returns:
      The transformation. With weight decay, ``update`` needs the parameters. All arithmetic is in
      float32 or float64. The updates have the wider of the dtypes of gradient and parameter.

    Deliberate differences from Lucid: after a NaN gradient, Lucid's u recovers, though the first
    moment is NaN permanently. With ``eps=0``, Lucid's update for a zero gradient is NaN.

    Raises:
      ValueError: a hyperparameter is out of range (Lucid validates nothing); from ``init``, as in
        :func:`optax_adamax.compat.torch.adamax`.
      TypeError: an argument has the wrong type, or parameters were passed.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from optax_adamax.compat import lucid as compat_lucid
      >>> tx = compat_lucid.adamax(lr=2e-3, weight_decay=0.1)
      >>> params = jnp.array([1.0, 2.0])
      >>> state = tx.init(params)
      >>> updates, state = tx.update(jnp.array([0.1, -0.3]), state, params)
      >>> print(optax.apply_updates(params, updates))
      [0.998 2.002]
    """
    b1, b2 = _arguments.pair(betas)

    def make(
        lr: Any, beta1: Any, beta2: Any, eps: Any, weight_decay: Any
    ) -> optax.GradientTransformationExtraArgs:
        _checks.check_decay("beta1", beta1, closed=False)
        _checks.check_decay("beta2", beta2, closed=False)
        chain = optax.chain(
            *_arguments.l2_decay(weight_decay),
            scale_by_adamax(
                beta1, beta2, eps, eps_placement="denominator", m_dtype=m_dtype, v_dtype=v_dtype
            ),
            optax.scale_by_learning_rate(_arguments.rate("lr", lr)),
        )
        return compute_in_float32(chain)

    defaults = dict(lr=lr, beta1=b1, beta2=b2, eps=eps, weight_decay=weight_decay)
    return _arguments.partition(make, defaults, groups, labels)
