"""Compares the gradients of a run with the range of a storage format of v."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike, DTypeLike

from optax_adamax import _checks
from optax_adamax._messages import describe_value, wrong_state
from optax_adamax._numerics import compute_dtype, incremented
from optax_adamax._tree_checks import check_arrays
from optax_adamax._v_formats import v_format_of


class ProbeGradientsState(NamedTuple):
    """State of `probe_gradients`."""

    # shape=(), dtype=int32: number of steps, saturates at 2**31 - 1
    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]


class GradientRange(NamedTuple):
    """The gradients of one step, compared with the range of a storage format of v.

    Sizes are absolute values of elements. Fractions are of all elements that are finite and not
    zero, in [0, 1].
    """

    step: int  # 1 in the first step
    smallest: float  # smallest size that is finite and not zero; inf without such an element
    largest: float  # largest finite size
    underflow_fraction: float  # elements with size + eps below the range: updates are too short
    saturated_fraction: float  # elements with size + eps above the range: updates are too long
    nonfinite_count: int  # elements that are NaN or infinite
    v_dtype: str  # "full-precision" for v_dtype=None
    range: tuple[float, float]  # of v in the storage format

    def __str__(self) -> str:
        low, high = self.range
        text = (
            f"step {self.step}: |g| {self.smallest:.2g} to {self.largest:.2g}; "
            f"{self.v_dtype} v {low:.2g} to {high:.2g}: "
            f"{self.underflow_fraction:.2%} below, {self.saturated_fraction:.2%} above"
        )
        return text + (f"; {self.nonfinite_count} not finite" if self.nonfinite_count else "")


def probe_gradients(
    v_dtype: DTypeLike,
    report: Callable[[GradientRange], Any] = print,
    *,
    every: int = 100,
    eps: ArrayLike = 1e-8,
) -> optax.GradientTransformation:
    """Reports whether gradients fit the range of a storage format of v, and returns them unchanged.

    Chain it before an optimizer in training loops that do not return the optimizer's state, for
    example in dynamax, gpjax and flowjax. If the loop returns the state, use
    :func:`describe_state`.

    In a reported step, the gradients are read once more. In all other steps the cost is one
    comparison.

    Args:
      v_dtype: storage format of v, as in :func:`scale_by_adamax`.
      report: a function that :func:`jax.debug.callback` calls on the host with a
        :class:`GradientRange`. Under :func:`jax.shard_map` and :func:`jax.vmap`, it is called for
        each device or row.
      every: number of steps between two reports. The first step is reported.
      eps: eps of the optimizer if it is added to the gradient's absolute value
        (``eps_placement="max"``), else 0.

    Returns:
      The transformation, with state :class:`ProbeGradientsState`.

    Raises:
      ValueError: another storage format, `every` that is not an integer >= 1, or eps out of range.
      TypeError: any other argument of another type. From ``update``: another state.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from optax_adamax import adamax, probe_gradients
      >>> tx = optax.chain(probe_gradients("uint8"), adamax(0.1, v_dtype="uint8"))
      >>> params = jnp.ones(4)
      >>> updates, _ = tx.update(jnp.array([0.0, 1e-12, 0.5, 1e10]), tx.init(params), params)
      step 1: |g| 1e-12 to 1e+10; uint8 v 1.2e-10 to 9.4e+08: 0.00% below, 33.33% above
    """
    v_format = v_format_of(v_dtype)
    if not callable(report):
        raise TypeError(
            f"report must be a function, but {describe_value(report)} was given. Write "
            f"report=print."
        )
    if isinstance(every, bool) or not isinstance(every, (int, np.integer)) or every < 1:
        raise ValueError(
            f"every must be an integer >= 1, but {describe_value(every)} was given. Write "
            f"every=100."
        )
    every = int(every)
    _checks.check_scalar("eps", eps, 0.0, float("inf"))
    low, high = v_format.range
    name = v_format.dtype.name if v_format.dtype is not None else "full-precision"

    def to_host(measured: dict[str, Any]) -> None:
        found = {key: np.asarray(number).item() for key, number in measured.items()}
        report(
            GradientRange(
                step=int(found["step"]),
                smallest=found["smallest"],
                largest=found["largest"],
                underflow_fraction=found["underflow_fraction"],
                saturated_fraction=found["saturated_fraction"],
                nonfinite_count=int(found["nonfinite_count"]),
                v_dtype=name,
                range=(low, high),
            )
        )

    def measure(step: jax.Array, grads: list[jax.Array]) -> None:
        jax.debug.callback(to_host, {"step": step, **_measured(grads, low, high, eps)})

    def skip(step: jax.Array, grads: list[jax.Array]) -> None:
        del step, grads

    def init(params: optax.Params) -> ProbeGradientsState:
        del params
        return ProbeGradientsState(count=jnp.zeros((), jnp.int32))

    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
    ) -> tuple[optax.Updates, ProbeGradientsState]:
        del params
        if not isinstance(state, ProbeGradientsState):
            raise TypeError(wrong_state(ProbeGradientsState, state))
        check_arrays("gradient", updates)
        grads = [jnp.asarray(g) for g in jax.tree.leaves(updates) if np.size(g) != 0]
        step = incremented(state.count)
        if grads:
            jax.lax.cond(state.count % every == 0, measure, skip, step, grads)
        return updates, ProbeGradientsState(count=step)

    return optax.GradientTransformation(init, update)


def _measured(
    grads: list[jax.Array], low: float, high: float, eps: ArrayLike
) -> dict[str, jax.Array]:
    """Returns the measured fields of a `GradientRange`."""
    dtype = compute_dtype(*grads)
    smallest, largest = jnp.asarray(np.inf, dtype), jnp.zeros((), dtype)
    below = above = nonzero = nonfinite = jnp.float32(0)
    for g in grads:
        size = jnp.abs(g).astype(dtype)
        finite = jnp.isfinite(size)
        nonzero_finite = finite & (size > 0)
        v = size + jnp.asarray(eps, dtype)
        smallest = jnp.minimum(smallest, jnp.min(size, initial=jnp.inf, where=nonzero_finite))
        largest = jnp.maximum(largest, jnp.max(size, initial=0, where=finite))
        below += jnp.sum(nonzero_finite & (v < low), dtype=jnp.float32)
        above += jnp.sum(nonzero_finite & (v > high), dtype=jnp.float32)
        nonzero += jnp.sum(nonzero_finite, dtype=jnp.float32)
        nonfinite += jnp.sum(~finite, dtype=jnp.float32)
    nonzero = jnp.maximum(nonzero, 1)
    return {
        "smallest": smallest,
        "largest": largest,
        "underflow_fraction": below / nonzero,
        "saturated_fraction": above / nonzero,
        "nonfinite_count": nonfinite,
    }
