"""Skips or clips steps whose gradient norm exceeds a limit."""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optax_adamax import _checks
from optax_adamax._inner import as_transformation
from optax_adamax._messages import CONTINUE, wrong_state
from optax_adamax._numerics import (
    compute_dtype,
    incremented,
    one_minus_power,
    saturating_cast,
    upcast,
)
from optax_adamax._tree_checks import check_arrays
from optax_adamax._varying_axes import varying_axes

AxisName = str | tuple[str, ...]

WARMUP_STEPS = 10  # norms that are averaged before the average limits a step


class LimitSpikesState(NamedTuple):
    """State of `limit_spikes`."""

    # Counts saturate at 2**31 - 1.
    spike_count: jax.Array  # shape=(), dtype=int32: steps skipped or clipped
    norm_count: jax.Array  # shape=(), dtype=int32: norms averaged
    norm_ema: jax.Array  # shape=(), dtype=float32: their running average, not bias-corrected
    inner_state: Any  # the state of `inner`


def limit_spikes(
    inner: optax.GradientTransformation,
    max_norm_ratio: ArrayLike | None = None,
    *,
    max_norm: ArrayLike | None = None,
    decay: ArrayLike = 0.99,
    action: Literal["skip", "clip"] = "skip",
    axis_name: AxisName | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Skips or clips steps whose gradient norm exceeds a fixed limit or a multiple of its average.

    Let :math:`n_t` be the global norm of the gradients, and :math:`\bar n_{t-1}` the bias-corrected
    running average of earlier norms. Step t is a spike if :math:`n_t > \ell_t`, with

    .. math::

        \ell_t &= \min(c\, \bar n_{t-1}, n_{\max}) \\
        s_t &= d\, s_{t-1} + (1 - d) \min(n_t, \ell_t), \quad
        \bar n_t = s_t / (1 - d^t)

    A spike enters the average as :math:`\ell_t`. So one spike multiplies the average by at most
    :math:`1 + (1 - d)(c - 1)`. If gradients become F times larger permanently, steps are spikes for
    about :math:`\log(F/c) / \log(1 + (1 - d)(c - 1))` steps: 77 for c = 5, d = 0.99 and F = 100. In
    the first ten steps, only norms above `max_norm` and infinite norms are spikes.

    Norms are computed in float32, in which norms above 1.8e19 are infinite. An infinite norm is
    always a spike, and clipping replaces such a gradient by zeros. Gradients whose norm is 0 or NaN
    are passed to `inner` and do not change the average. For NaN, use the argument `nonfinite` of
    :func:`scale_by_adamax`.

    ``action="skip"`` computes the step and then selects the old or the new state, so it needs
    temporary memory for both. The page "Non-finite and outlier gradients" has the measured costs of
    both actions. On TPU and GPU, both read the gradients twice.

    Args:
      inner: the transformation to protect, for example :func:`adamax`, or an object with ``init``
        and ``update``, for example :class:`optax.MultiSteps`.
      max_norm_ratio: c > 1. None: no limit relative to the average.
      max_norm: the fixed limit :math:`n_{\max}` > 0, from the first step on. None: no fixed limit.
        At least one of the two limits is required.
      decay: d, in [0, 1). The average extends over about 1 / (1 - d) steps.
      action: ``"skip"``: the updates are zero and the state of `inner` does not change.
        ``"clip"``: `inner` receives the gradients scaled to the norm :math:`\ell_t`, and to
        `max_norm` in the first ten steps.
      axis_name: axes of :func:`jax.shard_map` or :func:`jax.pmap` over which the gradients are
        sharded. The norm then includes the gradients of all devices. Replicated gradients, and
        steps under :func:`jax.jit` alone, do not need it.

    Returns:
      The transformation, with state :class:`LimitSpikesState`. The number of spikes is
      ``optax.tree.get(state, "spike_count")``. Further arguments of ``update`` are passed to
      `inner`.

    Raises:
      ValueError: neither max_norm_ratio nor max_norm; max_norm_ratio <= 1, max_norm <= 0, a decay
        out of range, or an unknown action. ``update`` raises it if gradients differ between the
        devices of a :func:`jax.shard_map` along an axis that `axis_name` does not name.
      TypeError: an argument of another type.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from optax_adamax import adamax, limit_spikes
      >>> tx = limit_spikes(adamax(0.1), max_norm_ratio=5.0)
      >>> params = jnp.zeros(2)
      >>> state = tx.init(params)
      >>> for g in [jnp.ones(2)] * 12 + [jnp.array([1.0, 900.0])]:
      ...     updates, state = tx.update(g, state, params)
      >>> print(updates, optax.tree.get(state, "spike_count"))
      [0. 0.] 1

    Reference:
      Child, `Very Deep VAEs <https://arxiv.org/abs/2011.10650>`_, 2020, and Hazami et al.,
      `Efficient-VDVAE <https://arxiv.org/abs/2203.13751>`_, 2022, skip steps above a fixed norm:
      ``max_norm``.
    """
    _check_arguments(max_norm_ratio, max_norm, decay, action)
    inner = as_transformation(inner, "limit_spikes(adamax(1e-3), max_norm_ratio=5.0)")

    def init(params: optax.Params) -> LimitSpikesState:
        return LimitSpikesState(
            spike_count=jnp.zeros((), jnp.int32),
            norm_count=jnp.zeros((), jnp.int32),
            norm_ema=jnp.zeros((), jnp.float32),
            inner_state=inner.init(params),
        )

    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, LimitSpikesState]:
        state = _check_state(state)
        check_arrays("gradient", updates)
        norm = _global_norm(updates, axis_name)
        _check_agreement(norm, state)
        fixed = jnp.asarray(jnp.inf if max_norm is None else max_norm, jnp.float32)
        limit = jnp.minimum(_relative_limit(state, max_norm_ratio, decay), fixed)
        threshold = jnp.where(state.norm_count >= WARMUP_STEPS, limit, fixed)
        spike = (norm > threshold) | jnp.isinf(norm)

        if action == "clip":
            factor = _clip_factor(spike, threshold, norm)
            updates = jax.tree.map(lambda g: _scaled(jnp.asarray(g), factor), updates)
        u, inner_state = inner.update(updates, state.inner_state, params, **extra_args)
        if action == "skip":
            # With jax.lax.cond, XLA would copy the state, and both states would need equal dtypes.
            u = jax.tree.map(lambda x: jnp.where(spike, jnp.zeros_like(x), x), u)
            inner_state = jax.tree.map(
                lambda old, new: jnp.where(spike, old, new), state.inner_state, inner_state
            )
        count, ema = _averaged(state, jnp.minimum(norm, limit), decay)
        return u, LimitSpikesState(
            spike_count=jnp.where(spike, incremented(state.spike_count), state.spike_count),
            norm_count=count,
            norm_ema=ema,
            inner_state=inner_state,
        )

    return optax.GradientTransformationExtraArgs(init, update)


def _relative_limit(
    state: LimitSpikesState, max_norm_ratio: ArrayLike | None, decay: ArrayLike
) -> jax.Array:
    """Returns c times the bias-corrected average; infinity before the first norm."""
    if max_norm_ratio is None:
        return jnp.asarray(jnp.inf, jnp.float32)
    count = jnp.maximum(state.norm_count, 1).astype(jnp.float32)
    mean = state.norm_ema / one_minus_power(jnp.asarray(1 - decay, jnp.float32), count)
    limit = jnp.asarray(max_norm_ratio, jnp.float32) * mean
    return jnp.where(state.norm_count > 0, limit, jnp.inf)


def _averaged(
    state: LimitSpikesState, limited: jax.Array, decay: ArrayLike
) -> tuple[jax.Array, jax.Array]:
    """Returns the new `norm_count` and `norm_ema`. A norm of 0, infinity or NaN is left out."""
    is_averaged = (limited > 0) & jnp.isfinite(limited)
    ema = state.norm_ema + jnp.asarray(1 - decay, jnp.float32) * (limited - state.norm_ema)
    return (
        jnp.where(is_averaged, incremented(state.norm_count), state.norm_count),
        jnp.where(is_averaged, ema, state.norm_ema),
    )


def _global_norm(updates: optax.Updates, axis_name: AxisName | None) -> jax.Array:
    names = () if axis_name is None else (axis_name,) if isinstance(axis_name, str) else axis_name

    def squares(g: jax.Array) -> jax.Array:
        return jnp.sum(jnp.square(jnp.abs(g).astype(jnp.float32)))

    total = jnp.zeros((), jnp.float32)
    for g in jax.tree.leaves(updates):
        part = squares(jnp.asarray(g))
        axes = tuple(name for name in names if _is_sharded(part, name))
        total += jax.lax.psum(part, axes) if axes else part
    is_zero = total == 0  # where the derivative of the square root is infinite
    return jnp.where(is_zero, 0, jnp.sqrt(jnp.where(is_zero, 1, total)))


def _clip_factor(spike: jax.Array, threshold: jax.Array, norm: jax.Array) -> jax.Array:
    """Returns threshold / norm for a spike, 0 for an infinite norm, and 1 in all other steps.

    The operands of the division are finite in every step. Otherwise the derivative of the quotient
    could be infinite, and would turn the derivative of the updates into NaN.
    """
    finite = spike & jnp.isfinite(norm)
    quotient = jnp.where(finite, threshold, 1) / jnp.where(finite, norm, 1)
    return jnp.where(jnp.isinf(norm), 0, quotient)


def _is_sharded(x: jax.Array, axis: str) -> bool:
    """Returns whether x may differ between the devices of an axis."""
    # JAX does not track this under jax.pmap and with check_vma=False.
    tracked = axis in varying_axes(jax.lax.axis_index(axis))
    return axis in varying_axes(x) or not tracked


def _check_agreement(norm: jax.Array, state: LimitSpikesState) -> None:
    """Raises if devices that share one state would compute different norms."""
    unnamed = sorted(varying_axes(norm) - varying_axes(state.norm_ema))
    if unnamed:
        axis_name = unnamed[0] if len(unnamed) == 1 else tuple(unnamed)
        raise ValueError(
            f"The gradients differ between the devices of {unnamed}, but the state of limit_spikes "
            f"does not, and a step could be a spike on one device only. If the gradients are "
            f"sharded, write axis_name={axis_name!r}. If they are not, average them first with "
            f"jax.lax.pmean."
        )


def _check_arguments(max_norm_ratio: Any, max_norm: Any, decay: ArrayLike, action: str) -> None:
    if max_norm_ratio is None and max_norm is None:
        raise ValueError(
            "limit_spikes needs a limit, but neither max_norm_ratio nor max_norm was given. Write "
            "max_norm_ratio=5.0 (relative to the average norm), max_norm=800.0, or both."
        )
    if max_norm_ratio is not None:
        _checks.check_scalar("max_norm_ratio", max_norm_ratio, 1.0, float("inf"))
        if not isinstance(max_norm_ratio, jax.Array) and max_norm_ratio == 1:
            raise ValueError(
                "max_norm_ratio must be above 1, but 1 was given: the average could not follow "
                "growing gradients. Write for example max_norm_ratio=5.0."
            )
    if max_norm is not None:
        _checks.check_scalar("max_norm", max_norm, 0.0, float("inf"))
        if not isinstance(max_norm, jax.Array) and max_norm == 0:
            raise ValueError(
                "max_norm must be above 0, but 0 was given: every step would be a spike. Write a "
                "norm that gradients rarely exceed, for example max_norm=800.0."
            )
    _checks.check_decay("decay", decay, closed=False)
    _checks.check_choice("action", action, ("skip", "clip"))


def _scaled(g: jax.Array, factor: jax.Array) -> jax.Array:
    if not jnp.issubdtype(g.dtype, jnp.inexact):
        return g  # `inner` raises an error
    x = upcast(g, compute_dtype(g))
    scaled = jnp.where(factor == 0, 0, x * factor.astype(x.dtype))  # inf * 0 is NaN
    return saturating_cast(scaled, g.dtype)


def _check_state(state: Any) -> LimitSpikesState:
    if not isinstance(state, LimitSpikesState):
        raise TypeError(wrong_state(LimitSpikesState, state, CONTINUE.format("limit_spikes")))
    return state
