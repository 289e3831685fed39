"""The variables of `keras.optimizers.Adamax`, in and out."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_adamax import repack_state, unpack_state
from optax_adamax._state import states_in
from optax_adamax.compat import _arrays, _mapping, _state
from optax_adamax.compat._mapping import Names
from optax_adamax.compat.keras import _variables
from optax_adamax.compat.keras._links import AccumulateState, AverageState


def finalize_variable_values(params: optax.Params, state: optax.OptState) -> optax.Params:
    """The parameters at the end of training: with ``use_ema`` their average, as `fit` leaves them.

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
    states_in(state)  # refuses what is no state
    nodes = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, AverageState))
    averages: dict[str, jax.Array] = {}
    for node in nodes:
        if isinstance(node, AverageState):
            averages |= _mapping.paths(node.average)
    surplus = sorted(averages.keys() - _mapping.paths(params).keys())
    if surplus:
        raise ValueError(f"The state has averages of {surplus}, which are no parameters.")

    def final(path: Any, p: jax.Array) -> jax.Array:
        name = _mapping.path_name(path)
        return averages[name].astype(p.dtype) if name in averages else p

    return jax.tree_util.tree_map_with_path(final, params)


def load_state(
    variables: Any,
    params: optax.Params,
    tx: optax.GradientTransformation,
    names: Names | None = None,
    *,
    order: Sequence[str],
) -> optax.OptState:
    """The state of `tx`, continued from Keras.

    Args:
      variables: ``optimizer.variables`` of a `keras.optimizers.Adamax`, or their values in this
        order, or a mapping of them by number as ``save_own_variables`` and Keras' files have it:
        ``h5py.File("model.weights.h5")["optimizer/vars"]``. A ``model.keras`` is a zip archive
        with this file in it.
      params: our parameters.
      tx: our transformation: an :func:`adamax` with the arguments that Keras' had.
      names: for each name in `order` a path in `params`, or a pair of path and the permutation of
        axes that makes Keras' array ours. None: the name is the path. (Flax lays its kernels out
        as Keras does.)
      order: the names of the variables in the order in which the optimizer got them,
        ``[v.path for v in model.trainable_variables]``. Where two have one path, call them
        otherwise, and give `names`.

    Returns:
      The state. Beside the counts of Adamax, of its accumulation and of its average, those of the
      schedules in its chain and of :func:`optax.inject_hyperparams` around it are set. Other
      counters stand where `tx.init` puts them.

    Raises:
      ValueError: a missing, surplus or misshapen variable, one whose own name is that of another,
        names that do not fit, moments that are not those of Adamax, or an infinity norm out of the
        range of ``v_dtype``.
      TypeError: a variable of the wrong type.

    Example:
      >>> import jax.numpy as jnp, numpy as np, optax
      >>> from optax_adamax.compat import keras as compat_keras
      >>> variables = [25, 1e-3, np.ones((2, 3)), np.ones((2, 3))]
      >>> params = {"dense": {"kernel": jnp.zeros((2, 3))}}
      >>> tx = compat_keras.adamax()
      >>> state = compat_keras.load_state(variables, params, tx, order=["dense/kernel"])
      >>> print(optax.tree.get(state, "count"), optax.tree.get(state, "m")["dense"]["kernel"].shape)
      25 (2, 3)
    """
    template = tx.init(params)
    unpacked = unpack_state(template, params)
    accumulated = _variables.find(unpacked, AccumulateState)
    averaged = _variables.find(unpacked, AverageState)
    steps = _steps(accumulated)
    peer = _variables.read(variables, unpacked, order)
    calls = _arrays.read_step(*peer.iteration)
    updates = peer.iteration._replace(value=calls // steps)
    moments = {key: x and x._replace(step=updates) for key, x in peer.moments.items()}
    state = unpack_state(_state.load(tx, params, moments, names), params)
    targets = _mapping.find_targets(order, params, names)
    if averaged is not None:
        state = _variables.replace(
            state,
            AverageState,
            iteration=jnp.asarray(calls, jnp.int32),
            average=_variables.load_tree(averaged.average, peer.averages, targets),
        )
    if accumulated is not None:
        sums = accumulated.gradient_accumulator
        state = _variables.replace(
            state,
            AccumulateState,
            micro_step=jnp.asarray(calls % steps, jnp.int32),
            gradient_accumulator=_variables.load_tree(sums, peer.sums, targets),
        )
    return repack_state(state, like=template)


def dump_state(
    state: optax.OptState,
    params: optax.Params,
    names: Names | None = None,
    *,
    order: Sequence[str],
    learning_rate: float | None,
    to_array: Callable[[np.ndarray], Any] = np.asarray,
) -> list[Any]:
    """The state for ``optimizer.set_weights``, the inverse of :func:`load_state`.

    Args:
      state: of an :func:`adamax`.
      params: our parameters.
      names: see :func:`load_state`.
      order: see :func:`load_state`.
      learning_rate: Keras keeps it as a variable, optax does not. None: Keras' is a schedule,
        which is no variable.
      to_array: what makes an array of Keras' backend of a NumPy array; Keras takes NumPy arrays.

    Returns:
      The values of ``optimizer.variables`` in order.

    Raises:
      ValueError: names that do not fit.
    """
    _mapping.check_order(order)
    state = unpack_state(state, params)
    accumulated = _variables.find(state, AccumulateState)
    averaged = _variables.find(state, AverageState)
    targets = _mapping.find_targets(order, params, names)
    found = _state.dump(state, params, order, names)
    calls = _state.single_step(found) * _steps(accumulated)
    values: dict[tuple[str, str], Any] = {}
    if averaged is not None:
        dumped = _variables.dump_tree(averaged.average, order, targets)
        values |= {("average", key): x for key, x in dumped.items()}
    if accumulated is not None:
        calls += int(accumulated.micro_step)
        dumped = _variables.dump_tree(accumulated.gradient_accumulator, order, targets)
        values |= {("gradient_accumulator", key): x for key, x in dumped.items()}
    values["iteration", ""] = np.array(calls, np.int32)
    values["learning_rate", ""] = np.array(learning_rate or 0.0)
    for key, moments in found.items():
        values["momentum", str(key)], values["norm", str(key)] = moments.m, moments.v
    layout = _variables.Layout(
        learning_rate is not None, averaged is not None, accumulated is not None
    )
    return [to_array(values[slot]) for slot in layout.slots(order)]


def _steps(accumulated: AccumulateState | None) -> int:
    """The number of calls to an update."""
    return 1 if accumulated is None else int(accumulated.gradient_accumulation_steps)
