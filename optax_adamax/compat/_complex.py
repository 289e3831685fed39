"""Complex parameters as pairs of reals, as PyTorch sees them.

`optax.contrib.split_real_and_imaginary` is not used: in optax 0.2.8 it joins the parts with
``real + imaginary * 1j``, which strict dtype promotion refuses and which makes the real part NaN
where the imaginary one is infinite, and its ``init`` fails on `jax.ShapeDtypeStruct`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax


class Parts(NamedTuple):
    """What stands in the state, and before the inner transformation, for one complex array."""

    real: Any
    imag: Any


def split_real_imag(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Gives `inner` the real and imaginary parts of each complex array as two real ones."""
    wrapped = optax.with_extra_args_support(inner)

    def init(params: optax.Params) -> optax.OptState:
        return wrapped.init(jax.tree.map(split, params))

    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        split_params = None if params is None else jax.tree.map(split, params)
        updates, state = wrapped.update(
            jax.tree.map(split, updates), state, split_params, **extra_args
        )
        return jax.tree.map(join, updates, is_leaf=is_parts), state

    return optax.GradientTransformationExtraArgs(init, update)


def is_parts(x: Any) -> bool:
    """Whether x stands for a complex array."""
    return isinstance(x, Parts)


def split(x: Any) -> Any:
    """The parts of a complex array (or of its shape and dtype); anything else as it is."""
    if not jnp.issubdtype(jnp.result_type(x), jnp.complexfloating):
        return x
    if isinstance(x, jax.ShapeDtypeStruct):
        dtype = np.finfo(x.dtype).dtype
        part = jax.ShapeDtypeStruct(x.shape, dtype, sharding=x.sharding)
        return Parts(part, part)
    return Parts(x.real, x.imag)


def join(x: Any) -> Any:
    """The complex array of a pair of parts; anything else as it is."""
    return jax.lax.complex(x.real, x.imag) if is_parts(x) else x
