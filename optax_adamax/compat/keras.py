"""`keras.optimizers.Adamax`: its constructor, and its variables in and out."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax
from jax.typing import ArrayLike, DTypeLike

from optax_adamax import _checks, repack_state, unpack_state
from optax_adamax._messages import describe_value
from optax_adamax._state import states_in
from optax_adamax._transform import scale_by_adamax
from optax_adamax.compat import _arithmetic, _arrays, _layout, _transfer
from optax_adamax.compat._arguments import compile_patterns, matching, number, rate
from optax_adamax.compat._comparison import Hyperparameters
from optax_adamax.compat._layout import Key, Layout, path_name, paths
from optax_adamax.compat._moments import Moments, put_tree
from optax_adamax.compat._transfer import dump_params, load_params

__all__ = [
    "adamax",
    "dump_params",
    "dump_state",
    "finalize_variable_values",
    "load_params",
    "load_state",
]

Exclusion = str | Sequence[str] | Callable[[optax.Params], Any]
# Variables besides the moments, in the order of Keras 3: the node of a state that stores them, and
# the field of the node.
_EXTRAS = {
    "average": (_arithmetic.is_average, "average"),
    "gradient_accumulator": (_arithmetic.is_accumulation, "acc_grads"),
}
# The last or second part of a variable's name in Keras 2, where `v` or `u` is the infinity norm.
_KERAS_2_KINDS = {"m": "momentum", "u": "norm", "v": "norm"}


def __dir__() -> list[str]:
    return list(__all__)


def adamax(
    learning_rate: optax.ScalarOrSchedule = 0.001,
    beta_1: ArrayLike = 0.9,
    beta_2: ArrayLike = 0.999,
    epsilon: ArrayLike = 1e-7,
    weight_decay: float | None = None,
    clipnorm: float | None = None,
    clipvalue: float | None = None,
    global_clipnorm: float | None = None,
    use_ema: bool = False,
    ema_momentum: float = 0.99,
    ema_overwrite_frequency: int | None = None,
    loss_scale_factor: float | None = None,
    gradient_accumulation_steps: int | None = None,
    name: str | None = None,
    *,
    exclude_from_weight_decay: Exclusion | None = None,
    m_dtype: DTypeLike | None = None,
    v_dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Returns Adamax with all arguments of `keras.optimizers.Adamax`.

    .. math::

        m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t \\
        u_t &= \max(\beta_2 u_{t-1}, |g_t|) \\
        w_t &= (1 - \alpha_t \lambda) w_{t-1}
            - \alpha_t m_t / ((1 - \beta_1^t) (u_t + \varepsilon))

    Each call divides the gradient by the loss scale and accumulates it. Every
    ``gradient_accumulation_steps``-th call clips the mean and applies the equations. Each call
    then updates the average of the parameters.

    Args:
      learning_rate: :math:`\alpha_t` >= 0, a float or a schedule. As in Keras, a schedule receives
        the number of calls, including those that only accumulate.
      beta_1: decay rate of the first moment, in [0, 1).
      beta_2: decay rate of the infinity norm, in [0, 1].
      epsilon: :math:`\varepsilon` >= 0, in the units of the gradient.
      weight_decay: :math:`\lambda` >= 0, decoupled. None: no weight decay.
      clipnorm: largest norm of the gradient of each array. At most one of the three limits can be
        given. As in Keras, a limit <= 0 has no effect.
      clipvalue: largest magnitude of each element of the gradient.
      global_clipnorm: largest norm of all gradients together.
      use_ema: whether to average the parameters; see :func:`finalize_variable_values`.
      ema_momentum: decay rate of the average, in [0, 1].
      ema_overwrite_frequency: number of updates after which the average replaces the parameters.
        None: never.
      loss_scale_factor: factor by which the loss was multiplied. None: 1.
      gradient_accumulation_steps: number of calls per update, at least 2. None: 1.
      name: has no effect.
      exclude_from_weight_decay: parameters without weight decay. Either a regular expression or a
        list of them, which are searched in the last part of each parameter's path, as by Keras'
        method of this name. Or a function from the parameters to a tree of booleans like the
        parameters (or a prefix of it).
      m_dtype: storage dtype of the first moment, see :func:`optax_adamax.scale_by_adamax`.
      v_dtype: storage dtype of the infinity norm.

    Returns:
      The transformation. With weight decay or an average, ``update`` needs the parameters. All
      arithmetic is in float32 or float64. The updates have the wider of the dtypes of gradient and
      parameter.

    Deliberate differences from Keras: with bfloat16 parameters, Keras' u never decays. In float16,
    Keras' default epsilon gives NaN for a zero gradient, norms of 256 and more overflow, and small
    gradients underflow when they are divided by the loss scale. With ``epsilon=0``, a zero gradient
    gives NaN in every dtype. Keras' bias correction in float32 is off by 1e-3 for a ``beta_1`` of
    0.99999. If the global norm overflows, Keras' parameters become NaN; this function's gradients
    become 0. Its sums and averages are float32 or float64. It does not accumulate complex
    gradients.

    Raises:
      ValueError: a hyperparameter is out of range, several limits are given, or the learning rate
        is an integer; from ``init``, no parameter matches a pattern.
      TypeError: an argument has the wrong type.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from optax_adamax.compat import keras as compat_keras
      >>> tx = compat_keras.adamax(learning_rate=0.002, weight_decay=0.1, clipnorm=1.0)
      >>> params = jnp.array([1.0, 2.0])
      >>> state = tx.init(params)
      >>> updates, state = tx.update(jnp.array([0.1, -0.3]), state, params)
      >>> print(optax.apply_updates(params, updates))
      [0.9978 2.0016]
    """
    del name
    steps = _integer("gradient_accumulation_steps", gradient_accumulation_steps, 2) or 1
    frequency = _integer("ema_overwrite_frequency", ema_overwrite_frequency, 1)
    momentum = number("ema_momentum", ema_momentum, 0.0, 1.0, closed=True)
    _checks.check_flag("use_ema", use_ema)
    _checks.check_decay("beta_1", beta_1, closed=False)
    _checks.check_decay("beta_2", beta_2, closed=True)
    tx = optax.chain(
        *_clip(clipnorm, clipvalue, global_clipnorm),
        scale_by_adamax(
            beta_1,
            beta_2,
            number("epsilon", epsilon),
            eps_placement="denominator",
            m_dtype=m_dtype,
            v_dtype=v_dtype,
        ),
        *_decay(weight_decay, exclude_from_weight_decay),
        optax.scale_by_learning_rate(_rate_of_updates(learning_rate, steps)),
    )
    if steps > 1:
        tx = _arithmetic.accumulate(tx, steps)
    unscale = []
    if loss_scale_factor is not None:
        factor = number("loss_scale_factor", loss_scale_factor)
        if factor == 0:
            raise ValueError(
                "loss_scale_factor must be greater than 0, but 0 was given. Write the factor by "
                "which the loss was multiplied, or None."
            )
        unscale = [optax.scale(1 / factor)]
    tx = _arithmetic.compute_in_float32(optax.chain(*unscale, tx))
    return _arithmetic.average(tx, momentum, frequency, steps) if use_ema else tx


def _rate_of_updates(learning_rate: Any, steps: int) -> Any:
    """Returns a learning rate as a function of updates, given a function of calls.

    Keras evaluates a schedule in the last of the `steps` calls per update.
    """
    if isinstance(learning_rate, (int, np.integer)):
        raise ValueError(
            f"learning_rate must be a float or a schedule, because Keras rejects integers, but "
            f"{learning_rate!r} was given. Write {float(learning_rate)}."
        )
    checked = rate("learning_rate", learning_rate)
    return (lambda count: checked((count + 1) * steps - 1)) if callable(checked) else checked


def _integer(name: str, value: Any, least: int) -> int | None:
    """Returns None, or an integer that is at least `least`."""
    if value is None:
        return None
    is_integer = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if not is_integer or value < least:
        raise (ValueError if is_integer else TypeError)(
            f"{name} must be an integer >= {least} or None, but {describe_value(value)} was given."
        )
    return int(value)


def _clip(
    clipnorm: Any, clipvalue: Any, global_clipnorm: Any
) -> list[optax.GradientTransformation]:
    """Clips gradients, if a limit is given. As in Keras, a limit <= 0 has no effect."""
    clips = {
        "clipnorm": (clipnorm, _arithmetic.clip_each),
        "clipvalue": (clipvalue, optax.clip),
        "global_clipnorm": (global_clipnorm, optax.clip_by_global_norm),
    }
    given = {
        name: number(name, limit, -math.inf, math.inf, closed=True)
        for name, (limit, _) in clips.items()
        if limit is not None
    }
    if len(given) > 1:
        raise ValueError(
            f"At most one limit of the gradient can be given, but {given} were given. Remove the "
            f"others."
        )
    return [clips[name][1](limit) for name, limit in given.items() if limit > 0]


def _decay(weight_decay: Any, exclude: Exclusion | None) -> list[optax.GradientTransformation]:
    """Adds decoupled weight decay, if there is any, except to the parameters in `exclude`."""
    mask = None if exclude is None else _decayed(exclude)
    if weight_decay is None:
        return []
    return [optax.add_decayed_weights(number("weight_decay", weight_decay), mask)]


def _decayed(exclude: Exclusion) -> Callable[[optax.Params], Any]:
    """Returns the function from the parameters to the mask of those with weight decay."""
    name = "exclude_from_weight_decay"

    def invert(flag: Any) -> bool:
        if not isinstance(flag, (bool, np.bool_)):
            raise TypeError(
                f"The function {name} must return a tree of booleans, but the tree has "
                f"{describe_value(flag)}. Return True for each parameter without weight decay."
            )
        return not flag

    if callable(exclude):
        return lambda params: jax.tree.map(invert, exclude(params))
    patterns = compile_patterns(name, exclude)

    def decayed(params: optax.Params) -> Any:
        excluded = matching(name, patterns, paths(params), lambda path: path.rsplit("/", 1)[-1])
        return jax.tree_util.tree_map_with_path(
            lambda path, _: path_name(path) not in excluded, params
        )

    return decayed


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
      TypeError: a state without Adamax.

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
    states_in(state)  # raises for a state without Adamax
    nodes = jax.tree.leaves(state, is_leaf=_arithmetic.is_average)
    nodes = [node for node in nodes if _arithmetic.is_average(node)]
    averages = {path: x for node in nodes for path, x in paths(node.average).items()}
    surplus = sorted(averages.keys() - paths(params).keys())
    if surplus:
        raise ValueError(
            f"params must have all parameters with averages, but {surplus} are missing. Pass the "
            f"parameters given to init."
        )

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
        order. Or a mapping of them by number as in the files of Keras 3,
        ``h5py.File("model.weights.h5")["optimizer/vars"]``. Or the ``h5py.File("model.h5")`` of a
        legacy file, in the order of its ``weight_names``, which may be Keras 2's. A
        ``model.keras`` is a zip archive that contains a ``model.weights.h5``. A
        `LossScaleOptimizer` has them in its ``inner_optimizer``.
      params: the parameters.
      tx: the transformation: an :func:`adamax` with the arguments of Keras' optimizer. A constant
        learning rate that differs from Keras' is a warning.
      layout: as for :func:`optax_adamax.compat.torch.load_state`: the function that moved the
        weights, or a mapping from the names in `names` to paths. None: the name is the path, as in
        Flax, whose layers have Keras' layout.
      names: the names of the variables in the order of the optimizer,
        ``[v.path for v in model.trainable_variables]``. If two have one path, give them other
        names, and a `layout`.

    Returns:
      The state. `load_state` sets the counts of Adamax, of its accumulation, of its average, of
      schedules in its chain, and of :func:`optax.inject_hyperparams` around it.

    Raises:
      ValueError: a missing, surplus or misshapen variable, one that has the name of another, a
        layout that does not fit, moments of another optimizer, or an infinity norm out of
        the range of ``v_dtype``.
      TypeError: a variable of the wrong type, the name of a file, or a `tx` without Adamax.

    Warns:
      UserWarning: the learning rate of `tx` is constant and differs from Keras'.

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
    extras = _find_extras(unpack_state(template, params))
    calls, learning_rate, arrays = _read_variables(variables, names, list(extras))
    per_update = _calls_per_update(extras)
    updates = calls // per_update
    source = Moments(arrays["momentum"], arrays["norm"], dict.fromkeys(names, updates))
    saved: dict[Key, Hyperparameters] = dict.fromkeys(names, Hyperparameters(learning_rate))
    state = unpack_state(_transfer.load(source, params, tx, layout, groups=[saved]), params)
    move = _layout.plan_load(layout, names, _layout.shapes_of(source.m), params).move
    counts = {
        "average": {"iteration": calls},
        "gradient_accumulator": {"mini_step": calls % per_update, "gradient_step": updates},
    }

    def put(node: Any, kind: str) -> Any:
        is_kind, field = _EXTRAS[kind]
        if not is_kind(node):
            return node
        new = {
            k: _arrays.put_like(np.asarray(x), getattr(node, k)) for k, x in counts[kind].items()
        }
        new[field] = put_tree(getattr(node, field), move(arrays[kind]))
        return node._replace(**new)

    for kind in extras:
        state = jax.tree.map(lambda x: put(x, kind), state, is_leaf=_EXTRAS[kind][0])  # noqa: B023
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
      learning_rate: the rate at which Keras continues, because an optax state has none. None: the
        learning rate of Keras is a schedule, which is not a variable.
      source_params: ``{v.path: v for v in model.trainable_variables}``, of which a mapping needs
        the shapes if it regroups axes.
      to_array: makes an array of Keras' backend from a NumPy array; Keras accepts NumPy arrays.

    Returns:
      The values of ``optimizer.variables`` in order.

    Raises:
      ValueError: names or a layout that do not fit.
    """
    _layout.check_unique(names, _layout.OWN_NAMES)
    extras = _find_extras(unpack_state(state, params))
    moments = _transfer.dump(state, params, layout, names, source_params)
    untrained = [name for name in names if name not in moments.m]
    if untrained:
        raise ValueError(
            f"All names must be of trained parameters, but the state has no moments of "
            f"{untrained}. Give the names of the variables that Keras' optimizer has."
        )
    calls = _transfer.single_step(moments) * _calls_per_update(extras)
    if "gradient_accumulator" in extras:
        calls += int(_arrays.fetch(extras["gradient_accumulator"].mini_step))
    arrays: dict[str, Mapping[Any, Any]] = {
        "iteration": {"": np.array(calls, np.int32)},
        "learning_rate": {"": np.array(learning_rate or 0.0)},
        "momentum": moments.m,
        "norm": moments.v,
    }
    move = _layout.plan_dump(layout, names, params, source_params).move
    for kind, node in extras.items():
        tree = paths(getattr(node, _EXTRAS[kind][1]))
        arrays[kind] = move({path: _arrays.fetch(x) for path, x in tree.items()})
    order = _order(names, list(extras), has_rate=learning_rate is not None)
    return [to_array(arrays[kind][name]) for kind, name in order]


def _find_extras(state: Any) -> dict[str, Any]:
    """Returns the states of the average and of the accumulation, if there are any, by kind.

    Raises:
      ValueError: there are several of a kind.
    """
    extras = {}
    for kind, (is_kind, _) in _EXTRAS.items():
        found = [x for x in jax.tree.leaves(state, is_leaf=is_kind) if is_kind(x)]
        if len(found) > 1:
            raise ValueError(
                f"The state must come from one compat.keras.adamax, but it has {len(found)} "
                f"{type(found[0]).__name__}. Give the state of each by itself."
            )
        if found:
            extras[kind] = found[0]
    return extras


def _calls_per_update(extras: Mapping[str, Any]) -> int:
    if "gradient_accumulator" not in extras:
        return 1
    return int(extras["gradient_accumulator"].skip_state.gradient_accumulation_steps)


def _order(names: Sequence[str], extras: Sequence[str], *, has_rate: bool) -> list[tuple[str, str]]:
    """Returns kind and parameter of all variables in the order of Keras 3."""
    return [
        ("iteration", ""),
        *([("learning_rate", "")] if has_rate else []),
        *((kind, name) for kind in extras for name in names),
        *((kind, name) for name in names for kind in ("momentum", "norm")),
    ]


def _read_variables(
    variables: Any, names: Sequence[str], extras: Sequence[str]
) -> tuple[int, float | None, dict[str, dict[Any, np.ndarray]]]:
    """Returns the number of calls, the learning rate, and the arrays by kind and name.

    Args:
      variables: see `load_state`.
      names: the names of the parameters.
      extras: the kinds of arrays besides the moments.

    Raises:
      TypeError: a variable of the wrong type.
      ValueError: too many or too few variables, or one of another name or shape.
    """
    _layout.check_unique(names, _layout.OWN_NAMES)
    labels, values = _in_order(variables)
    expected = _order(names, extras, has_rate=True)
    if len(values) == len(expected) - 1:
        expected = _order(names, extras, has_rate=False)
    if len(values) != len(expected):
        kinds = list(dict.fromkeys(kind for kind, _ in expected))
        raise ValueError(
            f"An optimizer of {len(names)} parameters with {kinds} must have {len(expected)} "
            f"variables, or one less if the learning rate is a schedule, but {len(values)} were "
            f"given. Give `tx` the arguments and `names` the parameters that Keras' optimizer had."
        )
    calls, learning_rate, arrays = 0, None, {kind: {} for kind, name in expected if name}
    for i, ((kind, name), label, value) in enumerate(zip(expected, labels, values, strict=True)):
        where = f"variables[{i}] ({kind}" + (f" of {name!r})" if name else ")")
        _check_name(where, kind, name, label, names)
        if kind == "iteration":
            calls = _arrays.read_step(where, value)
        elif kind == "learning_rate":
            learning_rate = float(_arrays.read_array(where, value))
        else:
            arrays[kind][name] = _arrays.read_array(where, value)
    for kind, of_kind in arrays.items():
        for name, array in of_kind.items():
            shape = arrays["momentum"][name].shape
            if array.shape != shape:
                raise ValueError(
                    f"The {kind} of {name!r} must have the shape of its momentum, {shape}, but its "
                    f"shape is {array.shape}. Give momentum and norm of each parameter in turn; "
                    f"Keras 2 may write all momenta before all norms."
                )
    return calls, learning_rate, arrays


def _in_order(variables: Any) -> tuple[list[str], list[Any]]:
    """Returns names, empty if unknown, and values in the order of Keras 3."""
    if not hasattr(variables, "keys"):
        _arrays.check_is_read("a list of variables, or a mapping of them", variables, object)
        values = list(variables)
        labels = [x.name if isinstance(getattr(x, "path", None), str) else "" for x in values]
        return labels, values
    if "optimizer_weights" in variables:
        variables = variables["optimizer_weights"]
    if "weight_names" in getattr(variables, "attrs", {}):  # a legacy file model.h5
        labels = [x if isinstance(x, str) else x.decode() for x in variables.attrs["weight_names"]]
        return _from_keras_2(labels, [variables[label] for label in labels])
    numbers = [str(i) for i in range(len(variables))]
    missing = [key for key in numbers if key not in variables]
    if missing:
        raise ValueError(
            f"The variables must be numbered from 0 on, but {missing[0]!r} is not in "
            f'{list(variables.keys())}. Pass h5py.File("model.weights.h5")["optimizer/vars"].'
        )
    return [""] * len(numbers), [variables[key] for key in numbers]


def _from_keras_2(labels: list[str], values: list[Any]) -> tuple[list[str], list[Any]]:
    """Returns names and values in the order of Keras 3, if Keras 2 wrote the names."""
    by_kind: dict[str, list[tuple[str, Any]]] = {"momentum": [], "norm": [], "": []}
    for label, value in zip(labels, values, strict=True):
        parts = label.removesuffix(":0").split("/")
        found = [i for i in (len(parts) - 1, 1) if len(parts) > 2 and parts[i] in _KERAS_2_KINDS]
        kind = _KERAS_2_KINDS[parts.pop(found[0])] if found else ""
        by_kind[kind].append((f"{'_'.join(parts[1:])}_{kind}" if kind else "", value))
    if not by_kind["momentum"]:
        return [label.rsplit("/", 1)[-1] for label in labels], values
    pairs = zip(by_kind["momentum"], by_kind["norm"], strict=True)
    ordered = [*by_kind[""], *(x for pair in pairs for x in pair)]
    return [label for label, _ in ordered], [value for _, value in ordered]


def _check_name(where: str, kind: str, name: str, label: str, names: Sequence[str]) -> None:
    """Raises ValueError if the variable has the name of another; an empty name is unknown."""
    if not label:
        return
    parameter, known = label.removesuffix(f"_{kind}"), {x.replace("/", "_"): x for x in names}
    if not label.endswith(kind) or (name and known.get(parameter, name) != name):
        raise ValueError(
            f"{where} must have the name of this variable, but it is called {label!r}. Pass the "
            f"variables of a keras.optimizers.Adamax, and `names` in the order of its optimizer, "
            f"[v.path for v in model.trainable_variables]."
        )
