"""Checks of the trees of parameters and gradients that a user passes to `init` and `update`."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_adamax._messages import (
    advice_for_tree,
    conversion_advice,
    describe_difference,
    describe_value,
    leaf_label,
)
from optax_adamax._numerics import dtype_or_none


def check_parameter(path: Any, parameter: Any) -> None:
    """Checks that a parameter is a float or complex array.

    Raises:
      TypeError: the parameter is not an array, or has an integer or boolean dtype.
    """
    label = leaf_label("parameter", path)
    dtype = _dtype_of(label, parameter)
    if not jnp.issubdtype(dtype, jnp.inexact):
        raise TypeError(
            f"The {label} must be a float array, but its dtype is {dtype}. Cast it, freeze it with "
            f"optax.partition and optax.set_to_zero, or leave it out: pass "
            f"nnx.state(model, nnx.Param) or equinox.filter(model, equinox.is_inexact_array)."
        )


def check_gradients(gradients: Any, moments: Any) -> None:
    """Checks that gradients have the tree, the shapes and the kinds of dtype of m in the state.

    Args:
      gradients: the tree given to `update`.
      moments: the tree of m in the state.

    Raises:
      ValueError: another tree structure, or another shape.
      TypeError: a gradient that is not a float or complex array; a complex gradient of a real
        parameter; a real gradient of a complex parameter.
    """
    if jax.tree.structure(gradients) != jax.tree.structure(moments):
        advice = advice_for_tree(
            gradients,
            moments,
            "Pass zeros for a parameter without a gradient, freeze it with optax.partition and "
            "optax.set_to_zero, or call init again with these parameters.",
        )
        raise ValueError(
            f"The gradients must have the tree of the parameters given to init, but "
            f"{describe_difference('gradient', gradients, moments)}. {advice}"
        )
    leaves = jax.tree_util.tree_leaves_with_path(gradients)
    for (path, gradient), moment in zip(leaves, jax.tree.leaves(moments), strict=True):
        label = leaf_label("gradient", path)
        dtype = _dtype_of(label, gradient)
        check_shape(label, gradient, moment)
        if not jnp.issubdtype(dtype, jnp.inexact):
            raise TypeError(
                f"The {label} must be a float array, but its dtype is {dtype.name}. Cast it to "
                f"float. Leave integer parameters out, because they have no gradient."
            )
        if jnp.issubdtype(dtype, jnp.complexfloating) != jnp.iscomplexobj(moment):
            kind = "complex" if jnp.iscomplexobj(moment) else "real"
            raise TypeError(
                f"The {label} must be {kind}, as its parameter in init, but its dtype is {dtype}."
            )


def check_shape(label: str, gradient: Any, like: Any) -> None:
    """Raises ValueError if a gradient has another shape than its moment or parameter."""
    if jnp.shape(gradient) != jnp.shape(like):
        raise ValueError(
            f"The {label} must have shape {jnp.shape(like)}, as its parameter in init, but "
            f"its shape is {jnp.shape(gradient)}."
        )


def check_arrays(kind: str, tree: Any) -> None:
    """Checks that leaves are arrays, in wrappers that read them before `inner` checks them.

    Args:
      kind: the noun for a leaf, "gradient" or "parameter".
      tree: the tree given to `init` or `update`.

    Raises:
      TypeError: a leaf is not an array.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if not isinstance(leaf, jax.Array):  # saves time in eager steps
            _dtype_of(leaf_label(kind, path), leaf)


def without_unused(gradients: Any, params: Any) -> Any:
    """Replaces each part of `params` whose gradient is None by None.

    Then an unfiltered Equinox model has the leaves of its gradients. If the tree of `params`
    differs from the tree of the gradients, it is returned unchanged.
    """
    given, treedef = jax.tree.flatten(gradients, is_leaf=lambda x: x is None)
    try:
        found = treedef.flatten_up_to(params)
    except ValueError:
        return params
    return treedef.unflatten([None if g is None else p for g, p in zip(given, found, strict=True)])


def params_like(gradients: Any, params: Any) -> list[Any]:
    """Returns the parameter of each gradient, in the order of the gradients.

    Parts of `params` for which the gradient is None are ignored.

    Raises:
      ValueError: the tree of `params` differs from the tree of the gradients.
      TypeError: the parameter of a gradient is not a float or complex array.
    """

    def is_none(x: Any) -> bool:
        return x is None

    given, treedef = jax.tree_util.tree_flatten_with_path(gradients, is_leaf=is_none)
    try:
        found = treedef.flatten_up_to(params)
    except ValueError:
        raise ValueError(
            f"The parameters must have the tree of the gradients, but "
            f"{describe_difference('parameter', params, gradients)}. Pass the parameters that the "
            f"gradients belong to: update(gradients, state, params)."
        ) from None
    pairs = [(path, p) for (path, g), p in zip(given, found, strict=True) if g is not None]
    for path, parameter in pairs:
        label = leaf_label("parameter", path)
        if not jnp.issubdtype(_dtype_of(label, parameter), jnp.inexact):
            raise TypeError(
                f"The {label} must be a float array, but its dtype is {jnp.result_type(parameter)}."
                f" Pass the parameters that the gradients belong to."
            )
    return [parameter for _, parameter in pairs]


def _dtype_of(label: str, x: Any) -> np.dtype:
    """Returns the dtype of a leaf.

    Raises:
      TypeError: the leaf is not an array.
    """
    advice = None if isinstance(x, jax.Array) else conversion_advice(x)
    # With advice, NumPy may take an attribute `dtype` of the object for its dtype.
    dtype = dtype_or_none(x) if advice is None else None
    if dtype is not None:
        return dtype
    advice = advice or (
        "Pass a tree of arrays, such as equinox.filter(model, equinox.is_inexact_array)."
    )
    raise TypeError(f"The {label} must be an array, but {describe_value(x)} was given. {advice}")
