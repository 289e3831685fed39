"""Steps whose gradient is much larger than the gradients before it."""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optax_adamax import _checks
from optax_adamax._numerics import compute_dtype, one_minus_power, saturating_cast, upcast
from optax_adamax._xla import varying_axes

AxisName = str | tuple[str, ...]

FIRST_STEPS = 10  # that the running average does not judge


class LimitSpikesState(NamedTuple):
    """State of `limit_spikes`."""

    inner_state: Any  # the state of the transformation that is protected
    norm_count: jax.Array  # shape=(), dtype=int32: norms averaged, stops at 2**31 - 1
    norm_ema: jax.Array  # shape=(), dtype=float32: their running average, not yet bias-corrected
    spike_count: jax.Array  # shape=(), dtype=int32: steps skipped or clipped, stops at 2**31 - 1


def limit_spikes(
    inner: optax.GradientTransformation,
    max_norm_ratio: ArrayLike | None = None,
    *,
    max_norm: ArrayLike | None = None,
    decay: ArrayLike = 0.99,
    action: Literal["skip", "clip"] = "skip",
    axis_name: AxisName | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Skips or clips a step whose gradient is too large, as such or for what gradients have been.

    With :math:`n_t` the global norm of the gradients and :math:`\bar n_{t-1}` the running average
    of the norms before it, corrected for its start at 0, step t is a spike if

    .. math::

        n_t &> \ell_t = \min(c\, \bar n_{t-1}, n_{\max}) \\
        s_t &= d\, s_{t-1} + (1 - d) \min(n_t, \ell_t), \quad
        \bar n_t = s_t / (1 - d^t)

    The average takes a spike at the limit. So one spike raises it by a factor of at most
    :math:`1 + (1 - d)(c - 1)`, and gradients that have become F times larger for good are
    accepted again after about :math:`\log(F/c) / \log(1 + (1 - d)(c - 1))` steps: for c = 5,
    d = 0.99 and F = 100, that is 77. The ratio is not checked during the first ten steps. A norm
    of 0 or NaN is passed on and leaves the average as it was: what is not finite is the business of
    `nonfinite` (:func:`scale_by_adamax`). An infinite norm is a spike; norms are computed in
    float32, where those above 1.8e19 are infinite, and clipping makes zeros of such a gradient.

    Args:
      inner: the transformation to protect, for instance :func:`adamax`.
      max_norm_ratio: c > 1; None: there is no such limit.
      max_norm: the fixed limit :math:`n_{\max}` > 0, from the first step on; None: there is none.
        One of the two has to be given.
      decay: d, in [0, 1); its average reaches back about 1 / (1 - d) steps.
      action: ``"skip"``: the updates are 0 and the state of `inner` stays as it is. ``"clip"``:
        `inner` is given the gradients scaled to the norm :math:`\ell_t`.
      axis_name: axes of :func:`jax.shard_map` or :func:`jax.pmap` over which the gradients are
        split. The norm is that of all parts. Gradients that are the same on all devices, and a
        step under :func:`jax.jit` alone, need none.

    Returns:
      The transformation, with state :class:`LimitSpikesState`:
      ``optax.tree.get(state, "spike_count")`` is the number of spikes. Further
      arguments of ``update`` reach `inner`.

    Raises:
      ValueError: neither max_norm_ratio nor max_norm; max_norm_ratio <= 1, max_norm <= 0, a decay
        out of range, or another action; from ``update``, gradients that
        :func:`jax.shard_map` knows to differ between devices along an axis that `axis_name`
        does not name.
      TypeError: an argument of the wrong type.

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
    _check_arguments(inner, max_norm_ratio, max_norm, decay, action)
    inner = optax.with_extra_args_support(inner)

    def init(params: optax.Params) -> LimitSpikesState:
        return LimitSpikesState(
            inner.init(params),
            norm_count=jnp.zeros((), jnp.int32),
            norm_ema=jnp.zeros((), jnp.float32),
            spike_count=jnp.zeros((), jnp.int32),
        )

    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, LimitSpikesState]:
        state = _check_state(state)
        norm = _global_norm(updates, axis_name)
        _check_agreement(norm, state)
        a = jnp.asarray(1 - decay, jnp.float32)
        fixed = jnp.asarray(jnp.inf if max_norm is None else max_norm, jnp.float32)
        running = fixed
        if max_norm_ratio is not None:
            seen = jnp.maximum(state.norm_count, 1).astype(jnp.float32)
            mean = state.norm_ema / one_minus_power(a, seen)
            ours = jnp.where(
                state.norm_count > 0, jnp.asarray(max_norm_ratio, jnp.float32) * mean, jnp.inf
            )
            running = jnp.minimum(ours, fixed)
        limit = jnp.where(state.norm_count >= FIRST_STEPS, running, fixed)
        spike = norm > limit

        if action == "clip":
            factor = jnp.where(spike, limit / norm, 1)
            updates = jax.tree.map(lambda g: _scaled(jnp.asarray(g), factor), updates)
        u, inner_state = inner.update(updates, state.inner_state, params, **extra_args)
        if action == "skip":
            # No branch: XLA would copy the state for it, and both sides would need equal types.
            u = jax.tree.map(lambda x: jnp.where(spike, jnp.zeros_like(x), x), u)
            inner_state = jax.tree.map(
                lambda old, new: jnp.where(spike, old, new), state.inner_state, inner_state
            )
        limited = jnp.minimum(norm, running)
        counts = (norm > 0) & jnp.isfinite(limited)
        new_mean = state.norm_ema + a * (limited - state.norm_ema)
        return u, LimitSpikesState(
            inner_state,
            norm_count=jnp.where(counts, optax.safe_increment(state.norm_count), state.norm_count),
            norm_ema=jnp.where(counts, new_mean, state.norm_ema),
            spike_count=jnp.where(
                spike, optax.safe_increment(state.spike_count), state.spike_count
            ),
        )

    return optax.GradientTransformationExtraArgs(init, update)


def _global_norm(updates: optax.Updates, axis_name: AxisName | None) -> jax.Array:
    names = () if axis_name is None else (axis_name,) if isinstance(axis_name, str) else axis_name

    def squares(g: jax.Array) -> jax.Array:
        return jnp.sum(jnp.square(jnp.abs(g).astype(jnp.float32)))

    total = jnp.zeros((), jnp.float32)
    for g in jax.tree.leaves(updates):
        part = squares(jnp.asarray(g))
        split = tuple(name for name in names if _is_split(part, name))
        total += jax.lax.psum(part, split) if split else part
    return jnp.sqrt(total)


def _is_split(x: jax.Array, axis: str) -> bool:
    """Whether x differs between the devices of an axis, as far as JAX knows; if not, it may."""
    known = axis in varying_axes(jax.lax.axis_index(axis))  # not under pmap, nor without check_vma
    return axis in varying_axes(x) or not known


def _check_agreement(norm: jax.Array, state: LimitSpikesState) -> None:
    """Refuses devices that would judge the same step differently and share one state."""
    unnamed = sorted(varying_axes(norm) - varying_axes(state.norm_ema))
    if unnamed:
        raise ValueError(
            f"The gradients differ between the devices of {unnamed}, but the state of limit_spikes "
            f"does not, so that the devices would not agree on which step is a spike: write "
            f"axis_name={unnamed[0] if len(unnamed) == 1 else tuple(unnamed)!r} where they are "
            f"parts of one gradient, or take their mean first (jax.lax.pmean)."
        )


def _check_arguments(
    inner: Any, max_norm_ratio: Any, max_norm: Any, decay: ArrayLike, action: str
) -> None:
    if not isinstance(inner, optax.GradientTransformation):
        raise TypeError(
            f"inner must be an optax transformation, but it is a {type(inner).__name__}: write "
            f"limit_spikes(adamax(1e-3), max_norm_ratio=5.0)."
        )
    if max_norm_ratio is None and max_norm is None:
        raise ValueError(
            "limit_spikes needs a limit: write max_norm_ratio=5.0, of the running average of the "
            "norms, or max_norm=800.0, or both."
        )
    if max_norm_ratio is not None:
        _checks.check_scalar("max_norm_ratio", max_norm_ratio, 1.0, float("inf"))
        if not isinstance(max_norm_ratio, jax.Array) and max_norm_ratio == 1:
            raise ValueError(
                "max_norm_ratio must be above 1, but 1 was given: the average of the norms could "
                "not follow gradients that grow. Write for instance max_norm_ratio=5.0."
            )
    if max_norm is not None:
        _checks.check_scalar("max_norm", max_norm, 0.0, float("inf"))
        if not isinstance(max_norm, jax.Array) and max_norm == 0:
            raise ValueError(
                "max_norm must be above 0, but 0 was given: no step would be taken. Write a norm "
                "that gradients rarely reach, for instance max_norm=800.0."
            )
    _checks.check_decay("decay", decay, closed=False)
    _checks.check_choice("action", action, ("skip", "clip"))


def _scaled(g: jax.Array, factor: jax.Array) -> jax.Array:
    wide = upcast(g, compute_dtype(g))
    return saturating_cast(wide * factor.astype(wide.dtype), g.dtype)


def _check_state(state: Any) -> LimitSpikesState:
    if not isinstance(state, LimitSpikesState):
        raise TypeError(
            f"limit_spikes needs the LimitSpikesState that its init returns, but a "
            f"{type(state).__name__} was given: to continue a run that had no such limit, write "
            f"init(params)._replace(inner_state=state)."
        )
    return state
