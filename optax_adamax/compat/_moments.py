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
from optax_adamax._state import dtypes_of, is_adamax_state, states_in
from optax_adamax._v_formats import v_format_of
from optax_adamax.compat import _arrays
from optax_adamax.compat._arithmetic import RealImag, is_real_imag, join
from optax_adamax.compat._layout import path_name, paths


class Moments(NamedTuple):
    """First moments, infinity norms and numbers of steps, by source name or by path."""

    m: dict[Any, Any]
    v: dict[Any, Any]
    step: dict[Any, int | None]  # None: no step yet

    def of(self, names: Iterable[Any]) -> "Moments":
        """Returns the moments of these names."""
        names = list(names)
        return Moments(*({name: field[name] for name in names} for field in self))

    def add(self, name: Any, m: Any, v: Any, step: Any) -> None:
        """Reads the moments of one parameter.

        Raises:
          TypeError: a moment is not an array of floats, or the step is not a number.
          ValueError: the moments have different shapes, or the step is not a whole number.
        """
        self.m[name] = _arrays.read_array(f"The first moment of {name!r}", m)
        self.v[name] = _arrays.read_array(f"The infinity norm of {name!r}", v)
        self.step[name] = _arrays.read_step(f"The step of {name!r}", step)
        shapes = self.m[name].shape, self.v[name].shape
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"The first moment and the infinity norm of {name!r} must have the same shape, but "
                f"their shapes are {shapes[0]} and {shapes[1]}. Pass the state as it was saved."
            )

    def with_zeros(self, shapes: dict[Any, tuple[int, ...]]) -> "Moments":
        """Adds zeros without a step for the shapes with new names."""
        new = {name: shape for name, shape in shapes.items() if name not in self.m}
        zeros = {name: np.zeros(shape, np.float32) for name, shape in new.items()}
        return Moments(self.m | zeros, self.v | zeros, self.step | dict.fromkeys(new))


def read_state(state: optax.OptState) -> Moments:
    """Returns all moments in an unpacked state by path."""
    nodes = [read_node(node) for node in states_in(decode_state(state))]
    return Moments(*({k: x for node in nodes for k, x in node[i].items()} for i in range(3)))


def read_node(node: ScaleByAdamaxState) -> Moments:
    """Returns the moments of one decoded state of Adamax by path."""
    m, v = (
        {path: _arrays.fetch(join(x)) for path, x in paths(tree, is_real_imag).items()}
        for tree in (node.m, node.v)
    )
    return Moments(m, v, dict.fromkeys(m, int(_arrays.fetch(node.count))))


def shapes_of_nodes(state: optax.OptState) -> list[dict[str, tuple[int, ...]]]:
    """Returns a dict of shapes by path for every Adamax in an unpacked state.

    Raises:
      TypeError: a state without Adamax.
      ValueError: two Adamax for one parameter.
    """
    decoded = [jax.eval_shape(decode_state, node) for node in states_in(state)]
    found = [{k: _shape(x) for k, x in paths(node.m, is_real_imag).items()} for node in decoded]
    seen: set[str] = set()
    for path in (path for node in found for path in node):
        if path in seen:
            raise ValueError(
                f"Each parameter must have one Adamax, but {path!r} has several in this "
                f"transformation. Load the state of each Adamax by itself."
            )
        seen.add(path)
    return found


def fill(state: Any, moments: Moments) -> Any:
    """Returns an unpacked state with these moments, and with their counts in its schedules.

    A schedule counts the steps of Adamax if both are in one chain, or if
    `optax.inject_hyperparams` has it around Adamax. A schedule for several Adamax has the largest
    count. Other counters are unchanged.
    """
    return _fill(state, moments)[0]


def _fill(state: Any, moments: Moments) -> tuple[Any, int | None]:
    """Returns the filled state, and the largest count of Adamax in it, or None."""
    if is_adamax_state(state):
        step = _find_step(state, moments)
        return fill_node(state, moments, step), step
    is_partition = isinstance(state, optax.transforms.PartitionState)
    tree = state.inner_states if is_partition else state
    children, treedef = jax.tree.flatten(tree, is_leaf=lambda x: x is not tree)
    if len(children) == 1 and children[0] is tree:  # a leaf
        return state, None
    filled = [_fill(child, moments) for child in children]
    step = max((step for _, step in filled if step is not None), default=None)
    if step is None:
        return state, None
    if is_partition:  # a schedule counts the steps of its own group
        return type(state)(treedef.unflatten([child for child, _ in filled])), step
    new = treedef.unflatten([_set_schedule(child, step) for child, _ in filled])
    if isinstance(new, optax.InjectStatefulHyperparamsState):
        states = {name: _set_schedule(x, step) for name, x in new.hyperparams_states.items()}
        new = new._replace(count=_put_step(step, new.count), hyperparams_states=states)
    return new, step


def _set_schedule(state: Any, step: int) -> Any:
    """Returns a state with this count if it is the state of a schedule, and else unchanged."""
    return jax.tree.map(lambda x: _put_step(step, x), state) if is_schedule(state) else state


def _put_step(step: int, like: Any) -> jax.Array:
    return _arrays.put_like(np.asarray(step), like)


def is_schedule(state: Any) -> bool:
    """Whether a state is a count and nothing else, inside `optax.masked` or not."""
    while isinstance(state, optax.MaskedState):
        state = state.inner_state
    return getattr(state, "_fields", ()) == ("count",)


def _find_step(node: ScaleByAdamaxState, moments: Moments) -> int:
    """Returns the number of steps of one transformation, which has one for all parameters."""
    names = paths(jax.eval_shape(decode_state, node).m, is_real_imag)
    steps = {k: step for k in names if (step := moments.step.get(k)) is not None}
    if len(set(steps.values())) > 1:
        raise ValueError(
            f"The parameters of one transformation must have the same number of steps, but the "
            f"numbers are {steps}. Put those with other numbers into groups of their own."
        )
    return next(iter(steps.values()), 0)


def fill_node(node: ScaleByAdamaxState, moments: Moments, step: int) -> ScaleByAdamaxState:
    """Returns a state of Adamax with these moments, in its storage formats and on its devices."""
    plain = decode_state(node)
    m, v = put_tree(plain.m, moments.m), put_tree(plain.v, moments.v)
    m_dtype, v_dtype = dtypes_of(node)
    for path in paths(m, is_real_imag):
        _check_range(path, moments.v[path], v_dtype)
    return encode_state(ScaleByAdamaxState(_put_step(step, node.count), m, v), m_dtype, v_dtype)


def put_tree(tree: Any, arrays: dict[Any, np.ndarray]) -> Any:
    """Returns `tree` with the arrays of these paths, in its dtypes and on its devices.

    Raises:
      ValueError: a path without an array, or an array of another shape.
      TypeError: a complex array for a real leaf.
    """

    def put(path: Any, like: Any) -> Any:
        name = path_name(path)
        if name not in arrays:
            raise ValueError(
                f"There must be an array for {name!r}, but there are only those for "
                f"{list(arrays)}. Use the transformation that has trained the same parameters."
            )
        array, shape = arrays[name], _shape(like)
        if array.shape != shape:
            raise ValueError(
                f"The array for {name!r} must have shape {shape}, but its shape is {array.shape}. "
                f"Pass the parameters that the state belongs to."
            )
        is_complex = is_real_imag(like) or jnp.iscomplexobj(like)
        if np.any(np.imag(array)) and not is_complex:
            raise TypeError(
                f"The array for {name!r} must be real as its template, but it is complex. Make the "
                f"parameter complex."
            )
        if is_real_imag(like):
            parts = (np.real(array), np.imag(array))
            return RealImag(*map(_arrays.put_like, parts, like))
        return _arrays.put_like(array if is_complex else np.real(array), like)

    return jax.tree_util.tree_map_with_path(put, tree, is_leaf=is_real_imag)


def _shape(x: Any) -> tuple[int, ...]:
    """Returns the shape of an array, or of the complex array that a pair of reals replaces."""
    return tuple(np.shape(x.real if is_real_imag(x) else x))


def _check_range(path: str, v: np.ndarray, v_dtype: DTypeLike | None) -> None:
    """Raises ValueError if the largest element of an infinity norm is out of the format's range.

    Smaller elements may be below the range: a v that decays underflows there in any run.
    """
    limits, largest = v_format_of(v_dtype).range, np.max(np.real(v), initial=0.0)
    if largest != 0 and not limits[0] <= largest <= limits[1]:
        raise ValueError(
            f"The largest element of the infinity norm of {path!r} must be in [{limits[0]:.2g}, "
            f"{limits[1]:.3g}], the range of v_dtype={str(v_dtype)!r}, but it is {largest:.3g}. "
            f"Use v_dtype='bfloat16'. Or scale the gradients into that range by optax.scale(c) "
            f"before the transformation, and multiply the loaded moments by c, too."
        )
