"""What a parameter of 16 bits cannot hold, kept beside it.

A step rounds the ordinal of the true parameter (see `_ordinals`) to one that the parameter's dtype
has, and what is left over is the residual.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import DTypeLike

from optax_adamax.wrappers import _ordinals

T = TypeVar("T")


class CompensateRoundingState(NamedTuple):
    """State of `compensate_rounding`."""

    # shape=(), dtype=int32: steps taken, stops at 2**31 - 1
    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    # shaped like the parameters, int8 or int16: true minus stored parameter, in 2**-8 or 2**-16
    # units in the last place; optax.MaskedNode for parameters of 32 bits and up
    residual: Any


def compensate_rounding(
    residual_dtype: DTypeLike = jnp.int8,
) -> optax.GradientTransformation:
    r"""Lets parameters of 16 bits add up updates that are smaller than they can show.

    The true parameter is :math:`\theta = p + r`: the stored p, of bfloat16 or float16, is
    :math:`\theta` rounded to the nearest (a tie is rounded up), and r, at most half a unit in the
    last place of p, is kept in the state as an integer. To a step u,

    .. math::

        \theta_t = \theta_{t-1} + u_t, \qquad u_t' = \mathrm{round}(\theta_t) - p_{t-1}

    It is the last link of a chain. For parameters of 16 bits its updates :math:`u'` are of float32,
    such that :func:`optax.apply_updates` leaves the rounded true parameter, exactly. Parameters of
    32 bits and up have no residual, and their updates pass unchanged.

    int16 holds :math:`\theta` as float32 would. int8 holds 16 significant bits of it for bfloat16
    (19 for float16); it is rounded to them up or down, by a threshold that walks with the count,
    so that the mean over the steps is right however small they are.

    In one step, :math:`\theta` is wrong by at most :math:`2^{-24}` (int8: :math:`2^{-15}`, in the
    mean over steps nothing; for float16 :math:`2^{-18}`) of the larger of :math:`|p_{t-1}|` and
    :math:`|\theta_t|`. Not followed are parameters below :math:`10^{-36}`, whose updates XLA
    flushes to zero. A parameter or update that is not finite is added as it is.

    Links before this one, such as :func:`optax.add_decayed_weights`, see the stored p, because the
    caller hands it to all of them: the decay of bfloat16 parameters is that of :math:`\theta` up to
    a factor of :math:`1 \pm 2^{-8}`, and it is added up without loss.

    Args:
      residual_dtype: dtype of r: int8 or int16.

    Returns:
      A transformation with state :class:`CompensateRoundingState`. Its ``update`` needs the
      parameters. :func:`master_params` gives :math:`\theta`.

    Raises:
      TypeError: another residual dtype; from ``init``, parameters of 8 bits; from ``update``,
        parameters of other dtypes than those given to ``init``.
      ValueError: from ``update``, no parameters.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from optax_adamax import adamax, compensate_rounding
      >>> tx = optax.chain(adamax(0.001), compensate_rounding())
      >>> params = jnp.array(1.0, jnp.bfloat16)
      >>> state = tx.init(params)
      >>> with jax.numpy_dtype_promotion("standard"):  # as it is by default
      ...     for _ in range(8):
      ...         updates, state = tx.update(jnp.array(1.0), state, params)
      ...         params = optax.apply_updates(params, updates)
      >>> print(params)  # 1 - 8 * 0.001; without the residual it would still be 1
      0.992188

    Reference:
      Gonzalez Ortiz et al., `FlashOptim <https://arxiv.org/abs/2602.23349>`_, 2026, splits master
      weights likewise.
    """
    dtype = np.dtype(residual_dtype)
    if dtype.name not in ("int8", "int16"):
        raise TypeError(f"residual_dtype must be int8 or int16, but {residual_dtype} was given.")

    def init(params: optax.Params) -> CompensateRoundingState:
        zeros = functools.partial(_zeros, dtype=dtype)
        residual = jax.tree_util.tree_map_with_path(zeros, params)
        return CompensateRoundingState(jnp.zeros((), jnp.int32), residual)

    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, CompensateRoundingState]:
        if params is None:
            raise ValueError(
                "compensate_rounding needs the parameters: call update(updates, state, params)."
            )
        if not isinstance(state, CompensateRoundingState):
            raise TypeError(
                f"The state must be a CompensateRoundingState, but a {type(state).__name__} was "
                f"given. The state of a chain goes to the update of that chain."
            )
        count = jnp.asarray(optax.safe_increment(state.count))
        gradients, treedef = jax.tree.flatten(updates)
        trees = treedef.flatten_up_to(params), treedef.flatten_up_to(state.residual)
        leaves = [_leaf(*x, count) for x in zip(gradients, *trees, strict=True)]
        u, residual = (treedef.unflatten([x[i] for x in leaves]) for i in range(2))
        return u, CompensateRoundingState(count, residual)

    return optax.GradientTransformation(init, update)


def _zeros(path: Any, p: Any, dtype: np.dtype) -> Any:
    kind = jnp.result_type(p)
    if kind in _ordinals.EXTRA:
        return jnp.zeros_like(p, dtype=dtype)
    if jnp.issubdtype(kind, jnp.floating) and kind.itemsize < 2:
        raise TypeError(
            f"{jax.tree_util.keystr(path) or 'The parameter'} is of dtype {kind}, but only "
            f"bfloat16 and float16 can be compensated: keep it in one of these."
        )
    return optax.MaskedNode()


def _leaf(u: jax.Array, p: Any, residual: Any, count: jax.Array) -> tuple[jax.Array, Any]:
    """The update that leaves the rounded true parameter, and the new residual."""
    _check(p, residual)
    if _is_masked(residual):
        return u, residual
    p, u = jnp.asarray(p), u.astype(jnp.float32)
    stored, moved = p.astype(jnp.float32), _ordinals.join(p, residual) + u
    fine, top = _ordinals.round_twice(moved, p.dtype, residual.dtype, _threshold(count))
    extra, width = _ordinals.EXTRA[p.dtype], _ordinals.width_of(p.dtype, residual.dtype)
    # The way from p to a number below 2**-16 |p| may be none of float32: p ends beside it.
    ends = stored + (_ordinals.from_ordinal(top << extra, p.dtype) - stored)
    reached = jnp.abs(_ordinals.to_ordinal(ends, p.dtype) - (top << extra)) < 1 << (extra - 1)
    left = (fine - (top << width)).astype(residual.dtype)
    new_residual = left & -reached.astype(residual.dtype)
    # `top << extra`, by way of the new residual: XLA on CPU then makes the residual first, and
    # copies the old one, of 1 byte, rather than the parameter, before it is overwritten.
    rounded = _ordinals.from_ordinal(
        (fine - new_residual.astype(jnp.int32)) << (extra - width), p.dtype
    )
    finite = jnp.isfinite(moved) & jnp.isfinite(rounded)
    return jnp.where(finite, rounded - stored, u), new_residual


def _threshold(count: jax.Array) -> jax.Array:
    """Multiples of 0.75487..., mod 1, in units of 2**-31: where in step t to round up.

    The number is 1 / x with x**3 = x + 1. The int8 code of m walks with the golden ratio; were it
    the same here, updates would be large in the very steps that round up, and their correlation
    would move the parameter.
    """
    return ((count.astype(jnp.uint32) * np.uint32(3242174889)) >> 1).astype(jnp.int32)


def master_params(state: Any, params: T) -> T:
    """The true parameters, for evaluation, export and averages.

    Args:
      state: the state of an optimizer with :func:`compensate_rounding` in it, as that of a chain.
      params: the stored parameters.

    Returns:
      A tree like `params`: in float32 where a parameter is compensated, else as it is.

    Raises:
      ValueError: there is no :class:`CompensateRoundingState` in `state`, or it belongs to another
        tree of parameters.
      TypeError: it belongs to parameters of other dtypes.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_adamax import compensate_rounding, master_params
      >>> tx, params = compensate_rounding(), jnp.array(1.0, jnp.bfloat16)
      >>> _, state = tx.update(jnp.array(-0.001), tx.init(params), params)
      >>> print(master_params(state, params))
      0.9990082
    """

    for found in _states(state):
        params = _map(_true, found.residual, params)
    return params


def split_master_params(state: Any, params: T, masters: T) -> tuple[Any, T]:
    """Splits true parameters into stored ones and residuals: the inverse of :func:`master_params`.

    Args:
      state: the state of an optimizer with :func:`compensate_rounding` in it.
      params: parameters whose dtypes are wanted; their values are not used.
      masters: true parameters of float32, a tree like `params`.

    Returns:
      The state with new residuals, and the stored parameters: `masters` rounded to nearest.

    Raises:
      ValueError, TypeError: as :func:`master_params`.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_adamax import compensate_rounding, master_params, split_master_params
      >>> tx, params = compensate_rounding("int16"), jnp.array(0.0, jnp.bfloat16)
      >>> state, params = split_master_params(tx.init(params), params, jnp.float32(0.1))
      >>> print(params, master_params(state, params))
      0.100098 0.1
    """

    stored = masters
    for found in _states(state):
        stored = _map(_store, found.residual, params, stored)

    def renew(node: Any) -> Any:
        if not isinstance(node, CompensateRoundingState):
            return node
        return node._replace(residual=_map(_leave, node.residual, params, masters))

    return jax.tree.map(renew, state, is_leaf=_is_state), stored


def _true(residual: Any, p: Any) -> Any:
    """p and what it cannot hold."""
    if _is_masked(residual):
        return p
    _check(p, residual)
    return _ordinals.join(jnp.asarray(p), residual)


def _store(residual: Any, p: Any, master: Any) -> Any:
    """`master` as p keeps it."""
    if _is_masked(residual):
        return master
    _check(p, residual)
    master = jnp.asarray(master, jnp.float32)
    _, top = _ordinals.round_twice(master, p.dtype, residual.dtype, _ordinals.HALF)
    rounded = _ordinals.from_ordinal(top << _ordinals.EXTRA[p.dtype], p.dtype)
    return jnp.where(jnp.isfinite(master), rounded, master).astype(p.dtype)


def _leave(residual: Any, p: Any, master: Any) -> Any:
    """What p cannot hold of `master`."""
    if _is_masked(residual):
        return residual
    master = jnp.asarray(master, jnp.float32)
    fine, top = _ordinals.round_twice(master, p.dtype, residual.dtype, _ordinals.HALF)
    finite = jnp.isfinite(_store(residual, p, master))
    left = fine - (top << _ordinals.width_of(p.dtype, residual.dtype))
    return jnp.where(finite, left, 0).astype(residual.dtype)


def _is_masked(x: Any) -> bool:
    return isinstance(x, optax.MaskedNode)


def _is_state(x: Any) -> bool:
    return isinstance(x, CompensateRoundingState)


def _states(state: Any) -> list[CompensateRoundingState]:
    found = [x for x in jax.tree.leaves(state, is_leaf=_is_state) if _is_state(x)]
    if not found:
        raise ValueError(
            "There is no CompensateRoundingState in the state: give the state of a chain that "
            "ends in compensate_rounding()."
        )
    return found


def _map(function: Callable[..., Any], residual: Any, *trees: Any) -> Any:
    """`jax.tree.map` over trees like the parameters, parts of which may be masked in `residual`."""
    try:
        return jax.tree.map(function, residual, *trees, is_leaf=_is_masked)
    except ValueError as error:
        raise ValueError(
            "The residuals in the state are not of the tree of these parameters. Inside of "
            "pack_small_leaves they belong to its buffers: put compensate_rounding after it."
        ) from error


def _check(p: Any, residual: Any) -> None:
    """Refuses a parameter that the residual was not made for."""
    if (jnp.result_type(p) in _ordinals.EXTRA) == _is_masked(residual):
        kept = "none" if _is_masked(residual) else residual.dtype
        raise TypeError(
            f"A parameter is of dtype {jnp.result_type(p)}, but its residual is {kept}: the state "
            f"was made for parameters of another dtype. Call init again with these parameters."
        )
    if not _is_masked(residual) and jnp.shape(p) != residual.shape:
        raise ValueError(
            f"A parameter has shape {jnp.shape(p)}, but its residual {residual.shape}: the state "
            f"was made for other parameters. Call init again with these."
        )
