"""Policies for non-finite gradients: propagate them, replace them by zero, or skip the step."""

import functools
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax

from optax_adamax import _checks, _xla
from optax_adamax._messages import CONTINUE, wrong_state
from optax_adamax._numerics import abs_if_complex
from optax_adamax._tree_checks import check_arrays
from optax_adamax._varying_axes import varying_axes

Nonfinite = Literal["propagate", "zero", "skip_step"]

# A policy passes this keyword to the inner `update`, with a scalar bool array as its value. If it
# is passed, `_leaf` replaces non-finite elements of gradients by 0. If it is False, `_leaf` returns
# the old m and v. If the policy itself did this, XLA on CPU would copy the arrays.
GRADS_FINITE = "_optax_adamax_grads_finite"


class HandleNonfiniteState(NamedTuple):
    """State of a transformation built with ``nonfinite="zero"`` or ``"skip_step"``."""

    # shape=(), dtype=int32: elements replaced, or steps skipped; saturates at 2**31 - 1
    nonfinite_count: jax.Array
    inner_state: Any  # the state of the same transformation with nonfinite="propagate"


def handle_nonfinite(
    nonfinite: Nonfinite, inner: optax.GradientTransformation
) -> optax.GradientTransformationExtraArgs:
    """Wraps `inner` in a policy for non-finite gradients.

    Args:
      nonfinite: the policy; see :func:`optax_adamax.scale_by_adamax`.
      inner: the transformation to wrap. Its `update` receives the keyword `GRADS_FINITE`.

    Returns:
      The transformation, with state :class:`HandleNonfiniteState`. For ``"propagate"`` it is
      `inner`, with the state of `inner`.
    """
    _checks.check_choice("nonfinite", nonfinite, get_args(Nonfinite))
    inner = optax.with_extra_args_support(inner)
    if nonfinite == "propagate":
        return inner

    def init(params: optax.Params) -> HandleNonfiniteState:
        return HandleNonfiniteState(
            nonfinite_count=jnp.zeros((), jnp.int32), inner_state=inner.init(params)
        )

    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, HandleNonfiniteState]:
        state = _check_state(state, nonfinite)
        check_arrays("gradient", updates)
        policy = _zero if nonfinite == "zero" else _skip_step
        grads = jax.tree.map(jnp.asarray, updates)
        update = functools.partial(inner.update, params=params, **extra_args)
        u, inner_state, increment = policy(update, grads, state)
        remaining = (jnp.iinfo(jnp.int32).max - state.nonfinite_count).astype(jnp.uint32)
        count = state.nonfinite_count + jnp.minimum(increment, remaining).astype(jnp.int32)
        return u, HandleNonfiniteState(nonfinite_count=count, inner_state=inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def _zero(update: Any, grads: Any, state: HandleNonfiniteState) -> tuple[Any, Any, jax.Array]:
    """Returns the updates, the inner state, and the number of replaced elements."""
    u, inner_state = update(grads, state.inner_state, **{GRADS_FINITE: jnp.asarray(True)})
    leaves, zero = jax.tree.leaves(grads), jnp.zeros_like(state.nonfinite_count, jnp.uint32)
    # XLA on CPU (jaxlib 0.10.2) writes the mask to memory before it counts. The branch avoids that
    # in steps without a non-finite element. Both branches are functions of the module, because
    # outside of jax.jit, new functions would be compiled again in every call.
    any_nonfinite = _has_nonfinite(leaves, zero)
    count = jax.lax.cond(any_nonfinite, _count_nonfinite, _return_zero, leaves, zero)
    return u, inner_state, count


def _count_nonfinite(grads: list[jax.Array], zero: jax.Array) -> jax.Array:
    counts = [jnp.sum(~jnp.isfinite(abs_if_complex(g)), dtype=jnp.uint32) for g in grads]
    return _total(counts, like=zero)


def _return_zero(grads: list[jax.Array], zero: jax.Array) -> jax.Array:
    del grads
    return zero


def _skip_step(update: Any, grads: Any, state: HandleNonfiniteState) -> tuple[Any, Any, jax.Array]:
    """Returns the updates, the inner state, and 1 if the step is skipped, else 0."""
    skipped = _has_nonfinite(jax.tree.leaves(grads), like=state.nonfinite_count)

    def select(new: jax.Array, old: jax.Array) -> jax.Array:
        # `_leaf` has selected m and v already. Scalars are counts and phases.
        return jnp.where(skipped, old, new) if jnp.ndim(old) == 0 else new

    u, inner_state = update(grads, state.inner_state, **{GRADS_FINITE: ~skipped})
    u = jax.tree.map(lambda u: jnp.where(skipped, 0, u), u)
    return u, jax.tree.map(select, inner_state, state.inner_state), skipped.astype(jnp.uint32)


def _has_nonfinite(grads: list[jax.Array], like: jax.Array) -> jax.Array:
    has_nonfinite = [~_xla.all_finite(abs_if_complex(g)) for g in grads]
    return _total([x.astype(jnp.uint32) for x in has_nonfinite], like) > 0


def _total(counts: list[jax.Array], like: jax.Array) -> jax.Array:
    """Adds counts, also over the mesh axes of `jax.shard_map` over which `like` does not vary."""
    total = functools.reduce(jnp.add, counts, jnp.uint32(0))
    axes = varying_axes(total) - varying_axes(like)
    return jax.lax.psum(total, tuple(axes)) if axes else total


def _check_state(state: Any, nonfinite: Nonfinite) -> HandleNonfiniteState:
    if not isinstance(state, HandleNonfiniteState):
        advice = CONTINUE.format(f"nonfinite={nonfinite!r}")
        raise TypeError(wrong_state(HandleNonfiniteState, state, advice))
    return state
