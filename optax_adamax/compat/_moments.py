"""Moments, the form in which every framework's state passes through `compat`.

Of `compat`, only this module knows how a state stores them.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import DTypeLike

from optax_adamax import ScaleByAdamaxState, decode_state, encode_state
from optax_adamax._state import dtypes_of
from optax_adamax._v_formats import v_format_of
from optax_adamax.compat import _arrays
from optax_adamax.compat._arithmetic import RealImag, is_real_imag, join
from optax_adamax.compat._paths import path_name, paths

Node = ScaleByAdamaxState | optax.ScaleByAdamState


class Moments(NamedTuple):
    """First moments, infinity norms and numbers of steps, by source name or by path."""

    m: dict[Any, Any]
    v: dict[Any, Any]
    step: dict[Any, int | None]  # None: no step yet

    def of(self, names: Iterable[Any]) -> "Moments":
        """Returns the moments of these names."""
        names = list(names)
        return Moments(*({name: field[name] for name in names} for field in self))


def read_state(state: optax.OptState, kind: type[Node] = ScaleByAdamaxState) -> Moments:
    """Returns all moments in an unpacked state by path.

    Raises:
      ValueError: there are none, or two for one parameter.
    """
    found = [read_node(node) for node in _nodes_in(state, kind)]
    return Moments(*({k: x for fields in found for k, x in fields[i].items()} for i in range(3)))


def read_node(node: Node) -> Moments:
    """Returns the moments of one state of Adamax by path."""
    count, m, v = _decode(node)
    m, v = (
        {path: _arrays.fetch(join(x)) for path, x in paths(tree, is_real_imag).items()}
        for tree in (m, v)
    )
    return Moments(m, v, dict.fromkeys(m, int(_arrays.fetch(count))))


def find_trained(
    state: optax.OptState, kind: type[Node] = ScaleByAdamaxState
) -> list[dict[str, jax.ShapeDtypeStruct]]:
    """Returns the shapes and dtypes of m by path, for each Adamax in an unpacked state.

    Raises:
      ValueError: there is no Adamax, or there are two for one parameter.
    """
    shapes = jax.eval_shape(
        lambda nodes: [_decode(node)[1] for node in nodes], _nodes_in(state, kind)
    )
    found = [
        paths(jax.eval_shape(lambda m: jax.tree.map(join, m, is_leaf=is_real_imag), m))
        for m in shapes
    ]
    seen: set[str] = set()
    for path in (path for m in found for path in m):
        if path in seen:
            raise ValueError(f"There are two {kind.__name__} with moments of {path!r}.")
        seen.add(path)
    return found


def _nodes_in(state: optax.OptState, kind: type[Node]) -> list[Any]:
    nodes = [
        x
        for x in jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, kind))
        if isinstance(x, kind)
    ]
    if not nodes:
        fields = (
            " m and v of Adamax are mu and nu in optax's." if kind is ScaleByAdamaxState else ""
        )
        raise ValueError(
            f"There is no {kind.__name__} in this state, which is a {type(state).__name__}.{fields}"
        )
    return nodes


def _decode(node: Any) -> Any:
    return decode_state(node) if isinstance(node, ScaleByAdamaxState) else node


def fill(state: Any, moments: Moments, kind: type[Node] = ScaleByAdamaxState) -> Any:
    """Returns an unpacked state with these moments, their counts and those of their schedules.

    A schedule counts the steps of Adamax if both are in one chain, or if
    `optax.inject_hyperparams` has it around Adamax. A schedule for several Adamax has the largest
    count. Other counters are left alone.
    """
    return _fill(state, moments, kind)[0]


def _fill(state: Any, moments: Moments, kind: type[Node]) -> tuple[Any, int | None]:
    """Returns the filled state, and the largest count of Adamax in it; None: there is no Adamax."""
    if isinstance(state, kind):
        step = _find_count(state, moments)
        return fill_node(state, moments, step), step
    if isinstance(state, optax.transforms.PartitionState):  # whose groups have their own schedules
        parts = {k: _fill(part, moments, kind) for k, part in state.inner_states.items()}
        steps = [step for _, step in parts.values() if step is not None]
        state = state._replace(inner_states={label: part for label, (part, _) in parts.items()})
        return state, max(steps, default=None)
    children, treedef = jax.tree.flatten(state, is_leaf=lambda x: x is not state)
    if len(children) == 1 and children[0] is state:  # a leaf
        return state, None
    filled = [_fill(child, moments, kind) for child in children]
    step = max((step for _, step in filled if step is not None), default=None)
    children = [child for child, _ in filled]
    if step is not None:
        children = [_set_schedule(child, step) for child in children]
    new = jax.tree.unflatten(treedef, children)
    if step is not None and _injects(new):
        states = jax.tree.map(
            lambda count: _put_count(step, count), getattr(new, "hyperparams_states", ())
        )
        new = new._replace(count=_put_count(step, new.count))
        new = new._replace(hyperparams_states=states) if states else new
    return new, step


def _set_schedule(state: Any, step: int) -> Any:
    """Returns the state with this count if it is a count and nothing else, masked or not."""
    if not _is_schedule(state):
        return state
    return jax.tree.map(lambda count: _put_count(step, count), state)


def _is_schedule(state: Any) -> bool:
    while getattr(state, "_fields", ()) == ("inner_state",):  # of optax.masked
        state = state.inner_state
    return getattr(state, "_fields", ()) == ("count",)


def _injects(state: Any) -> bool:
    return isinstance(state, (optax.InjectHyperparamsState, optax.InjectStatefulHyperparamsState))


def _put_count(step: int, like: Any) -> jax.Array:
    return _arrays.put_like(np.asarray(step), like)


def _find_count(node: Node, moments: Moments) -> int:
    """Returns the number of steps of one transformation, which has one for all parameters."""
    trained = paths(_decode(node)[1], is_real_imag)
    steps = {path: step for path in trained if (step := moments.step.get(path)) is not None}
    if len(set(steps.values())) > 1:
        raise ValueError(
            f"The parameters have taken different numbers of steps, {steps}, but one "
            f"transformation counts for all of its parameters: put them into separate groups."
        )
    return next(iter(steps.values()), 0)


def fill_node(node: Any, moments: Moments, step: int) -> Any:
    """Returns a state of Adamax with these moments, in its formats and on its devices."""
    count, m, v = _decode(node)
    count, m, v = _put_count(step, count), put_tree(m, moments.m), put_tree(v, moments.v)
    if isinstance(node, optax.ScaleByAdamState):
        return node._replace(count=count, mu=m, nu=v)
    m_dtype, v_dtype = dtypes_of(node)
    for path in paths(m, is_real_imag):
        _check_range(path, moments.v[path], v_dtype)
    return encode_state(ScaleByAdamaxState(count, m, v), m_dtype, v_dtype)


def replace_nodes(state: Any, template: Any, old: type[Node], new: type[Node]) -> Any | None:
    """Returns `state` with each Adamax in the form of `template`, and everything else as it is.

    It is None if the two have different wrappers, and those of `state` store nothing.

    Raises:
      ValueError: there is no Adamax, or what the wrappers of `state` store would be lost.
    """
    for tree, kind in ((state, old), (template, new)):
        _nodes_in(tree, kind)  # raises if there is none
    likes, treedef = jax.tree.flatten(template, is_leaf=lambda x: isinstance(x, new))
    try:
        parts = treedef.flatten_up_to(state)
    except ValueError:
        parts = None
    if parts is None or not all(map(_can_be, likes, parts, [old] * len(likes))):
        rest = jax.tree.map(
            lambda x: None if isinstance(x, old) or _is_schedule(x) else x,
            state,
            is_leaf=lambda x: isinstance(x, old) or _is_schedule(x),
        )
        if jax.tree.leaves(rest):
            names = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(rest)]
            raise ValueError(
                f"The transformations have different wrappers, so {names} would be lost. Give the "
                f"one that is to continue the wrappers that the state has."
            )
        return None
    return treedef.unflatten(
        [
            _convert(part, like) if isinstance(part, old) and isinstance(like, new) else part
            for like, part in zip(likes, parts, strict=True)
        ]
    )


def _convert(node: Node, like: Node) -> Node:
    moments, trained = read_node(node), paths(_decode(like)[1], is_real_imag)
    if moments.m.keys() != trained.keys():
        raise ValueError(
            f"The state has moments for {list(moments.m)}, but the transformation trains "
            f"{list(trained)}."
        )
    return fill_node(like, moments, int(_arrays.fetch(node.count)))


def _can_be(like: Any, part: Any, old: type[Node]) -> bool:
    """Whether `part` of a state can become, or is already, what `like` is."""
    if isinstance(like, Node):
        return isinstance(part, (old, type(like)))
    return jax.tree_util.treedef_is_leaf(jax.tree.structure(part))


def put_tree(tree: Any, arrays: dict[Any, np.ndarray]) -> Any:
    """Returns `tree` with the arrays of these paths, in its dtypes and on its devices.

    Raises:
      ValueError: a path without an array, or an array of another shape.
    """

    def put(path: Any, like: Any) -> Any:
        name = path_name(path)
        if name not in arrays:
            raise ValueError(f"There are no moments for {name!r}: there are {list(arrays)}.")
        array, shape = arrays[name], np.shape(like.real if is_real_imag(like) else like)
        if array.shape != shape:
            raise ValueError(f"The moments for {name!r} have shape {array.shape}, not {shape}.")
        if np.any(np.imag(array)) and not (is_real_imag(like) or jnp.iscomplexobj(like)):
            raise TypeError(f"The array for {name!r} is complex, but {name!r} is real.")
        if is_real_imag(like):
            parts = (np.real(array), np.imag(array))
            return RealImag(*map(_arrays.put_like, parts, like))
        return _arrays.put_like(array if jnp.iscomplexobj(like) else np.real(array), like)

    return jax.tree_util.tree_map_with_path(put, tree, is_leaf=is_real_imag)


def check_finite(moments: Moments) -> None:
    """Raises ValueError if a loaded moment has elements that are NaN or infinite."""
    for name, tree in (("first moment", moments.m), ("infinity norm", moments.v)):
        for path, x in tree.items():
            bad = np.argwhere(~np.isfinite(x))
            if len(bad):
                raise ValueError(
                    f"The {name} of {path!r} has {len(bad)} of {np.size(x)} elements that are NaN "
                    f"or infinite, the first at index {tuple(map(int, bad[0]))}. The saved run had "
                    f"diverged: load an older checkpoint."
                )


def _check_range(path: str, v: np.ndarray, v_dtype: DTypeLike | None) -> None:
    """Raises ValueError if the largest element of an infinity norm is out of the format's range.

    Smaller elements may be below the range: a v that decays underflows there in any run.
    """
    limits, largest = v_format_of(v_dtype).range, np.max(np.real(v), initial=0.0)
    if largest == 0 or limits[0] <= largest <= limits[1]:
        return
    raise ValueError(
        f"The largest element of the infinity norm of {path!r} is {largest:.3g}, but "
        f"v_dtype={v_dtype} represents {limits[0]:.2g} to {limits[1]:.3g}: use "
        f"v_dtype='bfloat16'. Or scale the gradients into that range by optax.scale(c) before the "
        f"transformation, and multiply the loaded moments by c too."
    )
