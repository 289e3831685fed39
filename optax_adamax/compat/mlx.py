"""`mlx.optimizers.Adamax`: its constructor, and its ``state`` in and out."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import DTypeLike

from optax_adamax._transform import scale_by_adamax
from optax_adamax.compat import _arguments, _arrays, _flax_names, _transfer
from optax_adamax.compat._arithmetic import compute_in_float32
from optax_adamax.compat._comparison import Hyperparameters
from optax_adamax.compat._layout import Entry, Key, Layout
from optax_adamax.compat._moments import Moments
from optax_adamax.compat._transfer import Missing

__all__ = ["adamax", "dump_params", "dump_state", "flax_names", "load_params", "load_state"]


def __dir__() -> list[str]:
    return list(__all__)


def adamax(
    learning_rate: optax.ScalarOrSchedule,
    betas: list[float] | tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    *,
    m_dtype: DTypeLike | None = None,
    v_dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Returns Adamax with the arguments of `mlx.optimizers.Adamax`, without bias correction.

    .. math::

        m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t \\
        v_t &= \max(\beta_2 v_{t-1}, |g_t|) \\
        w_t &= w_{t-1} - \lambda m_t / (v_t + \varepsilon)

    Args:
      learning_rate: :math:`\lambda` >= 0, a number or a schedule of the step count. As in MLX, it
        is rounded to float32, which only affects float64 parameters.
      betas: decay rates of the first moment and of the infinity norm, both in [0, 1).
      eps: :math:`\varepsilon` >= 0, in the units of the gradient.
      m_dtype: storage dtype of the first moment, see :func:`optax_adamax.scale_by_adamax`.
      v_dtype: storage dtype of the infinity norm.

    Returns:
      The transformation. All arithmetic is in float32 or float64. The updates have the wider of the
      dtypes of gradient and parameter (if ``update`` receives parameters).

    Deliberate differences from MLX: with bfloat16 parameters, MLX's v never decays. In float16, and
    with ``eps=0`` in every dtype, MLX's update for a zero gradient is NaN.

    Raises:
      ValueError: a hyperparameter is out of range.
      TypeError: an argument has the wrong type.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from optax_adamax.compat import mlx as compat_mlx
      >>> tx = compat_mlx.adamax(learning_rate=0.02)
      >>> params = jnp.array([1.0, 2.0])
      >>> state = tx.init(params)
      >>> updates, state = tx.update(jnp.array([0.1, -0.3]), state)
      >>> print(optax.apply_updates(params, updates))
      [0.998 2.002]
    """
    rate = _arguments.rate("learning_rate", learning_rate)
    chain = optax.chain(
        scale_by_adamax(
            *_arguments.pair(betas),
            eps,
            eps_placement="denominator",
            bias_correction=False,
            m_dtype=m_dtype,
            v_dtype=v_dtype,
        ),
        optax.scale_by_learning_rate(_in_float32(rate)),
    )
    return compute_in_float32(chain)


def _in_float32(rate: Any) -> Any:
    """Rounds a learning rate to float32, as MLX does, unless it is traced."""
    if callable(rate):
        return lambda count: jnp.asarray(rate(count), jnp.float32)
    return rate if isinstance(rate, jax.Array) else float(np.float32(rate))


def load_state(
    source_state: Mapping[str, Any],
    params: optax.Params,
    tx: optax.GradientTransformation,
    layout: Layout | None = None,
    *,
    missing: Missing = "raise",
    source_params: Mapping[str, Any] | None = None,
) -> optax.OptState:
    """Returns the state of `tx`, continued from MLX.

    Args:
      source_state: ``optimizer.state`` of an `mlx.optimizers.Adamax`, or its ``tree_flatten`` as a
        dict, which MLX writes to files: ``{"layers.0.weight.m": ...}``. Its arrays may be NumPy
        arrays, or anything that NumPy can read. The state of MLX's Adam has the same form; it
        raises if most of m is greater than Adamax allows, as it is for gradients below 1.
      params: the parameters.
      tx: the transformation, an :func:`adamax` by itself or within others. Its hyperparameters are
        used. A constant learning rate that differs from the state's is a warning.
      layout: as for :func:`optax_adamax.compat.torch.load_state`: the function that moved the
        weights, from a nested dict such as ``model.parameters()``, or a mapping from MLX's names,
        such as ``"layers.0.weight"``, to paths or to pairs of path and axes.
      missing: for parameters without moments: ``"raise"`` an error, or start at ``"zero"``.
      source_params: ``model.parameters()``, of which a function as `layout` needs the shapes for
        parameters without moments.

    Returns:
      The state. `load_state` sets the counts of Adamax, of schedules in its chain, and of
      :func:`optax.inject_hyperparams` around it.

    Raises:
      ValueError: a missing, surplus or misshapen entry, the state of a `MultiOptimizer`, moments
        of another optimizer, or an infinity norm out of the range of ``v_dtype``.
      TypeError: an entry of the wrong type, the name of a file, or a `tx` without Adamax.

    Warns:
      UserWarning: the learning rate of `tx` is constant and differs from the state's.

    Example:
      >>> import jax.numpy as jnp, numpy as np, optax
      >>> from optax_adamax.compat import mlx as compat_mlx
      >>> moments = {"m": np.ones((3, 2)), "v": np.ones((3, 2))}
      >>> source_state = {"step": 25, "learning_rate": 0.1, "layers": [{"weight": moments}]}
      >>> params = {"kernel": jnp.zeros((2, 3))}
      >>> layout = {"layers.0.weight": ("kernel", (1, 0))}
      >>> state = compat_mlx.load_state(source_state, params, compat_mlx.adamax(0.1), layout)
      >>> print(optax.tree.get(state, "count"), optax.tree.get(state, "m")["kernel"].shape)
      25 (2, 3)
    """
    _arrays.check_is_read("the state of an optimizer of MLX", source_state)
    flat = _flatten(source_state)
    if flat and all(name.startswith("states.") for name in flat):
        raise ValueError(
            "The state must come from one Adamax, but it comes from a MultiOptimizer. Give the "
            "state of the Adamax in it, optimizer.optimizers[i].state, with an optax.partition as "
            "`tx`. For several Adamax with equal steps, merge the tree_flatten of their states "
            "into one dict, without the learning_rate."
        )
    if "step" not in flat:
        raise ValueError(
            f"The state must have the entry 'step', but it has {list(flat)}. Pass optimizer.state."
        )
    step, rate = flat.pop("step"), flat.pop("learning_rate", None)
    names = list(dict.fromkeys(name.rpartition(".")[0] for name in flat))
    expected = {f"{name}.{field}" for name in names for field in "mv"}
    if expected != set(flat):
        raise ValueError(
            f"Each parameter must have the entries .m and .v of Adamax, but "
            f"{sorted(expected - set(flat))} are missing, and {sorted(set(flat) - expected)} are "
            f"unknown. Pass the state of an mlx.optimizers.Adamax."
        )
    saved = Hyperparameters(None if rate is None else float(rate))
    source = Moments({}, {}, {})
    for name in names:
        source.add(name, flat[f"{name}.m"], flat[f"{name}.v"], step)
    return _transfer.load(
        source,
        params,
        tx,
        _with_nested_input(layout),
        missing=missing,
        source_params=_flatten(source_params or {}),
        groups=[dict.fromkeys(names, saved)],
        example=next(iter(flat.values()), None),
    )


def dump_state(
    state: optax.OptState,
    params: optax.Params,
    layout: Layout | None = None,
    *,
    learning_rate: float,
    source_params: Mapping[str, Any] | None = None,
    to_array: Callable[[np.ndarray], Any] = np.asarray,
) -> dict[str, Any]:
    """Returns the state for ``optimizer.state = ...``, the inverse of :func:`load_state`.

    Args:
      state: of an :func:`adamax`, by itself or within others.
      params: the parameters.
      layout: a mapping as for :func:`load_state`, or the function that moves weights back, to
        arrays by name or to a nested dict of them. None: the names are the paths with "." for "/".
      learning_rate: MLX stores it in its state, optax does not. With a schedule, any number.
      source_params: ``model.parameters()``, of which a mapping needs the shapes if it regroups
        axes.
      to_array: makes an array from a NumPy array: `mlx.core.array`.

    Returns:
      A nested dict, with lists where names have numbers.

    Raises:
      ValueError: a layout that does not fit.
    """
    shapes = _flatten(source_params or {})
    moments = _transfer.dump(state, params, _with_flat_output(layout), source_params=shapes)
    flat: dict[str, Any] = {
        "step": to_array(np.array(_transfer.single_step(moments), np.uint64)),
        "learning_rate": to_array(np.array(learning_rate, np.float32)),
    }
    for name in moments.step:
        flat[f"{name}.m"], flat[f"{name}.v"] = map(to_array, (moments.m[name], moments.v[name]))
    return _unflatten(flat)


def load_params(
    source_params: Mapping[str, Any], params: optax.Params, layout: Layout | None = None
) -> optax.Params:
    """Returns MLX's parameters as a tree like `params`.

    As :func:`optax_adamax.compat.torch.load_params`; `source_params` is ``model.parameters()`` or
    its ``tree_flatten`` as a dict.
    """
    _arrays.check_is_read(_transfer.SOURCE_PARAMS, source_params)
    return _transfer.load_params(_flatten(source_params), params, _with_nested_input(layout))


def dump_params(
    params: optax.Params,
    layout: Layout | None = None,
    *,
    source_params: Mapping[str, Any] | None = None,
    to_array: Callable[[np.ndarray], Any] = np.asarray,
) -> dict[str, Any]:
    """Returns the parameters for ``model.update(...)``, the inverse of :func:`load_params`.

    As :func:`optax_adamax.compat.torch.dump_params`, but a nested dict, with lists where names have
    numbers.
    """
    shapes, layout = _flatten(source_params or {}), _with_flat_output(layout)
    flat = _transfer.dump_params(params, layout, source_params=shapes, to_array=to_array)
    return _unflatten(flat)


def flax_names(params: optax.Params, modules: Mapping[str, str] | None = None) -> dict[Key, Entry]:
    r"""Returns a layout for :func:`load_state` for the parameters of a Flax module.

    As :func:`optax_adamax.compat.torch.flax_names`, for MLX's layouts: its convolutions are
    (out, \*space, in).
    """
    return _flax_names.flax_names(params, modules, channels_last=True)


def _with_nested_input(layout: Layout | None) -> Layout | None:
    return (lambda flat: layout(_unflatten(flat))) if callable(layout) else layout


def _with_flat_output(layout: Layout | None) -> Layout | None:
    return (lambda tree: _flatten(layout(tree))) if callable(layout) else layout


def _flatten(tree: Any) -> dict[str, Any]:
    """Returns leaves by name, as MLX's ``tree_flatten`` names them."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): x for path, x in leaves}


def _unflatten(flat: Mapping[str, Any]) -> Any:
    """The inverse of `_flatten`, with an empty dict for each missing number."""
    branches: dict[str, dict[str, Any]] = {}
    leaves: dict[str, Any] = {}
    for name, value in flat.items():
        key, _, rest = name.partition(".")
        if rest:
            branches.setdefault(key, {})[rest] = value
        else:
            leaves[key] = value
    tree = leaves | {key: _unflatten(branch) for key, branch in branches.items()}
    if not all(key.isdigit() for key in tree):
        return tree
    length = 1 + max(map(int, tree))
    return [tree.get(str(i), {}) for i in range(length)]
