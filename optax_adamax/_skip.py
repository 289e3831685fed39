"""What becomes of gradients that are not finite: they propagate, or they are skipped and counted.

The choice of what to keep has to be made where a moment is about to be stored, and the updates
have to be computed from what was stored. A wrapper that chooses between the old and the new state
afterwards, by `jnp.where` or `jax.lax.cond`, makes XLA copy the moments, or write the updates to
memory once more: on CPU it doubles the time of a step. So the wrapper here only counts, and tells
the transformation inside, by the argument `taken` of its `update`, whether the step is taken.
"""

import functools
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax

from optax_adamax._state import ScaleByAdamaxState

Nonfinite = Literal["propagate", "skip_element", "skip_step"]
POLICIES: tuple[Nonfinite, ...] = get_args(Nonfinite)

_LARGEST = jnp.iinfo(jnp.int32).max


class SkipState(NamedTuple):
    """State of a transformation built with ``nonfinite="skip_element"`` or ``"skip_step"``."""

    inner_state: Any  # the state that nonfinite="propagate" has
    skipped: jax.Array  # shape=(), dtype=int32: elements or steps skipped, stops at 2**31 - 1


def is_taken(g: jax.Array, taken: jax.Array) -> jax.Array:
    """Where an element takes part in a step; `taken` says whether there is a step at all."""
    return jnp.isfinite(_size(g)) & taken


def chain(
    nonfinite: Nonfinite, core: optax.GradientTransformation, *links: optax.GradientTransformation
) -> optax.GradientTransformationExtraArgs:
    """`optax.chain(core, *links)` under a policy for gradients that are not finite.

    Args:
      nonfinite: the policy.
      core: a `scale_by_adamax` that propagates; its `update` takes `taken`.
      *links: what follows it, with states of scalars.
    """
    if nonfinite == "propagate":
        return optax.chain(core, *links)
    return skip(nonfinite, optax.chain(optax.GradientTransformationExtraArgs(*core), *links))


def skip(
    nonfinite: Nonfinite, inner: optax.GradientTransformationExtraArgs
) -> optax.GradientTransformationExtraArgs:
    """Skips and counts elements or steps of `inner`, an update of which takes `taken`."""
    by_step = nonfinite == "skip_step"

    def init(params: optax.Params) -> SkipState:
        return SkipState(inner.init(params), jnp.zeros((), jnp.int32))

    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, SkipState]:
        state = _check_state(state, nonfinite)
        gradients = jax.tree.leaves(jax.tree.map(jnp.asarray, updates))
        finite = functools.reduce(jnp.logical_and, map(_all_finite, gradients), jnp.asarray(True))
        taken = finite if by_step else jnp.asarray(True)
        u, inner_state = inner.update(updates, state.inner_state, params, taken=taken, **extra_args)
        u = jax.tree.map(lambda u, g: jnp.where(is_taken(jnp.asarray(g), taken), u, 0), u, updates)
        if by_step:
            inner_state = _selected(taken, inner_state, state.inner_state)
            more = (~finite).astype(jnp.uint32)
        else:
            more = jax.lax.cond(finite, lambda _: jnp.uint32(0), _count_nonfinite, gradients)
        room = (_LARGEST - state.skipped).astype(jnp.uint32)
        skipped = state.skipped + jnp.minimum(more, room).astype(jnp.int32)
        return u, SkipState(inner_state, skipped)

    return optax.GradientTransformationExtraArgs(init, update)


def _check_state(state: Any, nonfinite: Nonfinite) -> SkipState:
    if not isinstance(state, SkipState):
        raise TypeError(
            f"nonfinite={nonfinite!r} needs the SkipState that its init returns, but a "
            f"{type(state).__name__} was given: to continue a run that had no such policy, write "
            f"init(params)._replace(inner_state=state)."
        )
    return state


def _size(g: jax.Array) -> jax.Array:
    return jnp.abs(g) if jnp.iscomplexobj(g) else g


def _all_finite(g: jax.Array) -> jax.Array:
    # A sum of zeros, or NaN. On CPU XLA writes a mask to memory before `jnp.all` reads it, and
    # `jnp.max` of many float32 loses NaN. Seen in jaxlib 0.10.2.
    return jnp.isfinite(jnp.sum(_size(g) - _size(g)))


def _count_nonfinite(gradients: list[jax.Array]) -> jax.Array:
    counts = [jnp.sum(~jnp.isfinite(_size(g)), dtype=jnp.uint32) for g in gradients]
    return functools.reduce(jnp.add, counts, jnp.uint32(0))


def _selected(taken: jax.Array, new: Any, old: Any) -> Any:
    def select(new: Any, old: Any) -> Any:
        # That of Adamax itself has stayed where it was already.
        return new if isinstance(new, ScaleByAdamaxState) else jnp.where(taken, new, old)

    return jax.tree.map(select, new, old, is_leaf=lambda x: isinstance(x, ScaleByAdamaxState))
