"""Parameters in bfloat16 that train as float32 does."""

import functools
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import DTypeLike

from optax_adamax._numerics import compute_dtype, preserving_memory_kind, upcast
from optax_adamax.wrappers import _residual
from optax_adamax.wrappers.packing import PackedTree

T = TypeVar("T")


class Int8Residual(NamedTuple):
    """The residuals of 8 bits. The field's name keeps a checkpoint from another format apart."""

    # shaped like the parameters, int8: 2**-8 units in the last place of the stored parameter, away
    # from zero; optax.MaskedNode for parameters of 32 bits and up
    int8: Any


class Int16Residual(NamedTuple):
    """The residuals of 16 bits. The field's name keeps a checkpoint from another format apart."""

    int16: Any  # as in Int8Residual, but int16, in units of 2**-16


_NODES = {"int8": Int8Residual, "int16": Int16Residual}


class CompensateRoundingState(NamedTuple):
    """State of `compensate_rounding`."""

    # shape=(), dtype=int32: steps taken, stops at 2**31 - 1
    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    residual: Int8Residual | Int16Residual
    inner_state: Any  # the state of the transformation inside, made for parameters of float32


def compensate_rounding(
    inner: optax.GradientTransformation, residual_dtype: DTypeLike = jnp.int8
) -> optax.GradientTransformationExtraArgs:
    r"""Lets bfloat16 parameters add up updates that are smaller than they can show.

    The true parameter is :math:`\theta = p + r`: the stored p is :math:`\theta` rounded to the
    nearest bfloat16, and r, at most half a unit in the last place of p, is kept in the state as an
    integer. From the gradient to the stored parameter everything is of float32:

    .. math::

        u_t &= \mathrm{inner}(g_t, \theta_{t-1}) \\
        \theta_t &= \theta_{t-1} + u_t, \qquad u_t' = \mathrm{round}(\theta_t) - p_{t-1}

    `inner` is handed gradients widened to float32 (float64 stays) and the true parameters, so that
    weight decay, trust ratios and norms see these. The returned :math:`u'` is of float32, such that
    :func:`optax.apply_updates` leaves the rounded true parameter, exactly. (No :math:`u'` does so
    for a sum without a cast, as in ``equinox.apply_updates``: in bfloat16 it would be exact only
    where :math:`p'/2 \le p \le 2p'`.) Parameters of 32 bits and up have no residual, and their
    updates are those of `inner`. It is the outermost wrapper: what comes after it must not change
    :math:`u'`, and what comes before it sees the stored p.

    int16 holds :math:`\theta` as float32 would. int8 holds 16 significant bits of it, and it is
    rounded to them up or down, by a threshold that is a hash of the count and of the last bits of
    the update: in the mean over the steps nothing is lost, however small they are.

    In one step, :math:`\theta` is wrong by at most :math:`2^{-15}` of the larger of
    :math:`|p_{t-1}|` and :math:`|\theta_t|` with int8. With int16 it is float32's, except where a
    step ends below :math:`2^{-16} |p_{t-1}|`, which may lie between the numbers that a sum can
    reach (then the bound is :math:`2^{-24}`). Not followed are parameters below :math:`10^{-35}`,
    whose updates XLA flushes to zero. A parameter or update that is not finite is added as it is.

    Args:
      inner: the whole optimizer, for instance :func:`adamaxw`.
      residual_dtype: dtype of r: int8 or int16.

    Returns:
      The transformation, with state :class:`CompensateRoundingState`. Its ``update`` needs the
      parameters; further arguments reach `inner`. :func:`master_params` gives :math:`\theta`.

    Raises:
      TypeError: `inner` is no transformation, or another residual dtype; from ``init``, parameters
        of float16 or of 8 bits; from ``update``, a state or parameters of other dtypes than those
        given to ``init``.
      ValueError: from ``update``, no parameters, or others than those given to ``init``.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from optax_adamax import adamax, compensate_rounding
      >>> tx = compensate_rounding(adamax(0.001), residual_dtype="int16")
      >>> params = jnp.array(1.0, jnp.bfloat16)
      >>> state = tx.init(params)
      >>> with jax.numpy_dtype_promotion("standard"):  # as it is by default
      ...     for _ in range(8):
      ...         updates, state = tx.update(jnp.array(1.0, jnp.bfloat16), state, params)
      ...         params = optax.apply_updates(params, updates)
      >>> print(params)  # 1 - 8 * 0.001; without the residual it would still be 1
      0.992188

    Reference:
      Gonzalez Ortiz et al., `FlashOptim <https://arxiv.org/abs/2602.23349>`_, 2026, splits master
      weights likewise.
    """
    if not isinstance(inner, optax.GradientTransformation):
        raise TypeError(
            f"inner must be an optax transformation, but it is a {type(inner).__name__}: write "
            f"compensate_rounding(adamax(1e-3), residual_dtype='int8')."
        )
    dtype = np.dtype(residual_dtype)
    if dtype.name not in _NODES:
        raise TypeError(f"residual_dtype must be int8 or int16, but {residual_dtype} was given.")
    node = _NODES[dtype.name]
    inner = optax.with_extra_args_support(inner)

    def init(params: optax.Params) -> CompensateRoundingState:
        zeros = functools.partial(_zero_residual, dtype=dtype)
        return CompensateRoundingState(
            count=jnp.zeros((), jnp.int32),
            residual=node(jax.tree_util.tree_map_with_path(zeros, params)),
            inner_state=inner.init(jax.tree.map(_as_master, params)),
        )

    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, CompensateRoundingState]:
        if params is None:
            raise ValueError(
                "compensate_rounding needs the parameters: call update(updates, state, params)."
            )
        state = _check_state(state, node)
        (residual,) = state.residual
        treedef, residuals, stored = _flatten(residual, params)
        for p, r in zip(stored, residuals, strict=True):
            _check(p, r)
        masters = treedef.unflatten(map(_master, stored, residuals))
        wide = jax.tree.map(_widened, updates)
        u, inner_state = inner.update(wide, state.inner_state, masters, **extra_args)
        count = jnp.asarray(optax.safe_increment(state.count))
        leaves = [
            _update_leaf(*leaf, count)
            for leaf in zip(treedef.flatten_up_to(u), stored, residuals, strict=True)
        ]
        u, residual = (treedef.unflatten([leaf[i] for leaf in leaves]) for i in range(2))
        return u, CompensateRoundingState(count, node(residual), inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def master_params(state: Any, params: T) -> T:
    """The true parameters, for evaluation, export and averages.

    Args:
      state: the state of an optimizer with :func:`compensate_rounding` in it, in whatever memory.
      params: the stored parameters.

    Returns:
      A tree like `params`: in float32 where a parameter is compensated, else as it is.

    Raises:
      ValueError: there is no :class:`CompensateRoundingState` in `state`, or it belongs to another
        tree of parameters.
      TypeError: it belongs to parameters of other dtypes.

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
            "There is no CompensateRoundingState in the state: give the state of an optimizer that "
            "is compensate_rounding(...), or has it inside."
        )
    for each in found:
        (residual,) = each.residual
        treedef, residuals, stored = _flatten(residual, params)
        for p, r in zip(stored, residuals, strict=True):
            if not _is_masked(r):  # of several residuals, as in optax.partition, others have it
                _check(p, r)
        params = treedef.unflatten(map(_master, stored, residuals))
    return params


def _update_leaf(u: Any, p: Any, residual: Any, count: jax.Array) -> tuple[Any, Any]:
    """The update that leaves the rounded true parameter, and the new residual."""
    if _is_masked(residual):
        return u, residual
    return _residual.add(jnp.asarray(u).astype(jnp.float32), jnp.asarray(p), residual, count)


def _zero_residual(path: Any, p: Any, dtype: np.dtype) -> Any:
    kind = jnp.result_type(p)
    if kind == jnp.bfloat16:
        return jnp.zeros_like(p, dtype=dtype)
    if jnp.issubdtype(kind, jnp.floating) and kind.itemsize <= 2:
        raise TypeError(
            f"{jax.tree_util.keystr(path) or 'The parameter'} is of dtype {kind}, but only "
            f"bfloat16 can be compensated: cast it to bfloat16, or keep it in float32."
        )
    return optax.MaskedNode()


def _as_master(p: Any) -> Any:
    """A parameter whose residual is zero, as `inner` is to see it."""
    if jnp.result_type(p) != jnp.bfloat16:
        return p
    if isinstance(p, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(p.shape, jnp.float32, sharding=p.sharding)
    return jnp.asarray(p).astype(jnp.float32)


def _master(p: Any, residual: Any) -> Any:
    if _is_masked(residual):
        return p
    return preserving_memory_kind(_residual.join)(p, residual)


def _widened(g: Any) -> Any:
    if not jnp.issubdtype(jnp.result_type(g), jnp.inexact):
        return g
    return upcast(jnp.asarray(g), compute_dtype(g))


def _is_masked(x: Any) -> bool:
    return isinstance(x, optax.MaskedNode)


def _flatten(residual: Any, params: Any) -> tuple[Any, list[Any], list[Any]]:
    """The common structure, and the leaves of both; a masked residual may stand for a subtree."""
    residuals, treedef = jax.tree.flatten(residual, is_leaf=_is_masked)
    if isinstance(residual, PackedTree) and not isinstance(params, PackedTree):
        raise ValueError(
            "The residuals are in the buffers of pack_small_leaves, which is around "
            "compensate_rounding: put it inside, compensate_rounding(pack_small_leaves(...))."
        )
    try:
        return treedef, residuals, treedef.flatten_up_to(params)
    except ValueError as error:
        raise ValueError(
            f"The state of compensate_rounding was made for another tree of parameters: {error} "
            f"Call init again with these parameters."
        ) from error


def _check(p: Any, residual: Any) -> None:
    """Refuses a parameter that the residual was not made for."""
    dtype = jnp.result_type(p) if not _is_masked(p) else None
    if _is_masked(residual):
        if dtype == jnp.bfloat16:
            raise TypeError(
                "A parameter is of dtype bfloat16, but its residual is none: the state was made "
                "for a parameter of 32 bits. Call init again with these parameters."
            )
        return
    if dtype != jnp.bfloat16:
        raise TypeError(
            f"A parameter is of dtype {dtype}, but its residual is {residual.dtype}, for one of "
            f"bfloat16. If it was bfloat16 before the last step, the updates were added without a "
            f"cast back (p + u, as equinox.apply_updates does): add them by optax.apply_updates, "
            f"with Equinox between eqx.partition(model, eqx.is_inexact_array) and eqx.combine."
        )
    if jnp.shape(p) != residual.shape:
        raise ValueError(
            f"A parameter has shape {jnp.shape(p)}, but its residual {residual.shape}: the state "
            f"was made for other parameters. Call init again with these."
        )


def _check_state(state: Any, node: type) -> CompensateRoundingState:
    if not isinstance(state, CompensateRoundingState):
        raise TypeError(
            f"The state must be a CompensateRoundingState, but a {type(state).__name__} was given: "
            f"to continue a run that had no residuals, write "
            f"init(params)._replace(inner_state=state)."
        )
    if not isinstance(state.residual, node):
        raise TypeError(
            f"The state keeps residuals as {type(state.residual).__name__}, but the transformation "
            f"as {node.__name__}: give residual_dtype as it was when the state was made."
        )
    return state
