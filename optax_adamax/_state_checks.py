"""Checks of a state that is passed to `update`, converted or described."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_adamax._formats import Format, is_in_format, unwrap
from optax_adamax._m_formats import M_FORMATS, MFormat
from optax_adamax._messages import ORDER, conversion_advice, describe_value, with_article
from optax_adamax._numerics import dtype_or_none
from optax_adamax._state import ScaleByAdamaxState, container_of, is_adamax_state, stored_tree
from optax_adamax._v_formats import V_FORMATS, VFormat

RESTORE = "Restore a checkpoint into the structure and the dtypes that init returns."
AVERAGE = (
    "To average states over workers, average the floats of decode_state(state), leave count as it "
    "is, and convert the result with encode_state."
)
SAME_MOMENTS = (
    "To continue with the same moments, write optax.tree.set(tx.init(params), "
    "count=state[0].count, m=state[0].m, v=state[0].v)."
)


class ChainedTransformation(NamedTuple):
    """A transformation after `scale_by_adamax` in the chain of `adamax` or `adamaxw`."""

    argument: str  # the name of its hyperparameter
    is_schedule: bool  # whether the hyperparameter is a schedule; then its state has a count
    is_masked: bool = False  # whether it is inside `optax.masked`


def check_state(state: Any, m_format: MFormat, v_format: VFormat) -> ScaleByAdamaxState:
    """Checks that a state was made by the same transformation, with the same storage formats."""
    if not isinstance(state, ScaleByAdamaxState):
        raise TypeError(
            f"The state must be a ScaleByAdamaxState, but {describe_value(state)} was given. "
            f"{_wrong_state_hint(state)}"
        )
    check_counters(state)
    check_leaves(state)
    shape = jnp.shape(state.count)
    if shape:
        raise ValueError(
            f"The count of the state must be a scalar, but its shape is {shape}. Pass a state that "
            f"jax.vmap(tx.init) or jax.vmap(tx.update) returned to jax.vmap(tx.update)."
        )
    for name, format, table, moment in (
        ("m", m_format, M_FORMATS, state.m),
        ("v", v_format, V_FORMATS, state.v),
    ):
        if not is_in_format(moment, format, table):
            check_readable(name, moment, table)
            wanted = [_argument(n, f) for n, f in (("m", m_format), ("v", v_format))]
            raise TypeError(
                f"The state stores {name} as {_storage_description(moment, table)}, but the "
                f"transformation was built with {_argument(name, format)}. Convert the state with "
                f"optax_adamax.encode_state(state, {', '.join(wanted)})."
            )
    check_same_trees(unwrap(state.m, m_format), unwrap(state.v, v_format))
    return state


def check_leaves(state: ScaleByAdamaxState) -> None:
    """Checks that JAX can read the leaves of m and v; it prints the elements of other arrays."""
    for name, moment in (("m", state.m), ("v", state.v)):
        for x in jax.tree.leaves(moment):
            if not isinstance(x, jax.Array) and dtype_or_none(x) is None:
                raise TypeError(
                    f"The {name} of the state must consist of arrays, but it contains "
                    f"{describe_value(x)}. {conversion_advice(x) or RESTORE}"
                )


def check_counters(state: ScaleByAdamaxState) -> None:
    """Checks the dtypes of the step count and, for a quantized v, of the phase."""
    counters: dict[str, tuple[Any, Any]] = {"count": (state.count, jnp.integer)}
    if container_of(state.v, V_FORMATS) is not None:
        counters["phase"] = (state.v.phase, jnp.unsignedinteger)
    for name, (counter, kind) in counters.items():
        (leaf, *others) = jax.tree.leaves(counter) or (None,)
        if leaf is None or others or not _is_counter(jnp.result_type(leaf), kind):
            dtype = "int32" if name == "count" else "uint32"
            is_float = leaf is not None and jnp.issubdtype(jnp.result_type(leaf), jnp.floating)
            raise TypeError(
                f"The {name} of the state must be an array of dtype {dtype}, but it is "
                f"{describe_value(leaf)}. {RESTORE}{f' {AVERAGE}' if is_float else ''}"
            )


def _is_counter(dtype: np.dtype, kind: Any) -> bool:
    # `update` casts a count of 64 bits. A phase of 64 bits would not overflow.
    sizes = (4,) if kind is jnp.unsignedinteger else (4, 8)
    return jnp.issubdtype(dtype, kind) and dtype.itemsize in sizes


def check_concrete_types(state: ScaleByAdamaxState) -> None:
    """Checks that a state consists of arrays, not of shapes."""
    if any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(state)):
        raise TypeError(
            "The state must consist of arrays, but it contains ShapeDtypeStructs. For the shapes "
            "and dtypes of a converted state, write "
            "jax.eval_shape(lambda s: encode_state(s, m_dtype, v_dtype), state)."
        )


def check_readable(name: str, moment: Any, table: Mapping[str | None, Format]) -> None:
    """Checks that a moment of a state can be decoded.

    Raises:
      TypeError: codes without their container, or codes in another dtype.
    """
    container = container_of(moment, table)
    dtypes = [jnp.result_type(x) for x in jax.tree.leaves(moment[0] if container else moment)]
    formats = [format for format in table.values() if format.container is container]
    stored = formats[0].dtype if container else None
    if stored is None or jnp.issubdtype(stored, jnp.inexact):
        if all(jnp.issubdtype(dtype, jnp.inexact) for dtype in dtypes):
            return
        found = "float arrays" if stored is None else f"{stored} arrays"
    else:
        if all(dtype == stored for dtype in dtypes):
            return
        found = f"{stored} codes, which cannot be cast or averaged"
    where = (
        "outside of a container" if container is None else f"in {with_article(container.__name__)}"
    )
    raise TypeError(
        f"The state must store {name} {where} as {found}, but its dtype is "
        f"{_dtypes(moment)}. {RESTORE} {AVERAGE}"
    )


def check_same_trees(m: Any, v: Any) -> None:
    """Checks that m and v of a state belong to the same parameters."""
    shapes = [[jnp.shape(x) for x in jax.tree.leaves(tree)] for tree in (m, v)]
    if jax.tree.structure(m) != jax.tree.structure(v) or shapes[0] != shapes[1]:
        raise ValueError(f"The m and v of the state must have the same tree and shapes. {RESTORE}")


def check_chain_state(state: Any, after_core: tuple[ChainedTransformation, ...]) -> None:
    """Checks the tuple of states of `adamax` or `adamaxw`, except the state of `scale_by_adamax`.

    Without this check, `optax.chain` would raise errors that do not name the cause.

    Args:
      state: the state given to `update`.
      after_core: the transformations after `scale_by_adamax`.
    """
    is_chain = isinstance(state, (tuple, list)) and not hasattr(state, "_fields")
    if not is_chain or len(state) != 1 + len(after_core):
        given = f"a tuple of {len(state)}" if is_chain else describe_value(state)
        is_other_chain = is_chain and any(map(is_adamax_state, state))
        raise TypeError(
            f"The state must be the tuple of {1 + len(after_core)} states that init returns, but "
            f"{given} was given. "
            f"{SAME_MOMENTS if is_other_chain else _wrong_state_hint(state)}"
        )
    for expected, found in zip(after_core, state[1:], strict=True):
        is_masked = isinstance(found, optax.MaskedState)
        inner = found.inner_state if isinstance(found, optax.MaskedState) else found
        is_schedule = "count" in getattr(inner, "_fields", ())
        kinds = [_kind(expected.argument, *x) for x in ((is_schedule, is_masked), expected[1:])]
        if kinds[0] != kinds[1]:
            raise TypeError(
                f"The state was made with {kinds[0]}, but the transformation was built with "
                f"{kinds[1]}. {SAME_MOMENTS}"
            )


def _kind(argument: str, is_schedule: bool, is_masked: bool) -> str:
    mask = " and a mask" if is_masked else ""
    return f"{'a schedule' if is_schedule else 'a number'} as {argument}{mask}"


def _argument(name: str, format: Format) -> str:
    return f"{name}_dtype={None if format.dtype is None else format.dtype.name!r}"


def _storage_description(moment: Any, table: Mapping[str | None, Format]) -> str:
    """Names the dtypes of m or v in a state, and the container around them."""
    container = container_of(moment, table)
    return _dtypes(moment) + (f" in {with_article(container.__name__)}" if container else "")


def _dtypes(moment: Any) -> str:
    """Names the dtypes of m or v, without its phase."""
    leaves = jax.tree.leaves(stored_tree(moment))
    return " and ".join(sorted({str(jnp.result_type(x)) for x in leaves}))


def _wrong_state_hint(state: Any) -> str:
    """Returns advice for an object that is not the state of the transformation."""
    if isinstance(state, optax.ScaleByAdamState):
        return (
            "Convert it with optax_adamax.compat.optax.load_state(state, params, tx), which reads "
            "mu as m and nu as v."
        )
    if is_adamax_state(state):
        return "Pass the whole state of the chain, not the state of one of its transformations."
    if hasattr(state, "inner_state"):
        return (
            "Pass its inner_state, or build the transformation with the wrapper or the nonfinite "
            "policy that made it."
        )
    if isinstance(state, (tuple, list)) and any(map(is_adamax_state, state)):
        return "It is the state of a chain: pass it to the update of that chain."
    return f"{ORDER} {RESTORE}"
