"""Names of leaves: their paths, without the variables in which Flax wraps arrays."""

from collections.abc import Callable
from typing import Any

import jax
from jax.tree_util import GetAttrKey

# The key of the array in nnx.Param, linen.Partitioned and similar variables. nnx.Optimizer passes
# variables to `init` and plain arrays to `update`, and both must have the same names.
VARIABLE_KEY = GetAttrKey("value")


def path_name(path: tuple[Any, ...], separator: str | None = None) -> str:
    """Returns the name of a path: ``['dense']['kernel']``, or ``dense/kernel`` with separator "/".

    The trailing ``.value`` of a Flax variable is left out. Names without a separator are unique,
    because a tree in which ``a.value`` is a leaf has no leaf ``a``.

    >>> import jax
    >>> (path, _), = jax.tree_util.tree_leaves_with_path({"dense": {"kernel": 1.0}})
    >>> print(path_name(path), path_name(path, separator="/"))
    ['dense']['kernel'] dense/kernel
    """
    while path and path[-1] == VARIABLE_KEY:
        path = path[:-1]
    if separator is None:
        return jax.tree_util.keystr(path)
    return jax.tree_util.keystr(path, simple=True, separator=separator)


def named_leaves(
    tree: Any, separator: str | None = None, is_leaf: Callable[[Any], bool] | None = None
) -> list[tuple[str, Any]]:
    """Returns the name and the value of each leaf of a tree, in the order of the tree."""
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)
    return [(path_name(path, separator), leaf) for path, leaf in leaves]
