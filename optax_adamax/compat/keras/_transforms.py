"""What Keras' optimizers do around the update rule, where optax has nothing of the kind."""

import inspect
from typing import Any, NamedTuple, TypeGuard, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

State = TypeVar("State")

# optax 0.2.6 and 0.2.7 sum in the dtype of the parameters, which `accumulate` widens; optax 0.2.8
# sums in one dtype for all parameters. JAX takes float64 for float32 unless x64 is enabled.
_ACCUMULATOR_DTYPE: dict[str, Any] = (
    {"accumulator_dtype": np.float64}
    if "accumulator_dtype" in inspect.signature(optax.MultiSteps).parameters
    else {}
)


class StepsPerUpdate(NamedTuple):
    """`skip_state` of the `optax.MultiSteps` in `accumulate`. The count of calls depends on it."""

    gradient_accumulation_steps: jax.Array  # shape=(), dtype=int32, constant


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
    """Passes the mean of `steps` gradients to `inner` at every `steps`-th call.

    `optax.MultiSteps` does the work, with these changes. It sums and `inner` gets the sum divided
    by `steps`, as in Keras: a running mean rounds differently. The sums are float32 or wider.
    """
    mean = optax.stateless(lambda sums, _: jax.tree.map(lambda x: x / steps, sums))

    def never_skip(*args: Any, **kwargs: Any) -> tuple[jax.Array, StepsPerUpdate]:
        del args, kwargs
        return jnp.array(False), StepsPerUpdate(jnp.array(steps, jnp.int32))

    def multi_steps() -> optax.MultiSteps:  # not in advance: accumulator_dtype depends on x64 mode
        return optax.MultiSteps(
            optax.chain(mean, inner),
            steps,
            use_grad_mean=False,
            should_skip_update_fn=never_skip,
            **_ACCUMULATOR_DTYPE,
        )

    def init(params: optax.Params) -> optax.MultiStepsState:
        zeros = jax.tree.map(_zeros, params)
        if any(jnp.iscomplexobj(x) for x in jax.tree.leaves(zeros)):
            raise TypeError(
                "gradient_accumulation_steps needs real parameters, but one is complex: "
                "optax.MultiSteps drops the imaginary parts of gradients. Split complex parameters "
                "with optax.contrib.split_real_and_imaginary."
            )
        return multi_steps().init(zeros)

    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.MultiStepsState]:
        state = _own(state, optax.MultiStepsState)
        with jax.numpy_dtype_promotion("standard"):  # optax 0.2.8 multiplies booleans and floats
            updates, state = multi_steps().update(updates, state, params, **extra_args)
        # optax 0.2.8 resets the sums by multiplying with 0, and an infinite sum becomes NaN.
        is_new = state.mini_step == 0
        sums = jax.tree.map(lambda x: jnp.where(is_new, 0, x), state.acc_grads)
        return updates, state._replace(acc_grads=sums)

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


def is_accumulation(x: Any) -> TypeGuard[optax.MultiStepsState]:
    """Whether `x` is a state of `accumulate`, not that of another `optax.MultiSteps`."""
    return isinstance(x, optax.MultiStepsState) and isinstance(x.skip_state, StepsPerUpdate)


def is_average(x: Any) -> TypeGuard[AverageState]:
    """Whether `x` is a state of `average`."""
    return isinstance(x, AverageState)


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
