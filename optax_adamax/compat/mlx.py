"""`mlx.optimizers.Adamax`: its constructor, and its ``state`` in and out."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike, DTypeLike

from optax_adamax import _checks
from optax_adamax._transform import scale_by_adamax
from optax_adamax.compat import _arguments, _mapping, _state
from optax_adamax.compat._float32 import compute_in_float32
from optax_adamax.compat._mapping import Entry, Key, Names, dump_params, load_params
from optax_adamax.compat._state import Missing, PeerMoments, PeerValue

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
    r"""`mlx.optimizers.Adamax`, which does not correct the bias of its first moment.

    .. math::

        m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t \\
        v_t &= \max(\beta_2 v_{t-1}, |g_t|) \\
        w_t &= w_{t-1} - \lambda m_t / (v_t + \varepsilon)

    Args:
      learning_rate: :math:`\lambda` >= 0, a number or a schedule of the step count. As in MLX it
        is rounded to float32, which only float64 parameters can tell.
      betas: decay rates of the first moment and of the infinity norm, both in [0, 1).
      eps: :math:`\varepsilon` >= 0, in the units of the gradient.
      m_dtype: dtype in which the first moment is kept, see :func:`optax_adamax.scale_by_adamax`.
      v_dtype: dtype in which the infinity norm is kept, likewise.

    Returns:
      The transformation. All of its arithmetic is in float32 at least; the updates have the wider
      dtype of gradient and parameter (if ``update`` is given any).

    Where MLX goes wrong we do not follow: with bfloat16 parameters its v never decays, in float16
    a zero gradient gives NaN, and so does one with ``eps=0`` in every dtype.

    Raises:
      ValueError: a hyperparameter out of range.
      TypeError: a hyperparameter of the wrong type.

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
    b1, b2 = _arguments.check_betas(betas)
    _checks.check_rate("learning_rate", learning_rate)
    chain = optax.chain(
        scale_by_adamax(
            b1,
            b2,
            eps,
            eps_placement="denominator",
            bias_correction=False,
            m_dtype=m_dtype,
            v_dtype=v_dtype,
        ),
        optax.scale_by_learning_rate(_in_float32(learning_rate)),
    )
    return compute_in_float32(chain)


def _in_float32(learning_rate: optax.ScalarOrSchedule) -> Any:
    """The learning rate as MLX keeps it. JAX arrays stay as they are: they may be tracers."""
    if isinstance(learning_rate, jax.Array):
        return learning_rate
    if not callable(learning_rate):
        return float(np.float32(learning_rate))

    def schedule(count: ArrayLike) -> ArrayLike:
        return jnp.asarray(learning_rate(count), jnp.float32)

    return schedule


def load_state(
    peer_state: Mapping[str, Any],
    params: optax.Params,
    tx: optax.GradientTransformation,
    names: Names | None = None,
    *,
    missing: Missing = "refuse",
) -> optax.OptState:
    """The state of `tx`, continued from MLX.

    Args:
      peer_state: ``optimizer.state`` of an `mlx.optimizers.Adamax`, or its ``tree_flatten`` as a
        dict, which is what MLX writes to files: ``{"layers.0.weight.m": ...}``. Its arrays may be
        NumPy's, or whatever NumPy can read. The state of MLX's Adam has the same form. It is
        refused where gradients were smaller than 1, for m is then greater than v; else nothing
        tells the two apart.
      params: our parameters.
      tx: our transformation, an :func:`adamax` by itself or within others. The hyperparameters
        are those it was made with: the learning rate in the state is not read.
      names: for each parameter's name in MLX, such as ``"layers.0.weight"``, its path in
        `params`, or a pair of path and the permutation of axes that makes MLX's array ours. None:
        the name with "/" for ".", nothing permuted. :func:`flax_names` makes them for Flax.
      missing: what becomes of a parameter for which there is nothing, because it never had a
        gradient: ``"refuse"`` it, or start it at ``"zero"``.

    Returns:
      The state. Beside the count of Adamax, those of the schedules in its chain and of
      :func:`optax.inject_hyperparams` around it are set. Other counters (of another optimizer, of
      :func:`optax.ema`, of `optax.MultiSteps`) stand where `tx.init` puts them.

    Raises:
      ValueError: a missing, surplus or misshapen entry, names that do not fit, moments that are not
        those of Adamax, an infinity norm out of the range of ``v_dtype``, or the state of a
        `MultiOptimizer`.
      TypeError: an entry of the wrong type.

    Example:
      >>> import jax.numpy as jnp, numpy as np, optax
      >>> from optax_adamax.compat import mlx as compat_mlx
      >>> moments = {"m": np.ones((3, 2)), "v": np.ones((3, 2))}
      >>> peer_state = {"step": 25, "learning_rate": 0.1, "layers": [{"weight": moments}]}
      >>> params = {"kernel": jnp.zeros((2, 3))}
      >>> names = {"layers.0.weight": ("kernel", (1, 0))}
      >>> state = compat_mlx.load_state(peer_state, params, compat_mlx.adamax(0.1), names)
      >>> print(optax.tree.get(state, "count"), optax.tree.get(state, "m")["kernel"].shape)
      25 (2, 3)
    """
    flat = dict(_flatten(peer_state))
    if flat and all(name.startswith("states.") for name in flat):
        raise ValueError(
            "This is the state of a MultiOptimizer: give that of the Adamax in it, "
            "optimizer.optimizers[i].state, with an optax.partition as `tx`. Give those of several "
            "Adamax of the same steps as one dict of what tree_flatten makes of each."
        )
    if "step" not in flat:
        raise ValueError(f"There is no 'step' in this state: it has {list(flat)}.")
    step = PeerValue("'step'", flat.pop("step"))
    flat.pop("learning_rate", None)
    moments: dict[str, dict[str, PeerValue]] = {}
    for name, value in flat.items():
        key, _, field = name.rpartition(".")
        if field not in ("m", "v") or not key:
            raise ValueError(
                f"{name!r} is nothing that Adamax keeps: its entries end in .m and .v."
            )
        moments.setdefault(key, {})[field] = PeerValue(repr(name), value)
    for key, entry in moments.items():
        for field in ("m", "v"):
            if field not in entry:
                raise ValueError(f"There is no {f'{key}.{field}'!r} in this state.")
    entries: dict[Key, PeerMoments | None] = {
        key: PeerMoments(entry["m"], entry["v"], step) for key, entry in moments.items()
    }
    return _state.load(tx, params, entries, names, missing)


def dump_state(
    state: optax.OptState,
    params: optax.Params,
    names: Names | None = None,
    *,
    learning_rate: float,
    to_array: Callable[[np.ndarray], Any] = np.asarray,
) -> dict[str, Any]:
    """The state as MLX keeps it, for ``optimizer.state = ...``; the inverse of :func:`load_state`.

    Args:
      state: of an :func:`adamax`, by itself or within others.
      params: our parameters.
      names: see :func:`load_state`. None: the paths with "." for "/".
      learning_rate: MLX keeps it in its state, optax does not. With a schedule, any number.
      to_array: what makes an array of a NumPy array: `mlx.core.array`.

    Returns:
      A nested dict, with lists where names have numbers.

    Raises:
      ValueError: names that do not fit.
    """
    names = _mapping.peer_names(params) if names is None else names
    found = _state.dump(state, params, names, names)
    step = _state.single_step(found)
    flat: dict[str, Any] = {
        "step": to_array(np.array(step, np.uint64)),
        "learning_rate": to_array(np.array(learning_rate, np.float32)),
    }
    for key, moments in found.items():
        flat[f"{key}.m"], flat[f"{key}.v"] = to_array(moments.m), to_array(moments.v)
    return _unflatten(flat)


def flax_names(params: optax.Params, modules: Mapping[str, str] | None = None) -> dict[Key, Entry]:
    r"""Names for :func:`load_state` where `params` are those of a Flax module.

    As :func:`optax_adamax.compat.torch.flax_names`, for MLX's layouts: its convolutions are
    (out, \*space, in).
    """
    return _mapping.flax_names(params, modules, channels_last=True)


def _flatten(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves by name, as MLX's ``tree_flatten`` names them."""
    if not isinstance(tree, (Mapping, list, tuple)):
        yield prefix, tree
        return
    items = tree.items() if isinstance(tree, Mapping) else enumerate(tree)
    for key, value in items:
        yield from _flatten(value, f"{prefix}.{key}" if prefix else str(key))


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
