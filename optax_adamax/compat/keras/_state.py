"""The variables of `keras.optimizers.Adamax`, in and out."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeGuard, TypeVar

import jax
import numpy as np
import optax

from optax_adamax import repack_state, unpack_state
from optax_adamax._state import states_in
from optax_adamax.compat import _arrays, _plan, _transfer
from optax_adamax.compat._layout import Key, Layout
from optax_adamax.compat._moments import Moments, put_tree
from optax_adamax.compat._paths import check_order, path_name, paths
from optax_adamax.compat.keras._transforms import is_accumulation, is_average
from optax_adamax.compat.keras._variables import Slots, read_variables

Kind = TypeVar("Kind")


def finalize_variable_values(params: optax.Params, state: optax.OptState) -> optax.Params:
    """Returns the parameters at the end of training, with ``use_ema`` their average, as `fit` does.

    Args:
      params: the parameters.
      state: the state of an :func:`adamax`, by itself or within others.

    Returns:
      The average in the dtypes of the parameters; without ``use_ema`` the parameters. In an
      `optax.partition`, each parameter as its own transformation leaves it.

    Raises:
      ValueError: averages of other parameters.
      TypeError: there is no Adamax in `state`.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from optax_adamax.compat import keras as compat_keras
      >>> tx = compat_keras.adamax(0.1, use_ema=True)
      >>> params = jnp.array([1.0, 2.0])
      >>> state = tx.init(params)
      >>> for _ in range(2):
      ...     updates, state = tx.update(jnp.array([0.1, -0.2]), state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> average = compat_keras.finalize_variable_values(params, state)
      >>> print(f"{params[0]:.3f} {average[0]:.3f}")
      0.800 0.899
    """
    state = unpack_state(state, params)
    states_in(state)  # raises if there is none
    nodes = jax.tree.leaves(state, is_leaf=is_average)
    averages = {path: x for n in nodes if is_average(n) for path, x in paths(n.average).items()}
    surplus = sorted(averages.keys() - paths(params).keys())
    if surplus:
        raise ValueError(f"The state has averages of {surplus}, which are not parameters.")

    def final(path: Any, p: jax.Array) -> jax.Array:
        name = path_name(path)
        return averages[name].astype(p.dtype) if name in averages else p

    return jax.tree_util.tree_map_with_path(final, params)


def load_state(
    variables: Any,
    params: optax.Params,
    tx: optax.GradientTransformation,
    layout: Layout | None = None,
    *,
    names: Sequence[str],
) -> optax.OptState:
    """Returns the state of `tx`, continued from Keras.

    Args:
      variables: ``optimizer.variables`` of a `keras.optimizers.Adamax`, or their values in this
        order, or a mapping of them by number as in the files of Keras 3,
        ``h5py.File("model.weights.h5")["optimizer/vars"]``, or the ``h5py.File("model.h5")`` of a
        legacy file, whose ``weight_names`` have the order, also that of Keras 2. A ``model.keras``
        is a zip archive with a ``model.weights.h5`` in it.
      params: the parameters.
      tx: the transformation: an :func:`adamax` with the arguments of Keras' optimizer. A constant
        learning rate that differs from Keras' is a warning.
      layout: as for :func:`optax_adamax.compat.torch.load_state`, by the names in `names`. None:
        the name is the path. (Flax has the layout of Keras.)
      names: the names of the variables in the order of the optimizer,
        ``[v.path for v in model.trainable_variables]``. If two have one path, give them other
        names, and a `layout`.

    Returns:
      The state. The counts of Adamax, of its accumulation and of its average are set, and those of
      schedules in its chain and of :func:`optax.inject_hyperparams` around it.

    Raises:
      ValueError: a missing, surplus or misshapen variable, one that has the name of another, a
        layout that does not fit, moments that are not those of Adamax, or an infinity norm out of
        the range of ``v_dtype``.
      TypeError: a variable of the wrong type, or the name of a file.

    Warns:
      UserWarning: the learning rate of `tx` is constant and differs from that of the variables.

    Example:
      >>> import jax.numpy as jnp, numpy as np, optax
      >>> from optax_adamax.compat import keras as compat_keras
      >>> variables = [25, 1e-3, np.ones((2, 3)), np.ones((2, 3))]
      >>> params = {"dense": {"kernel": jnp.zeros((2, 3))}}
      >>> tx = compat_keras.adamax()
      >>> state = compat_keras.load_state(variables, params, tx, names=["dense/kernel"])
      >>> print(optax.tree.get(state, "count"), optax.tree.get(state, "m")["dense"]["kernel"].shape)
      25 (2, 3)
    """
    template = tx.init(params)
    average, accumulation, slots = _find_slots(unpack_state(template, params))
    read = read_variables(variables, slots, names)
    calls, steps = read.iteration, _steps_per_update(accumulation)
    source = Moments(
        read.arrays["momentum"], read.arrays["norm"], dict.fromkeys(names, calls // steps)
    )
    rates: dict[Key, float | None] = dict.fromkeys(names, read.learning_rate)
    state = _transfer.load(source, params, tx, layout, groups=[rates])
    state = unpack_state(state, params)
    shapes = {name: x.shape for name, x in source.m.items()}
    move = _plan.plan_load(layout, names, shapes, params).move

    def put(node: Any, kind: str, counts: Mapping[str, int], field: str) -> Any:
        new = {k: _arrays.put_like(np.asarray(x), getattr(node, k)) for k, x in counts.items()}
        new[field] = put_tree(getattr(node, field), move(read.arrays[kind]))
        return node._replace(**new)

    if average is not None:
        counts = {"iteration": calls}
        state = _map(lambda x: put(x, "average", counts, "average"), state, is_average)
    if accumulation is not None:
        counts = {"mini_step": calls % steps, "gradient_step": calls // steps}
        kind = "gradient_accumulator"
        state = _map(lambda x: put(x, kind, counts, "acc_grads"), state, is_accumulation)
    return repack_state(state, like=template)


def dump_state(
    state: optax.OptState,
    params: optax.Params,
    layout: Layout | None = None,
    *,
    names: Sequence[str],
    learning_rate: float | None,
    source_params: Mapping[str, Any] | None = None,
    to_array: Callable[[np.ndarray], Any] = np.asarray,
) -> list[Any]:
    """Returns the values for ``optimizer.set_weights``, the inverse of :func:`load_state`.

    Args:
      state: of an :func:`adamax`.
      params: the parameters.
      layout: a mapping as for :func:`load_state`, or the function that moves weights back, from a
        tree like `params` to arrays by name.
      names: see :func:`load_state`.
      learning_rate: Keras stores it as a variable, optax does not. None: Keras' learning rate is a
        schedule, which is not a variable.
      source_params: ``{v.path: v for v in model.trainable_variables}``, of which a mapping needs
        the shapes if it regroups axes.
      to_array: makes an array of Keras' backend from a NumPy array; Keras accepts NumPy arrays.

    Returns:
      The values of ``optimizer.variables`` in order.

    Raises:
      ValueError: names or a layout that do not fit.
    """
    check_order(names)
    average, accumulation, slots = _find_slots(unpack_state(state, params))
    moments = _transfer.dump(state, params, layout, names, source_params)
    calls = _transfer.single_step(moments) * _steps_per_update(accumulation)
    arrays: dict[str, Mapping[Any, Any]] = {"momentum": moments.m, "norm": moments.v}
    move = _plan.plan_dump(layout, names, params, source_params).move
    if average is not None:
        arrays["average"] = move(_fetch_all(average.average))
    if accumulation is not None:
        calls += int(_arrays.fetch(accumulation.mini_step))
        arrays["gradient_accumulator"] = move(_fetch_all(accumulation.acc_grads))
    arrays["iteration"] = {"": np.array(calls, np.int32)}
    arrays["learning_rate"] = {"": np.array(learning_rate or 0.0)}
    slots = slots._replace(learning_rate=learning_rate is not None)
    return [to_array(arrays[kind][name]) for kind, name in slots.order(names)]


def _find_slots(state: Any) -> tuple[Any, Any, Slots]:
    """Returns the states of the average and of the accumulation, and which variables they mean."""
    average, accumulation = _find(state, is_average), _find(state, is_accumulation)
    return average, accumulation, Slots(True, average is not None, accumulation is not None)


def _find(state: Any, is_kind: Callable[[Any], TypeGuard[Kind]]) -> Kind | None:
    """Returns the state of this kind, if there is one.

    Raises:
      ValueError: there are several.
    """
    found = [x for x in jax.tree.leaves(state, is_leaf=is_kind) if is_kind(x)]
    if len(found) > 1:
        raise ValueError(
            f"There are {len(found)} {type(found[0]).__name__} in this state, but an optimizer of "
            f"Keras has one: give the state of each compat.keras.adamax by itself."
        )
    return found[0] if found else None


def _map(function: Callable[[Any], Any], state: Any, is_kind: Callable[[Any], bool]) -> Any:
    return jax.tree.map(lambda x: function(x) if is_kind(x) else x, state, is_leaf=is_kind)


def _fetch_all(tree: Any) -> dict[str, np.ndarray]:
    return {path: _arrays.fetch(x) for path, x in paths(tree).items()}


def _steps_per_update(accumulation: optax.MultiStepsState | None) -> int:
    """Returns the number of calls per update."""
    constant: Any = None if accumulation is None else accumulation.skip_state
    return 1 if constant is None else int(constant.gradient_accumulation_steps)
