"""The one table of storage formats for tests: what each promises, read from the formats."""

import math

import numpy as np

from optax_adamax._m_formats import M_FORMATS
from optax_adamax._v_formats import V_FORMATS

M_DTYPES = ["float32", "bfloat16", "int8"]
V_DTYPES = ["float32", "bfloat16", "uint8"]
FORMATS = [(m, v) for m in M_DTYPES for v in V_DTYPES]
LOW_BIT = FORMATS[1:]
SOME_FORMATS = [("float32", "float32"), ("bfloat16", "bfloat16"), ("int8", "uint8")]
# One for each way through the step: is m rounded, is it a ratio, has v a frame?
WAYS = [*SOME_FORMATS, ("bfloat16", "float32"), ("int8", "float32"), ("float32", "uint8")]


def state_bytes(m_dtype, v_dtype):
    """Bytes a parameter."""
    return np.dtype(m_dtype).itemsize + np.dtype(v_dtype).itemsize


FRAME = 1e-4  # relative: what the frame's scale, in float32, adds in any number of steps


def v_error(v_dtype, frame=FRAME):
    """The relative error of v, wherever it is in `v_range`, after any number of steps."""
    return V_FORMATS[v_dtype].relative_error + frame


def v_octaves(v_dtype):
    """The same as |log2(kept / exact)|."""
    error = V_FORMATS[v_dtype].relative_error
    # The nearest of two neighbours is off by at most so much of the smaller of them.
    return math.log2(1 + error) + FRAME if v_dtype == "uint8" else -math.log2(1 - error) + FRAME


def v_range(v_dtype):
    """Where `v_error` holds."""
    return V_FORMATS[v_dtype].range


def m_error(m_dtype, m, v):
    """What one step may add to the error of m; in the mean over steps it is 0."""
    kept = M_FORMATS[m_dtype]
    return np.maximum(kept.relative_error, 1e-6) * np.abs(m) + kept.resolution * v


def largest_ratio(m_dtype):
    """The largest |m| / v that can be kept."""
    return M_FORMATS[m_dtype].largest_ratio


def step_bound(t, b1, b2, *, bias_correction=True, nesterov=False):
    """The largest |u_t| for constant b1 < b2."""
    ratio = (1 - b1) * (1 - (b1 / b2) ** t) / (1 - b1 / b2)  # of m to v
    bias, next_bias = (1 - b1**t, 1 - b1 ** (t + 1)) if bias_correction else (1, 1)
    return b1 * ratio / next_bias + (1 - b1) / bias if nesterov else ratio / bias
