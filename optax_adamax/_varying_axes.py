"""Mesh axes of `jax.shard_map` over which an array varies, that is, differs between devices."""

from typing import Any

import jax


def match_varying_axes(x: jax.Array, other: jax.Array) -> jax.Array:
    """Returns x, marked as varying over every axis over which `other` varies."""
    axes = tuple(varying_axes(other) - varying_axes(x))
    if not axes:
        return x
    if hasattr(jax.lax, "pcast"):  # since JAX 0.10; before, `pvary`
        return jax.lax.pcast(x, axes, to="varying")
    return getattr(jax.lax, "pvary")(x, axes)  # noqa: B009


def varying_axes(x: jax.Array) -> frozenset[str]:
    """Returns the axes over which x varies."""
    kind: Any = jax.typeof(x)
    if hasattr(kind, "manual_axis_type"):  # since JAX 0.10; before, `vma`
        return kind.manual_axis_type.varying
    return getattr(kind, "vma", frozenset())
