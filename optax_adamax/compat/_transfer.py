"""Moves moments and parameters of a source framework into trees like the parameters, and back."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import optax

from optax_adamax import repack_state, unpack_state
from optax_adamax.compat import _arrays, _comparison, _layout, _moments
from optax_adamax.compat._comparison import Hyperparameters
from optax_adamax.compat._layout import Key, Layout, Plan, paths, shapes_of
from optax_adamax.compat._moments import Moments

Missing = Literal["raise", "zero"]
# Of the batch norms of PyTorch, MLX and Keras.
STATISTICS = ("running_mean", "running_var", "moving_mean", "moving_variance")
SOURCE_PARAMS = "a mapping of the source's parameters by name"


def load(
    source: Moments,
    params: optax.Params,
    tx: optax.GradientTransformation,
    layout: Layout | None,
    names: Iterable[Key] = (),
    *,
    missing: Missing = "raise",
    source_params: Mapping[str, Any] | None = None,
    groups: Sequence[Mapping[Key, Hyperparameters]] = (),
    example: Any = None,
) -> optax.OptState:
    """Returns the state of `tx` with these moments, by source name.

    Args:
      source: the moments.
      params: the parameters.
      tx: the transformation.
      layout: see `compat.torch.load_state`.
      names: the names of all parameters of the source, with moments or without.
      missing: see `compat.torch.load_state`.
      source_params: the source's parameters by name.
      groups: the hyperparameters of each source name, for each group of the source.
      example: an array of the source framework; a function as `layout` receives such arrays.
    """
    if missing not in ("raise", "zero"):
        raise ValueError(f"missing must be 'raise' or 'zero', but {missing!r} was given.")
    template = tx.init(params)
    state = unpack_state(template, params)
    nodes = _moments.shapes_of_nodes(state)
    trained = {path: shape for node in nodes for path, shape in node.items()}
    known = list(dict.fromkeys((*source.m, *names)))
    if isinstance(layout, Mapping):
        source = source.of(name for name in source.m if layout.get(name, "") is not None)
    elif callable(layout):
        source = source.with_zeros(shapes_of(source_params or {}))
    make = _arrays.maker_like(example)
    plan = _layout.plan_load(layout, known, shapes_of(source.m), params, make)
    moments = _move(plan, source)
    _comparison.check_values(moments)
    frozen = [k for k, step in moments.step.items() if step is not None and k not in trained]
    if frozen:
        raise ValueError(
            f"The transformation must train all parameters with moments, but it does not train "
            f"{frozen}. Train them, or leave {[plan.origins[k] for k in frozen]} out by None in "
            f"the layout."
        )
    absent = [k for k, shape in trained.items() if moments.step.get(k) is None and 0 not in shape]
    if missing == "raise" and absent:
        places = {} if callable(layout) else _layout.find_places(layout, known, params)
        name_of = {place.path: f" ({name!r} in the source)" for name, place in places.items()}
        raise ValueError(
            f"The source must have moments for all trained parameters, but it has none for "
            f"{', '.join(repr(k) + name_of.get(k, '') for k in absent)}. To start them at zero, "
            f"give missing='zero'. To freeze them, use optax.set_to_zero() in an optax.partition."
        )
    moments = moments.with_zeros(trained).of(trained)
    state = _moments.fill(state, moments)
    _comparison.check_is_adamax(moments, tx, params)
    if groups:
        _comparison.check_groups(nodes, plan.origins, groups)
        saved = {name: values for group in groups for name, values in group.items()}
        _comparison.check_hyperparameters(tx, params, moments.step, plan.origins, saved)
    return repack_state(state, like=template)


def dump(
    state: optax.OptState,
    params: optax.Params,
    layout: Layout | None,
    names: Iterable[Key] | None = None,
    source_params: Mapping[str, Any] | None = None,
) -> Moments:
    """Returns the moments of the trained parameters by source name."""
    moments = _moments.read_state(unpack_state(state, params))
    plan = _layout.plan_dump(layout, names, params, source_params)
    dumped = _move(plan, moments.with_zeros(shapes_of(paths(params))))
    return dumped.of(name for name, step in dumped.step.items() if step is not None)


def single_step(moments: Moments) -> int:
    """Returns the number of steps, for a framework that has one for all parameters."""
    if len(set(moments.step.values())) > 1:
        raise ValueError(
            f"All parameters must have the same number of steps, because the framework counts them "
            f"together, but the numbers are {moments.step}. Dump each group by itself."
        )
    return next(iter(moments.step.values()), None) or 0


def _move(plan: Plan, moments: Moments) -> Moments:
    """Returns the moments by their new names."""
    unused = [name for name in plan.unused if moments.step[name] is not None]
    if unused:
        raise ValueError(
            f"The layout must have a place for all moments, but {unused} have none. "
            f"Give each a path, or None to leave it out."
        )
    new_steps: dict[Any, int | None] = {}
    for target, names in plan.origins.items():
        steps = {name: moments.step[name] for name in names if moments.step[name] is not None}
        if len(set(steps.values())) > 1:
            raise ValueError(
                f"The arrays in {target!r} must have the same number of steps, but the numbers are "
                f"{steps}. Use a layout that does not join them."
            )
        new_steps[target] = next(iter(steps.values()), None)
    return Moments(plan.move(moments.m), plan.move(moments.v), new_steps)


def load_params(
    source_params: Mapping[str, Any], params: optax.Params, layout: Layout | None = None
) -> optax.Params:
    """Returns the source's parameters as a tree like `params`.

    Every array of the source needs a place, with three exceptions: arrays of integers, the
    statistics of batch norms, and the second name of an array that has a place (tied weights in
    PyTorch). To load these, give a tree and a layout that have them. To leave out other buffers,
    give None as their entry, or ``dict(model.named_parameters())`` instead of
    ``model.state_dict()``.

    Args:
      source_params: the source's arrays by name.
      params: the parameters, of which structure, shapes, dtypes and shardings are used.
      layout: the function that moved the weights, or a mapping from names to paths, as for
        :func:`optax_adamax.compat.torch.load_state`. None: the name with "/" for ".".

    Returns:
      A tree like `params`. Each array has the dtype and the sharding of its template.

    Raises:
      TypeError: an array that cannot be read.
      ValueError: a missing, surplus or misshapen array.
    """
    _arrays.check_is_read(SOURCE_PARAMS, source_params)
    by_path, named = paths(params), dict(layout) if isinstance(layout, Mapping) else {}

    def is_wanted(name: str, value: Any) -> bool:
        if name in named:
            return named[name] is not None
        is_path = layout is None and name.replace(".", "/") in by_path
        return is_path or not (_is_integer(value) or (layout is None and _is_statistic(name)))

    values = {name: x for name, x in source_params.items() if is_wanted(name, x)}
    arrays = {name: _arrays.read_array(repr(name), x) for name, x in values.items()}
    make = _arrays.maker_like(next(iter(values.values()), None))
    names = source_params if named else values
    plan = _layout.plan_load(layout, names, shapes_of(arrays), params, make)
    memory = {_memory_of(values[k]) for origin in plan.origins.values() for k in origin}
    surplus = [k for k in plan.unused if not (_is_statistic(k) or _memory_of(values[k]) in memory)]
    if surplus:
        raise ValueError(
            f"The layout must have a place for every array, but it has none for {surplus}. If they "
            f"are buffers, give None as the entry of each, or the trainable parameters alone: in "
            f"PyTorch, dict(model.named_parameters())."
        )
    missing = [path for path in by_path if path not in plan.origins]
    if missing:
        raise ValueError(
            f"The layout must lead to every parameter, but it does not lead to {missing}. Give an "
            f"array for each."
        )
    return _moments.put_tree(params, plan.move(arrays))


def dump_params(
    params: optax.Params,
    layout: Layout | None = None,
    *,
    source_params: Mapping[str, Any] | None = None,
    to_array: Callable[[np.ndarray], Any] = np.asarray,
) -> dict[str, Any]:
    """Returns the parameters as the source's arrays by name, the inverse of :func:`load_params`.

    Args:
      params: the parameters.
      layout: a mapping as for :func:`load_params`, or the function that moves weights back. None:
        the names are the paths with "." for "/".
      source_params: the source's parameters by name. Only their shapes are used, by a mapping that
        regroups axes.
      to_array: makes an array of the source framework from a NumPy array.

    Returns:
      The arrays by name.

    Raises:
      ValueError: a layout that does not lead to every parameter.
    """
    plan = _layout.plan_dump(layout, None, params, source_params)
    if plan.unused:
        raise ValueError(
            f"The layout must have a name for every parameter, but it has none for {plan.unused}. "
            f"Give a name for each."
        )
    arrays = {path: _arrays.fetch(x) for path, x in paths(params).items()}
    return {str(name): to_array(x) for name, x in plan.move(arrays).items()}


def _is_statistic(name: str) -> bool:
    return name.replace("/", ".").rsplit(".", 1)[-1] in STATISTICS


def _is_integer(value: Any) -> bool:
    dtype = str(getattr(value, "dtype", "")).rsplit(".", 1)[-1]
    return dtype.startswith(("int", "uint", "bool"))


def _memory_of(value: Any) -> Any:
    """Returns an object that is equal for two names of one array."""
    if hasattr(value, "data_ptr"):
        return value.data_ptr(), tuple(value.shape)
    return (value.ctypes.data, value.shape) if isinstance(value, np.ndarray) else id(value)
