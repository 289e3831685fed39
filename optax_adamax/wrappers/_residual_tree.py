"""Trees of residuals: they match a tree of parameters leaf by leaf, or raise."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import keystr

from optax_adamax._numerics import preserving_memory_kind
from optax_adamax._paths import VARIABLE_KEY, named_leaves
from optax_adamax.wrappers import _residual
from optax_adamax.wrappers.packing import PackedTree

AT_MOST = 3  # names in a message


def zero_residual(path: Any, p: Any, dtype: np.dtype) -> Any:
    """Returns the residual of a new parameter; MaskedNode for 32 bits and more."""
    given = jnp.result_type(p)
    if given == jnp.bfloat16:
        return jnp.zeros_like(p, dtype=dtype)
    if jnp.issubdtype(given, jnp.floating) and given.itemsize <= 2:
        raise TypeError(
            f"{keystr(path) or 'The parameter'} has dtype {given}, but compensate_rounding "
            f"supports bfloat16 and wider parameters. Cast it to bfloat16 or float32."
        )
    return optax.MaskedNode()


def is_absent(residual: Any) -> bool:
    """Whether a leaf has no residual: it is wide, masked, or not trained (None)."""
    return residual is None or isinstance(residual, optax.MaskedNode)


def match(residual: Any, params: Any) -> tuple[Any, list[tuple[str, Any, Any]]]:
    """Returns the treedef of the residuals; and name, parameter and residual of each leaf.

    The parameter of an absent residual may be anything, for example a subtree or a function.

    Raises:
      ValueError: the parameters have another tree.
    """
    if isinstance(residual, PackedTree) and not isinstance(params, PackedTree):
        raise ValueError(
            "The residuals are in the buffers of pack_small_leaves, which is outside of "
            "compensate_rounding. Put it inside: compensate_rounding(pack_small_leaves(...))."
        )
    treedef = jax.tree.structure(residual, is_leaf=is_absent)
    named = named_leaves(residual, is_leaf=is_absent)
    try:
        stored = treedef.flatten_up_to(params)
    except ValueError:
        difference = _difference([name for name, r in named if not is_absent(r)], params)
    else:
        return treedef, [(name, p, r) for (name, r), p in zip(named, stored, strict=True)]
    # Outside of `except`: JAX's error prints the arrays.
    raise ValueError(
        f"The state of compensate_rounding was initialized for another tree of parameters: "
        f"{difference}. Call init with these parameters."
    )


def _difference(names: list[str], params: Any) -> str:
    given = [name for name, _ in named_leaves(params)]
    missing = [name for name in names if name not in given]
    if missing:
        return f"it has residuals for {_listed(missing)}, but params does not have these leaves"
    unknown = [name for name in given if name not in names]
    if unknown:
        return f"params has the leaves {_listed(unknown)}, but the state does not know them"
    return "the leaves have the same names, but their containers have other types"


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - AT_MOST} more" if len(names) > AT_MOST else ""
    return ", ".join(name or "(a single array)" for name in names[:AT_MOST]) + more


def check_leaf(name: str, p: Any, residual: Any) -> None:
    """Raises if the residual was made for a parameter of another dtype or shape."""
    what = f"The parameter {name}" if name else "The parameter"
    if is_absent(residual):
        if isinstance(residual, optax.MaskedNode) and getattr(p, "dtype", None) == jnp.bfloat16:
            raise TypeError(
                f"{what} has dtype bfloat16, but the state holds no residual for it: it was "
                f"initialized with a wider or masked parameter. Call init with these parameters."
            )
        return
    dtype = jnp.result_type(p)
    if dtype != jnp.bfloat16:
        raise TypeError(
            f"{what} has dtype {dtype}, but its residual is {residual.dtype}, for a bfloat16 "
            f"parameter. If it was bfloat16 before the last step, the float32 updates were added "
            f"without a cast back, as equinox.apply_updates, optimistix and flowjax do. Write "
            f"compensate_rounding(..., update_dtype='bfloat16') for such a loop, or add updates "
            f"with optax.apply_updates."
        )
    if jnp.shape(p) != residual.shape:
        raise ValueError(
            f"{what} has shape {jnp.shape(p)}, but its residual has shape {residual.shape}: the "
            f"state was initialized for other parameters. Call init with these parameters."
        )


def master(p: Any, residual: Any) -> Any:
    """Returns the master parameter of a leaf: float32 if it has a residual, else p."""
    if is_absent(residual):
        return p
    return preserving_memory_kind(_residual.merge_residual)(p, residual)


def unboxed(tree: Any) -> Any:
    """Replaces each `nnx.Variable`, `linen.Partitioned` and the like by the value inside."""
    return jax.tree.map(
        lambda node: unboxed(_children(node)[0][1]) if _is_box(node) else node,
        tree,
        is_leaf=_is_box,
    )


def _is_box(node: Any) -> bool:
    return [path for path, _ in _children(node)] == [(VARIABLE_KEY,)]


def _children(node: Any) -> list[tuple[Any, Any]]:
    return jax.tree_util.tree_leaves_with_path(node, is_leaf=lambda x: x is not node)
