"""Computes Adamax in NumPy float64, as simply as possible, for comparison in tests."""

from typing import NamedTuple

import numpy as np


class Moments(NamedTuple):
    """State of the reference: float64 (complex128 for complex m), shaped like the gradient."""

    t: int
    m: np.ndarray
    v: np.ndarray


def start(shape=(), dtype=np.float64):
    """Returns the moments before the first step."""
    return Moments(0, np.zeros(shape, dtype), np.zeros(shape))


def step(
    g,
    state,
    b1=0.9,
    b2=0.999,
    eps=1e-8,
    *,
    eps_placement="max",
    bias_correction=True,
    nesterov=False,
):
    """Returns the direction m_hat / v, to be scaled by -learning_rate, and the next state."""
    dtype = np.complex128 if np.iscomplexobj(g) else np.float64
    g = np.asarray(g).astype(dtype)
    t = state.t + 1
    m = b1 * state.m + (1 - b1) * g
    if eps_placement == "max":
        v = np.maximum(b2 * state.v, np.abs(g) + eps)
        denominator = v
    else:
        v = np.maximum(b2 * state.v, np.abs(g))
        denominator = v + eps
    correction = one_minus_power(b1, t) if bias_correction else 1.0
    next_correction = one_minus_power(b1, t + 1) if bias_correction else 1.0
    if nesterov:
        m_hat = b1 * m / next_correction + (1 - b1) * g / correction
    else:
        m_hat = m / correction
    with np.errstate(invalid="ignore", divide="ignore"):
        direction = np.where(denominator == 0, 0, m_hat / denominator)
    return direction, Moments(t, m, v)


def one_minus_power(b, t):
    """Returns 1 - b**t without cancellation for b near 1."""
    b = np.asarray(b, np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(b <= 0, 1 - b**t, -np.expm1(t * np.log(b)))


def run(gradients, **hyperparameters):
    """Returns the directions for a sequence of gradients of equal shape, and the last state."""
    gradients = np.asarray(gradients)
    state = start(gradients.shape[1:], np.complex128 if np.iscomplexobj(gradients) else np.float64)
    directions = []
    for g in gradients:
        direction, state = step(g, state, **hyperparameters)
        directions.append(direction)
    return np.array(directions), state
