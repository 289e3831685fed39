"""Check, for debugging, that parameters were changed by exactly the returned updates."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_adamax.wrappers._residual_tree import is_absent


def initial(residual: Any) -> Any:
    """Returns the expected parameters of a new state: zeros, which `check` ignores at count 0."""
    return jax.tree.map(lambda r: jnp.zeros_like(r, dtype=jnp.bfloat16), residual)


def expected(residual: Any, params: Any, updates: Any) -> Any:
    """Returns the parameters with a residual, after `optax.apply_updates`."""

    def applied(r: Any, p: Any, u: Any) -> Any:
        if is_absent(r) or u is None:
            return r if is_absent(r) else p
        p, u = jnp.asarray(p).astype(jnp.float32), u.astype(jnp.float32)
        return (p + u).astype(jnp.bfloat16)

    return jax.tree.map(applied, residual, params, updates, is_leaf=is_absent)


def check(matched: list[tuple[str, Any, Any]], expected: Any, count: jax.Array) -> None:
    """Raises an error when the program runs, if parameters differ from the expected ones.

    Args:
      matched: name, parameter and residual of each leaf.
      expected: the parameters after the last step, or () if that step did not store them.
      count: the number of steps before this step.
    """
    leaves = [(name, p) for name, p, r in matched if not is_absent(r)]
    changed = [
        jnp.sum((p != q) & (p == p), dtype=jnp.int32)  # NaN is not reported
        for (_, p), q in zip(leaves, jax.tree.leaves(expected), strict=False)
    ]
    if changed:
        names = tuple(name for name, _ in leaves)
        counts = jnp.where(count > 0, jnp.stack(changed), 0)
        jax.debug.callback(functools.partial(_raise_if_changed, names), counts)


def _raise_if_changed(names: tuple[str, ...], counts: np.ndarray) -> None:
    worst = int(np.argmax(counts))
    if counts[worst] > 0:
        raise ValueError(
            f"compensate_rounding must receive the parameters that result from its last updates, "
            f"but {counts[worst]} elements of {names[worst] or 'the parameter'} differ. Make it "
            f"the outermost transformation: write compensate_rounding(optax.chain(..., learning "
            f"rate)), not optax.chain(compensate_rounding(...), learning rate). Add its updates "
            f"unchanged, with optax.apply_updates."
        )
