"""Lists the storage formats for tests, and returns the error bounds that each format states."""

import math

import numpy as np

from optax_adamax._m_formats import M_FORMATS
from optax_adamax._v_formats import V_FORMATS

M_DTYPES = ["float32", "bfloat16", "int8"]
V_DTYPES = ["float32", "bfloat16", "uint8"]
FORMATS = [(m, v) for m in M_DTYPES for v in V_DTYPES]
LOW_BIT = FORMATS[1:]
SOME_FORMATS = [("float32", "float32"), ("bfloat16", "bfloat16"), ("int8", "uint8")]
# One pair per branch of the step. They differ in whether m is rounded, whether m is a ratio to v,
# and whether v has a shared scale.
STEP_VARIANTS = [
    *SOME_FORMATS,
    ("bfloat16", "float32"),
    ("int8", "float32"),
    ("float32", "uint8"),
]


def state_bytes(m_dtype, v_dtype):
    """Returns the bytes of state per parameter."""
    return np.dtype(m_dtype).itemsize + np.dtype(v_dtype).itemsize


SCALE_ERROR = 1e-4  # relative error that the float32 shared scale adds in any number of steps


def v_error(v_dtype, scale_error=SCALE_ERROR):
    """Returns the bound on the relative error of v within `v_range`, after any number of steps."""
    return V_FORMATS[v_dtype].relative_error + scale_error


def v_log2_error(v_dtype):
    """Returns the bound on |log2(stored / exact)| that follows from `v_error`."""
    error = V_FORMATS[v_dtype].relative_error
    # Rounding to the nearer of two neighbours is off by at most this fraction of the smaller one.
    nearest = math.log2(1 + error) if v_dtype == "uint8" else -math.log2(1 - error)
    return nearest + SCALE_ERROR


def v_range(v_dtype):
    """Returns the smallest and the largest v for which `v_error` is valid."""
    return V_FORMATS[v_dtype].range


def m_error(m_dtype, m, v):
    """Returns the bound on the error that one step adds to m; this error has mean 0 over steps."""
    m_format = M_FORMATS[m_dtype]
    return np.maximum(m_format.relative_error, 1e-6) * np.abs(m) + m_format.resolution * v


def largest_ratio(m_dtype):
    """Returns the largest |m| / v that the format can store."""
    return M_FORMATS[m_dtype].largest_ratio


def step_bound(t, b1, b2, *, bias_correction=True, nesterov=False):
    """Returns C_t, the largest |u_t| for constant b1 < b2."""
    ratio = (1 - b1) * (1 - (b1 / b2) ** t) / (1 - b1 / b2)  # largest |m| / v
    bias, next_bias = (1 - b1**t, 1 - b1 ** (t + 1)) if bias_correction else (1, 1)
    return b1 * ratio / next_bias + (1 - b1) / bias if nesterov else ratio / bias
