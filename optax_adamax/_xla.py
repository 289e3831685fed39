"""Workarounds for compilers.

Each function is named after its intent, and names the symptom and the versions that have it.
`tests/test_xla.py`, and for TPU `tests/accelerators`, have a test for each that fails when the
workaround is obsolete.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from optax_adamax._numerics import map_real_imag


def all_finite(x: jax.Array) -> jax.Array:
    """Returns whether all elements are finite, in one pass.

    XLA on CPU (jaxlib 0.10.2) writes a mask to memory for `jnp.all`, and `jnp.max` over many
    float32 may lose a NaN. A sum of zeros or NaN has neither fault.
    """
    return jnp.isfinite(jnp.sum(x - x))


# Arrays of fewer elements may be copied; a branch would take longer.
MIN_BRANCH_SIZE = 1 << 16

Moments = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


def evaluate_moments(
    moments: Moments,
    g: jax.Array,
    m: jax.Array,
    v: jax.Array,
    t: jax.Array,
    *,
    quantized: tuple[bool, bool],
) -> tuple[jax.Array, jax.Array]:
    """Returns moments(g, m, v), compiled so that quantized results are read as stored.

    XLA on CPU (jaxlib 0.10.2) recomputes an expression that ends in a cast at each use. The update
    would then be computed from the old moments, which would be copied before they are overwritten.
    So the first moment that is quantized is computed inside a branch, which XLA does not look
    into: it does not know that t > 0. Dead code elimination removes the other moment there. On
    other platforms the branch would only cost time.

    Args:
      moments: computes m_t and v_t, as stored, from g and the stored m and v.
      g: gradient.
      m: the stored m_{t-1}.
      v: the stored v_{t-1}.
      t: int32, the number of the step, at least 1.
      quantized: whether m and v are stored in fewer bits than the compute dtype has.
    """

    def on_cpu(g: jax.Array, m: jax.Array, v: jax.Array, t: jax.Array) -> Any:
        index = quantized.index(True)
        old = match_varying_axes((m, v)[index], g)
        stored = jax.lax.cond(
            t > 0, lambda old, g, m, v: moments(g, m, v)[index], lambda old, *_: old, old, g, m, v
        )
        if index == 1:
            return moments(g, m, v)[0], stored
        if jnp.issubdtype(m.dtype, jnp.integer) and jnp.issubdtype(v.dtype, jnp.floating):
            # The branch reads v, so that a float v must also be computed after the branch.
            return stored, moments(g, m, write_after(stored, v, t))[1]
        return stored, write_after(stored, moments(g, m, v)[1], t)

    if True not in quantized or g.size < MIN_BRANCH_SIZE:
        return moments(g, m, v)
    return jax.lax.platform_dependent(
        g, m, v, t, cpu=on_cpu, default=lambda g, m, v, t: moments(g, m, v)
    )


def write_after(first: jax.Array, x: jax.Array, t: jax.Array) -> jax.Array:
    """Returns x, for t >= 0, in such a way that it is written with or after `first`.

    If each of two results needs the old value of the other, XLA on CPU (jaxlib 0.10.2) copies the
    one that it happens to write last, and XLA on TPU (libtpu 0.0.50) makes two loops. So x is made
    to depend on `first`.
    """
    return jnp.where(t < 0, first.astype(x.dtype), x)


def add_products(
    a: jax.Array, x: jax.Array, b: jax.Array, y: jax.Array, t: jax.Array, *, exactly: bool
) -> jax.Array:
    """Returns a x + b y for t >= 0; if `exactly`, both products are rounded before the addition.

    XLA on CPU (jaxlib 0.7 to 0.12) contracts a product and a sum to a fused multiply-add in one
    program and not in another, so that a quantized sum may differ by one code between the two.

    Args:
      a: scalar.
      x: array, real or complex.
      b: scalar.
      y: array, with the shape and dtype of x.
      t: int32, the number of the step.
      exactly: prevents the contraction, and with it derivatives.
    """
    if not exactly:  # in the order of optax, so that XLA contracts the same product
        return map_real_imag(lambda x, y: b * y + a * x, x, y)
    products = a * x, b * y
    return jax.lax.platform_dependent(
        *products,
        t,
        cpu=lambda ax, by, t: without_fma(ax, t) + without_fma(by, t),
        default=lambda ax, by, t: ax + by,
    )


def without_fma(x: jax.Array, t: jax.Array) -> jax.Array:
    """Returns x, a product, for t >= 0, in such a way that it is rounded before an addition.

    XLA does not look through an `or` with the bits of min(t, 0). On TPU, which has no such
    contraction, this would make a step 1.3 (v5e) to 1.7 (v6e) times slower.
    """
    integer = jnp.int32 if x.dtype.itemsize == 4 else jnp.int64
    bits = jax.lax.bitcast_convert_type(x, integer) | jnp.minimum(t, 0).astype(integer)
    return jax.lax.bitcast_convert_type(bits, x.dtype)


# On TPU (libtpu 0.0.50), a loop with more than twelve operands, arrays and scalars together, takes
# 1.3 (v5e) to 1.7 (v6e) times as long, according to the compiler's estimate. So one scalar, a power
# of two, is packed into the low bits of another one.
_PACKED_BITS = 9  # the sign and the exponent of a float32


def pack(scalar: jax.Array, power_of_two: jax.Array) -> jax.Array:
    """Replaces the low bits of a uint32 with a float32 that is a power of two, or 0."""
    exponent = jax.lax.bitcast_convert_type(power_of_two, jnp.uint32) >> (32 - _PACKED_BITS)
    return (scalar >> _PACKED_BITS << _PACKED_BITS) | exponent


def add_above_packed(packed: jax.Array, x: jax.Array) -> jax.Array:
    """Adds x, as uint32, to a scalar made by :func:`pack`, without changing its low bits."""
    return packed + (x.astype(jnp.uint32) << _PACKED_BITS)


def unpack(packed: jax.Array, power_of_two: jax.Array) -> jax.Array:
    """Returns an array of `power_of_two`, on TPU from the low bits of `packed`.

    Computed from arrays, it is not an operand of the loop. On other platforms a scalar is cheaper.
    """
    return jax.lax.platform_dependent(packed, power_of_two, tpu=from_low_bits, default=from_scalar)


def from_low_bits(packed: jax.Array, power_of_two: jax.Array) -> jax.Array:
    """Returns the float in the low bits of `packed`, in the dtype of `power_of_two`."""
    bits = packed << (32 - _PACKED_BITS)
    return jax.lax.bitcast_convert_type(bits, jnp.float32).astype(power_of_two.dtype)


def from_scalar(packed: jax.Array, power_of_two: jax.Array) -> jax.Array:
    """Returns `power_of_two` with the shape, sharding and varying axes of `packed`."""
    return (packed - packed).astype(power_of_two.dtype) + power_of_two


def match_varying_axes(x: jax.Array, other: jax.Array) -> jax.Array:
    """Returns x, varying over the mesh axes of `jax.shard_map` over which `other` varies."""
    axes = tuple(varying_axes(other) - varying_axes(x))
    if not axes:
        return x
    if hasattr(jax.lax, "pcast"):  # since JAX 0.10; before, `pvary`
        return jax.lax.pcast(x, axes, to="varying")
    return getattr(jax.lax, "pvary")(x, axes)  # noqa: B009


def varying_axes(x: jax.Array) -> frozenset[str]:
    """Returns the mesh axes of `jax.shard_map` over which x differs between devices."""
    kind: Any = jax.typeof(x)
    if hasattr(kind, "manual_axis_type"):  # since JAX 0.10; before, `vma`
        return kind.manual_axis_type.varying
    return getattr(kind, "vma", frozenset())
