"""The shared scale of a quantized v.

v_t = max(b2 v_{t-1}, |g_t|) is a maximum, and a maximum commutes with a common positive factor. So
a quantized v is stored as w = s v, with one scale s for all elements of the tree. In each step, s
is multiplied by 1 / b2, and divided by 2^k to remain in [1/2, 1):

    w_t = max(2^-k w_{t-1}, s_t |g_t|)

So in units of s, the decay rate b2 is 2^-k, and a multiplication by it is exact. Each element is
rounded once, when a gradient sets it.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from optax_adamax._numerics import float32_from_bits


class SharedScale(NamedTuple):
    """The shared scale after a step, as scalars."""

    phase: jax.Array  # uint32: log2(s_t) + 1 in units of 2**-32
    scale: jax.Array  # float32: s_t
    b2: jax.Array  # float32: 2**-k, which is b2 in units of s


def log2_decay(b2: ArrayLike) -> jax.Array | np.floating:
    """Returns log2(1 / b2) as float32, accurate also for b2 near 1."""
    if isinstance(b2, jax.Array):
        return jnp.log1p(-(1 - b2)).astype(jnp.float32) * (-1 / math.log(2))
    # Computed in NumPy, because constant folding and kernels of XLA may differ in the last bit.
    with np.errstate(divide="ignore"):
        return np.float32(np.log1p(-(1 - np.asarray(b2, np.float64))) * (-1 / math.log(2)))


def scale_from_phase(phase: jax.Array) -> jax.Array:
    """Returns s in [1/2, 1) as float32."""
    return jnp.exp2(phase.astype(jnp.float32) * jnp.float32(2**-32) - 1)


@jax.jit
def advance(phase: jax.Array, log2_decay: ArrayLike) -> SharedScale:
    """Returns the scale after one step; `phase` is the phase before it."""
    # For b2 = 0, k is 127, and the float with the exponent bits 127 - k is 0.
    log2_decay = jnp.minimum(jnp.asarray(log2_decay, jnp.float32), 127)
    whole = jnp.floor(log2_decay)
    ticks = jnp.round((log2_decay - whole) * 2.0**32)
    new_phase = phase + ticks.astype(jnp.uint32)
    carry = (new_phase < phase).astype(jnp.int32)
    k = whole.astype(jnp.int32) + carry
    return SharedScale(new_phase, scale_from_phase(new_phase), b2=float32_from_bits(127 - k << 23))
