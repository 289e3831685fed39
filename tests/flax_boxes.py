"""Imports Flax and removes its metadata wrappers from parameters."""

import warnings

import jax

with warnings.catch_warnings():  # flax 0.12.0 accesses names that JAX 0.8.0 deprecates
    warnings.simplefilter("ignore", DeprecationWarning)
    from flax import linen, nnx

__all__ = ["linen", "nnx", "unboxed"]


def is_box(node):
    return isinstance(node, nnx.Variable | linen.Partitioned)


def unboxed(tree):
    """Replaces each wrapper by its array, as nnx.Optimizer does before it calls `update`."""
    return jax.tree.map(
        lambda node: jax.tree.leaves(node)[0] if is_box(node) else node, tree, is_leaf=is_box
    )
