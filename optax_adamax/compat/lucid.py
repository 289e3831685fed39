"""`lucid.optim.Adamax`: its constructor, and its ``state_dict`` in and out."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import optax
from jax.typing import DTypeLike

from optax_adamax import _checks
from optax_adamax._transform import scale_by_adamax
from optax_adamax.compat import _arguments, _groups, _mapping, _state_dict
from optax_adamax.compat._mapping import Entry, Key, Names, dump_params, load_params

__all__ = ["adamax", "dump_params", "dump_state", "flax_names", "load_params", "load_state"]


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
      argument.

    Where Lucid goes wrong we do not follow: there a NaN gradient makes the first moment NaN for
    good while u recovers, and with ``eps=0`` a zero gradient gives NaN.

    Raises:
      ValueError: a hyperparameter out of range (Lucid checks nothing).
      TypeError: a hyperparameter of the wrong type.

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
        return optax.chain(
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

    defaults = dict(lr=lr, beta1=b1, beta2=b2, eps=eps, weight_decay=weight_decay)
    return _groups.partition(make, defaults, groups, labels)


def load_state(
    state_dict: Mapping[str, Any],
    params: optax.Params,
    tx: optax.GradientTransformation,
    names: Names | None = None,
    *,
    order: Sequence[str] | None = None,
) -> optax.OptState:
    """The state of `tx`, continued from Lucid.

    Lucid 2 saves the moments of Adamax: ``exp_avg``, ``exp_inf`` and ``step``, as PyTorch does.
    Lucid 3 (3.8 at least) does not: the ``state`` of its state dict is empty. Give one of the
    same form with NumPy arrays in it.

    Args:
      state_dict: of a `lucid.optim.Adamax`.
      params: our parameters.
      tx: our transformation, an :func:`adamax` by itself or within others. The hyperparameters
        are those it was made with: the ones in the state dict are not read.
      names: as in :func:`optax_adamax.compat.torch.load_state`.
      order: the names in the order in which the optimizer got the parameters. None: the numbers
        in the state dict are the names.

    Returns:
      The state. Counters of schedules stand at the step of their parameters.

    Raises:
      ValueError: a missing, surplus or misshapen entry, parameters of one group that have taken
        different numbers of steps, or names that do not fit.
      TypeError: an entry of the wrong type.
    """
    if isinstance(state_dict, Mapping) and not state_dict.get("state", True):
        raise ValueError(
            "The 'state' of this state dict is empty. Lucid 3 does not save the moments of Adamax: "
            "train on from a Lucid 2 checkpoint, or start with tx.init(params)."
        )
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
    """The state as a state dict for Lucid, the inverse of :func:`load_state`.

    Lucid 2 continues from it. Lucid 3 (3.8 at least) takes it without a word and drops the
    moments.

    Args:
      state: of an :func:`adamax`, by itself or within others.
      params: our parameters.
      param_groups: those of the optimizer that is to continue,
        ``optimizer.state_dict()["param_groups"]``: optax has no hyperparameters in its state.
      names: see :func:`load_state`.
      order: see :func:`load_state`.
      to_array: what makes an array of Lucid's of a NumPy array.

    Returns:
      The state dict.

    Raises:
      ValueError: names that do not fit.
    """
    return _state_dict.dump(state, params, param_groups, names, order, to_array, to_step=int)


def flax_names(params: optax.Params, modules: Mapping[str, str] | None = None) -> dict[Key, Entry]:
    """Names for :func:`load_state` where `params` are those of a Flax module.

    As :func:`optax_adamax.compat.torch.flax_names`: Lucid lays its parameters out as PyTorch does.
    """
    return _mapping.flax_names(params, modules, channels_last=False)
