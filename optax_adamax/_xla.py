"""Workarounds for compilers.

Each function documents a symptom and the versions that have it. A test in
`tests/test_xla.py` or `tests/accelerators` fails when the workaround is obsolete.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from optax_adamax._numerics import map_real_imag
from optax_adamax._varying_axes import match_varying_axes


def all_finite(x: jax.Array) -> jax.Array:
    """Returns whether all elements are finite, in one pass.

    XLA on CPU (jaxlib 0.10.2) writes a mask to memory for `jnp.all`, and `jnp.max` of a large
    float32 array may lose a NaN. The sum of x - x, which is 0 or NaN, has neither fault.
    """
    return jnp.isfinite(jnp.sum(x - x))


MIN_BRANCH_SIZE = 1 << 16  # in smaller arrays, a branch costs more time than it saves


def evaluate_moments(
    moments: Callable[..., tuple[jax.Array, jax.Array]],
    g: jax.Array,
    m: jax.Array,
    v: jax.Array,
    t: jax.Array,
    *,
    quantized: tuple[bool, bool],
) -> tuple[jax.Array, jax.Array]:
    """Returns moments(g, m, v), and prevents XLA on CPU from recomputing a quantized result.

    XLA on CPU (jaxlib 0.10.2) recomputes an expression that ends in a cast at each use. The update
    would then be computed from the old moments, which would be copied before they are overwritten.
    So the first quantized moment is computed in a branch on t > 0. The condition is always true,
    but XLA neither removes the branch nor fuses across it. Dead code elimination removes the other
    moment from the branch. On other platforms the branch would only cost time.

    Args:
      moments: a function that returns m_t and v_t as stored.
      g, m, v: the gradient, and m_{t-1} and v_{t-1} as stored.
      t: int32, the number of the step, at least 1.
      quantized: whether m is quantized, and whether v is.
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
            # The branch reads the old v, which a float v_t overwrites. So v_t is computed later.
            return stored, moments(g, m, write_after(stored, v, t))[1]
        return stored, write_after(stored, moments(g, m, v)[1], t)

    is_small = isinstance(g.size, int) and g.size < MIN_BRANCH_SIZE  # jax.export: a symbolic size
    if True not in quantized or is_small:
        return moments(g, m, v)
    return jax.lax.platform_dependent(
        g, m, v, t, cpu=on_cpu, default=lambda g, m, v, t: moments(g, m, v)
    )


def write_after(first: jax.Array, x: jax.Array, t: jax.Array) -> jax.Array:
    """Returns x, which XLA then does not write before `first`; t >= 0.

    If each of two results needs the old value of the other, XLA on CPU (jaxlib 0.10.2) copies one
    of the old values, and XLA on TPU (libtpu 0.0.50) emits two loops. The condition, which is never
    true, makes x depend on `first`.
    """
    return jnp.where(t < 0, first.astype(x.dtype), x)


def add_products(
    a: jax.Array, x: jax.Array, b: jax.Array, y: jax.Array, t: jax.Array, *, exactly: bool
) -> jax.Array:
    """Returns a x + b y; if `exactly`, both products are rounded before the addition.

    XLA on CPU (jaxlib 0.7 to 0.12) contracts a product and a sum to a fused multiply-add in some
    programs only. A quantized sum may then differ by one code between two programs.

    Args:
      a, b: scalars.
      x, y: arrays of one shape and dtype, real or complex.
      t: int32, the number of the step, at least 0.
      exactly: prevents the contraction. The sum is then not differentiable.
    """
    if not exactly:  # b y first, as in optax: XLA then contracts the same product
        return map_real_imag(lambda x, y: b * y + a * x, x, y)
    products = a * x, b * y
    return jax.lax.platform_dependent(
        *products,
        t,
        cpu=lambda ax, by, t: without_fma(ax, t) + without_fma(by, t),
        default=lambda ax, by, t: ax + by,
    )


def without_fma(x: jax.Array, t: jax.Array) -> jax.Array:
    """Returns the product x, which XLA on CPU then rounds before it adds it; t >= 0.

    XLA (jaxlib 0.7 to 0.12) does not contract a product whose bits are combined by `or` with the
    bits of min(t, 0), which is 0. On TPU, which does not contract, a step would be 1.3 (v5e) to 1.7
    (v6e) times slower.
    """
    integer = jnp.int32 if x.dtype.itemsize == 4 else jnp.int64
    bits = jax.lax.bitcast_convert_type(x, integer) | jnp.minimum(t, 0).astype(integer)
    return jax.lax.bitcast_convert_type(bits, x.dtype)


# On TPU (libtpu 0.0.50), a loop with more than twelve operands, arrays and scalars together, is 1.3
# (v5e) to 1.7 (v6e) times slower, as estimated by the compiler. So one scalar, a power of two, is
# packed into the low bits of another scalar.
_PACKED_BITS = 9  # the sign and the exponent of a float32


def pack(scalar: jax.Array, power_of_two: jax.Array) -> jax.Array:
    """Replaces the low bits of a uint32 with a float32 that is a power of two, or 0."""
    exponent = jax.lax.bitcast_convert_type(power_of_two, jnp.uint32) >> (32 - _PACKED_BITS)
    return (scalar >> _PACKED_BITS << _PACKED_BITS) | exponent


def add_above_packed(packed: jax.Array, x: jax.Array) -> jax.Array:
    """Adds x, as uint32, to the bits of `packed` above the power of two."""
    return packed + (x.astype(jnp.uint32) << _PACKED_BITS)


def unpack(packed: jax.Array, power_of_two: jax.Array) -> jax.Array:
    """Returns `power_of_two` as an array like `packed`, whose low bits contain it.

    On TPU it is decoded from `packed`, and is not an operand of the loop. On other platforms the
    scalar is cheaper.
    """
    return jax.lax.platform_dependent(packed, power_of_two, tpu=from_low_bits, default=from_scalar)


def from_low_bits(packed: jax.Array, power_of_two: jax.Array) -> jax.Array:
    """Decodes the power of two in the low bits of `packed`."""
    bits = packed << (32 - _PACKED_BITS)
    return jax.lax.bitcast_convert_type(bits, jnp.float32).astype(power_of_two.dtype)


def from_scalar(packed: jax.Array, power_of_two: jax.Array) -> jax.Array:
    """Broadcasts `power_of_two` to the shape, sharding and varying axes of `packed`."""
    return (packed - packed).astype(power_of_two.dtype) + power_of_two
