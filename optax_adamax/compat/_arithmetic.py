"""Arithmetic around a chain: float32, complex pairs, Keras' accumulation and average."""

import inspect
from typing import Any, NamedTuple, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_adamax._messages import ORDER, describe_value, leaf_label
from optax_adamax._numerics import compute_dtype, saturating_cast, upcast, wider_dtype
from optax_adamax._tree_checks import check_arrays, check_shape, without_unused

# optax 0.2.6 and 0.2.7 sum gradients in the dtypes of the parameters given to init, optax 0.2.8 in
# one dtype. JAX replaces float64 by float32 unless x64 is enabled.
_ACCUMULATOR_DTYPE: dict[str, Any] = (
    {"accumulator_dtype": np.float64}
    if "accumulator_dtype" in inspect.signature(optax.MultiSteps).parameters
    else {}
)


class RealImag(NamedTuple):
    """Replaces a complex array by two real arrays."""

    real: Any
    imag: Any


class StepsPerUpdate(NamedTuple):
    """`skip_state` of the `optax.MultiSteps` in `accumulate`, from which calls are counted."""

    gradient_accumulation_steps: jax.Array  # shape=(), dtype=int32, constant


class AverageState(NamedTuple):
    """State of `average`."""

    iteration: jax.Array  # shape=(), dtype=int32: calls so far, saturates at 2**31 - 1
    average: optax.Params  # shaped like the parameters, float32 or wider
    inner_state: optax.OptState


def compute_in_float32(
    inner: optax.GradientTransformation, *, split_complex: bool = False
) -> optax.GradientTransformationExtraArgs:
    """Casts gradients and parameters to float32, or to float64 if one of them has 64 bits.

    Norms and weight decay computed in float16 overflow or vanish. The updates are cast once, to
    the wider of the dtypes of gradient and parameter. The state is the state of `inner`.

    With `split_complex`, `inner` receives complex arrays as pairs of reals, as in PyTorch.
    `optax.contrib.split_real_and_imaginary` (optax 0.2.8) joins the parts with
    ``real + imaginary * 1j``. That raises under strict dtype promotion, and an infinite imaginary
    part makes the real part NaN. Its ``init`` raises for `jax.ShapeDtypeStruct`.
    """
    wrapped = optax.with_extra_args_support(inner)

    def split(tree: Any) -> Any:
        return jax.tree.map(_split, tree) if split_complex else tree

    def init(params: optax.Params) -> optax.OptState:
        check_arrays("parameter", params)
        return wrapped.init(split(params))

    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        if not isinstance(state, (tuple, list)) or hasattr(state, "_fields"):
            raise TypeError(
                f"The state must be the tuple that init returns, but {describe_value(state)} was "
                f"given. {ORDER}"
            )
        check_arrays("gradient", updates)
        params = without_unused(updates, params)
        paired = jax.tree.structure(params) == jax.tree.structure(updates)
        if paired:
            _check_shapes(updates, params)
        others = params if paired else updates  # `inner` checks which parameters it needs
        wide = jax.tree.map(_widen, updates, others)
        wide_params = jax.tree.map(_widen, params, updates) if paired else params
        wide, state = wrapped.update(split(wide), state, split(wide_params), **extra_args)
        wide = jax.tree.map(join, wide, is_leaf=is_real_imag)
        return jax.tree.map(_narrow, wide, updates, others), state

    return optax.GradientTransformationExtraArgs(init, update)


def _check_shapes(gradients: Any, params: Any) -> None:
    """Checks shapes before weight decay, which would broadcast a gradient to its parameter."""
    leaves = jax.tree_util.tree_leaves_with_path(gradients)
    for (path, gradient), parameter in zip(leaves, jax.tree.leaves(params), strict=True):
        check_shape(leaf_label("gradient", path), gradient, parameter)


def _widen(x: Any, other: Any) -> Any:
    try:
        are_floats = all(jnp.issubdtype(jnp.result_type(y), jnp.inexact) for y in (x, other))
    except TypeError:  # not an array
        are_floats = False
    return upcast(jnp.asarray(x), compute_dtype(x, other)) if are_floats else x  # `inner` raises


def _narrow(update: jax.Array, gradient: Any, parameter: Any) -> jax.Array:
    return saturating_cast(update, wider_dtype(parameter, gradient))


def is_real_imag(x: Any) -> bool:
    """Whether x replaces a complex array."""
    return isinstance(x, RealImag)


def join(x: Any) -> Any:
    """The complex array of a `RealImag`; other arrays are returned unchanged."""
    return jax.lax.complex(x.real, x.imag) if is_real_imag(x) else x


def _split(x: Any) -> Any:
    if not jnp.iscomplexobj(x):
        return x
    if isinstance(x, jax.ShapeDtypeStruct):
        real = jax.ShapeDtypeStruct(x.shape, np.finfo(x.dtype).dtype, sharding=x.sharding)
        return RealImag(real, real)
    return RealImag(x.real, x.imag)


def is_accumulation(x: Any) -> TypeGuard[optax.MultiStepsState]:
    """Whether `x` is a state of `accumulate`, not of another `optax.MultiSteps`."""
    return isinstance(x, optax.MultiStepsState) and isinstance(x.skip_state, StepsPerUpdate)


def is_average(x: Any) -> TypeGuard[AverageState]:
    """Whether `x` is a state of `average`."""
    return isinstance(x, AverageState)


def clip_each(max_norm: float) -> optax.GradientTransformation:
    """Clips the norm of each array by `optax.clip_by_global_norm`."""
    clip = optax.clip_by_global_norm(max_norm)
    return optax.stateless(
        lambda updates, _: jax.tree.map(lambda g: clip.update(g, optax.EmptyState())[0], updates)
    )


def accumulate(
    inner: optax.GradientTransformation, steps: int
) -> optax.GradientTransformationExtraArgs:
    """Passes the mean of `steps` gradients to `inner` at every `steps`-th call.

    `optax.MultiSteps` adds the gradients, and `inner` receives the sum divided by `steps`, as in
    Keras. The running mean of `optax.MultiSteps` rounds differently.
    """
    mean = optax.stateless(lambda sums, _: jax.tree.map(lambda x: x / steps, sums))

    def never_skip(*args: Any, **kwargs: Any) -> tuple[jax.Array, StepsPerUpdate]:
        del args, kwargs
        return jnp.array(False), StepsPerUpdate(jnp.array(steps, jnp.int32))

    def multi_steps() -> optax.MultiSteps:  # built when used: the x64 mode may have changed
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
                "All parameters must be real with gradient_accumulation_steps, but one is complex, "
                "and optax.MultiSteps drops imaginary parts. Use "
                "optax.contrib.split_real_and_imaginary, or accumulate gradients before update."
            )
        return multi_steps().init(zeros)

    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.MultiStepsState]:
        if not is_accumulation(state):
            raise _wrong_state(state, "gradient_accumulation_steps")
        with jax.numpy_dtype_promotion("standard"):  # optax 0.2.8 multiplies booleans and floats
            updates, state = multi_steps().update(updates, state, params, **extra_args)
        # optax 0.2.8 resets sums by multiplying them by 0, which turns an infinite sum into NaN.
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
    """Averages the parameters. Every `overwrite_frequency` updates the average replaces them.

    `optax.ema` averages updates. As in Keras, every call updates the average, including the calls
    that only accumulate. The average is a copy of the parameters until ``calls // steps`` is 1.
    All calls of an overwriting update overwrite the parameters.
    """
    wrapped = optax.with_extra_args_support(inner)

    def init(params: optax.Params) -> AverageState:
        zeros = jax.tree.map(_zeros, params)
        return AverageState(jnp.zeros((), jnp.int32), zeros, wrapped.init(params))

    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, AverageState]:
        if params is None:
            raise ValueError(
                "update must receive the parameters because use_ema is True, but None was given. "
                "Write update(gradients, state, params)."
            )
        if not is_average(state):
            raise _wrong_state(state, "use_ema")
        updates, inner_state = wrapped.update(updates, state.inner_state, params, **extra_args)
        effective = state.iteration // steps

        def mean(p: jax.Array, a: jax.Array) -> jax.Array:
            old = jnp.where(effective == 0, 0.0, momentum).astype(a.dtype)
            return old * a + (1 - old) * p.astype(a.dtype)

        averages = jax.tree.map(mean, optax.apply_updates(params, updates), state.average)
        if overwrite_frequency is not None:
            is_due = (effective + 1) % overwrite_frequency == 0
            updates = jax.tree.map(
                lambda u, p, a: jnp.where(is_due, (a - p.astype(a.dtype)).astype(u.dtype), u),
                updates,
                params,
                averages,
            )
        iteration = jnp.asarray(optax.safe_increment(state.iteration))
        return updates, AverageState(iteration, averages, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def _wrong_state(state: Any, option: str) -> TypeError:
    return TypeError(
        f"The state must be made with {option}, but {describe_value(state)} was given. Pass the "
        f"state that init of this transformation returned."
    )


def _zeros(parameter: Any) -> jax.Array:
    """Returns zeros of at least 32 bits; sums and averages in half precision lose small terms."""
    dtype = np.result_type(jnp.result_type(parameter), np.float32)
    return jnp.zeros_like(parameter, dtype=dtype)
