"""The optimizers `adamax` and `adamaxw`, as chains of `scale_by_adamax` and optax."""

from collections.abc import Callable
from typing import Any

import optax
from jax.typing import ArrayLike, DTypeLike

from optax_adamax import _checks
from optax_adamax._nonfinite import Nonfinite, handle_nonfinite
from optax_adamax._state_checks import ChainedTransformation, check_chain_state
from optax_adamax._transform import EpsPlacement, scale_by_adamax
from optax_adamax.wrappers.packing import PackedTree


@_checks.suggest_renamed_arguments
def adamax(
    learning_rate: optax.ScalarOrSchedule,
    b1: "ArrayLike" = 0.9,
    b2: "ArrayLike" = 0.999,
    eps: "ArrayLike" = 1e-8,
    *,
    eps_placement: EpsPlacement = "max",
    bias_correction: bool = True,
    nesterov: bool = False,
    m_dtype: "DTypeLike | None" = None,
    v_dtype: "DTypeLike | None" = None,
    nonfinite: Nonfinite = "propagate",
) -> optax.GradientTransformationExtraArgs:
    r"""Returns the Adamax optimizer, the variant of Adam with an infinity norm.

    The first four arguments are as in :func:`optax.adamax`. By default, eps is added in the
    maximum, as in optax and PyTorch. (:func:`adamax_step` adds it in the denominator.)

    .. math::

        m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t \\
        v_t &= \max(\beta_2 v_{t-1}, |g_t| + \varepsilon) \\
        \theta_t &= \theta_{t-1} - \alpha_t m_t / ((1 - \beta_1^t) v_t)

    Args:
      learning_rate: :math:`\alpha_t` >= 0, a number or a schedule of the step count.
      b1: decay rate of the first moment, in [0, 1).
      b2: decay rate of the infinity norm, in [0, 1].
      eps: small constant >= 0, in the units of the gradient.
      eps_placement: where eps is added: ``"max"`` or ``"denominator"``.
      bias_correction: whether m is divided by :math:`1 - \beta_1^t`.
      nesterov: whether to use Nesterov momentum.
      m_dtype: storage format of m: float32, float64, bfloat16 or int8.
      v_dtype: storage format of v: float32, float64, bfloat16 or uint8.
      nonfinite: policy for NaN and infinite gradients: ``"propagate"``, ``"zero"`` or
        ``"skip_step"``. A skipped step does not advance a schedule.

    :func:`scale_by_adamax` describes the last six arguments, and the costs and limits of bfloat16,
    int8 and uint8 moments.

    Returns:
      The transformation. Its state is a chain's tuple that begins with a
      :class:`ScaleByAdamaxState`. With ``"zero"`` or ``"skip_step"``, the tuple is inside a
      :class:`HandleNonfiniteState`. Updates have the shapes and dtypes of the updates of
      :func:`scale_by_adamax`.

    Raises:
      ValueError: a hyperparameter out of range, for example a negative or NaN learning rate.
      TypeError: a hyperparameter of another type. From ``update``: a state that was made with
        other arguments.

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
    core = scale_by_adamax(
        b1,
        b2,
        eps,
        eps_placement=eps_placement,
        bias_correction=bias_correction,
        nesterov=nesterov,
        m_dtype=m_dtype,
        v_dtype=v_dtype,
    )
    after_core = (ChainedTransformation("learning_rate", callable(learning_rate)),)
    tx = optax.chain(core, optax.scale_by_learning_rate(learning_rate))
    return handle_nonfinite(nonfinite, _with_state_check(tx, after_core))


@_checks.suggest_renamed_arguments
def adamaxw(
    learning_rate: optax.ScalarOrSchedule,
    b1: "ArrayLike" = 0.9,
    b2: "ArrayLike" = 0.999,
    eps: "ArrayLike" = 1e-8,
    weight_decay: "optax.ScalarOrSchedule" = 1e-4,
    mask: "Any | Callable[[optax.Params], Any] | None" = None,
    *,
    eps_placement: EpsPlacement = "max",
    bias_correction: bool = True,
    nesterov: bool = False,
    m_dtype: "DTypeLike | None" = None,
    v_dtype: "DTypeLike | None" = None,
    nonfinite: Nonfinite = "propagate",
) -> optax.GradientTransformationExtraArgs:
    r"""Returns the Adamax optimizer with decoupled weight decay.

    The first six arguments are as in :func:`optax.adamaxw`. With m and v as in :func:`adamax`,

    .. math::

        \theta_t = \theta_{t-1} - \alpha_t (m_t / ((1 - \beta_1^t) v_t) + \lambda \theta_{t-1})

    Args:
      learning_rate: :math:`\alpha_t` >= 0, a number or a schedule of the step count.
      b1: decay rate of the first moment, in [0, 1).
      b2: decay rate of the infinity norm, in [0, 1].
      eps: small constant >= 0, in the units of the gradient.
      weight_decay: :math:`\lambda` >= 0, a number or a schedule of the step count. It is multiplied
        by the learning rate.
      mask: a tree of booleans with the structure of the parameters or a prefix of it, or a function
        from the parameters to such a tree. Only parameters with True decay. None: all decay.
      eps_placement: where eps is added: ``"max"`` or ``"denominator"``.
      bias_correction: whether m is divided by :math:`1 - \beta_1^t`.
      nesterov: whether to use Nesterov momentum.
      m_dtype: storage format of m: float32, float64, bfloat16 or int8.
      v_dtype: storage format of v: float32, float64, bfloat16 or uint8.
      nonfinite: policy for NaN and infinite gradients: ``"propagate"``, ``"zero"`` or
        ``"skip_step"``. In a skipped step, parameters do not decay, and schedules do not advance.

    :func:`scale_by_adamax` describes the last six arguments, and the costs and limits of bfloat16,
    int8 and uint8 moments. With bfloat16 parameters, small updates and a small decay are lost in
    rounding unless the optimizer is wrapped in :func:`compensate_rounding`.

    Returns:
      The transformation. Its ``update`` needs the parameters as its third argument. State and
      updates are as in :func:`adamax`, except that the state has an entry for the weight decay.

    Raises:
      ValueError: a hyperparameter out of range. From ``update``: no parameters. From ``init``: a
        mask that is a function, inside :func:`pack_small_leaves`.
      TypeError: a hyperparameter of another type. From ``update``: a state that was made with
        other arguments.

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
    core = scale_by_adamax(
        b1,
        b2,
        eps,
        eps_placement=eps_placement,
        bias_correction=bias_correction,
        nesterov=nesterov,
        m_dtype=m_dtype,
        v_dtype=v_dtype,
    )
    after_core = (
        ChainedTransformation("weight_decay", callable(weight_decay), mask is not None),
        ChainedTransformation("learning_rate", callable(learning_rate)),
    )
    tx = optax.chain(
        core,
        optax.add_decayed_weights(weight_decay, _rejecting_packed_trees(mask)),
        optax.scale_by_learning_rate(learning_rate),
    )
    return handle_nonfinite(nonfinite, _with_state_check(tx, after_core))


def _rejecting_packed_trees(mask: Any) -> Any:
    """Adds an error for a packed tree, whose leaves have other paths and shapes, to a function."""
    if not callable(mask):
        return mask

    def checked(params: optax.Params) -> Any:
        if isinstance(params, PackedTree):
            raise ValueError(
                "The mask of adamaxw must receive the parameters, but pack_small_leaves passes a "
                "PackedTree, whose buffers have other paths and shapes. Decay the weights outside: "
                "optax.chain(pack_small_leaves(scale_by_adamax()), optax.add_decayed_weights("
                "weight_decay, mask), optax.scale_by_learning_rate(learning_rate))."
            )
        return mask(params)

    return checked


def _with_state_check(
    chain: optax.GradientTransformation, after_core: tuple[ChainedTransformation, ...]
) -> optax.GradientTransformationExtraArgs:
    """Adds an error for a state that was made with other kinds of arguments."""
    inner = optax.with_extra_args_support(chain)

    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        check_chain_state(state, after_core)
        return inner.update(updates, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(chain.init, update)
