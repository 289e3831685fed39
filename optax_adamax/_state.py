"""The state of the transformation, and its conversion between storage formats."""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import DTypeLike

from optax_adamax import _shared_scale
from optax_adamax._formats import Format, is_in_format, unwrap, wrap
from optax_adamax._m_formats import M_FORMATS, MFormat, m_format_of
from optax_adamax._numerics import preserving_memory_kind, saturating_cast
from optax_adamax._v_formats import V_FORMATS, VFormat, v_format_of

T = TypeVar("T")


class ScaleByAdamaxState(NamedTuple):
    """State of `scale_by_adamax`.

    m and v are trees like the parameters; what is coded stands in a node that says how: m in a
    :class:`RatioInt8`, v in a :class:`ScaledBfloat16` or :class:`ScaledUint8`.
    :func:`decode_state` turns both into plain floats.
    """

    # shape=(), dtype=int32: steps taken, stops at 2**31 - 1
    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    m: Any  # first moment
    v: Any  # infinity norm, real


def decode_state(state: T) -> T:
    """Returns the same state with m and v as floats: of float32 where they were in fewer bits.

    Args:
      state: a :class:`ScaleByAdamaxState`, or any tree with such states in it, as the state of a
        chain is.

    Returns:
      The tree with each m and v as a tree of float32 arrays shaped like the parameters; moments
      that were float32 or float64 (or complex) already are left as they are. What was in the
      memory of the host is there again.

    Raises:
      TypeError: there is no :class:`ScaleByAdamaxState` in `state`.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_adamax import adamax, decode_state
      >>> tx = adamax(0.002, m_dtype="int8", v_dtype="uint8")
      >>> params = jnp.array([1.0, 2.0])
      >>> _, state = tx.update(jnp.array([0.1, -0.2]), tx.init(params), params)
      >>> print(decode_state(state)[0].v.round(3))
      [0.104 0.208]
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
      ``m_dtype`` and ``v_dtype``. What was in the memory of the host is there again.

    Raises:
      ValueError: a dtype in which a moment cannot be kept.
      TypeError: no dtype, complex moments in few bits, or no :class:`ScaleByAdamaxState` in
        `state`.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_adamax import adamax, encode_state
      >>> state = adamax(0.002).init({"w": jnp.ones(3)})
      >>> encode_state(state, "int8", "uint8")[0].m.ratio_int8["w"].dtype
      dtype('int8')
    """
    m_format, v_format = m_format_of(m_dtype), v_format_of(v_dtype)
    return _map_states(lambda s: _encode(s, m_format, v_format), state)


def formats_of(state: ScaleByAdamaxState) -> tuple[MFormat, VFormat]:
    """How a state keeps m and v."""
    return _m_format(state.m), _v_format(state.v)


def dtypes_of(state: ScaleByAdamaxState) -> tuple[np.dtype | None, np.dtype | None]:
    """The `m_dtype` and `v_dtype` of a state; None where a moment is as wide as the arithmetic."""
    m_format, v_format = formats_of(state)
    return m_format.dtype, v_format.dtype


def _m_format(m: Any) -> MFormat:
    return next(f for f in M_FORMATS.values() if is_in_format(m, f, M_FORMATS))


def _v_format(v: Any) -> VFormat:
    return next(f for f in V_FORMATS.values() if is_in_format(v, f, V_FORMATS))


def states_in(tree: Any) -> list[ScaleByAdamaxState]:
    """The states of `scale_by_adamax` in a tree, at least one.

    Raises:
      TypeError: there is none.
    """
    found = [x for x in jax.tree.leaves(tree, is_leaf=_is_state) if _is_state(x)]
    if not found:
        raise TypeError(
            f"There is no ScaleByAdamaxState in this {type(tree).__name__}: give the state of a "
            f"transformation of optax_adamax. compat.optax.load_state makes one of the state of "
            f"optax.adamax."
        )
    return found


def _map_states(function: Any, tree: T) -> T:
    states_in(tree)  # refuses a tree without one
    return jax.tree.map(lambda x: function(x) if _is_state(x) else x, tree, is_leaf=_is_state)


def _is_state(x: Any) -> bool:
    return isinstance(x, ScaleByAdamaxState)


def _decode(state: ScaleByAdamaxState) -> ScaleByAdamaxState:
    m_format, v = _m_format(state.m), _decode_v(state.v)
    m = unwrap(state.m, m_format)
    if m_format.is_quantized:
        decode = preserving_memory_kind(functools.partial(_decode_leaf_of_m, m_format=m_format))
        m = jax.tree.map(decode, m, v)
    return ScaleByAdamaxState(state.count, m, v)


def _decode_v(v: Any) -> Any:
    v_format = _v_format(v)
    if not v_format.has_shared_scale:
        return v

    decode = preserving_memory_kind(functools.partial(decode_framed, v_format=v_format))
    return jax.tree.map(lambda codes: decode(codes, v.phase), unwrap(v, v_format))


# The conversion of a leaf is compiled: by itself each operation would be a program for each shape.


@functools.partial(jax.jit, static_argnames="m_format")
def _decode_leaf_of_m(m: jax.Array, v: jax.Array, m_format: MFormat) -> jax.Array:
    return m_format.decode(m, v)


@functools.partial(jax.jit, static_argnames="v_format")
def decode_framed(codes: jax.Array, phase: jax.Array, v_format: VFormat) -> jax.Array:
    """v of one leaf that is kept in a frame of this phase."""
    # In a state made by `jax.vmap` there is a phase for each row.
    phase = phase.reshape(phase.shape + (1,) * (codes.ndim - phase.ndim))
    w = v_format.decode(codes)
    return jnp.minimum(w * (1 / _shared_scale.scale_from_phase(phase)), jnp.finfo(w.dtype).max)


def _encode(state: ScaleByAdamaxState, m_format: MFormat, v_format: VFormat) -> ScaleByAdamaxState:
    floats = _decode(state)
    keeps_v = is_in_format(state.v, v_format, V_FORMATS)
    keeps_m = is_in_format(state.m, m_format, M_FORMATS)

    @preserving_memory_kind
    def encode_v(v: jax.Array, m: jax.Array) -> jax.Array:
        dtype = _stored_dtype(v_format, v, m, real=True)
        return v if v.dtype == dtype else _encode_leaf_of_v(v, v_format, dtype)

    @preserving_memory_kind
    def encode_m(m: jax.Array, v: jax.Array) -> jax.Array:
        dtype = _stored_dtype(m_format, m, m, real=False)
        return m if m.dtype == dtype else _encode_leaf_of_m(m, v, m_format, dtype)

    m, v = state.m, state.v
    if not keeps_v:
        phase = preserving_memory_kind(lambda count: jnp.zeros_like(count, jnp.uint32))(state.count)
        v = wrap(jax.tree.map(encode_v, floats.v, floats.m), v_format, phase)
    if not (keeps_m and (keeps_v or not m_format.is_ratio)):
        m = wrap(jax.tree.map(encode_m, floats.m, _decode_v(v)), m_format)
    return ScaleByAdamaxState(state.count, m, v)


def _stored_dtype(format: Format, x: jax.Array, m: jax.Array, *, real: bool) -> np.dtype:
    """The dtype for x, which is m or v of a leaf; refuses complex parameters in few bits."""
    return x.dtype if format.dtype is None else format.stored_dtype(m, real=real)


@functools.partial(jax.jit, static_argnames=("v_format", "dtype"))
def _encode_leaf_of_v(v: jax.Array, v_format: VFormat, dtype: np.dtype) -> jax.Array:
    scale = _shared_scale.scale_from_phase(jnp.uint32(0)).astype(v.dtype)
    return saturating_cast(v_format.encode(v * scale if v_format.has_shared_scale else v), dtype)


@functools.partial(jax.jit, static_argnames=("m_format", "dtype"))
def _encode_leaf_of_m(m: jax.Array, v: jax.Array, m_format: MFormat, dtype: np.dtype) -> jax.Array:
    return saturating_cast(m_format.encode(m, v, jnp.uint32(1 << 31)), dtype)


def check_state(state: Any, m_format: MFormat, v_format: VFormat) -> ScaleByAdamaxState:
    """Refuses the state of another transformation, or of other storage formats."""
    if not isinstance(state, ScaleByAdamaxState):
        raise TypeError(f"The state must be a ScaleByAdamaxState, but {_what_it_is(state)}")
    for name, format, table, moment in (
        ("m", m_format, M_FORMATS, state.m),
        ("v", v_format, V_FORMATS, state.v),
    ):
        if not is_in_format(moment, format, table):
            raise TypeError(
                f"The state keeps {name} as {_how(moment, table)}, but the transformation was "
                f"built with {name}_dtype={format.dtype}: convert the state with "
                f"optax_adamax.encode_state(state, m_dtype, v_dtype), and restore a checkpoint "
                f"into the structure and the dtypes that init returns."
            )
    scalars: dict[str, tuple[Any, type]] = {"count": (state.count, jnp.integer)}
    if v_format.has_shared_scale:
        scalars["phase"] = (state.v.phase, jnp.unsignedinteger)
    for name, (scalar, kind) in scalars.items():
        if scalar is None or not jnp.issubdtype(jnp.result_type(scalar), kind):
            raise TypeError(f"The state has {scalar} for {name}: {_RESTORE}")
    m, v = unwrap(state.m, m_format), unwrap(state.v, v_format)
    shapes = [[jnp.shape(x) for x in jax.tree.leaves(tree)] for tree in (m, v)]
    if jax.tree.structure(m) != jax.tree.structure(v) or shapes[0] != shapes[1]:
        raise ValueError(f"The state has m and v of different trees or shapes: {_RESTORE}")
    return state


def _how(moment: Any, table: Mapping[str | None, Format]) -> str:
    """The dtype in which m or v of a state is kept, and the node, if it is one of a format."""
    nodes = [format.container for format in table.values() if type(moment) is format.container]
    dtypes = sorted({str(jnp.result_type(x)) for x in jax.tree.leaves(moment)} - {"uint32"})
    return " and ".join(dtypes) + (f" in a {nodes[0].__name__}" if nodes and nodes[0] else "")


def _what_it_is(state: Any) -> str:
    """What was given instead of a state, and what to do about it."""
    if isinstance(state, optax.ScaleByAdamState):
        return (
            "a ScaleByAdamState of optax was given: convert it, with mu for m and nu for v, by "
            "optax_adamax.compat.optax.load_state(state, params, tx)."
        )
    hint = "Give its inner_state. " if hasattr(state, "inner_state") else ""
    return (
        f"a {type(state).__name__} was given. {hint}The state of a chain goes to the update of "
        f"that chain; a checkpoint that was read as a dict must be restored into the structure "
        f"that init returns."
    )


_RESTORE = "restore the checkpoint into the structure and the dtypes that init returns."
