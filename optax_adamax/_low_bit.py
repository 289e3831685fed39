"""One step of a leaf whose moments are kept in fewer bits than the arithmetic has.

The shape of this code is the shape of what XLA makes of it. On CPU the step becomes three
passes over memory: the code of m, the code of v, and the updates from the stored codes.
`benchmarks/low_bit.py` shows the passes and their times; three things keep them apart:

- what is stored is decoded again for the update: no float32 temporary, and a step that a
  checkpoint can explain;
- v is marked as lost where m is: the code of v then comes after that of m, which still reads
  the old v, and both are written in place;
- `_apart`, for bfloat16.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from optax_adamax import _storage
from optax_adamax._numerics import narrow
from optax_adamax._rule import AdamaxStep
from optax_adamax._skip import is_taken

Moments = tuple[jax.Array, jax.Array]


@functools.partial(jax.jit, static_argnames=("m_format", "v_format"))
def low_bit_leaf(
    g: jax.Array,
    m: jax.Array,
    v: jax.Array,
    t: jax.Array,
    step: AdamaxStep,
    frame: _storage.Frame,
    bound: jax.Array,
    taken: jax.Array | None = None,
    *,
    m_format: _storage.MFormat,
    v_format: _storage.VFormat,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Takes step t.

    Args:
      g: gradient, of any real dtype.
      m: first moment as `m_format` keeps it, of the same shape.
      v: infinity norm as `v_format` keeps it, of the same shape.
      t: number of the step, int32.
      step: the rule at step t, in float32.
      frame: the decay of v at step t.
      bound: largest |direction| of step t in exact arithmetic; the codes' errors are cut there.
      taken: whether the step is taken, by the elements with a finite gradient; None: by all.
      m_format: how m is kept.
      v_format: how v is kept.

    Returns:
      The direction in the dtype of g, and the new m and v as they are kept. An element that
      takes no step keeps what is stored of m, and of v but for the fold of the frame.
    """

    def moments(g: jax.Array, m: jax.Array, v: jax.Array) -> Moments:
        g = g.astype(jnp.float32)
        size = jnp.abs(g) + step.eps_in_max
        new_v = v_format.next_v(v, size, frame)
        old_m = m_format.decode_m(m, v_format.decode_v(v, frame.old_unit))
        if m_format.is_low_bit:
            new_m = _storage.pinned(step.a1 * g, t) + _storage.pinned(step.b1 * old_m, t)
            scale = v_format.decode_v(new_v, frame.unit)
            new_m = m_format.encode_m(new_m, scale, _storage.threshold(t))
        else:
            new_m = step.next_m(g, old_m)
        new_m = new_m.astype(m.dtype)
        if taken is not None:
            stays = ~is_taken(g, taken)
            new_m = jnp.where(stays, m, new_m)
            size = jnp.where(stays, 0 if v_format.is_framed else v.astype(jnp.float32), size)
        if isinstance(m_format, _storage.RatioInt8):
            size = jnp.where(m_format.is_lost(new_m), jnp.nan, size)
        new_v = v_format.next_v(v, size, frame)
        return new_m, new_v.astype(v.dtype)

    bfloat16 = jnp.bfloat16 in (m.dtype, v.dtype)
    new_m, new_v = _apart(t, moments, g, m, v) if bfloat16 else moments(g, m, v)
    kept_v = v_format.decode_v(new_v, frame.unit)
    kept_m = m_format.decode_m(new_m, kept_v)
    direction = step.direction(g.astype(jnp.float32), kept_m, kept_v)
    bounded = jnp.clip(direction, -bound, bound)
    u = jnp.where(jnp.isfinite(kept_m), bounded, jnp.nan)
    return narrow(u, g.dtype), new_m, new_v


def _apart(
    t: jax.Array, moments: Callable[..., Moments], g: jax.Array, m: jax.Array, v: jax.Array
) -> Moments:
    """`moments(g, m, v)`, in a pass of its own on CPU.

    There XLA computes bfloat16 in float32 and casts at the end, and it repeats what ends in a
    cast wherever the result is used: the updates would be computed from the old moments, which
    would have to be copied before they are overwritten. It does not look into a branch (and does
    not know that t > 0). Seen in jaxlib 0.10.2.
    """

    def branch(g: jax.Array, m: jax.Array, v: jax.Array) -> Moments:
        return jax.lax.cond(t > 0, moments, lambda g, m, v: (m, v), g, m, v)

    return jax.lax.platform_dependent(g, m, v, cpu=branch, default=moments)
