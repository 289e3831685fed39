"""What a step needs to know besides arrays: scalars, the same for all parameters."""

from typing import NamedTuple

import jax

SHIFT_BITS = 9  # of a threshold, in which the shift stands


class Step(NamedTuple):
    """Step t; the floats are of the dtype of the arithmetic.

    v is in the units of its frame (see `_frame`), where it has one, and so is what is kept as a
    ratio to it. The scalars contain what that takes: on TPU a loop has to do with few of them (see
    `_xla.per_element`).
    """

    t: jax.Array  # int32: 1 at the first step
    b1: jax.Array  # over b2 where m is a ratio in the frame, which decays by itself
    one_minus_b1: jax.Array  # 1 - b1
    b2: jax.Array
    shift: jax.Array  # int32: by how much the frame is folded back, as `VFormat.fold` takes it
    scale: jax.Array | None  # s_t; None: there is no frame
    eps_in_max: jax.Array | None
    eps_in_denominator: jax.Array | None  # times s_t
    bias: jax.Array  # 1 - b1**t, or 1 without bias correction; over s_t where m is no ratio
    b1_ahead: jax.Array | None  # with Nesterov momentum, b1 (1 - b1**t) / (1 - b1**(t + 1))
    bound: jax.Array | None  # of |u_t|, where what is stored may take it beyond
    # uint32: a hash of t, by which it is decided what is rounded up; the last SHIFT_BITS: `shift`
    threshold: jax.Array
    phase: jax.Array  # uint32: that of the frame after the step
    grads_finite: jax.Array | None  # bool: whether the step is taken; None: nobody asked

    def divisor(self, v: jax.Array) -> jax.Array:
        """(1 - b1^t) (v + eps), by which m is divided."""
        return self.bias * (v if self.eps_in_denominator is None else v + self.eps_in_denominator)
