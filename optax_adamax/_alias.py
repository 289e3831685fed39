"""Adamax as ready-made chains."""

from collections.abc import Callable
from typing import Any

import optax
from jax.typing import ArrayLike, DTypeLike

from optax_adamax import _checks
from optax_adamax._nonfinite import Nonfinite, handle_nonfinite
from optax_adamax._transform import EpsPlacement, scale_by_adamax


@_checks.suggest_renamed_arguments
def adamax(
    learning_rate: optax.ScalarOrSchedule,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    *,
    eps_placement: EpsPlacement = "max",
    bias_correction: bool = True,
    nesterov: bool = False,
    m_dtype: DTypeLike | None = None,
    v_dtype: DTypeLike | None = None,
    nonfinite: Nonfinite = "propagate",
) -> optax.GradientTransformationExtraArgs:
    r"""Adamax, the variant of Adam with an infinity norm; takes the place of `optax.adamax`.

    .. math::

        m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t \\
        v_t &= \max(\beta_2 v_{t-1}, |g_t| + \varepsilon) \\
        \theta_t &= \theta_{t-1} - \alpha_t m_t / ((1 - \beta_1^t) v_t)

    Args:
      learning_rate: :math:`\alpha_t` >= 0, a number or a schedule of the step count.
      b1: decay rate of the first moment, in [0, 1).
      b2: decay rate of the infinity norm, in [0, 1].
      eps: small constant >= 0, in the units of the gradient.
      eps_placement, bias_correction, nesterov, m_dtype, v_dtype, nonfinite: see
        :func:`scale_by_adamax`. A step that is skipped does not count in the schedule either.

    Returns:
      The transformation; for the dtype of its updates see :func:`scale_by_adamax`.

    Raises:
      ValueError: a hyperparameter out of range, a negative or NaN learning rate among them.
      TypeError: a hyperparameter of the wrong type.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from optax_adamax import adamax
      >>> tx = adamax(0.002)
      >>> params = jnp.array([1.0, 2.0])
      >>> state = tx.init(params)
      >>> updates, state = tx.update(jnp.array([0.1, -0.2]), state, params)
      >>> print(optax.apply_updates(params, updates))
      [0.998 2.002]

    Reference:
      Kingma & Ba, `Adam: A Method for Stochastic Optimization
      <https://arxiv.org/abs/1412.6980>`_, 2014, section 7.1.
    """
    _checks.check_rate("learning_rate", learning_rate)
    tx = optax.chain(
        scale_by_adamax(
            b1,
            b2,
            eps,
            eps_placement=eps_placement,
            bias_correction=bias_correction,
            nesterov=nesterov,
            m_dtype=m_dtype,
            v_dtype=v_dtype,
        ),
        optax.scale_by_learning_rate(learning_rate),
    )
    return handle_nonfinite(nonfinite, tx)


@_checks.suggest_renamed_arguments
def adamaxw(
    learning_rate: optax.ScalarOrSchedule,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    weight_decay: optax.ScalarOrSchedule = 1e-4,
    mask: Any | Callable[[optax.Params], Any] | None = None,
    *,
    eps_placement: EpsPlacement = "max",
    bias_correction: bool = True,
    nesterov: bool = False,
    m_dtype: DTypeLike | None = None,
    v_dtype: DTypeLike | None = None,
    nonfinite: Nonfinite = "propagate",
) -> optax.GradientTransformationExtraArgs:
    r"""Adamax with decoupled weight decay; takes the place of `optax.adamaxw`.

    .. math::

        \theta_t = \theta_{t-1} - \alpha_t (m_t / ((1 - \beta_1^t) v_t) + \lambda \theta_{t-1})

    Args:
      learning_rate: :math:`\alpha_t` >= 0, a number or a schedule of the step count.
      b1: decay rate of the first moment, in [0, 1).
      b2: decay rate of the infinity norm, in [0, 1].
      eps: small constant >= 0, in the units of the gradient.
      weight_decay: :math:`\lambda` >= 0, a number or a schedule. It is multiplied with the
        learning rate.
      mask: a tree of booleans like the parameters (or a prefix of it), or a function from the
        parameters to such a tree: True where weight decay applies. None: everywhere.
      eps_placement, bias_correction, nesterov, m_dtype, v_dtype, nonfinite: see
        :func:`scale_by_adamax`. In a step that is skipped the weights do not decay either.

    Returns:
      The transformation. Its ``update`` needs the parameters as its third argument.

    Raises:
      ValueError: a hyperparameter out of range; from ``update``, no parameters.
      TypeError: a hyperparameter of the wrong type.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from optax_adamax import adamaxw
      >>> tx = adamaxw(0.002, weight_decay=0.1)
      >>> params = jnp.array([1.0, 2.0])
      >>> state = tx.init(params)
      >>> updates, state = tx.update(jnp.array([0.1, -0.2]), state, params)
      >>> print(optax.apply_updates(params, updates))
      [0.9978 2.0016]

    Reference:
      Loshchilov & Hutter, `Decoupled Weight Decay Regularization
      <https://arxiv.org/abs/1711.05101>`_, 2019.
    """
    _checks.check_rate("learning_rate", learning_rate)
    _checks.check_rate("weight_decay", weight_decay)
    tx = optax.chain(
        scale_by_adamax(
            b1,
            b2,
            eps,
            eps_placement=eps_placement,
            bias_correction=bias_correction,
            nesterov=nesterov,
            m_dtype=m_dtype,
            v_dtype=v_dtype,
        ),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )
    return handle_nonfinite(nonfinite, tx)
