"""`keras.optimizers.Adamax`: its constructor, and its variables in and out."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike, DTypeLike

from optax_adamax._transform import scale_by_adamax
from optax_adamax.compat import (
    _arrays,
    _keras_arguments,
    _keras_links,
    _keras_variables,
    _mapping,
    _state,
)
from optax_adamax.compat._keras_links import AccumulateState, AverageState
from optax_adamax.compat._mapping import Names, dump_params, load_params

__all__ = [
    "adamax",
    "dump_params",
    "dump_state",
    "finalize_variable_values",
    "load_params",
    "load_state",
]


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
    exclude_from_weight_decay: _keras_arguments.Exclusion | None = None,
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
        name, without its layer's); or a tree of booleans like the parameters (or a prefix of
        it), True for those excluded; or a function from the parameters to such a tree.
      m_dtype: dtype in which the first moment is kept, see :func:`optax_adamax.scale_by_adamax`.
      v_dtype: dtype in which the infinity norm is kept, likewise.

    Returns:
      The transformation. With weight decay or an average its ``update`` needs the parameters as
      its third argument.

    Where Keras goes wrong we do not follow: with bfloat16 parameters its u never decays; in
    float16 its own default epsilon gives NaN on a zero gradient; its bias correction in float32
    is off by 1e-3 for a ``beta_1`` of 0.99999; a global norm that overflows makes every parameter
    NaN (here the gradients become 0). Accumulators and averages are kept in float32 at least.

    Raises:
      ValueError: a hyperparameter out of range, more than one limit, an integer learning rate.
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
    _keras_arguments.check_rate(learning_rate)
    _keras_arguments.check_average(use_ema, ema_momentum, ema_overwrite_frequency)
    steps = _keras_arguments.check_steps(gradient_accumulation_steps)
    tx = optax.chain(
        *_keras_arguments.limit(clipnorm, clipvalue, global_clipnorm),
        scale_by_adamax(
            beta_1, beta_2, epsilon, eps_placement="denominator", m_dtype=m_dtype, v_dtype=v_dtype
        ),
        *_keras_arguments.decay(weight_decay, exclude_from_weight_decay),
        optax.scale_by_learning_rate(_keras_arguments.by_updates(learning_rate, steps)),
    )
    if steps > 1:
        tx = _keras_links.accumulate(tx, steps)
    tx = optax.chain(*_keras_arguments.unscale(loss_scale_factor), tx)
    if use_ema:
        tx = _keras_links.average(tx, ema_momentum, ema_overwrite_frequency, steps)
    return tx


def finalize_variable_values(params: optax.Params, state: optax.OptState) -> optax.Params:
    """The parameters at the end of training: with ``use_ema`` their average, as `fit` leaves them.

    Args:
      params: the parameters.
      state: the state of :func:`adamax`.

    Returns:
      The average in the dtypes of the parameters; without ``use_ema`` the parameters.
    """
    if not isinstance(state, _keras_links.AverageState):
        return params
    return jax.tree.map(lambda p, a: a.astype(p.dtype), params, state.average)


def load_state(
    variables: Any,
    params: optax.Params,
    tx: optax.GradientTransformation,
    names: Names | None = None,
    *,
    order: Sequence[str],
    gradient_accumulation_steps: int | None = None,
) -> optax.OptState:
    """The state of `tx`, continued from Keras.

    Args:
      variables: ``optimizer.variables`` of a `keras.optimizers.Adamax`, or their values in this
        order, or a mapping of them by number as ``save_own_variables`` and Keras' files have it.
      params: our parameters.
      tx: our transformation: an :func:`adamax` with the arguments that Keras' had.
      names: for each name in `order` a path in `params`, or a pair of path and the permutation of
        axes that makes Keras' array ours. None: the name is the path. (Flax lays its kernels out
        as Keras does.)
      order: the names of the variables in the order in which the optimizer got them,
        ``[v.path for v in model.trainable_variables]``.
      gradient_accumulation_steps: as given to `tx`.

    Returns:
      The state.

    Raises:
      ValueError: a missing, surplus or misshapen variable, or names that do not fit.
      TypeError: a variable of the wrong type.

    Example:
      >>> import numpy as np, jax.numpy as jnp
      >>> from optax_adamax.compat import keras as compat_keras
      >>> variables = [25, 1e-3, np.ones((2, 3)), np.ones((2, 3))]
      >>> params = {"dense": {"kernel": jnp.zeros((2, 3))}}
      >>> tx = compat_keras.adamax()
      >>> state = compat_keras.load_state(variables, params, tx, order=["dense/kernel"])
      >>> print(optax.tree.get(state, "count"), optax.tree.get(state, "m")["dense"]["kernel"].shape)
      25 (2, 3)
    """
    template = tx.init(params)
    steps = _accumulation(template, gradient_accumulation_steps)
    theirs = _keras_variables.read(variables, template, order)
    calls = _arrays.read_step(*theirs.iteration)
    updates = theirs.iteration._replace(value=calls // steps)
    moments = {k: x and x._replace(step=updates) for k, x in theirs.moments.items()}
    state = _state.load(tx, params, moments, names)
    route = _mapping.places(order, params, names)
    averaged = _keras_variables.find(template, AverageState)
    if averaged is not None:
        state = _keras_variables.replace(
            state,
            AverageState,
            iteration=jnp.asarray(calls, jnp.int32),
            average=_keras_variables.load_trees(averaged.average, theirs.averages, route),
        )
    accumulated = _keras_variables.find(template, AccumulateState)
    if accumulated is not None:
        sums = accumulated.gradient_accumulator
        state = _keras_variables.replace(
            state,
            AccumulateState,
            micro_step=jnp.asarray(calls % steps, jnp.int32),
            gradient_accumulator=_keras_variables.load_trees(sums, theirs.sums, route),
        )
    return state


def dump_state(
    state: optax.OptState,
    params: optax.Params,
    names: Names | None = None,
    *,
    order: Sequence[str],
    learning_rate: float | None,
    gradient_accumulation_steps: int | None = None,
    to_array: Callable[[np.ndarray], Any] = np.asarray,
) -> list[Any]:
    """The state for ``optimizer.set_weights``, the inverse of :func:`load_state`.

    Args:
      state: of an :func:`adamax`.
      params: our parameters.
      names: see :func:`load_state`.
      order: see :func:`load_state`.
      learning_rate: Keras keeps it as a variable, optax does not. None: Keras' is a schedule,
        which is no variable.
      gradient_accumulation_steps: as given to :func:`adamax`.
      to_array: what makes an array of Keras' backend of a NumPy array; Keras takes NumPy arrays.

    Returns:
      The values of ``optimizer.variables`` in order.

    Raises:
      ValueError: names that do not fit.
    """
    steps = _accumulation(state, gradient_accumulation_steps)
    route = _mapping.places(order, params, names)
    found = _state.dump(state, params, order, names)
    averaged = _keras_variables.find(state, AverageState)
    accumulated = _keras_variables.find(state, AccumulateState)
    calls = _state.single_step(found) * steps
    values: dict[tuple[str, str], Any] = {}
    if averaged is not None:
        dumped = _keras_variables.dump_tree(averaged.average, order, route)
        values |= {("average", key): x for key, x in dumped.items()}
    if accumulated is not None:
        calls += int(accumulated.micro_step)
        dumped = _keras_variables.dump_tree(accumulated.gradient_accumulator, order, route)
        values |= {("gradient_accumulator", key): x for key, x in dumped.items()}
    values["iteration", ""] = np.array(calls, np.int32)
    values["learning_rate", ""] = np.array(learning_rate or 0.0)
    for key, moments in found.items():
        values["momentum", str(key)], values["norm", str(key)] = moments.m, moments.v
    layout = _keras_variables.Layout(
        learning_rate is not None, averaged is not None, accumulated is not None
    )
    return [to_array(values[slot]) for slot in layout.slots(order)]


def _accumulation(state: optax.OptState, gradient_accumulation_steps: int | None) -> int:
    """The number of calls to an update, which the state does not tell."""
    accumulates = _keras_variables.find(state, AccumulateState) is not None
    steps = _keras_arguments.check_steps(gradient_accumulation_steps)
    if accumulates != (steps > 1):
        raise ValueError(
            f"gradient_accumulation_steps is {gradient_accumulation_steps}, but the transformation "
            f"{'accumulates' if accumulates else 'does not accumulate'}: give what it was given."
        )
    return steps
