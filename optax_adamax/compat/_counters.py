"""Which counters of a state count the steps of Adamax: those of its schedules, and no other's.

A schedule's state is a count and nothing else. It counts for Adamax where both are in one chain, or
where it is what `optax.inject_hyperparams` keeps around Adamax.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import optax
from jax.tree_util import GetAttrKey

Path = tuple[Any, ...]


def find(
    tree: Any, is_wanted: Callable[[Any], bool], path: Path = ()
) -> Iterator[tuple[Path, Any]]:
    """Path and node of all nodes of a kind, those within others of that kind included."""
    if is_wanted(tree):
        yield path, tree
    leaves = jax.tree_util.tree_leaves_with_path(
        tree, is_leaf=lambda x: x is not tree and is_wanted(x)
    )
    for below, x in leaves:
        if below:
            yield from find(x, is_wanted, (*path, *below))


def of_schedules(state: optax.OptState, counts: Mapping[Path, int]) -> dict[Path, int]:
    """What the counters of schedules have to be.

    Args:
      state: of a chain.
      counts: the numbers of steps of all Adamax within it, by their paths. A schedule for several
        of them counts the most.

    Returns:
      The counts by the paths of their leaves.
    """
    found: dict[Path, int] = {}
    for path, schedule in find(state, _is_schedule):
        chain = _chain_of(path, schedule)
        if chain is None:
            continue
        inside = [n for other, n in counts.items() if other[: len(chain)] == chain]
        if inside:
            found[(*path, GetAttrKey("count"))] = max(inside)
    return found


def _is_schedule(x: Any) -> bool:
    """Whether x is the state of a schedule: a count, and hyperparameters at the most."""
    return getattr(x, "_fields", ()) == ("count",) or _injects(x)


def _injects(x: Any) -> bool:
    return isinstance(x, (optax.InjectHyperparamsState, optax.InjectStatefulHyperparamsState))


def _chain_of(path: Path, schedule: Any) -> Path | None:
    """The path of what holds a schedule and what it is for; None: it stands alone in its group."""
    if _injects(schedule):
        return path
    while path[-1:] == (GetAttrKey("inner_state"),):  # of optax.masked
        path = path[:-1]
    holder = path[:-1]
    if holder[-1:] == (GetAttrKey("inner_states"),):  # of optax.partition
        return None
    return holder[:-1] if holder[-1:] == (GetAttrKey("hyperparams_states"),) else holder
