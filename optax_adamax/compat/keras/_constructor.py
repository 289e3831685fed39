"""The constructor of `keras.optimizers.Adamax`."""

import optax
from jax.typing import ArrayLike, DTypeLike

from optax_adamax import _checks
from optax_adamax._transform import scale_by_adamax
from optax_adamax.compat._arguments import number
from optax_adamax.compat._arithmetic import compute_in_float32
from optax_adamax.compat.keras import _arguments, _transforms


def adamax(
    learning_rate: optax.ScalarOrSchedule = 0.001,
    beta_1: ArrayLike = 0.9,
    beta_2: ArrayLike = 0.999,
    epsilon: ArrayLike = 1e-7,
    weight_decay: float | None = None,
    clipnorm: float | None = None,
    clipvalue: float | None = None,
    global_clipnorm: float | None = None,
    use_ema: bool = False,
    ema_momentum: float = 0.99,
    ema_overwrite_frequency: int | None = None,
    loss_scale_factor: float | None = None,
    gradient_accumulation_steps: int | None = None,
    name: str | None = None,
    *,
    exclude_from_weight_decay: _arguments.Exclusion | None = None,
    m_dtype: DTypeLike | None = None,
    v_dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Adamax with all arguments of `keras.optimizers.Adamax`.

    .. math::

        m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t \\
        u_t &= \max(\beta_2 u_{t-1}, |g_t|) \\
        w_t &= (1 - \alpha_t \lambda) w_{t-1}
            - \alpha_t m_t / ((1 - \beta_1^t) (u_t + \varepsilon))

    Each call divides the gradient by the loss scale and accumulates it. Every
    ``gradient_accumulation_steps``-th call clips the mean and applies the equations. Each call
    then updates the average of the parameters.

    Args:
      learning_rate: :math:`\alpha_t` >= 0, a float or a schedule. As in Keras, a schedule receives
        the number of calls, including those that only accumulate.
      beta_1: decay rate of the first moment, in [0, 1).
      beta_2: decay rate of the infinity norm, in [0, 1].
      epsilon: :math:`\varepsilon` >= 0, in the units of the gradient.
      weight_decay: :math:`\lambda` >= 0, decoupled. None: no weight decay.
      clipnorm: largest norm of the gradient of each array. At most one of the three limits can be
        given. As in Keras, a limit <= 0 has no effect.
      clipvalue: largest magnitude of each element of the gradient.
      global_clipnorm: largest norm of all gradients together.
      use_ema: whether to average the parameters; see :func:`finalize_variable_values`.
      ema_momentum: decay rate of the average, in [0, 1].
      ema_overwrite_frequency: number of updates after which the average replaces the parameters.
        None: never.
      loss_scale_factor: factor by which the loss was multiplied. None: 1.
      gradient_accumulation_steps: number of calls per update, at least 2. None: 1.
      name: has no effect.
      exclude_from_weight_decay: parameters without weight decay. Either a regular expression or a
        list of them, which are searched in the last part of each parameter's path, as by Keras'
        method of this name. Or a function from the parameters to a tree of booleans like the
        parameters (or a prefix of it).
      m_dtype: storage dtype of the first moment, see :func:`optax_adamax.scale_by_adamax`.
      v_dtype: storage dtype of the infinity norm, see :func:`optax_adamax.scale_by_adamax`.

    Returns:
      The transformation. With weight decay or an average, ``update`` needs the parameters. All
      arithmetic is in float32 or float64. The updates have the wider of the dtypes of gradient and
      parameter.

    Deliberate differences from Keras: with bfloat16 parameters, Keras' u never decays. In float16,
    Keras' default epsilon gives NaN for a zero gradient, norms of 256 and more overflow, and small
    gradients underflow when they are divided by the loss scale. With ``epsilon=0``, a zero gradient
    gives NaN in every dtype. Keras' bias correction in float32 is off by 1e-3 for a ``beta_1`` of
    0.99999. If the global norm overflows, Keras' parameters become NaN, but here the gradients
    become 0. Here, sums and averages are float32 or float64, and complex gradients cannot be
    accumulated.

    Raises:
      ValueError: a hyperparameter is out of range, several limits are given, or the learning rate
        is an integer; from ``init``, no parameter matches a pattern.
      TypeError: an argument has the wrong type.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from optax_adamax.compat import keras as compat_keras
      >>> tx = compat_keras.adamax(learning_rate=0.002, weight_decay=0.1, clipnorm=1.0)
      >>> params = jnp.array([1.0, 2.0])
      >>> state = tx.init(params)
      >>> updates, state = tx.update(jnp.array([0.1, -0.3]), state, params)
      >>> print(optax.apply_updates(params, updates))
      [0.9978 2.0016]
    """
    del name
    steps = _arguments.integer("gradient_accumulation_steps", gradient_accumulation_steps, 2) or 1
    frequency = _arguments.integer("ema_overwrite_frequency", ema_overwrite_frequency, 1)
    momentum = number("ema_momentum", ema_momentum, 0.0, 1.0, closed=True)
    _checks.check_flag("use_ema", use_ema)
    _checks.check_decay("beta_1", beta_1, closed=False)
    _checks.check_decay("beta_2", beta_2, closed=True)
    tx = optax.chain(
        *_arguments.clip(clipnorm, clipvalue, global_clipnorm),
        scale_by_adamax(
            beta_1,
            beta_2,
            number("epsilon", epsilon),
            eps_placement="denominator",
            m_dtype=m_dtype,
            v_dtype=v_dtype,
        ),
        *_arguments.decay(weight_decay, exclude_from_weight_decay),
        optax.scale_by_learning_rate(_arguments.rate_of_updates(learning_rate, steps)),
    )
    if steps > 1:
        tx = _transforms.accumulate(tx, steps)
    tx = compute_in_float32(optax.chain(*_arguments.unscale(loss_scale_factor), tx))
    return _transforms.average(tx, momentum, frequency, steps) if use_ema else tx
