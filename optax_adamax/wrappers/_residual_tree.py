"""Trees of residuals, and their leaf-by-leaf match with trees of parameters."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import keystr

from optax_adamax._memory_kind import preserving_memory_kind
from optax_adamax._messages import key_paths
from optax_adamax._numerics import dtype_or_none
from optax_adamax._paths import VARIABLE_KEY, named_leaves
from optax_adamax.wrappers import _residual
from optax_adamax.wrappers.packing import PackedTree


def zero_residual(path: Any, p: Any, dtype: np.dtype) -> Any:
    """Returns the residual of a new parameter; MaskedNode for parameters with 32 bits or more."""
    given = dtype_or_none(p)
    if given is None:
        return optax.MaskedNode()  # the init of `inner` raises an error
    if given == jnp.bfloat16:
        return jnp.zeros_like(p, dtype=dtype)
    if jnp.issubdtype(given, jnp.floating) and given.itemsize <= 2:
        raise TypeError(
            f"{keystr(path) or 'The parameter'} has dtype {given}, but compensate_rounding "
            f"supports bfloat16 and wider parameters. Cast it to bfloat16 or float32."
        )
    return optax.MaskedNode()


def is_absent(residual: Any) -> bool:
    """Returns whether a leaf is without a residual: of 32 bits or more, masked, or None."""
    return residual is None or isinstance(residual, optax.MaskedNode)


def match(residual: Any, params: Any) -> tuple[Any, list[tuple[str, Any, Any]]]:
    """Returns the treedef of the residuals, and name, parameter and residual of each leaf.

    The parameter of an absent residual may be any object, for example a subtree or a function.

    Raises:
      ValueError: the trees of residuals and parameters differ.
    """
    if isinstance(residual, PackedTree) and not isinstance(params, PackedTree):
        raise ValueError(
            "The residuals must not be packed, but pack_small_leaves is outside of "
            "compensate_rounding. Write compensate_rounding(pack_small_leaves(...))."
        )
    treedef = jax.tree.structure(residual, is_leaf=is_absent)
    named = named_leaves(residual, is_leaf=is_absent)
    try:
        stored = treedef.flatten_up_to(params)
    except ValueError:
        difference = _difference([name for name, r in named if not is_absent(r)], params)
    else:
        return treedef, [(name, p, r) for (name, r), p in zip(named, stored, strict=True)]
    # Outside of `except`, because the traceback would contain JAX's error, which prints arrays.
    raise ValueError(
        f"The parameters must have the tree of the parameters given to the init of "
        f"compensate_rounding, but {difference}. Call init with these parameters."
    )


def _difference(names: list[str], params: Any) -> str:
    given = [name for name, _ in named_leaves(params)]
    missing = [name for name in names if name not in given]
    if missing:
        return f"there is no parameter for {key_paths(missing)}"
    unknown = [name for name in given if name not in names]
    if unknown:
        return f"{key_paths(unknown)} is unknown"
    return "their containers have other types"


def check_leaf(name: str, p: Any, residual: Any) -> None:
    """Checks that a residual was made for a parameter of this dtype and shape.

    Raises:
      TypeError: a parameter of another dtype.
      ValueError: a parameter of another shape.
    """
    label = f"The parameter {name}".rstrip()
    if is_absent(residual):
        if isinstance(residual, optax.MaskedNode) and getattr(p, "dtype", None) == jnp.bfloat16:
            raise TypeError(
                f"{label} has dtype bfloat16, but the state has no residual for it, because in "
                f"init it had 32 bits or more, or was masked. Call init with these parameters."
            )
        return
    dtype = jnp.result_type(p)
    if dtype != jnp.bfloat16:
        raise TypeError(
            f"{label} must be bfloat16, as in init, but its dtype is {dtype}. If it was bfloat16 "
            f"before the last step, the float32 updates were added without a cast back, as "
            f"equinox.apply_updates, optimistix and flowjax do. For such a loop, write "
            f"compensate_rounding(..., update_dtype='bfloat16'), or add updates with "
            f"optax.apply_updates."
        )
    if residual.dtype not in (jnp.int8, jnp.int16):
        raise TypeError(
            f"The residual of {name or 'the parameter'} must be int8 or int16, but its dtype is "
            f"{residual.dtype}. Residuals cannot be cast or averaged. To average workers, average "
            f"master_params(state, params), cast the mean to bfloat16, and write "
            f"state._replace(residual=tx.init(params).residual)."
        )
    if jnp.shape(p) != residual.shape:
        raise ValueError(
            f"{label} must have shape {residual.shape}, as in init, but its shape is "
            f"{jnp.shape(p)}. Call init with these parameters."
        )


def master(p: Any, residual: Any) -> Any:
    """Returns the master parameter of a leaf: float32 if it has a residual, else p."""
    if is_absent(residual):
        return p
    return preserving_memory_kind(_residual.merge_residual)(p, residual)


def unwrap_variables(tree: Any) -> Any:
    """Replaces Flax variables (`nnx.Variable`, `linen.Partitioned` and similar) by their values."""
    return jax.tree.map(
        lambda node: unwrap_variables(_children(node)[0][1]) if _is_variable(node) else node,
        tree,
        is_leaf=_is_variable,
    )


def _is_variable(node: Any) -> bool:
    return [path for path, _ in _children(node)] == [(VARIABLE_KEY,)]


def _children(node: Any) -> list[tuple[Any, Any]]:
    return jax.tree_util.tree_leaves_with_path(node, is_leaf=lambda x: x is not node)
