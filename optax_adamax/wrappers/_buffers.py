"""Concatenates the leaves of a tree into one flat array, and slices it again.

XLA on CPU compiles one kernel for each slice at a constant offset, which takes 10 ms per slice
(jaxlib 0.10.2). `slice_leaves` hides the offsets from XLA. Leaves of equal size then share one
kernel.
"""

import functools
import itertools
import math
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike


def concatenate_leaves(leaves: list[Any]) -> Any:
    """Returns one flat array of all leaves; its shape if a leaf is a `jax.ShapeDtypeStruct`."""
    dtypes = {jnp.result_type(x) for x in leaves}
    if len(dtypes) > 1:
        raise TypeError(
            f"The gradients in one buffer must have one dtype, but "
            f"{' and '.join(sorted(map(str, dtypes)))} were given. Cast the gradients of "
            f"parameters with equal dtypes to one dtype."
        )
    if any(isinstance(x, jax.ShapeDtypeStruct) for x in leaves):
        return jax.ShapeDtypeStruct((sum(x.size for x in leaves),), *dtypes)
    return _concatenate(leaves)


@jax.jit
def _concatenate(leaves: list[ArrayLike]) -> jax.Array:
    return jnp.concatenate([jnp.ravel(x) for x in leaves])


@functools.partial(jax.jit, static_argnames="shapes")
def slice_leaves(flat: jax.Array, shapes: tuple[tuple[int, ...], ...]) -> list[jax.Array]:
    """Slices `flat` into consecutive arrays of the given shapes, which are sorted by size."""
    sizes = [math.prod(shape) for shape in shapes]
    base = math.isqrt(max(Counter(sizes).values())) + 1
    flat, digits = _hide_offsets(flat, base)
    start, leaves = 0, []
    for size, run in itertools.groupby(shapes, math.prod):
        for row, shape in enumerate(run):
            offset = start + size * (base * digits[row // base] + digits[row % base])
            leaf = jax.lax.dynamic_slice(flat, (offset,), (size,), allow_negative_indices=False)
            leaves.append(leaf.reshape(shape))
        start = sum(sizes[: len(leaves)])
    return leaves


def _hide_offsets(flat: jax.Array, base: int) -> tuple[jax.Array, list[jax.Array]]:
    """Returns `flat` and the numbers below `base`, which XLA on CPU does not treat as constants.

    They are the result of a `lax.cond` with two equal branches. XLA on CPU (jaxlib 0.10.2) neither
    folds the constants nor fuses across the branch, and computes `flat` once instead of a part of
    it in each kernel. On GPUs, a branch would block the host.
    """

    def constant(flat: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
        return flat, [jnp.int32(i) for i in range(base)]

    def hidden(flat: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
        return jax.lax.cond(flat[0] == 0, constant, constant, flat)

    return jax.lax.platform_dependent(flat, cpu=hidden, default=constant)
