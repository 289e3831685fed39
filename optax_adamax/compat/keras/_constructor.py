"""The constructor of `keras.optimizers.Adamax`."""

import optax
from jax.typing import ArrayLike, DTypeLike

from optax_adamax._transform import scale_by_adamax
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
    r"""`keras.optimizers.Adamax`, all of its surface.

    .. math::

        m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t \\
        u_t &= \max(\beta_2 u_{t-1}, |g_t|) \\
        w_t &= (1 - \alpha_t \lambda) w_{t-1}
            - \alpha_t m_t / ((1 - \beta_1^t) (u_t + \varepsilon))

    A call divides the gradient by the loss scale, accumulates it, and at every
    ``gradient_accumulation_steps``-th call clips the mean and takes the step above; then it
    updates the average of the parameters.

    Args:
      learning_rate: :math:`\alpha_t` >= 0, a float or a schedule. As in Keras a schedule is given
        the number of calls so far, those that only accumulate included.
      beta_1: decay rate of the first moment, in [0, 1).
      beta_2: decay rate of the infinity norm, in [0, 1].
      epsilon: :math:`\varepsilon` >= 0, in the units of the gradient.
      weight_decay: :math:`\lambda` >= 0, decoupled. None: none.
      clipnorm: largest norm of the gradient of each array by itself. At most one of the three
        limits can be given, and one <= 0 is none, as in Keras.
      clipvalue: largest magnitude of each element.
      global_clipnorm: largest norm of all gradients together.
      use_ema: whether to keep a moving average of the parameters; see
        :func:`finalize_variable_values`.
      ema_momentum: its decay rate, in [0, 1].
      ema_overwrite_frequency: every how many updates the average becomes the parameters. None:
        never.
      loss_scale_factor: what the loss was multiplied with. None: nothing.
      gradient_accumulation_steps: calls to an update, at least 2. None: every call is one.
      name: accepted and of no effect.
      exclude_from_weight_decay: parameters without weight decay. A sequence of patterns, searched
        as by the method of this name in Keras in the last part of the parameter's path (its own
        name, without its layer's), each of which some parameter must match; or a tree of booleans
        like the parameters (or a prefix of it), True for those excluded; or a function from the
        parameters to such a tree.
      m_dtype: dtype in which the first moment is kept, see :func:`optax_adamax.scale_by_adamax`.
      v_dtype: dtype in which the infinity norm is kept, likewise.

    Returns:
      The transformation. With weight decay or an average its ``update`` needs the parameters as
      its third argument. All of its arithmetic is in float32 at least; the updates have the wider
      dtype of gradient and parameter.

    Where Keras goes wrong we do not follow: with bfloat16 parameters its u never decays; in
    float16 its own default epsilon gives NaN on a zero gradient, and so does ``epsilon=0`` in every
    dtype; norms of 256 and more overflow in float16, and what the loss scale saved is lost there;
    its bias correction in float32 is off by 1e-3 for a ``beta_1`` of 0.99999; a global norm that
    overflows makes every parameter NaN (here the gradients become 0). Accumulators and averages
    are kept in float32 at least.

    Raises:
      ValueError: a hyperparameter out of range, more than one limit, an integer learning rate;
        from ``init``, a pattern of `exclude_from_weight_decay` that no parameter matches.
      TypeError: a hyperparameter of the wrong type.

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
    _arguments.check_rate(learning_rate)
    _arguments.check_average(use_ema, ema_momentum, ema_overwrite_frequency)
    steps = _arguments.check_steps(gradient_accumulation_steps)
    tx = optax.chain(
        *_arguments.limit(clipnorm, clipvalue, global_clipnorm),
        scale_by_adamax(
            beta_1, beta_2, epsilon, eps_placement="denominator", m_dtype=m_dtype, v_dtype=v_dtype
        ),
        *_arguments.decay(weight_decay, exclude_from_weight_decay),
        optax.scale_by_learning_rate(_arguments.by_updates(learning_rate, steps)),
    )
    if steps > 1:
        tx = _transforms.accumulate(tx, steps)
    tx = compute_in_float32(optax.chain(*_arguments.unscale(loss_scale_factor), tx))
    if use_ema:
        tx = _transforms.average(tx, ema_momentum, ema_overwrite_frequency, steps)
    return tx
