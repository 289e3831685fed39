"""What is done for a compiler, and for nothing else.

Each function is named after its intent, and says where it is needed and in which versions that was
seen. `tests/test_xla.py`, and for TPU `tests/accelerators`, has a test for each that fails when it
has become needless.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def all_finite(x: jax.Array) -> jax.Array:
    """Whether all elements are finite, in one pass over them.

    On CPU XLA writes a mask to memory before `jnp.all` reads it, and `jnp.max` of many float32
    loses NaN; a sum of zeros, or NaN, does neither. Seen in jaxlib 0.10.2.
    """
    return jnp.isfinite(jnp.sum(x - x))


Add = Callable[[jax.Array, jax.Array], jax.Array]

# Fewer elements than these may be copied; a branch would take longer.
LARGE = 1 << 16


def store(
    next_m: Callable[[jax.Array, jax.Array, jax.Array, jax.Array, Add], jax.Array],
    next_v: Callable[[jax.Array, jax.Array], jax.Array],
    m: jax.Array,
    v: jax.Array,
    g: jax.Array,
    t: jax.Array,
    *,
    rounds_m: bool,
) -> tuple[jax.Array, jax.Array]:
    """m and v as they are stored, to be read from there.

    On CPU XLA repeats what ends in a cast wherever the result is used: the updates would be
    computed from the old m and v, which would have to be copied before they are overwritten. So
    what is rounded is computed in a branch, into which XLA does not look (it does not know that
    t > 0), and v after m, which is computed from it. Seen in jaxlib 0.10.2.

    Elsewhere nothing is done: in each of these ways a step would take longer on TPU.

    Args:
      next_m: computes m as it is stored from m, v, the new v and g; `add` adds two products.
      next_v: computes v as it is stored.
      m: as it is stored.
      v: likewise.
      g: the gradient.
      t: int32, the number of the step, at least 1.
      rounds_m: whether m is stored in fewer bits than the arithmetic has; else v is.
    """

    def on_cpu(
        m: jax.Array, v: jax.Array, g: jax.Array, t: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        def add(x: jax.Array, y: jax.Array) -> jax.Array:
            return without_fma(x, t) + without_fma(y, t)

        def in_branch(function: Callable[..., jax.Array], old: jax.Array, *rest: jax.Array) -> Any:
            old = _varying_as(old, g)
            return jax.lax.cond(t > 0, function, lambda old, *rest: old, old, *rest)

        if g.size < LARGE:
            new_v = next_v(v, g)
            return next_m(m, v, new_v, g, add), new_v
        if not rounds_m:
            new_v = in_branch(next_v, v, g)
            return next_m(m, v, new_v, g, add), new_v
        new_m = in_branch(lambda m, v, g: next_m(m, v, next_v(v, g), g, add), m, v, g)
        new_v = next_v(v, g)
        return new_m, written_after(new_m, new_v, t)

    def elsewhere(
        m: jax.Array, v: jax.Array, g: jax.Array, t: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        del t
        new_v = next_v(v, g)
        return next_m(m, v, new_v, g, jnp.add), new_v

    return jax.lax.platform_dependent(m, v, g, t, cpu=on_cpu, default=elsewhere)


def written_after(first: jax.Array, x: jax.Array, t: jax.Array) -> jax.Array:
    """x, for t >= 0: to be written after `first` is, or in the same loop.

    Where each of two results needs the old value of the other, XLA on CPU copies one before it is
    overwritten: the one that it happens to write last. On TPU it makes two loops of them. So x is
    made to depend on `first`. Seen in jaxlib 0.10.2 and libtpu 0.0.50.
    """
    return jnp.where(t < 0, first.astype(x.dtype), x)


def without_fma(x: jax.Array, t: jax.Array) -> jax.Array:
    """x, for t >= 0: a product that is rounded before something is added to it.

    On CPU XLA contracts a product and a sum to a fused multiply-add in one program and not in
    another, and what is rounded to few bits afterwards would differ by a code between the two. It
    does not see through an `or` with the bits of min(t, 0). Only for CPU: there are no such
    contractions on TPU, where this takes the loop its pipelining. Seen in jaxlib 0.7 to 0.12.
    """
    integer = jnp.int32 if x.dtype.itemsize == 4 else jnp.int64
    bits = jax.lax.bitcast_convert_type(x, integer) | jnp.minimum(t, 0).astype(integer)
    return jax.lax.bitcast_convert_type(bits, x.dtype)


def per_element(scalar: jax.Array, elements: jax.Array) -> jax.Array:
    """`elements`, which are all equal to `scalar`, to keep that from being an operand of a loop.

    On TPU a loop of more than twelve operands, arrays and scalars together, is slow: it takes 1.3
    (v5e) to 1.7 times (v6e) what its bytes take. What is computed from scalars alone becomes one of
    them; what stands in the last bits of something that differs between elements does not. Seen in
    libtpu 0.0.50, by its own estimate. Elsewhere the scalar is cheaper.
    """
    return jax.lax.platform_dependent(
        scalar,
        elements,
        tpu=lambda scalar, x: x,
        default=lambda scalar, x: x - x + scalar,  # varies, and is split, as x is
    )


def _varying_as(x: jax.Array, other: jax.Array) -> jax.Array:
    """x, over the mesh axes of a `jax.shard_map` over which `other` varies, as branches must be."""
    axes = tuple(varying_axes(other) - varying_axes(x))
    if not axes:
        return x
    if hasattr(jax.lax, "pcast"):  # in JAX 0.10; `pvary` before it
        return jax.lax.pcast(x, axes, to="varying")
    return getattr(jax.lax, "pvary")(x, axes)  # noqa: B009


def varying_axes(x: jax.Array) -> frozenset[str]:
    """The mesh axes over which a value inside of `jax.shard_map` differs between devices."""
    kind: Any = jax.typeof(x)
    if hasattr(kind, "manual_axis_type"):  # in JAX 0.10; `vma` before it
        return kind.manual_axis_type.varying
    return getattr(kind, "vma", frozenset())
