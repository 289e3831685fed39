"""Leaves of a tree as one flat array, and back.

What is to do well is compiling: a slice at an offset that XLA knows is a kernel of its own for each
leaf, ten milliseconds of compiling each on CPU. `cut` hides the offsets, and one kernel serves all
leaves of a size.
"""

import functools
import itertools
import math
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import ArrayLike


def join(leaves: list[Any]) -> Any:
    """One flat array of all leaves, arrays or shapes, whole on each device."""
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
    return jnp.concatenate([jnp.ravel(reshard_like(x, None)) for x in leaves])


def reshard_like(x: Any, like: Any) -> Any:
    """`x` split over explicit axes of a mesh as `like` is, or not split at all."""
    axes = _explicit_axes(like)
    if _explicit_axes(x) == axes:
        return x
    mesh = jax.typeof(like if axes else x).sharding.mesh
    return jax.sharding.reshard(x, NamedSharding(mesh, PartitionSpec(*axes)))


def _explicit_axes(x: Any) -> tuple[Any, ...]:
    spec = jax.typeof(x).sharding.spec if isinstance(x, jax.Array) else ()
    return tuple(spec) if any(entry is not None for entry in spec) else ()


@functools.partial(jax.jit, static_argnames="shapes")
def cut(flat: jax.Array, shapes: tuple[tuple[int, ...], ...]) -> list[jax.Array]:
    """The arrays of these shapes that follow each other in `flat`, equal sizes together."""
    sizes = [math.prod(shape) for shape in shapes]
    base = math.isqrt(max(Counter(sizes).values())) + 1
    flat, digits = _with_digits(flat, base)
    start, leaves = 0, []
    for size, run in itertools.groupby(shapes, math.prod):
        for row, shape in enumerate(run):
            offset = start + size * (base * digits[row // base] + digits[row % base])
            leaf = jax.lax.dynamic_slice(flat, (offset,), (size,), allow_negative_indices=False)
            leaves.append(leaf.reshape(shape))
        start = sum(sizes[: len(leaves)])
    return leaves


def _with_digits(flat: jax.Array, base: int) -> tuple[jax.Array, list[jax.Array]]:
    """`flat` and the numbers below `base`; on CPU in a form into which XLA does not see.

    It does not look into a branch, and does not ask whether both are the same: it computes `flat`
    once, instead of a piece in each kernel, and does not know the numbers. Seen in jaxlib 0.10.2.
    On a GPU a branch would make the host wait.
    """

    def known(flat: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
        return flat, [jnp.int32(i) for i in range(base)]

    def hidden(flat: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
        return jax.lax.cond(flat[0] == 0, known, known, flat)

    return jax.lax.platform_dependent(flat, cpu=hidden, default=known)
