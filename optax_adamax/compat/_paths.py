"""Names of parameters: paths in a tree, and names that occur twice or resemble others.

A path is that of :func:`jax.tree_util.keystr` with ``simple=True`` and ``separator="/"``, for
example ``"params/Dense_0/kernel"``, without the box that Flax may put around an array.
"""

import difflib
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from optax_adamax._paths import named_leaves
from optax_adamax._paths import path_name as _path_name


def paths(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> dict[str, Any]:
    """Returns the leaves of a tree by path.

    Raises:
      ValueError: two leaves have one path.
    """
    named = named_leaves(tree, "/", is_leaf)
    by_path = dict(named)
    if len(by_path) < len(named):
        raise ValueError(
            f"Several parameters have the path {first_twice([path for path, _ in named])!r}, so "
            f"no name identifies them: rename one of them, without '/' in a key."
        )
    return by_path


def path_name(path: Any) -> str:
    """Returns the path of a leaf as a name."""
    return _path_name(path, "/")


def first_twice(names: Sequence[str | int]) -> str | int | None:
    """Returns the first name that occurs twice, if there is one."""
    seen: set[str | int] = set()
    return next((name for name in names if name in seen or seen.add(name)), None)


def check_order(order: Sequence[str | int]) -> None:
    """Raises ValueError if a name occurs twice."""
    twice = first_twice(order)
    if twice is not None:
        raise ValueError(
            f"The names of the parameters have {twice!r} twice: give each parameter a name of its "
            f"own in `names`, such as '0:{twice}', and `layout` with a path for each."
        )


def last_part(path: str) -> str:
    """Returns the last part of a path, the parameter's own name."""
    return path.rsplit("/", 1)[-1]


def near(wanted: str, known: Iterable[str]) -> list[str]:
    """Returns the three names that are most similar to an unknown name or pattern."""
    plain = re.sub(r"[^\w/]", "", wanted)

    def likeness(name: str) -> float:
        candidates = (name, last_part(name))
        return max(difflib.SequenceMatcher(None, plain, x).ratio() for x in candidates)

    return sorted(known, key=likeness, reverse=True)[:3]
