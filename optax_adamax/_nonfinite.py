"""Gradients that are not finite: they propagate, count as 0, or their step is skipped."""

import functools
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax

from optax_adamax import _checks, _xla
from optax_adamax._numerics import abs_if_complex

Nonfinite = Literal["propagate", "zero", "skip_step"]

# The keyword with which a policy calls the inner `update`. Its value is a bool array. If it is
# given, non-finite elements of gradients count as 0. If it is False, m and v do not change. The
# leaf does both, because XLA on CPU would copy the arrays if the policy did.
GRADS_FINITE = "_optax_adamax_grads_finite"


class HandleNonfiniteState(NamedTuple):
    """State of a transformation built with ``nonfinite="zero"`` or ``"skip_step"``."""

    inner_state: Any  # the state that nonfinite="propagate" has
    # shape=(), dtype=int32: elements set to 0, or steps skipped; stops at 2**31 - 1
    nonfinite_count: jax.Array


def handle_nonfinite(
    nonfinite: Nonfinite, inner: optax.GradientTransformation
) -> optax.GradientTransformationExtraArgs:
    """`inner` under a policy for gradients that are not finite.

    Args:
      nonfinite: the policy, see :func:`optax_adamax.scale_by_adamax`.
      inner: the transformation to protect. Its `update` receives the argument `GRADS_FINITE`.

    Returns:
      The transformation, with state :class:`HandleNonfiniteState`; `inner` itself for
      ``"propagate"``.
    """
    _checks.check_choice("nonfinite", nonfinite, get_args(Nonfinite))
    inner = optax.with_extra_args_support(inner)
    if nonfinite == "propagate":
        return inner

    def init(params: optax.Params) -> HandleNonfiniteState:
        return HandleNonfiniteState(inner.init(params), jnp.zeros((), jnp.int32))

    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, HandleNonfiniteState]:
        state = _check_state(state, nonfinite)
        policy = _zero if nonfinite == "zero" else _skip_step
        grads = jax.tree.map(jnp.asarray, updates)
        update = functools.partial(inner.update, params=params, **extra_args)
        u, inner_state, more = policy(update, grads, state)
        room = (jnp.iinfo(jnp.int32).max - state.nonfinite_count).astype(jnp.uint32)
        count = state.nonfinite_count + jnp.minimum(more, room).astype(jnp.int32)
        return u, HandleNonfiniteState(inner_state, count)

    return optax.GradientTransformationExtraArgs(init, update)


def _zero(update: Any, grads: Any, state: HandleNonfiniteState) -> tuple[Any, Any, jax.Array]:
    u, inner_state = update(grads, state.inner_state, **{GRADS_FINITE: jnp.asarray(True)})
    none = jnp.zeros_like(state.nonfinite_count, jnp.uint32)

    def count(grads: list[jax.Array]) -> jax.Array:
        return _total(
            [jnp.sum(~jnp.isfinite(abs_if_complex(g)), dtype=jnp.uint32) for g in grads], like=none
        )

    # On CPU XLA writes the mask to memory before it is added up: so only where there is something.
    leaves = jax.tree.leaves(grads)
    return u, inner_state, jax.lax.cond(_has_nonfinite(leaves, none), count, lambda _: none, leaves)


def _skip_step(update: Any, grads: Any, state: HandleNonfiniteState) -> tuple[Any, Any, jax.Array]:
    skipped = _has_nonfinite(jax.tree.leaves(grads), like=state.nonfinite_count)

    def chosen(new: jax.Array, old: jax.Array) -> jax.Array:
        return jnp.where(skipped, old, new) if jnp.ndim(old) == 0 else new

    u, inner_state = update(grads, state.inner_state, **{GRADS_FINITE: ~skipped})
    u = jax.tree.map(lambda u: jnp.where(skipped, 0, u), u)
    return u, jax.tree.map(chosen, inner_state, state.inner_state), skipped.astype(jnp.uint32)


def _has_nonfinite(grads: list[jax.Array], like: jax.Array) -> jax.Array:
    bad = [~_xla.all_finite(abs_if_complex(g)) for g in grads]
    return _total([x.astype(jnp.uint32) for x in bad], like) > 0


def _total(counts: list[jax.Array], like: jax.Array) -> jax.Array:
    """The sum of the counts, on all devices of a `jax.shard_map` over which `like` is the same."""
    total = functools.reduce(jnp.add, counts, jnp.uint32(0))
    axes = _xla.varying_axes(total) - _xla.varying_axes(like)
    return jax.lax.psum(total, tuple(axes)) if axes else total


def _check_state(state: Any, nonfinite: Nonfinite) -> HandleNonfiniteState:
    if not isinstance(state, HandleNonfiniteState):
        raise TypeError(
            f"nonfinite={nonfinite!r} needs the HandleNonfiniteState that its init returns, but a "
            f"{type(state).__name__} was given: to continue a run that had no such policy, write "
            f"init(params)._replace(inner_state=state)."
        )
    return state
