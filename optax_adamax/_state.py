"""The state of the transformation, and its conversion between storage formats."""

from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike

from optax_adamax import _storage

T = TypeVar("T")


class ScaleByAdamaxState(NamedTuple):
    """State of `scale_by_adamax`.

    With ``v_dtype`` bfloat16 or uint8, v is a :class:`FramedMaximum`; :func:`decode_state` turns
    m and v into plain floats.
    """

    # shape=(), dtype=int32: steps taken, stops at 2**31 - 1
    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    m: optax.Updates  # shaped like the parameters: first moment
    v: Any  # shaped like the parameters, real: infinity norm, or a FramedMaximum of it


def decode_state(state: T) -> T:
    """Returns the same state with m and v as floats: m and v of float32 where they were coded.

    Args:
      state: a :class:`ScaleByAdamaxState`, or any tree with such states in it, as the state of a
        chain is.

    Returns:
      The tree with each m and v as a tree of float32 arrays shaped like the parameters; moments
      that were float32 or float64 (or complex) already are left as they are.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_adamax import adamax, decode_state
      >>> tx = adamax(0.002, m_dtype="int8", v_dtype="uint8")
      >>> params = jnp.array([1.0, 2.0])
      >>> _, state = tx.update(jnp.array([0.1, -0.2]), tx.init(params), params)
      >>> print(decode_state(state)[0].v)
      [0.10406212 0.2081242 ]
    """
    return _map_states(_decode, state)


def encode_state(state: T, m_dtype: DTypeLike | None = None, v_dtype: DTypeLike | None = None) -> T:
    """Converts a state to other storage formats, in the middle of a run or from a checkpoint.

    A moment that is in the wanted format already keeps its bits. Otherwise it is decoded and
    rounded to the nearest code.

    Args:
      state: a :class:`ScaleByAdamaxState`, or any tree with such states in it.
      m_dtype: as in :func:`scale_by_adamax`; None leaves float moments as they are and turns
        coded ones into float32.
      v_dtype: likewise.

    Returns:
      The tree in the new formats, ready for a transformation that was built with the same
      ``m_dtype`` and ``v_dtype``.

    Raises:
      ValueError: a dtype in which a moment cannot be kept.
      TypeError: no dtype, or complex moments in few bits.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_adamax import adamax, encode_state
      >>> state = adamax(0.002).init({"w": jnp.ones(3)})
      >>> encode_state(state, "int8", "uint8")[0].m["w"].dtype
      dtype('int8')
    """
    m_format, v_format = _storage.m_format(m_dtype), _storage.v_format(v_dtype)
    return _map_states(lambda s: _encode(s, m_format, v_format), state)


def _map_states(function: Any, tree: T) -> T:
    def is_state(x: Any) -> bool:
        return isinstance(x, ScaleByAdamaxState)

    return jax.tree.map(lambda x: function(x) if is_state(x) else x, tree, is_leaf=is_state)


def _decode(state: ScaleByAdamaxState) -> ScaleByAdamaxState:
    def decode_m(m: jax.Array, v: jax.Array) -> jax.Array:
        low_bit = m.dtype in (jnp.bfloat16, jnp.int8)
        return _storage.m_format(m.dtype).decode_m(m, v) if low_bit else m

    v = _decode_v(state.v)
    return ScaleByAdamaxState(state.count, jax.tree.map(decode_m, state.m, v), v)


def _decode_v(v: Any) -> Any:
    if not isinstance(v, _storage.FramedMaximum):
        return v
    unit = 1 / _storage.scale_of(v.phase)
    return jax.tree.map(lambda x: _storage.v_format(x.dtype).decode_v(x, unit), v.codes)


def _encode(
    state: ScaleByAdamaxState, m_format: _storage.MFormat, v_format: _storage.VFormat
) -> ScaleByAdamaxState:
    floats = _decode(state)
    keeps_v = _is_kept_as(v_format, state.v)
    v = state.v if keeps_v else _encode_v(floats.v, v_format)

    def encode_m(kept: jax.Array, m: jax.Array, v: jax.Array) -> jax.Array:
        like = jax.ShapeDtypeStruct(m.shape, m.dtype)
        v_format.zeros(like, real=True)  # which refuses complex parameters in few bits
        if m_format.dtype is None or (kept.dtype == m_format.dtype and keeps_v):
            return m if m_format.dtype is None else kept
        dtype = m_format.zeros(like, real=False).dtype
        return m_format.encode_m(m, v, jnp.int32(1 << 19)).astype(dtype)

    m = jax.tree.map(encode_m, state.m, floats.m, _decode_v(v))
    return ScaleByAdamaxState(state.count, m, v)


def _encode_v(v: Any, v_format: _storage.VFormat) -> Any:
    if isinstance(v_format, _storage.Float):
        return jax.tree.map(lambda x: x.astype(v_format.dtype or x.dtype), v)
    format_, phase = v_format, jnp.zeros((), jnp.uint32)
    scale = _storage.scale_of(phase)

    def encode(x: jax.Array) -> jax.Array:
        return format_.encode_v(x.astype(jnp.float32) * scale).astype(format_.dtype)

    return _storage.FramedMaximum(jax.tree.map(encode, v), phase)


def check_state(
    state: Any, m_format: _storage.MFormat, v_format: _storage.VFormat
) -> ScaleByAdamaxState:
    """Refuses the state of another transformation, or of other storage formats."""
    if not isinstance(state, ScaleByAdamaxState):
        hint = "Give its inner_state. " if hasattr(state, "inner_state") else ""
        raise TypeError(
            f"The state must be a ScaleByAdamaxState, but a {type(state).__name__} was given. "
            f"{hint}The state of a chain goes to the update of that chain; a checkpoint that was "
            f"read as a dict must be restored into the structure that init returns."
        )
    for name, format_, kept in (("m", m_format, state.m), ("v", v_format, state.v)):
        if not _is_kept_as(format_, kept):
            given = sorted({str(jnp.result_type(x)) for x in jax.tree.leaves(_codes(kept))})
            frame = " without its frame" if given == [str(format_.dtype)] else ""
            raise TypeError(
                f"The state keeps {name} as {' and '.join(given)}{frame}, but the transformation "
                f"was built with {name}_dtype={format_.dtype}: convert the state with "
                f"optax_adamax.encode_state(state, m_dtype, v_dtype)."
            )
    _check_is_whole(state)
    return state


def _check_is_whole(state: ScaleByAdamaxState) -> None:
    scalars: dict[str, tuple[Any, type]] = {"count": (state.count, jnp.integer)}
    if isinstance(state.v, _storage.FramedMaximum):
        scalars["phase"] = (state.v.phase, jnp.unsignedinteger)
    for name, (scalar, kind) in scalars.items():
        if scalar is None or not jnp.issubdtype(jnp.result_type(scalar), kind):
            raise TypeError(f"The state has {scalar} for {name}: {_RESTORE}")
    m, v = state.m, _codes(state.v)
    shapes = [[jnp.shape(x) for x in jax.tree.leaves(tree)] for tree in (m, v)]
    if jax.tree.structure(m) != jax.tree.structure(v) or shapes[0] != shapes[1]:
        raise ValueError(f"The state has m and v of different trees or shapes: {_RESTORE}")


_RESTORE = "restore the checkpoint into the structure and the dtypes that init returns."


def _is_kept_as(format_: _storage.MFormat | _storage.VFormat, moment: Any) -> bool:
    if isinstance(moment, _storage.FramedMaximum) != format_.is_framed:
        return False
    return all(format_.keeps(jnp.result_type(x)) for x in jax.tree.leaves(_codes(moment)))


def _codes(moment: Any) -> Any:
    return moment.codes if isinstance(moment, _storage.FramedMaximum) else moment
