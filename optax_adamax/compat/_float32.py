"""Arithmetic in float32 for all of a chain, whatever the dtypes of gradients and parameters."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_adamax._numerics import compute_dtype, saturating_cast, upcast


def compute_in_float32(
    inner: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Gives `inner` gradients and parameters in float32, or in float64 where one has 64 bits.

    A norm or a weight decay that is computed in float16 overflows or vanishes. The updates are
    narrowed once, at the end, to the wider of the dtypes of gradient and parameter (the
    parameter's, if they are equally wide). The state is that of `inner`.
    """
    wrapped = optax.with_extra_args_support(inner)

    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        gradients = jax.tree.leaves(updates)
        beside = jax.tree.leaves(params)
        if jax.tree.structure(updates) != jax.tree.structure(params):
            beside = gradients  # no parameters, or others: `inner` judges which gradients fit
        pairs = list(zip(gradients, beside, strict=True))
        wide = jax.tree.unflatten(jax.tree.structure(updates), [_wide(g, p) for g, p in pairs])
        if beside is not gradients:
            wide_params = [_wide(p, g) for g, p in pairs]
            params = jax.tree.unflatten(jax.tree.structure(params), wide_params)
        wide, state = wrapped.update(wide, state, params, **extra_args)
        steps, treedef = jax.tree.flatten(wide)
        narrowed = [_narrow(u, *pair) for u, pair in zip(steps, pairs, strict=True)]
        return treedef.unflatten(narrowed), state

    return optax.GradientTransformationExtraArgs(wrapped.init, update)


def _wide(x: Any, other: Any) -> Any:
    """`x` in the dtype to compute in; what is no float is for `inner` to refuse."""
    return upcast(jnp.asarray(x), compute_dtype(x, other)) if _are_floats(x, other) else x


def _narrow(u: jax.Array, gradient: Any, parameter: Any) -> jax.Array:
    kinds = [jnp.finfo(jnp.result_type(x)) for x in (parameter, gradient)]
    real = np.dtype(max(kinds, key=lambda kind: kind.bits).dtype)
    return saturating_cast(u, np.result_type(real, np.complex64) if jnp.iscomplexobj(u) else real)


def _are_floats(*arrays: Any) -> bool:
    try:
        return all(jnp.issubdtype(jnp.result_type(x), jnp.inexact) for x in arrays)
    except TypeError:  # no array
        return False
