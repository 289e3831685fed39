"""The moving frame of v: its decay is divided out of what is stored.

v_t = max(b2 v_{t-1}, |g_t|) is a maximum, and a maximum commutes with a common factor. So what is
stored is w = s v, where the scale s grows by 1 / b2 in each step and is folded back into [1/2, 1]:

    w_t = max(2^-k w_{t-1}, s_t |g_t|)

Each element is rounded once, when it is set; all that is left of the decay is 2^-k, which is exact.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike


class Frame(NamedTuple):
    """One step of the frame, as scalars."""

    phase: jax.Array  # uint32: after the step
    shift: jax.Array  # int32: k, the octaves by which s is folded back
    scale: jax.Array  # float32: s_t


def octaves(b2: ArrayLike) -> jax.Array | np.floating:
    """log2(1 / b2), the decay of one step, without cancellation as b2 nears 1."""
    if isinstance(b2, jax.Array):
        return jnp.log1p(-(1 - b2)).astype(jnp.float32) * (-1 / math.log(2))
    # On the host, for XLA's constant folding and its kernels may differ in the last bit.
    with np.errstate(divide="ignore"):
        return np.float32(np.log1p(-(1 - np.asarray(b2, np.float64))) * (-1 / math.log(2)))


def scale_at(phase: jax.Array) -> jax.Array:
    """s, where the phase is log2(s) + 1 in units of 2**-32."""
    return jnp.exp2(phase.astype(jnp.float32) * jnp.float32(2**-32) - 1)


def advance(phase: jax.Array, octaves: ArrayLike) -> Frame:
    """The frame of a step that decays by so many octaves, from the phase before it."""
    octaves = jnp.asarray(octaves, jnp.float32)
    whole = jnp.minimum(jnp.floor(octaves), 127)
    fraction = jnp.where(octaves < 127, octaves - whole, 0)
    ticks = jnp.minimum(jnp.round(fraction * 2.0**32), 2.0**32 - 256)
    new_phase = phase + ticks.astype(jnp.uint32)
    carry = (new_phase < phase).astype(jnp.int32)
    return Frame(
        phase=new_phase,
        shift=jnp.minimum(whole.astype(jnp.int32) + carry, 127),
        scale=scale_at(new_phase),
    )
