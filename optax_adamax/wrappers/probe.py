"""Compares the gradients of a run with the range of a storage format."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike, DTypeLike

from optax_adamax import _checks
from optax_adamax._numerics import compute_dtype
from optax_adamax._v_formats import v_format_of


class ProbeGradientsState(NamedTuple):
    """State of `probe_gradients`."""

    # shape=(), dtype=int32: steps taken, stops at 2**31 - 1
    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]


class GradientRange(NamedTuple):
    """The gradients of one step, compared with the range of a storage format of v.

    Shares are fractions of all elements that are finite and not zero, from 0 to 1.
    """

    step: int
    smallest: float  # absolute value, of the elements that are finite and not zero; inf: no such
    largest: float  # absolute value, of the finite elements
    underflow_fraction: float  # |g| + eps is below the range: updates are too short
    saturated_fraction: float  # |g| + eps is above the range: updates are as long as the bound
    nonfinite_count: int  # elements
    v_dtype: str
    range: tuple[float, float]  # of v_dtype

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
    """Reports whether the gradients fit the range of a storage format of v, and passes them on.

    Chain it before an optimizer in training loops that do not return the optimizer's state (for
    example dynamax, gpjax and flowjax). If you have the state, use :func:`describe_state`.

    In a reported step, the gradients are read once more. In all other steps the cost is one
    comparison.

    Args:
      v_dtype: the storage format, as in :func:`scale_by_adamax`.
      report: a function that is called on the host with a :class:`GradientRange`, through
        :func:`jax.debug.callback`. Under :func:`jax.shard_map` and :func:`jax.vmap`, it is called
        for each device or row.
      every: number of steps between two reports; the first step is reported.
      eps: eps of the optimizer if it is added to the gradient's absolute value
        (``eps_placement="max"``), else 0.

    Returns:
      The transformation, with state :class:`ProbeGradientsState`.

    Raises:
      ValueError: another storage format, every < 1, or eps out of range.
      TypeError: an argument of the wrong type.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from optax_adamax import adamax
      >>> from optax_adamax.wrappers.probe import probe_gradients
      >>> tx = optax.chain(probe_gradients("uint8"), adamax(0.1, v_dtype="uint8"))
      >>> params = jnp.ones(4)
      >>> updates, _ = tx.update(jnp.array([0.0, 1e-12, 0.5, 1e10]), tx.init(params), params)
      step 1: |g| 1e-12 to 1e+10; uint8 v 1.2e-10 to 9.4e+08: 0.00% below, 33.33% above
    """
    v_format = v_format_of(v_dtype)
    if not callable(report):
        raise TypeError(f"report must be a function, but got {report!r}. Write report=print.")
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        raise ValueError(f"every must be an integer >= 1, but got {every!r}.")
    _checks.check_scalar("eps", eps, 0.0, float("inf"))
    low, high = v_format.range
    name = str(v_format.dtype)

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
        assert isinstance(state, ProbeGradientsState)
        grads = [jnp.asarray(g) for g in jax.tree.leaves(updates)]
        step = jnp.asarray(optax.safe_increment(state.count))
        if sum(g.size for g in grads):
            jax.lax.cond(state.count % every == 0, measure, skip, step, grads)
        return updates, ProbeGradientsState(count=step)

    return optax.GradientTransformation(init, update)


def _measured(
    grads: list[jax.Array], low: float, high: float, eps: ArrayLike
) -> dict[str, jax.Array]:
    """Returns the measured fields of a `GradientRange`."""
    smallest, largest = jnp.float32(np.inf), jnp.float32(0)
    below = above = nonzero = nonfinite = jnp.float32(0)
    for g in grads:
        size = jnp.abs(g).astype(compute_dtype(g))
        finite = jnp.isfinite(size)
        counted = finite & (size > 0)
        v = size + jnp.asarray(eps, size.dtype)
        smallest = jnp.minimum(smallest, jnp.min(jnp.where(counted, size, jnp.inf)).astype("f4"))
        largest = jnp.maximum(largest, jnp.max(jnp.where(finite, size, 0)).astype("f4"))
        below += jnp.sum(counted & (v < low), dtype=jnp.float32)
        above += jnp.sum(counted & (v > high), dtype=jnp.float32)
        nonzero += jnp.sum(counted, dtype=jnp.float32)
        nonfinite += jnp.sum(~finite, dtype=jnp.float32)
    nonzero = jnp.maximum(nonzero, 1)
    return {
        "smallest": smallest,
        "largest": largest,
        "underflow_fraction": below / nonzero,
        "saturated_fraction": above / nonzero,
        "nonfinite_count": nonfinite,
    }
