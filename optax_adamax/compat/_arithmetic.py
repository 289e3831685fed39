"""Arithmetic around a chain: float32 for every dtype, and complex parameters as pairs of reals."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_adamax._numerics import compute_dtype, saturating_cast, upcast, wider_dtype


class RealImag(NamedTuple):
    """Replaces a complex array by two real arrays."""

    real: Any
    imag: Any


def compute_in_float32(
    inner: optax.GradientTransformation, *, split_complex: bool = False
) -> optax.GradientTransformationExtraArgs:
    """Casts gradients and parameters to float32, or to float64 if one of them has 64 bits.

    Norms and weight decay computed in float16 overflow or vanish. The updates are cast once, to
    the wider of the dtypes of gradient and parameter. The state is the state of `inner`.

    With `split_complex`, `inner` receives complex arrays as pairs of reals, as in PyTorch.
    `optax.contrib.split_real_and_imaginary` (optax 0.2.8) joins the parts with
    ``real + imaginary * 1j``. That raises under strict dtype promotion, and an infinite imaginary
    part makes the real part NaN. Its ``init`` raises for `jax.ShapeDtypeStruct`.
    """
    wrapped = optax.with_extra_args_support(inner)

    def split(tree: Any) -> Any:
        return jax.tree.map(_split, tree) if split_complex else tree

    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        paired = jax.tree.structure(params) == jax.tree.structure(updates)
        others = params if paired else updates  # `inner` checks which parameters it needs
        wide = jax.tree.map(_widen, updates, others)
        wide_params = jax.tree.map(_widen, params, updates) if paired else params
        wide, state = wrapped.update(split(wide), state, split(wide_params), **extra_args)
        wide = jax.tree.map(join, wide, is_leaf=is_real_imag)
        return jax.tree.map(_narrow, wide, updates, others), state

    return optax.GradientTransformationExtraArgs(lambda params: wrapped.init(split(params)), update)


def _widen(x: Any, other: Any) -> Any:
    try:
        are_floats = all(jnp.issubdtype(jnp.result_type(y), jnp.inexact) for y in (x, other))
    except TypeError:  # not an array
        are_floats = False
    return upcast(jnp.asarray(x), compute_dtype(x, other)) if are_floats else x  # `inner` raises


def _narrow(update: jax.Array, gradient: Any, parameter: Any) -> jax.Array:
    return saturating_cast(update, wider_dtype(parameter, gradient))


def is_real_imag(x: Any) -> bool:
    """Whether x replaces a complex array."""
    return isinstance(x, RealImag)


def join(x: Any) -> Any:
    """The complex array of a `RealImag`; other arrays are returned unchanged."""
    return jax.lax.complex(x.real, x.imag) if is_real_imag(x) else x


def _split(x: Any) -> Any:
    if not jnp.iscomplexobj(x):
        return x
    if isinstance(x, jax.ShapeDtypeStruct):
        real = jax.ShapeDtypeStruct(x.shape, np.finfo(x.dtype).dtype, sharding=x.sharding)
        return RealImag(real, real)
    return RealImag(x.real, x.imag)
