"""How a leaf of a tree is named: by its path, without the box that Flax may put around it."""

from collections.abc import Callable
from typing import Any

import jax
from jax.tree_util import GetAttrKey

# nnx.Param, linen.Partitioned and their like are nodes with this one child. nnx.Optimizer gives
# boxed parameters to `init` and plain arrays to `update`, so that a name must not have the box.
BOX = GetAttrKey("value")


def path_name(path: tuple[Any, ...], separator: str | None = None) -> str:
    """The name of a path: ``['dense']['kernel']``, or ``dense/kernel`` with separator "/".

    The trailing ``.value`` of a box is left out. Names without a separator stay unique: where
    ``a.value`` is a leaf, ``a`` is none.

    >>> (path, _), = jax.tree_util.tree_leaves_with_path({"dense": {"kernel": 1.0}})
    >>> print(path_name(path), path_name(path, separator="/"))
    ['dense']['kernel'] dense/kernel
    """
    while path and path[-1] == BOX:
        path = path[:-1]
    if separator is None:
        return jax.tree_util.keystr(path)
    return jax.tree_util.keystr(path, simple=True, separator=separator)


def named_leaves(
    tree: Any, separator: str | None = None, is_leaf: Callable[[Any], bool] | None = None
) -> list[tuple[str, Any]]:
    """Name and leaf of each leaf of a tree, in its order."""
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)
    return [(path_name(path, separator), leaf) for path, leaf in leaves]
