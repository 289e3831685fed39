"""The hyperparameters of a transformation, measured by a step on one element per parameter."""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_adamax import repack_state, unpack_state
from optax_adamax.compat import _moments
from optax_adamax.compat._moments import Moments
from optax_adamax.compat._paths import paths

# So many steps that 1 - b1**t is 1.
LATE = 2**30


class Measured(NamedTuple):
    """What a transformation does to a parameter, up to the rounding of its storage formats."""

    b1: float
    b2: float
    rate: float | None  # None: the parameter does not move in this call, or b1 = 0

    @property
    def largest_ratio(self) -> float:
        """The bound of |m| / v."""
        return (1 - self.b1) / (1 - self.b1 / self.b2) if self.b1 < self.b2 else np.inf


def measure(
    tx: optax.GradientTransformation, params: optax.Params, steps: Mapping[str, int | None]
) -> dict[str, Measured]:
    """Returns the hyperparameters by path; nothing if `tx` cannot be called with gradients alone.

    With gradients and parameters of 0 and moments of 1, m becomes b1, v becomes b2, and the update
    becomes minus the learning rate times their quotient, whatever wraps the transformation.

    Args:
      tx: the transformation.
      params: the parameters; only their tree, dtypes and numbers of axes are used.
      steps: the counts of the schedules for each trained path.
    """
    small = jax.tree.map(lambda p: jnp.zeros((1,) * jnp.ndim(p), jnp.result_type(p)), params)
    zeros = jax.tree.map(lambda p: p.astype(np.result_type(p.dtype, np.float32)), small)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        try:
            template = tx.init(small)
            state = unpack_state(template, small)
            ones = {path: np.ones(p.shape) for path, p in paths(small).items()}
            state = _moments.fill(state, Moments(ones, ones, dict(steps)))
            state = jax.tree.map(_age, state, is_leaf=_is_node)
            updates, state = tx.update(zeros, repack_state(state, like=template), small)
            after = _moments.read_state(unpack_state(state, small))
        except Exception:  # a wrapper may need other arguments, or arrays of their true shape
            return {}
    moved = paths(updates)
    measured = {}
    for path in after.m:
        m, v, update = (np.real(x[path]).item() for x in (after.m, after.v, moved))
        measured[path] = Measured(m, v, -update * v / m if m and update else None)
    return measured


def _is_node(x: object) -> bool:
    return isinstance(x, _moments.ScaleByAdamaxState)


def _age(state: object) -> object:
    if isinstance(state, _moments.ScaleByAdamaxState):
        return state._replace(count=jnp.full_like(state.count, LATE))
    return state
