"""Concatenates the leaves of a tree into one flat array, and slices it again.

The aim is a short compile time: XLA compiles one kernel per slice at a constant offset, ten
milliseconds each on CPU. `slice_leaves` hides the offsets, so that all leaves of a size share one
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
    """One flat array of all leaves, which are arrays or shapes."""
    dtypes = {jnp.result_type(x) for x in leaves}
    if len(dtypes) > 1:
        raise TypeError(
            f"The gradients of leaves in one buffer are {' and '.join(sorted(map(str, dtypes)))}: "
            f"cast them to one dtype. Leaves are in one buffer if their parameters have one dtype."
        )
    if any(isinstance(x, jax.ShapeDtypeStruct) for x in leaves):
        return jax.ShapeDtypeStruct((sum(x.size for x in leaves),), *dtypes)
    return _concatenate(leaves)


@jax.jit
def _concatenate(leaves: list[ArrayLike]) -> jax.Array:
    return jnp.concatenate([jnp.ravel(x) for x in leaves])


@functools.partial(jax.jit, static_argnames="shapes")
def slice_leaves(flat: jax.Array, shapes: tuple[tuple[int, ...], ...]) -> list[jax.Array]:
    """The arrays of these shapes, which follow each other in `flat`, sorted by size."""
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
    """`flat` and the numbers below `base`, which XLA on CPU does not treat as constants.

    XLA CPU (jaxlib 0.10.2) neither looks into a branch nor compares the two branches. So it
    computes `flat` once instead of a part in each kernel, and does not know the numbers. On a GPU,
    a branch would make the host wait.
    """

    def constant(flat: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
        return flat, [jnp.int32(i) for i in range(base)]

    def hidden(flat: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
        return jax.lax.cond(flat[0] == 0, constant, constant, flat)

    return jax.lax.platform_dependent(flat, cpu=hidden, default=constant)
