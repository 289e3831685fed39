"""What Keras' optimizers do around the update rule, where optax has nothing of the kind."""

from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

State = TypeVar("State")


class AccumulateState(NamedTuple):
    """State of `accumulate`."""

    micro_step: jax.Array  # shape=(), dtype=int32: calls since the last update
    # shape=(), dtype=int32, constant: calls to an update, which the count of calls is made of
    gradient_accumulation_steps: jax.Array
    # shaped like the parameters, float32 or wider: sum of the gradients of these calls
    gradient_accumulator: optax.Updates
    inner_state: optax.OptState


class AverageState(NamedTuple):
    """State of `average`."""

    iteration: jax.Array  # shape=(), dtype=int32: calls so far, stops at 2**31 - 1
    average: optax.Params  # shaped like the parameters, float32 or wider
    inner_state: optax.OptState


def clip_each(max_norm: float) -> optax.GradientTransformation:
    """Clips the norm of each array by itself: `optax.clip_by_global_norm`, leaf by leaf."""
    clip = optax.clip_by_global_norm(max_norm)
    return optax.stateless(
        lambda updates, _: jax.tree.map(lambda g: clip.update(g, optax.EmptyState())[0], updates)
    )


def accumulate(
    inner: optax.GradientTransformation, steps: int
) -> optax.GradientTransformationExtraArgs:
    """Gives `inner` the mean of `steps` gradients at every `steps`-th call, else no update.

    `optax.MultiSteps` keeps a running mean. Keras keeps the sum and divides at the end, and where
    gradients nearly cancel Adamax's first steps turn that rounding into steps of full length.
    """
    wrapped = optax.with_extra_args_support(inner)

    def init(params: optax.Params) -> AccumulateState:
        return AccumulateState(
            micro_step=jnp.zeros((), jnp.int32),
            gradient_accumulation_steps=jnp.asarray(steps, jnp.int32),
            gradient_accumulator=jax.tree.map(_zeros, params),
            inner_state=wrapped.init(params),
        )

    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, AccumulateState]:
        state, gradients = _own(state, AccumulateState), updates
        total = jax.tree.map(
            lambda g, a: jnp.asarray(g).astype(a.dtype) + a, gradients, state.gradient_accumulator
        )

        def step(total: Any, inner_state: Any) -> Any:
            mean = jax.tree.map(lambda g, a: (a / steps).astype(g.dtype), gradients, total)
            updates, inner_state = wrapped.update(mean, inner_state, params, **extra_args)
            return updates, jax.tree.map(jnp.zeros_like, total), inner_state

        def wait(total: Any, inner_state: Any) -> Any:
            return jax.tree.map(jnp.zeros_like, gradients), total, inner_state

        last = state.micro_step == steps - 1
        updates, total, inner_state = jax.lax.cond(last, step, wait, total, state.inner_state)
        return updates, state._replace(
            micro_step=(state.micro_step + 1) % steps,
            gradient_accumulator=total,
            inner_state=inner_state,
        )

    return optax.GradientTransformationExtraArgs(init, update)


def average(
    inner: optax.GradientTransformation,
    momentum: float,
    overwrite_frequency: int | None,
    steps: int,
) -> optax.GradientTransformationExtraArgs:
    """Keeps a moving average of the parameters, and makes it the parameters now and then.

    `optax.ema` averages updates; Keras averages parameters. It does so at every call, those that
    only accumulate included, and all else counts effective iterations, ``calls // steps``: the
    average is a copy until the first is complete, and in each `overwrite_frequency`-th one every
    call overwrites.
    """
    wrapped = optax.with_extra_args_support(inner)

    def init(params: optax.Params) -> AverageState:
        return AverageState(
            iteration=jnp.zeros((), jnp.int32),
            average=jax.tree.map(_zeros, params),
            inner_state=wrapped.init(params),
        )

    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, AverageState]:
        if params is None:
            raise ValueError("update needs the parameters as its third argument: use_ema is True.")
        state = _own(state, AverageState)
        updates, inner_state = wrapped.update(updates, state.inner_state, params, **extra_args)
        effective = state.iteration // steps

        def mean(p: jax.Array, a: jax.Array) -> jax.Array:
            kept = jnp.where(effective == 0, 0.0, momentum).astype(a.dtype)
            return kept * a + (1 - kept) * p.astype(a.dtype)

        averages = jax.tree.map(mean, optax.apply_updates(params, updates), state.average)
        if overwrite_frequency is not None:
            overwrite = (effective + 1) % overwrite_frequency == 0

            def replace(u: jax.Array, p: jax.Array, a: jax.Array) -> jax.Array:
                return jnp.where(overwrite, (a - p.astype(a.dtype)).astype(u.dtype), u)

            updates = jax.tree.map(replace, updates, params, averages)
        iteration = jnp.asarray(optax.safe_increment(state.iteration))
        return updates, AverageState(iteration, averages, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def _own(state: Any, expected: type[State]) -> State:
    if not isinstance(state, expected):
        raise TypeError(
            f"The state must be a {expected.__name__}, but a {type(state).__name__} was given: "
            f"give the one that init of this transformation returned."
        )
    return state


def _zeros(parameter: Any) -> jax.Array:
    """Room for a sum or a mean: half precision would lose what one more call adds."""
    dtype = np.result_type(jnp.result_type(parameter), np.float32)
    return jnp.zeros_like(parameter, dtype=dtype)
