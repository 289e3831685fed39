"""Trains bfloat16 parameters like float32 parameters, with an integer residual per parameter."""

import functools
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import DTypeLike

from optax_adamax._inner import as_transformation
from optax_adamax._messages import (
    CONTINUE,
    arrays_summary,
    count_summary,
    describe_dtype,
    describe_value,
    with_article,
    wrong_state,
)
from optax_adamax._numerics import compute_dtype, dtype_or_none, incremented, upcast
from optax_adamax._tree_checks import check_arrays
from optax_adamax.wrappers import _applied, _residual
from optax_adamax.wrappers._residual_tree import (
    check_leaf,
    is_absent,
    master,
    match,
    unwrap_variables,
    zero_residual,
)

T = TypeVar("T")


class Int8Residual(NamedTuple):
    """8-bit residuals. The name of the field distinguishes their checkpoints."""

    # Tree like the parameters, int8, with the shapes of the parameters: in units of 2**-8 ULP of
    # the stored parameter, positive away from zero. optax.MaskedNode for parameters with 32 bits or
    # more.
    int8: Any


class Int16Residual(NamedTuple):
    """16-bit residuals. The name of the field distinguishes their checkpoints."""

    int16: Any  # as in Int8Residual, but int16, in units of 2**-16 ULP


_CONTAINERS = {"int8": Int8Residual, "int16": Int16Residual}


class CompensateRoundingState(NamedTuple):
    """State of `compensate_rounding`."""

    # shape=(), dtype=int32: number of steps, saturates at 2**31 - 1
    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    residual: Int8Residual | Int16Residual  # of all parameters
    inner_state: Any  # the state of `inner`, for float32 master parameters
    # With check_applied, the bfloat16 parameters after the last step; else ().
    expected_params: Any = ()

    def __repr__(self) -> str:
        """Returns the count, the dtypes of the residuals and the inner state, without arrays."""
        count, residual = count_summary(self.count), arrays_summary(self.residual)
        name = type(self).__name__
        return f"{name}(count={count}, residual={residual}, inner_state={self.inner_state!r})"


def compensate_rounding(
    inner: optax.GradientTransformation,
    residual_dtype: DTypeLike = "int8",
    *,
    update_dtype: DTypeLike = "float32",
    check_applied: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Accumulates updates that are too small to change bfloat16 parameters.

    The master parameter is :math:`\theta = p + r`. The stored parameter p is :math:`\theta` rounded
    to bfloat16. The residual r, at most half a ULP of p, is an integer in the state. All arithmetic
    from the gradient to the stored parameter is in float32:

    .. math::

        u_t &= \mathrm{inner}(g_t, \theta_{t-1}) \\
        \theta_t &= \theta_{t-1} + u_t, \qquad u_t' = \mathrm{round}(\theta_t) - p_{t-1}

    `inner` receives float32 gradients and the master parameters, also for weight decay, trust
    ratios and norms. float64 gradients are not cast. :func:`optax.apply_updates` then changes p to
    exactly the rounded master parameter. Parameters with 32 bits or more are without a residual,
    and their updates are the updates of `inner`.

    **It must be the outermost transformation**, because u' must reach the parameters unchanged.
    A learning rate or weight decay outside of it is lost in rounding:

    - correct: ``compensate_rounding(optax.chain(scale_by_adamax(), optax.scale(-1e-4)))``
    - incorrect: ``optax.chain(compensate_rounding(scale_by_adamax()), optax.scale(-1e-4))``

    There are two exceptions. :func:`limit_spikes` may be around it. Transformations may precede it
    in a chain, and receive p. If the loss does not decrease, ``check_applied=True`` finds updates
    that were changed.

    int16 represents :math:`\theta` as float32 does. In each step :math:`\theta` equals the float32
    result, with one exception: if :math:`|\theta_t| < 2^{-16} |p_{t-1}|`, its error is at most
    :math:`2^{-24} |p_{t-1}|`. int8 represents 16 significant bits of :math:`\theta`. It rounds
    stochastically, with bits from a hash of the step count and of the update, and the mean over the
    steps is unbiased for updates of any size. The error of one step is at most :math:`2^{-15}` of
    the larger of :math:`|p_{t-1}|` and :math:`|\theta_t|`.

    Parameters below :math:`10^{-35}` are not supported, because XLA flushes their updates to zero.
    Non-finite parameters and updates are added without a residual. Updates cannot be
    differentiated.

    The residual adds 1 or 2 bytes of state per parameter. On CPU, XLA computes it in further passes
    over memory, so a step is slower. The page "bfloat16 parameters" has measured times, and the
    page "On TPU and GPU" has estimates by the compiler.

    Args:
      inner: the complete optimizer, for example :func:`adamaxw`, or an object with ``init`` and
        ``update``, for example :class:`optax.MultiSteps`.
      residual_dtype: dtype of r: int8 or int16.
      update_dtype: dtype of u' for bfloat16 parameters. float32 requires that p + u' is cast back
        to bfloat16, as in :func:`optax.apply_updates`. ``"bfloat16"`` also supports loops that
        compute p + u' in bfloat16, as ``equinox.apply_updates``, optimistix and flowjax do. If a
        step then changes the sign of a parameter, or its size by more than a factor of two, u' is
        rounded, and the error of :math:`\theta` may be 1.5 bfloat16 ULP of the larger number.
      check_applied: for debugging. True stores the new parameters in the state, 2 bytes per
        parameter. The next ``update`` raises an error if it receives other parameters, for example
        after a projection.

    Returns:
      The transformation, with state :class:`CompensateRoundingState`. Its ``update`` needs the
      parameters, and passes further arguments to `inner`. u' has the shape of p.
      :func:`master_params` returns :math:`\theta`.

    Raises:
      TypeError: `inner` is not a transformation; another dtype. From ``init``: 8-bit or float16
        parameters. From ``update``: another state, other dtypes than in ``init``, or a derivative.
      ValueError: from ``update``: no parameters, or another tree or other shapes than in ``init``.
        With `check_applied`: the updates were not applied as returned. Under :func:`jax.jit`, JAX
        raises this error as a :class:`jax.errors.JaxRuntimeError`.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from optax_adamax import adamax, compensate_rounding
      >>> tx = compensate_rounding(adamax(0.001), residual_dtype="int16")
      >>> params = jnp.array(1.0, jnp.bfloat16)
      >>> state = tx.init(params)
      >>> with jax.numpy_dtype_promotion("standard"):  # JAX's default
      ...     for _ in range(8):
      ...         updates, state = tx.update(jnp.array(1.0, jnp.bfloat16), state, params)
      ...         params = optax.apply_updates(params, updates)
      >>> print(params)  # 1 - 8 * 0.001; without the residual it would still be 1
      0.992188

    Reference:
      Gonzalez Ortiz et al., `FlashOptim <https://arxiv.org/abs/2602.23349>`_, 2026, also splits
      master weights into a bfloat16 parameter and an integer.
    """
    inner = as_transformation(inner, "compensate_rounding(adamax(1e-3), residual_dtype='int8')")
    dtype = _one_of("residual_dtype", residual_dtype, ("int8", "int16"))
    u_dtype = _one_of("update_dtype", update_dtype, ("float32", "bfloat16"))
    container = _CONTAINERS[dtype.name]

    def init(params: optax.Params) -> CompensateRoundingState:
        zeros = functools.partial(zero_residual, dtype=dtype)
        residual = jax.tree_util.tree_map_with_path(zeros, params)
        return CompensateRoundingState(
            count=jnp.zeros((), jnp.int32),
            residual=container(residual),
            inner_state=inner.init(jax.tree.map(_as_master, params)),
            expected_params=_applied.initial(residual) if check_applied else (),
        )

    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, CompensateRoundingState]:
        if params is None:
            raise ValueError(
                "compensate_rounding needs the parameters, but params=None was given. Call "
                "update(gradients, state, params)."
            )
        state = _check_state(state, container)
        treedef, matched = match(state.residual[0], params)
        for leaf in matched:
            check_leaf(*leaf)
        check_arrays("gradient", updates)
        count = incremented(state.count)
        if check_applied:
            _applied.check(matched, state.expected_params, state.count)
        masters = treedef.unflatten([master(p, r) for _, p, r in matched])
        grads = jax.tree.map(_as_float32, updates)
        u, inner_state = inner.update(grads, state.inner_state, masters, **extra_args)
        pairs = [
            _update_leaf(u, p, r, count, u_dtype)
            for u, (_, p, r) in zip(treedef.flatten_up_to(u), matched, strict=True)
        ]
        u, residual = (treedef.unflatten([pair[i] for pair in pairs]) for i in range(2))
        expected = _applied.expected(residual, params, u) if check_applied else ()
        return u, CompensateRoundingState(count, container(residual), inner_state, expected)

    return optax.GradientTransformationExtraArgs(init, update)


def master_params(state: Any, params: T) -> T:
    """Returns the master parameters, for evaluation, export and averages.

    Args:
      state: the state of an optimizer that contains :func:`compensate_rounding`, in device or host
        memory. Its arrays may be wrapped in Flax variables, as in ``nnx.Optimizer.opt_state``.
      params: the stored parameters. They may be wrapped in Flax variables, too.

    Returns:
      A tree like `params`: float32 for parameters with a residual. All others are the same arrays
      as in `params`. Before both trees are donated to one function, copy them with `jnp.copy`.

    Raises:
      ValueError: `state` contains no :class:`CompensateRoundingState`, or its parameters have
        another tree or other shapes.
      TypeError: the parameters of the state have other dtypes.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_adamax import adamax, compensate_rounding, master_params
      >>> tx = compensate_rounding(adamax(0.001), "int16")
      >>> params = jnp.array(1.0, jnp.bfloat16)
      >>> _, state = tx.update(params, tx.init(params), params)
      >>> print(params, master_params(state, params))
      1 0.999
    """

    def is_state(x: Any) -> bool:
        return isinstance(x, CompensateRoundingState)

    found = [x for x in jax.tree.leaves(state, is_leaf=is_state) if is_state(x)]
    if not found:
        raise ValueError(
            f"The state must contain a CompensateRoundingState, but this {type(state).__name__} "
            f"does not. Write master_params(state, params), with the state of an optimizer that "
            f"contains compensate_rounding(...)."
        )
    masters = unwrap_variables(params)
    for each in found:
        treedef, matched = match(unwrap_variables(each.residual[0]), masters)
        for name, p, r in matched:
            if not is_absent(r):  # with optax.partition, another state may contain the residual
                check_leaf(name, p, r)
        masters = treedef.unflatten([master(p, r) for _, p, r in matched])
    return jax.tree.unflatten(jax.tree.structure(params), jax.tree.leaves(masters))


def _update_leaf(
    u: Any, p: Any, residual: Any, count: jax.Array, update_dtype: np.dtype
) -> tuple[Any, Any]:
    if is_absent(residual) or u is None:
        return u, residual
    u = jnp.asarray(u).astype(jnp.float32)
    return _residual.add(u, jnp.asarray(p), residual, count, update_dtype)


def _as_master(p: Any) -> Any:
    """Returns the master parameter of a new parameter, array or shape."""
    if dtype_or_none(p) != jnp.bfloat16:
        return p  # `inner` raises an error if p is not an array
    if isinstance(p, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(p.shape, jnp.float32, sharding=p.sharding)
    return jnp.asarray(p).astype(jnp.float32)


def _as_float32(g: Any) -> Any:
    if not jnp.issubdtype(jnp.result_type(g), jnp.inexact):
        return g
    return upcast(jnp.asarray(g), compute_dtype(g))


def _one_of(name: str, dtype: DTypeLike, allowed: tuple[str, str]) -> np.dtype:
    try:
        found = jnp.dtype(dtype)
    except TypeError:
        found = None
    if found is None or found.name not in allowed:
        given = describe_value(dtype) if found is None else describe_dtype(dtype, found.name)
        raise TypeError(f"{name} must be {allowed[0]} or {allowed[1]}, but {given} was given.")
    return found


def _check_state(state: Any, container: type) -> CompensateRoundingState:
    if not isinstance(state, CompensateRoundingState):
        advice = CONTINUE.format("residuals")
        raise TypeError(wrong_state(CompensateRoundingState, state, advice))
    if not isinstance(state.residual, container):
        raise TypeError(
            f"The state stores residuals in {with_article(type(state.residual).__name__)}, but the "
            f"transformation was built for {with_article(container.__name__)}. Write the "
            f"residual_dtype with which the state was initialized."
        )
    return state
