"""The Adamax update of Kingma & Ba (2014), section 7.1, as an optax transformation."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike, DTypeLike

from optax_adamax import _checks, _skip, _storage
from optax_adamax._low_bit import low_bit_leaf
from optax_adamax._numerics import compute_dtype, map_real_imag, narrow, widen
from optax_adamax._rule import AdamaxRule, EpsPlacement
from optax_adamax._skip import Nonfinite
from optax_adamax._state import ScaleByAdamaxState, check_state


def scale_by_adamax(
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
) -> optax.GradientTransformation:
    r"""Rescales gradients by the Adamax rule.

    For each element, with gradient :math:`g_t` at step :math:`t = 1, 2, \dots`,

    .. math::

        m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t \\
        v_t &= \max(\beta_2 v_{t-1}, |g_t| + \varepsilon) \\
        u_t &= m_t / ((1 - \beta_1^t) v_t)

    The arithmetic is done in float32, or in float64 where a gradient or a moment is of 64
    bits, whatever the dtype of the parameters. An element that has never seen a gradient has
    :math:`u_t = 0`, with ``eps=0`` too. For complex parameters :math:`|g_t|` is the modulus
    and v is real; to treat real and imaginary parts as separate parameters, as PyTorch does,
    wrap the transformation in :func:`optax.contrib.split_real_and_imaginary`.

    Args:
      b1: decay rate of the first moment, in [0, 1).
      b2: decay rate of the infinity norm, in [0, 1]; 1 never forgets.
      eps: small constant >= 0, in the units of the gradient.
      eps_placement: ``"max"`` puts eps where it stands above, as optax and PyTorch do;
        ``"denominator"`` divides by :math:`v_t + \varepsilon` instead and leaves it out of the
        maximum, as Keras, MLX and Lucid do.
      bias_correction: False leaves :math:`1 - \beta_1^t` out, as MLX does.
      nesterov: uses :math:`\beta_1 m_t / (1 - \beta_1^{t+1}) + (1 - \beta_1) g_t / (1 -
        \beta_1^t)` in place of :math:`m_t / (1 - \beta_1^t)`, as :func:`optax.nadam` does.
      m_dtype: dtype in which m is kept. None: float32, or float64 for parameters of 64 bits.
        For complex parameters, the dtype of one part.
      v_dtype: dtype in which v is kept, likewise.
      nonfinite: what becomes of a gradient that is NaN or infinite (or complex, with an infinite
        modulus). ``"propagate"``: its element of m, v and every later update is not finite.
        ``"skip_element"``: its element of the update is 0, and m and v of the element are kept
        as they are stored; v in bfloat16 or uint8 is stored in a frame that all elements share,
        so there it decays by b2 as with a gradient of 0, and m in int8, which is stored as a
        ratio to v, decays with it. ``"skip_step"``: if any element of any gradient is not finite
        all updates are 0 and no state changes, the count included.

    b1, b2 and eps may be traced arrays of float32 or float64
    (:func:`optax.inject_hyperparams`, :func:`jax.vmap`, :func:`jax.grad`).

    Returns:
      A transformation with state :class:`ScaleByAdamaxState`, inside a :class:`SkipState` that
      counts if elements or steps are skipped. The updates have the shape and dtype of the
      gradients, and point uphill: chain them with :func:`optax.scale_by_learning_rate`.

    Raises:
      ValueError: a hyperparameter out of range; from ``update``, gradients whose tree or
        shapes are not those of the parameters given to ``init``.
      TypeError: a hyperparameter of the wrong type; from ``init``, integer parameters.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from optax_adamax import scale_by_adamax
      >>> tx = optax.chain(scale_by_adamax(), optax.scale_by_learning_rate(0.002))
      >>> params = {"w": jnp.array([1.0, 2.0])}
      >>> state = tx.init(params)
      >>> updates, state = tx.update({"w": jnp.array([0.1, -0.2])}, state)
      >>> print(updates["w"])
      [-0.002  0.002]

    Reference:
      Kingma & Ba, `Adam: A Method for Stochastic Optimization
      <https://arxiv.org/abs/1412.6980>`_, 2014, section 7.1.
    """
    rule = AdamaxRule(b1, b2, eps, eps_placement, bias_correction, nesterov)
    rule.check()
    _checks.check_choice("nonfinite", nonfinite, _skip.POLICIES)
    m_format, v_format = _storage.m_format(m_dtype), _storage.v_format(v_dtype)
    if isinstance(m_format, _storage.RatioInt8):
        _checks.check_ratio_is_bounded(b1, b2)

    def init(params: optax.Params) -> ScaleByAdamaxState:
        jax.tree_util.tree_map_with_path(_checks.check_parameter, params)
        m = jax.tree.map(functools.partial(m_format.zeros, real=False), params)
        v = jax.tree.map(functools.partial(v_format.zeros, real=True), params)
        phase = jnp.zeros((), jnp.uint32)
        return ScaleByAdamaxState(
            count=jnp.zeros((), jnp.int32),
            m=m,
            v=_storage.FramedMaximum(v, phase) if v_format.is_framed else v,
        )

    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        *,
        taken: jax.Array | None = None,  # from _skip, for the policies other than "propagate"
        **extra_args: Any,
    ) -> tuple[optax.Updates, ScaleByAdamaxState]:
        del params, extra_args
        state = check_state(state, m_format, v_format)
        _checks.check_gradients(updates, state.m)
        t = jnp.asarray(optax.safe_increment(state.count))
        at = functools.cache(functools.partial(rule.at, t))
        codes, phase = state.v if v_format.is_framed else (state.v, jnp.zeros((), jnp.uint32))

        def leaf(g: jax.Array, m: jax.Array, v: jax.Array) -> tuple[jax.Array, ...]:
            mask = None if taken is None else _skip.is_taken(g, taken)
            u, new_m, new_v = at(compute_dtype(g, m, v)).take(g, m, v, mask)
            return narrow(u, g.dtype), new_m.astype(m.dtype), new_v.astype(v.dtype)

        if m_format.is_low_bit or v_format.is_low_bit:
            step = at(np.dtype(np.float32))
            phase, frame = _moved(phase, b2, taken)
            leaf = functools.partial(
                low_bit_leaf,
                t=t,
                step=step,
                frame=frame,
                bound=rule.bound(t, step),
                taken=taken,
                m_format=m_format,
                v_format=v_format,
            )

        gradients, treedef = jax.tree.flatten(updates)
        trees = map(jnp.asarray, gradients), jax.tree.leaves(state.m), jax.tree.leaves(codes)
        leaves = [leaf(*x) for x in zip(*trees, strict=True)]
        u, m, v = (treedef.unflatten([x[i] for x in leaves]) for i in range(3))
        if v_format.is_framed:
            v = _storage.FramedMaximum(v, phase)
        count = t if taken is None else jnp.where(taken, t, state.count)
        return u, ScaleByAdamaxState(count, m, v)

    core = optax.GradientTransformation(init, update)
    if nonfinite == "propagate":
        return core
    return _skip.skip(nonfinite, optax.GradientTransformationExtraArgs(*core))


def _moved(
    phase: jax.Array, b2: ArrayLike, taken: jax.Array | None
) -> tuple[jax.Array, _storage.Frame]:
    """The frame of v after the step, or where it was if the step is not taken."""
    moved = _storage.advance(phase, b2)
    if taken is None:
        return moved
    return jax.tree.map(functools.partial(jnp.where, taken), moved, _storage.advance(phase, 1.0))


def adamax_step(
    parameter: ArrayLike | list[float],
    grad: ArrayLike | list[float],
    m: ArrayLike | list[float],
    v: ArrayLike | list[float],
    t: ArrayLike,
    learning_rate: ArrayLike = 0.002,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    *,
    eps_placement: EpsPlacement = "denominator",
    bias_correction: bool = True,
    nesterov: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """One step of Adamax as a pure function of arrays, scalars or (nested) lists of numbers.

    The arithmetic is that of :func:`scale_by_adamax`, where the hyperparameters are described;
    eps stands in the denominator unless told otherwise.

    Args:
      parameter: what is trained, of any shape. Integers are taken as floats.
      grad: its gradient, of the same shape.
      m: first moment before the step, of the same shape or a scalar; 0 at the first step.
      v: infinity norm before the step, likewise.
      t: number of this step; the first one is 1.
      learning_rate: step size >= 0.
      b1: decay rate of m, in [0, 1).
      b2: decay rate of v, in [0, 1].
      eps: small constant >= 0.
      eps_placement: ``"max"`` or ``"denominator"``.
      bias_correction: whether m is divided by ``1 - b1**t``.
      nesterov: whether the step looks ahead by one gradient.

    Returns:
      The new ``(parameter, m, v)``: the parameter in its own dtype, m and v in float32, or in
      float64 where an argument is.

    Raises:
      ValueError: shapes that differ, t < 1, or a hyperparameter out of range.
      TypeError: an argument that is no number.

    Example:
      >>> from optax_adamax import adamax_step
      >>> parameter, m, v = adamax_step(1.0, 0.1, 0.0, 0.0, t=1)
      >>> print(f"{parameter:.3f} {m:.3f} {v:.3f}")
      0.998 0.010 0.100
    """
    rule = AdamaxRule(b1, b2, eps, eps_placement, bias_correction, nesterov)
    rule.check()
    _checks.check_scalar("learning_rate", learning_rate, 0.0, float("inf"))
    _checks.check_scalar("t", t, 1.0, float("inf"))
    arrays = {"parameter": parameter, "grad": grad, "m": m, "v": v}
    parameter, grad, m, v = (_checks.as_float_array(*item) for item in arrays.items())
    _checks.check_shapes(parameter, grad=grad, m=m, v=v)
    dtype = compute_dtype(parameter, grad, m, v)
    m, v = jnp.broadcast_to(m, parameter.shape), jnp.broadcast_to(v, parameter.shape)
    u, m, v = rule.at(t, dtype).take(grad, m, v)
    rate = jnp.asarray(learning_rate, dtype)
    new = map_real_imag(lambda p, u: p - rate * u, widen(parameter, dtype), u)
    return new.astype(parameter.dtype), m, v
