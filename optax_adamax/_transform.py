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
from optax_adamax._numerics import compute_dtype, incremented, map_real_imag, wider_dtype
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

    All arithmetic is in float32, or in float64 if a gradient or a moment has 64-bit parts. The
    dtype of the parameters does not matter. If all gradients of an element have been zero, its
    update is 0, also with ``eps=0``. For complex parameters, :math:`|g_t|` is the modulus and v is
    real. PyTorch treats real and imaginary parts as separate parameters. For the same result, wrap
    the transformation in :func:`optax.contrib.split_real_and_imaginary`.

    Args:
      b1: decay rate of the first moment, in [0, 1).
      b2: decay rate of the infinity norm, in [0, 1]. With 1, v never decreases.
      eps: small constant >= 0, in the units of the gradient.
      eps_placement: ``"max"`` adds eps in the maximum, as above and as in optax and PyTorch.
        ``"denominator"`` divides by :math:`v_t + \varepsilon` instead, and the maximum does not
        contain eps, as in Keras, MLX and Lucid.
      bias_correction: False omits the factor :math:`1 - \beta_1^t`, as MLX does.
      nesterov: True replaces :math:`m_t / (1 - \beta_1^t)` by :math:`\beta_1 m_t / (1 -
        \beta_1^{t+1}) + (1 - \beta_1) g_t / (1 - \beta_1^t)`, as in :func:`optax.nadam`.
      m_dtype: storage format of m: float32, float64, bfloat16 or int8. None: float32, or float64
        for 64-bit parameters. For complex parameters, the dtype of the real part.
      v_dtype: storage format of v: float32, float64, bfloat16 or uint8. None: as for m.
      nonfinite: policy for gradients that are NaN or infinite. A complex gradient is infinite if
        its modulus is. ``"propagate"``: m and all later updates of the element are non-finite.
        ``"zero"``: replaces non-finite elements by 0. ``"skip_step"``: if any element of any
        gradient is non-finite, all updates are 0, and m, v and the step count do not change.

    b1, b2 and eps may be traced float32 or float64 scalars, as in
    :func:`optax.inject_hyperparams`, :func:`jax.vmap` and :func:`jax.grad`.

    bfloat16, int8 and uint8 moments are called quantized. Their costs and limits are:

    - **Range.** The relative error of v is at most 0.4 % (bfloat16) or 12.5 % (uint8), after any
      number of steps, if v is between 7.5e-37 and 1.7e38 (bfloat16) or between 1.2e-10 and 9.4e8
      (uint8). :func:`describe_state` reports v outside of the range.
    - **Noise.** m is rounded stochastically, without bias. The rounding noise persists for about
      :math:`1 / (1 - \beta_1)` steps. On gradients of pure noise, the rms error of an update is
      about 9 % (int8) or 0.5 % (bfloat16) for ``b1=0.9``, and 26 % or 1.6 % for ``b1=0.99``. For
      b1 >= 0.99, use bfloat16 instead of int8.
    - **Clip.** If b1 < b2 are numbers, :math:`|u_t|` is clipped to its largest value in exact
      arithmetic. With constant gradients, exact updates are close to this value, and the clip
      removes errors in one direction only. Updates with int8 m and uint8 v are then about 1.8 % too
      short on average (``b1=0.9``, measured).
    - **Traced b1 or b2, and b1 >= b2.** Updates are not clipped. :math:`|u_t|` may exceed the exact
      value by the error of the format. int8 m limits it to :math:`7.5 / (1 - \beta_1^t)`.
    - **Time.** A step reads and writes fewer bytes and needs more arithmetic. The page "Benchmarks"
      has measured times on CPU, and the page "On TPU and GPU" has estimates by the compiler.
    - **Derivatives.** Updates cannot be differentiated.
    - **Complex parameters.** Their moments cannot be quantized.

    ``nonfinite="skip_step"`` reads the gradients twice.

    Returns:
      The transformation, with state :class:`ScaleByAdamaxState`. With ``"zero"`` or
      ``"skip_step"``, that state is inside a :class:`HandleNonfiniteState`. Updates have the shape
      of the gradients, and the wider one of the dtypes of gradient and parameter. If ``update``
      receives no parameters, they have the dtype of the gradient. To descend, chain the
      transformation with :func:`optax.scale_by_learning_rate`.

    Raises:
      ValueError: a hyperparameter out of range; int8 m with decay rates for which :math:`|m_t| /
        v_t` may exceed 7.5. From ``init``: float64 moments if JAX has 64-bit types disabled. From
        ``update``: gradients whose tree or shapes differ from the parameters given to ``init``.
      TypeError: a hyperparameter of another type. From ``init``: parameters that are not float or
        complex arrays, or complex ones with quantized moments. From ``update``: another state, or
        a derivative of an update with quantized moments.

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
        t = incremented(state.count)
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
    r"""Computes one step of Adamax for one array, as a pure function.

    eps is added in the denominator by default, unlike in :func:`scale_by_adamax`:

    .. math::

        m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t \\
        v_t &= \max(\beta_2 v_{t-1}, |g_t|) \\
        \theta_t &= \theta_{t-1} - \alpha\, m_t / ((1 - \beta_1^t) (v_t + \varepsilon))

    The arrays may be scalars or nested lists of numbers. Arithmetic is in float32, or in float64 if
    one of them has 64-bit parts.

    Args:
      parameter: :math:`\theta_{t-1}`, float or complex, of any shape. Integers are cast to float.
      grad: :math:`g_t`, with the shape of the parameter.
      m: :math:`m_{t-1}`, with the shape of the parameter or a scalar. 0 in the first step.
      v: :math:`v_{t-1}`, real, with the shape of the parameter or a scalar. 0 in the first step.
      t: number of the step. 1 in the first step.
      learning_rate: :math:`\alpha` >= 0.
      b1: decay rate of m, in [0, 1).
      b2: decay rate of v, in [0, 1].
      eps: small constant >= 0, in the units of the gradient.
      eps_placement: ``"denominator"`` as above, or ``"max"`` as in :func:`scale_by_adamax`.
      bias_correction: False omits the factor :math:`1 - \beta_1^t`.
      nesterov: True uses Nesterov momentum, as in :func:`scale_by_adamax`.

    Returns:
      The new ``(parameter, m, v)``, with the shape of the parameter. The parameter has its own
      dtype. m and v have the dtype of the arithmetic, and m is complex if the parameter is.

    Raises:
      ValueError: shapes that differ, t < 1, or a hyperparameter out of range.
      TypeError: an argument that is not a number or an array of numbers; a complex gradient or m of
        a real parameter; a complex v.

    Example:
      >>> from optax_adamax import adamax_step
      >>> parameter, m, v = adamax_step(1.0, 0.1, 0.0, 0.0, t=1)
      >>> print(f"{parameter:.3f} {m:.3f} {v:.3f}")
      0.998 0.010 0.100

    Reference:
      Kingma & Ba, `Adam: A Method for Stochastic Optimization
      <https://arxiv.org/abs/1412.6980>`_, 2014, section 7.1.
    """
    hyper = Hyperparameters.validated(b1, b2, eps, eps_placement, bias_correction, nesterov)
    _checks.check_scalar("learning_rate", learning_rate, 0.0, float("inf"))
    _checks.check_scalar("t", t, 1.0, float("inf"))
    arrays = {"parameter": parameter, "grad": grad, "m": m, "v": v}
    parameter, grad, m, v = (_checks.as_float_array(*item) for item in arrays.items())
    _checks.check_arrays(parameter, grad=grad, m=m, v=v)
    dtype = compute_dtype(parameter, grad, m, v)
    formats: dict[str, Any] = {"m_format": m_format_of(None), "v_format": v_format_of(None)}
    upcast_dtype = np.result_type(dtype, parameter.dtype)  # complex for complex parameters
    u, new_m, new_v = update_leaf(
        grad.astype(upcast_dtype),
        jnp.broadcast_to(m.astype(upcast_dtype), parameter.shape),
        jnp.broadcast_to(v.astype(dtype), parameter.shape),
        hyper.for_step(t, None, **formats, dtype=dtype),
        **formats,
        dtype=upcast_dtype,
    )
    rate = jnp.asarray(learning_rate, dtype)
    new = map_real_imag(lambda p, u: p - rate * u, parameter.astype(upcast_dtype), u)
    return new.astype(parameter.dtype), new_m, new_v
