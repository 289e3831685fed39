"""Conversion of states between storage formats."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from optax_adamax import _shared_scale, _state_checks
from optax_adamax._formats import Format, is_in_format, unwrap, wrap
from optax_adamax._m_formats import M_FORMATS, MFormat, m_format_of
from optax_adamax._memory_kind import preserving_memory_kind
from optax_adamax._numerics import saturating_cast, upcast
from optax_adamax._state import (
    ScaleByAdamaxState,
    container_of,
    formats_of,
    is_adamax_state,
    states_in,
)
from optax_adamax._v_formats import V_FORMATS, VFormat, v_format_of

T = TypeVar("T")

ROUND_TO_NEAREST = 1 << 31  # the rounding bits with which `MFormat.encode` rounds to nearest


def decode_state(state: T) -> T:
    """Converts quantized m and v of a state to float32.

    Args:
      state: a :class:`ScaleByAdamaxState`, or any tree that contains such states, for example the
        state of a chain or of ``flax.nnx.Optimizer``.

    Returns:
      The tree with m and v as trees like the parameters, of arrays with their shapes. Moments that
      are float32, float64 or complex are unchanged, and all others are float32. Arrays in host
      memory remain in host memory.

    Raises:
      TypeError: `state` contains no :class:`ScaleByAdamaxState`, or the dtypes of its codes or
        counters differ from those after ``init``.
      ValueError: m and v have different trees or shapes.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_adamax import adamax, decode_state
      >>> tx = adamax(0.002, v_dtype="bfloat16")
      >>> params = jnp.array([1.0, 2.0])
      >>> _, state = tx.update(jnp.array([0.25, -0.5]), tx.init(params), params)
      >>> print(decode_state(state)[0].v.round(2))
      [0.25 0.5 ]
    """
    return _map_states(_decode, state)


def encode_state(
    state: T, m_dtype: "DTypeLike | None" = None, v_dtype: "DTypeLike | None" = None
) -> T:
    """Converts a state to other storage formats, during a run or after loading a checkpoint.

    A moment in the requested format is unchanged, bit for bit. All other moments are decoded and
    rounded to the nearest value of the new format. If v changes, an int8 m is encoded again,
    because it is a ratio to v. float16 and bfloat16 arrays without a container are read as
    numbers; a checkpoint has them if all its floats were cast.

    Args:
      state: a :class:`ScaleByAdamaxState`, or any tree that contains such states, for example the
        state of a chain or of ``flax.nnx.Optimizer``.
      m_dtype: storage format of m, as in :func:`scale_by_adamax`. None converts quantized moments
        to float32, and does not change moments in full precision.
      v_dtype: storage format of v. None: as for m.

    Returns:
      The tree in the new formats, which a transformation with the same ``m_dtype`` and ``v_dtype``
      accepts. Arrays in host memory remain in host memory.

    Raises:
      ValueError: a dtype that is not a storage format, or a `state` for which
        :func:`decode_state` raises it.
      TypeError: an argument that is not a dtype; complex moments in a quantized format; a `state`
        for which :func:`decode_state` raises it.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_adamax import adamax, encode_state
      >>> state = adamax(0.002).init({"w": jnp.ones(3)})
      >>> encode_state(state, "int8", "uint8")[0].m.ratio_int8["w"].dtype
      dtype('int8')
    """
    m_format, v_format = m_format_of(m_dtype), v_format_of(v_dtype)
    return _map_states(lambda s: _encode(s, m_format, v_format), state)


def normalize_dtypes(state: ScaleByAdamaxState) -> ScaleByAdamaxState:
    """Casts moments that were cast to half precision back to the dtypes of a storage format.

    Raises:
      TypeError: the dtypes of codes or counters differ from those after ``init``.
      ValueError: m and v have different trees or shapes.
    """
    _state_checks.check_concrete_types(state)
    _state_checks.check_counters(state)
    _state_checks.check_leaves(state)
    m = _normalize_moment("m", state.m, M_FORMATS)
    v = _normalize_moment("v", state.v, V_FORMATS)
    state = ScaleByAdamaxState(state.count, m, v)
    m_format, v_format = formats_of(state)
    m, v = unwrap(m, m_format), unwrap(v, v_format)
    # Lists of leaves, because the metadata of Flax variables may differ between m and v.
    _state_checks.check_same_trees(*map(jax.tree.leaves, (m, v)))
    return state


def _normalize_moment(name: str, moment: Any, table: Mapping[str | None, Format]) -> Any:
    if any(is_in_format(moment, format, table) for format in table.values()):
        return moment
    _state_checks.check_readable(name, moment, table)
    container = container_of(moment, table)
    if container is None:
        cast = preserving_memory_kind(
            lambda x: upcast(x, np.promote_types(x.real.dtype, np.float32))
        )
        return jax.tree.map(cast, moment)
    dtype = next(format.dtype for format in table.values() if format.container is container)
    cast = preserving_memory_kind(lambda x: x.astype(dtype))
    return container(jax.tree.map(cast, moment[0]), *moment[1:])


def _map_states(function: Callable[[ScaleByAdamaxState], Any], tree: T) -> T:
    states_in(tree)  # raises an error if the tree contains no state
    return jax.tree.map(
        lambda x: function(x) if is_adamax_state(x) else x, tree, is_leaf=is_adamax_state
    )


def _map_leaves(function: Callable[..., jax.Array], tree: Any, *others: Any) -> Any:
    """Maps over the leaves of trees whose Flax variables may have different metadata."""
    lists = map(jax.tree.leaves, (tree, *others))
    new = [function(*leaves) for leaves in zip(*lists, strict=True)]
    return jax.tree.structure(tree).unflatten(new)


def _single_leaf(tree: Any) -> jax.Array:
    """Returns the array in a Flax variable, or the array itself."""
    (leaf,) = jax.tree.leaves(tree)
    return leaf


def _decode(state: ScaleByAdamaxState) -> ScaleByAdamaxState:
    state = normalize_dtypes(state)
    m_format, _ = formats_of(state)
    m, v = unwrap(state.m, m_format), _decode_v(state)
    if m_format.is_quantized:
        decode = preserving_memory_kind(functools.partial(_decode_leaf_of_m, m_format=m_format))
        m = _map_leaves(decode, m, v)
    return ScaleByAdamaxState(state.count, m, v)


def _decode_v(state: ScaleByAdamaxState) -> Any:
    _, v_format = formats_of(state)
    if not v_format.has_shared_scale:
        return state.v
    decode = preserving_memory_kind(functools.partial(decode_scaled, v_format=v_format))
    phase = _single_leaf(state.v.phase)
    return jax.tree.map(lambda codes: decode(codes, phase), unwrap(state.v, v_format))


# Outside of jax.jit, JAX compiles every operation separately for every shape. So the conversion of
# a leaf is one jitted function.


@functools.partial(jax.jit, static_argnames="m_format")
def _decode_leaf_of_m(m: jax.Array, v: jax.Array, m_format: MFormat) -> jax.Array:
    return m_format.decode(m, v)


@functools.partial(jax.jit, static_argnames="v_format")
def decode_scaled(codes: jax.Array, phase: jax.Array, v_format: VFormat) -> jax.Array:
    """Decodes v of one leaf with a shared scale."""
    # A state made by `jax.vmap` has one phase per row.
    phase = phase.reshape(phase.shape + (1,) * (codes.ndim - phase.ndim))
    w = v_format.decode(codes)
    return w * (1 / _shared_scale.scale_from_phase(phase))


def _encode(state: ScaleByAdamaxState, m_format: MFormat, v_format: VFormat) -> ScaleByAdamaxState:
    state = normalize_dtypes(state)
    floats = _decode(state)
    has_v_format = is_in_format(state.v, v_format, V_FORMATS)
    has_m_format = is_in_format(state.m, m_format, M_FORMATS)

    @preserving_memory_kind
    def encode_v(v: jax.Array, m: jax.Array) -> jax.Array:
        dtype = _stored_dtype(v_format, v, m, real=True)
        return v if v.dtype == dtype else _encode_leaf_of_v(v, v_format, dtype)

    @preserving_memory_kind
    def encode_m(m: jax.Array, v: jax.Array) -> jax.Array:
        dtype = _stored_dtype(m_format, m, m, real=False)
        return m if m.dtype == dtype else _encode_leaf_of_m(m, v, m_format, dtype)

    m, v = state.m, state.v
    if not has_v_format:
        zeros = preserving_memory_kind(lambda count: jnp.zeros_like(count, jnp.uint32))
        phase = jax.tree.map(zeros, state.count)
        v = wrap(_map_leaves(encode_v, floats.v, floats.m), v_format, phase)
    if not (has_m_format and (has_v_format or not m_format.is_ratio)):
        decoded = _decode_v(state._replace(v=v))
        m = wrap(_map_leaves(encode_m, floats.m, decoded), m_format)
    return ScaleByAdamaxState(state.count, m, v)


def _stored_dtype(format: Format, x: jax.Array, m: jax.Array, *, real: bool) -> np.dtype:
    """Returns the dtype of x, m or v of a leaf, in a format; raises if it quantizes a complex m."""
    return x.dtype if format.dtype is None else format.stored_dtype(m, real=real)


@functools.partial(jax.jit, static_argnames=("v_format", "dtype"))
def _encode_leaf_of_v(v: jax.Array, v_format: VFormat, dtype: np.dtype) -> jax.Array:
    scale = _shared_scale.scale_from_phase(jnp.uint32(0)).astype(v.dtype)
    return saturating_cast(v_format.encode(v * scale if v_format.has_shared_scale else v), dtype)


@functools.partial(jax.jit, static_argnames=("m_format", "dtype"))
def _encode_leaf_of_m(m: jax.Array, v: jax.Array, m_format: MFormat, dtype: np.dtype) -> jax.Array:
    return saturating_cast(m_format.encode(m, v, jnp.uint32(ROUND_TO_NEAREST)), dtype)
