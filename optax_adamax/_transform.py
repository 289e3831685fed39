"""The Adamax update of Kingma & Ba (2014), section 7.1, as an optax transformation."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike, DTypeLike

from optax_adamax import _checks, _tree_checks
from optax_adamax._formats import unwrap, wrap
from optax_adamax._hyperparameters import EpsPlacement, Hyperparameters, Step
from optax_adamax._leaf import update_leaf
from optax_adamax._m_formats import m_format_of
from optax_adamax._nonfinite import GRADS_FINITE, Nonfinite, handle_nonfinite
from optax_adamax._numerics import compute_dtype, map_real_imag, wider_dtype
from optax_adamax._shared_scale import advance
from optax_adamax._state import ScaleByAdamaxState
from optax_adamax._state_checks import check_state
from optax_adamax._v_formats import v_format_of


@_checks.suggest_renamed_arguments
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
) -> optax.GradientTransformationExtraArgs:
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
      m_dtype: dtype in which m is kept: float32, float64, bfloat16 or int8. None: float32, or
        float64 for parameters of 64 bits. For complex parameters, the dtype of one part.
      v_dtype: dtype in which v is kept: float32, float64, bfloat16 or uint8. None: likewise.
      nonfinite: what becomes of a gradient that is NaN or infinite (or complex, with an infinite
        modulus). ``"propagate"``: its element of m and every later update are not finite.
        ``"zero"``: it counts as 0 in that element. ``"skip_step"``: if any element of any gradient
        is not finite all updates are 0 and no state changes, the count included.

    b1, b2 and eps may be traced arrays of float32 or float64
    (:func:`optax.inject_hyperparams`, :func:`jax.vmap`, :func:`jax.grad`).

    Where m or v is kept in few bits, :math:`|u_t|` is limited to what exact arithmetic allows for
    constant b1 and b2. For traced ones there is no such number, and it may be larger by the
    format's error (a twelfth in uint8); with m in int8 it is at most 7.5 times
    :math:`1 / (1 - \beta_1^t)`. Updates in few bits cannot be differentiated.

    Returns:
      A transformation with state :class:`ScaleByAdamaxState`, inside a
      :class:`HandleNonfiniteState` that counts elements or steps if there is a policy for them. The
      updates have the shape of the gradients, and the wider of the dtypes of gradient and
      parameter (of the gradient if ``update`` is given no parameters). They point uphill: chain
      them with :func:`optax.scale_by_learning_rate`.

    Raises:
      ValueError: a hyperparameter out of range; from ``update``, gradients whose tree or
        shapes are not those of the parameters given to ``init``.
      TypeError: a hyperparameter of the wrong type; from ``init``, integer parameters; a derivative
        of an update in few bits.

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
    hyper = Hyperparameters.validated(b1, b2, eps, eps_placement, bias_correction, nesterov)
    m_format, v_format = m_format_of(m_dtype), v_format_of(v_dtype)
    formats: dict[str, Any] = {"m_format": m_format, "v_format": v_format}
    _checks.check_ratio(b1, b2, m_format.largest_ratio)

    def init(params: optax.Params) -> ScaleByAdamaxState:
        jax.tree_util.tree_map_with_path(_tree_checks.check_parameter, params)
        m = jax.tree.map(lambda p: m_format.init(p, real=False), params)
        v = jax.tree.map(lambda p: v_format.init(p, real=True), params)
        return ScaleByAdamaxState(
            count=jnp.zeros((), jnp.int32),
            m=wrap(m, m_format),
            v=wrap(v, v_format, jnp.zeros((), jnp.uint32)),
        )

    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, ScaleByAdamaxState]:
        state = check_state(state, m_format, v_format)
        m, v = unwrap(state.m, m_format), unwrap(state.v, v_format)
        _tree_checks.check_gradients(updates, m)
        grads, treedef = jax.tree.flatten(updates)
        like = grads if params is None else _tree_checks.params_like(updates, params)
        t = jnp.asarray(optax.safe_increment(state.count))
        shared = advance(state.v.phase, hyper.log2_decay) if v_format.has_shared_scale else None
        grads_finite = extra_args.get(GRADS_FINITE)

        @functools.cache
        def step(dtype: np.dtype) -> Step:
            return hyper.for_step(t, shared, grads_finite, **formats, dtype=dtype)

        leaves = zip(grads, jax.tree.leaves(m), jax.tree.leaves(v), like, strict=True)
        updated = [
            update_leaf(
                jnp.asarray(g),
                m,
                v,
                step(compute_dtype(g, m, v)),
                **formats,
                dtype=wider_dtype(g, p),
            )
            for g, m, v, p in leaves
        ]
        u, m, v = (treedef.unflatten([leaf[i] for leaf in updated]) for i in range(3))
        phase = None if shared is None else shared.phase
        return u, ScaleByAdamaxState(t, wrap(m, m_format), wrap(v, v_format, phase))

    return handle_nonfinite(nonfinite, optax.GradientTransformationExtraArgs(init, update))


@_checks.suggest_renamed_arguments
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
    hyper = Hyperparameters.validated(b1, b2, eps, eps_placement, bias_correction, nesterov)
    _checks.check_scalar("learning_rate", learning_rate, 0.0, float("inf"))
    _checks.check_scalar("t", t, 1.0, float("inf"))
    arrays = {"parameter": parameter, "grad": grad, "m": m, "v": v}
    parameter, grad, m, v = (_checks.as_float_array(*item) for item in arrays.items())
    _checks.check_arrays(parameter, grad=grad, m=m, v=v)
    dtype = compute_dtype(parameter, grad, m, v)
    formats: dict[str, Any] = {"m_format": m_format_of(None), "v_format": v_format_of(None)}
    wide = np.result_type(dtype, parameter.dtype)  # complex for complex parameters
    u, new_m, new_v = update_leaf(
        grad.astype(wide),
        jnp.broadcast_to(m.astype(wide), parameter.shape),
        jnp.broadcast_to(v.astype(dtype), parameter.shape),
        hyper.for_step(t, None, **formats, dtype=dtype),
        **formats,
        dtype=wide,
    )
    rate = jnp.asarray(learning_rate, dtype)
    new = map_real_imag(lambda p, u: p - rate * u, parameter.astype(wide), u)
    return new.astype(parameter.dtype), new_m, new_v
