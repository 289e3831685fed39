"""Steps whose gradient is much larger than the gradients before it."""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optax_adamax import _checks
from optax_adamax._numerics import compute_dtype, narrow, one_minus_power, widen

FIRST_STEPS = 10  # that are accepted, whatever their norm


class SpikeState(NamedTuple):
    """State of `limit_spikes`."""

    inner_state: Any  # the state of the transformation that is protected
    seen: jax.Array  # shape=(), dtype=int32: norms averaged, stops at 2**31 - 1
    mean_norm: jax.Array  # shape=(), dtype=float32: their running average, not yet bias-corrected
    spikes: jax.Array  # shape=(), dtype=int32: steps skipped or clipped, stops at 2**31 - 1


def limit_spikes(
    inner: optax.GradientTransformation,
    multiple: ArrayLike,
    *,
    decay: ArrayLike = 0.99,
    action: Literal["skip", "clip"] = "skip",
) -> optax.GradientTransformationExtraArgs:
    r"""Skips or clips a step whose gradient is a multiple of what gradients have been.

    With :math:`n_t` the global norm of the gradients and :math:`\bar n_{t-1}` the running average
    of the norms before it, corrected for its start at 0, step t is a spike if

    .. math::

        n_t &> c\, \bar n_{t-1} \\
        s_t &= d\, s_{t-1} + (1 - d) \min(n_t, c\, \bar n_{t-1}), \quad
        \bar n_t = s_t / (1 - d^t)

    The average takes a spike at the limit. So one spike raises it by a factor of at most
    :math:`1 + (1 - d)(c - 1)`, and gradients that have become F times larger for good are
    accepted again after about :math:`\log(F/c) / \log(1 + (1 - d)(c - 1))` steps: for c = 5,
    d = 0.99 and F = 100, that is 77. The first ten steps are accepted. A norm of 0 or NaN is
    passed on and leaves the average as it was: what is not finite is the business of `nonfinite`
    (:func:`scale_by_adamax`). An infinite norm is a spike; norms are computed in float32, where
    those above 1.8e19 are infinite, and clipping makes zeros of such a gradient.

    Args:
      inner: the transformation to protect, for instance :func:`adamax`.
      multiple: c > 1.
      decay: d, in [0, 1); its average reaches back about 1 / (1 - d) steps.
      action: ``"skip"``: the updates are 0 and the state of `inner` stays as it is. ``"clip"``:
        `inner` is given the gradients scaled to the norm :math:`c\, \bar n_{t-1}`.

    Returns:
      The transformation, with state :class:`SpikeState`: ``optax.tree.get(state, "spikes")`` is
      the number of spikes. Further arguments of ``update`` reach `inner`.

    Raises:
      ValueError: multiple <= 1, a decay out of range, or another action.
      TypeError: an argument of the wrong type.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from optax_adamax import adamax, limit_spikes
      >>> tx = limit_spikes(adamax(0.1), multiple=5.0)
      >>> params = jnp.zeros(2)
      >>> state = tx.init(params)
      >>> for g in [jnp.ones(2)] * 12 + [jnp.array([1.0, 900.0])]:
      ...     updates, state = tx.update(g, state, params)
      >>> print(updates, optax.tree.get(state, "spikes"))
      [0. 0.] 1

    Unlike :func:`optax.clip_by_global_norm` and :func:`optax.skip_large_updates` it needs no
    absolute norm. Compare Child, `Very Deep VAEs <https://arxiv.org/abs/2011.10650>`_, 2020,
    where steps above a fixed norm are skipped.
    """
    if not isinstance(inner, optax.GradientTransformation):
        raise TypeError(
            f"inner must be an optax transformation, but it is a {type(inner).__name__}: write "
            f"limit_spikes(adamax(1e-3), multiple=5.0)."
        )
    _checks.check_scalar("multiple", multiple, 1.0, float("inf"))
    if not isinstance(multiple, jax.Array) and multiple == 1:
        raise ValueError(
            "multiple must be above 1, but 1 was given: the average of the norms could not follow "
            "gradients that grow. Write for instance multiple=5.0."
        )
    _checks.check_decay("decay", decay, closed=False)
    _checks.check_choice("action", action, ("skip", "clip"))
    inner = optax.with_extra_args_support(inner)

    def init(params: optax.Params) -> SpikeState:
        return SpikeState(
            inner.init(params),
            seen=jnp.zeros((), jnp.int32),
            mean_norm=jnp.zeros((), jnp.float32),
            spikes=jnp.zeros((), jnp.int32),
        )

    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, SpikeState]:
        state = _check_state(state)
        norm = _global_norm(updates)
        a = jnp.asarray(1 - decay, jnp.float32)
        seen = jnp.maximum(state.seen, 1).astype(jnp.float32)
        mean = state.mean_norm / one_minus_power(a, seen)
        limit = jnp.where(state.seen > 0, jnp.asarray(multiple, jnp.float32) * mean, jnp.inf)
        spike = (norm > limit) & (state.seen >= FIRST_STEPS)

        if action == "clip":
            factor = jnp.where(spike, limit / norm, 1)
            clipped = jax.tree.map(lambda g: _scaled(jnp.asarray(g), factor), updates)
            u, inner_state = inner.update(clipped, state.inner_state, params, **extra_args)
        else:
            u, inner_state = jax.lax.cond(
                spike,
                lambda: (jax.tree.map(jnp.zeros_like, updates), state.inner_state),
                lambda: inner.update(updates, state.inner_state, params, **extra_args),
            )
        limited = jnp.minimum(norm, limit)
        counts = (norm > 0) & jnp.isfinite(limited)
        new_mean = state.mean_norm + a * (limited - state.mean_norm)
        return u, SpikeState(
            inner_state,
            seen=jnp.where(counts, optax.safe_increment(state.seen), state.seen),
            mean_norm=jnp.where(counts, new_mean, state.mean_norm),
            spikes=jnp.where(spike, optax.safe_increment(state.spikes), state.spikes),
        )

    return optax.GradientTransformationExtraArgs(init, update)


def _global_norm(updates: optax.Updates) -> jax.Array:
    def squares(g: jax.Array) -> jax.Array:
        return jnp.sum(jnp.square(jnp.abs(g).astype(jnp.float32)))

    leaves = [squares(jnp.asarray(g)) for g in jax.tree.leaves(updates)]
    return jnp.sqrt(sum(leaves, jnp.zeros((), jnp.float32)))


def _scaled(g: jax.Array, factor: jax.Array) -> jax.Array:
    wide = widen(g, compute_dtype(g))
    return narrow(wide * factor.astype(wide.dtype), g.dtype)


def _check_state(state: Any) -> SpikeState:
    if not isinstance(state, SpikeState):
        raise TypeError(
            f"limit_spikes needs the SpikeState that its init returns, but a "
            f"{type(state).__name__} was given: to continue a run that had no such limit, write "
            f"init(params)._replace(inner_state=state)."
        )
    return state
