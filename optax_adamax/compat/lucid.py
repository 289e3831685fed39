"""`lucid.optim.Adamax`: its constructor.

Lucid lays parameters out as PyTorch does. Lucid 3 does not save the moments of Adamax; what Lucid 2
saves has the form of PyTorch's state dict, which `compat.torch.load_state` reads.
"""

from typing import Any

import optax
from jax.typing import DTypeLike

from optax_adamax import _checks
from optax_adamax._transform import scale_by_adamax
from optax_adamax.compat import _arguments, _groups
from optax_adamax.compat._float32 import compute_in_float32
from optax_adamax.compat._mapping import dump_params, load_params
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
    groups: _groups.Groups | None = None,
    labels: Any = None,
    m_dtype: DTypeLike | None = None,
    v_dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""`lucid.optim.Adamax` without its first argument: optax gives ``init`` the parameters.

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
        and ``weight_decay``; they choose parameters as in :func:`optax_adamax.compat.torch.adamax`.
      labels: likewise.
      m_dtype: dtype in which the first moment is kept, see :func:`optax_adamax.scale_by_adamax`.
      v_dtype: dtype in which the infinity norm is kept, likewise.

    Returns:
      The transformation. With weight decay its ``update`` needs the parameters as its third
      argument. All of its arithmetic is in float32 at least; the updates have the wider dtype of
      gradient and parameter.

    Where Lucid goes wrong we do not follow: there a NaN gradient makes the first moment NaN for
    good while u recovers, and with ``eps=0`` a zero gradient gives NaN.

    Raises:
      ValueError: a hyperparameter out of range (Lucid checks nothing); from ``init`` as in
        :func:`optax_adamax.compat.torch.adamax`.
      TypeError: a hyperparameter of the wrong type, or parameters.

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
    b1, b2 = _arguments.check_betas(betas)

    def make(
        lr: Any, beta1: Any, beta2: Any, eps: Any, weight_decay: Any
    ) -> optax.GradientTransformationExtraArgs:
        _checks.check_rate("lr", lr)
        chain = optax.chain(
            *_arguments.l2_decay(weight_decay),
            scale_by_adamax(
                *_arguments.check_betas((beta1, beta2)),
                eps,
                eps_placement="denominator",
                m_dtype=m_dtype,
                v_dtype=v_dtype,
            ),
            optax.scale_by_learning_rate(lr),
        )
        return compute_in_float32(chain)

    defaults = dict(lr=lr, beta1=b1, beta2=b2, eps=eps, weight_decay=weight_decay)
    return _groups.partition(make, defaults, groups, labels)
