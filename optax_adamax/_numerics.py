"""Arithmetic that knows no optimizer: dtypes to compute in, and powers without cancellation."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def compute_dtype(*arrays: Any) -> np.dtype:
    """The real dtype to compute in: float64 if one of `arrays` is of 64 bits, else float32."""
    wide = any(jnp.finfo(jnp.result_type(x)).bits == 64 for x in arrays)
    return np.dtype(np.float64 if wide else np.float32)


def widen(x: jax.Array, dtype: np.dtype) -> jax.Array:
    """Casts x to the real `dtype`, or to its complex counterpart if x is complex."""
    return x.astype(np.result_type(dtype, np.complex64) if jnp.iscomplexobj(x) else dtype)


def narrow(x: jax.Array, dtype: np.dtype) -> jax.Array:
    """Casts x to `dtype`; what is too large for a dtype of 16 or 8 bits becomes its largest."""
    if jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits <= 16:
        largest = jnp.asarray(jnp.finfo(dtype).max).astype(x.dtype)
        x = jnp.clip(x, -largest, largest)
    return x.astype(dtype)


@jax.custom_jvp
def one_minus_power(a: jax.Array, t: jax.Array) -> jax.Array:
    """1 - (1 - a)**t without cancellation, for a in [0, 1] and t >= 1."""
    return -jnp.expm1(t * jnp.log1p(-a))


@one_minus_power.defjvp
def _(primals: tuple[Any, Any], tangents: tuple[Any, Any]) -> tuple[jax.Array, jax.Array]:
    # At a = 1 (b1 = 0) the derivative of the expression above is 0 * inf.
    (a, t), (a_dot, _) = primals, tangents
    return one_minus_power(a, t), t * (1 - a) ** (t - 1) * a_dot


def map_real_imag(linear: Callable[..., jax.Array], *arrays: jax.Array) -> jax.Array:
    """Applies a real linear function, to real and imaginary parts apart if they are complex."""
    if not jnp.iscomplexobj(arrays[0]):
        return linear(*arrays)
    return jax.lax.complex(linear(*(x.real for x in arrays)), linear(*(x.imag for x in arrays)))
