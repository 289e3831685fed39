"""`encode_state` and `decode_state` convert extreme, half-precision, Flax and averaged states."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax_boxes import nnx
from jax.flatten_util import ravel_pytree

from optax_adamax import (
    ScaleByAdamaxState,
    adamax,
    decode_state,
    describe_state,
    encode_state,
    scale_by_adamax,
)
from optax_adamax._m_formats import M_FORMATS
from optax_adamax._v_formats import V_FORMATS

MAX = np.finfo(np.float32).max
FORMATS = [(None, None), ("int8", "uint8"), ("bfloat16", "bfloat16")]


def state_of(m, v):
    return ScaleByAdamaxState(jnp.int32(5), *(jnp.asarray(x, jnp.float32) for x in (m, v)))


@pytest.mark.parametrize("v_dtype", ["bfloat16", "uint8"])
@pytest.mark.parametrize("phase", [0, 2**31, 2**32 - 1])
def test_v_near_the_largest_float_stays_finite(v_dtype, phase):
    """Rounded up in units of the shared scale, v would be infinite in its own units."""
    largest = np.float32([MAX, MAX * 0.999, V_FORMATS[v_dtype].range[1], 1.0])
    state = encode_state(state_of(0 * largest, largest), None, v_dtype)
    v = np.asarray(decode_state(state).v)
    inside = largest <= V_FORMATS[v_dtype].range[1]
    np.testing.assert_allclose(v[inside], largest[inside], rtol=V_FORMATS[v_dtype].relative_error)
    assert np.isfinite(v).all() and (v[~inside] >= v[inside].max()).all()
    scaled = state._replace(v=state.v._replace(phase=jnp.uint32(phase)))
    assert np.isfinite(np.asarray(decode_state(scaled).v)).all()
    assert np.isfinite(describe_state(scaled).leaves[0].v_max)


@pytest.mark.parametrize("v_dtype", ["bfloat16", "uint8"])
def test_rows_of_a_vmapped_state_are_decoded_with_their_own_phases(v_dtype):
    tx = scale_by_adamax(v_dtype=v_dtype)
    state = tx.init({"w": jnp.zeros(3)})

    def run(phase, g):
        start = state._replace(v=state.v._replace(phase=phase))
        return tx.update({"w": g}, start)[1]

    phases, g = jnp.uint32([0, 2**31, 2**32 - 1]), jnp.float32([[1, 2, 3], [4, 5, 6], [7, 8, 9]])
    states = jax.vmap(run)(phases, g)
    decoded = np.asarray(decode_state(states).v["w"])
    rows = [decode_state(run(*row)).v["w"] for row in zip(phases, g, strict=True)]
    np.testing.assert_array_equal(decoded, np.stack(rows))
    error = V_FORMATS[v_dtype].relative_error
    np.testing.assert_allclose(decoded, g, rtol=error)
    assert describe_state(states).leaves[0].v_max == pytest.approx(9, rel=error)


def test_m_near_the_largest_float_stays_finite():
    """The ratio 1.94 is rounded up to 2."""
    state = encode_state(state_of([MAX, -MAX, MAX / 2], [MAX, MAX / 1.94, MAX]), "int8")
    m = np.asarray(decode_state(state).m, np.float64)
    assert np.isfinite(m).all()
    np.testing.assert_allclose(m, [MAX, -MAX, MAX / 2], rtol=M_FORMATS["int8"].relative_error)


def test_float64_moments_beyond_float32_saturate():
    with jax.enable_x64(True):
        m, v = np.float64([-1e300, 0.5]), np.float64([1e300, 2.0])
        state = encode_state(ScaleByAdamaxState(jnp.int32(5), m, v), "float32", "float32")
    assert state.m.dtype == state.v.dtype == np.float32
    assert state.m.tolist() == [-MAX, 0.5] and state.v.tolist() == [MAX, 2.0]


@pytest.mark.parametrize(
    "source, target", [("uint8", None), (None, "uint8"), ("uint8", "bfloat16")]
)
def test_int8_m_is_preserved_if_the_format_of_v_changes(source, target):
    """The codes of m are ratios to v, so they change if v is rounded to another format."""
    v = np.geomspace(1, 8, 1000, dtype=np.float32)
    ratios = np.asarray(decode_state(encode_state(state_of(0.9 * v, v), "int8")).m) / v
    state = encode_state(state_of(ratios[0] * v, v), "int8", source)
    before, converted = decode_state(state), encode_state(state, "int8", target)
    after = decode_state(converted)
    # Half of the distance between two codes of m. The two v differ by more.
    np.testing.assert_allclose(after.m, before.m, rtol=1 / 15)
    if target == "uint8":
        assert np.max(np.abs(after.v / before.v - 1)) > 1 / 14
        assert np.any(converted.m.ratio_int8 != state.m.ratio_int8)


@pytest.mark.parametrize(
    "m_dtype, v_dtype, half",
    [*((*formats, jnp.float16) for formats in FORMATS), (None, None, jnp.bfloat16)],
)
def test_checkpoint_cast_to_half_precision_is_converted(m_dtype, v_dtype, half):
    tx = adamax(0.1, m_dtype=m_dtype, v_dtype=v_dtype)
    g = {"a": np.float32([0.5, -2.0, 0.0]), "b": [np.float32(3.0)]}
    _, state = jax.jit(tx.update)(g, tx.init(g))
    halves = jax.tree.map(
        lambda x: x.astype(half) if jnp.issubdtype(x.dtype, jnp.floating) else x, state
    )
    converted = encode_state(halves, m_dtype, v_dtype)
    assert jax.tree.map(jnp.result_type, converted) == jax.tree.map(jnp.result_type, state)
    for read in (decode_state(halves), decode_state(converted)):
        for x, y in zip(jax.tree.leaves(read), jax.tree.leaves(decode_state(state)), strict=True):
            np.testing.assert_allclose(x, y, rtol=2**-7, atol=1e-7)
    assert describe_state(halves).leaves[0].v_max == pytest.approx(2, rel=1 / 8)
    jax.jit(tx.update)(g, converted)


def test_half_precision_in_some_leaves_is_converted():
    tx = scale_by_adamax()
    state = tx.init({"a": np.ones(2, np.float32), "b": np.ones(2, np.complex64)})
    mixed = state._replace(m={**state.m, "a": jnp.ones(2, jnp.bfloat16)})
    read = decode_state(mixed)
    assert jax.tree.map(jnp.result_type, read) == jax.tree.map(jnp.result_type, state)
    np.testing.assert_array_equal(read.m["a"], 1)


@pytest.mark.parametrize("m_dtype, v_dtype", FORMATS[1:2])
def test_states_of_flax_optimizers_are_converted(m_dtype, v_dtype):
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    full = nnx.Optimizer(model, adamax(0.1), wrt=nnx.Param)
    quantized = nnx.Optimizer(model, adamax(0.1, m_dtype=m_dtype, v_dtype=v_dtype), wrt=nnx.Param)
    gradients = jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param))
    full.update(model, gradients)
    converted = encode_state(full.opt_state, m_dtype, v_dtype)
    assert jax.tree.structure(converted) == jax.tree.structure(quantized.opt_state)
    decoded = decode_state(converted)
    assert jax.tree.structure(decoded) == jax.tree.structure(full.opt_state)
    description = describe_state(converted)
    assert [leaf.path for leaf in description.leaves] == ["bias", "kernel"]
    assert description.leaves[0].v_max == pytest.approx(1, rel=1 / 8)
    quantized.opt_state = converted
    quantized.update(model, gradients)
    assert int(quantized.opt_state[0].count[...]) == 2
    assert len(repr(quantized.opt_state)) < 500


def average(state, axis, m_dtype, v_dtype):
    """Averages states over workers in the documented way."""
    floats = jax.tree.map(
        lambda x: jax.lax.pmean(x, axis) if jnp.issubdtype(x.dtype, jnp.floating) else x,
        decode_state(state),
    )
    return encode_state(floats, m_dtype, v_dtype)


@pytest.mark.parametrize("m_dtype, v_dtype", FORMATS)
def test_averaged_states_of_workers_can_be_encoded(m_dtype, v_dtype):
    tx = adamax(0.1, m_dtype=m_dtype, v_dtype=v_dtype)
    g = jnp.asarray(np.random.default_rng(0).normal(size=(2, 50)), jnp.float32)

    def worker(g):
        return average(tx.update(g, tx.init(g))[1], "workers", m_dtype, v_dtype)

    states = jax.jit(jax.vmap(worker, axis_name="workers"))(g)
    averaged = jax.tree.map(lambda x: x[0], states)
    assert jax.tree.map(jnp.result_type, averaged) == jax.tree.map(jnp.result_type, tx.init(g[0]))
    m, v = decode_state(averaged)[0][1:]
    exact_m, exact_v = (0.1 * g).mean(0), jnp.abs(g).mean(0)
    if v_dtype is None:
        np.testing.assert_allclose(v, exact_v, rtol=1e-5)
    else:
        np.testing.assert_allclose(v, exact_v, rtol=2.1 * V_FORMATS[v_dtype].relative_error)
    assert np.all(np.abs(m - exact_m) <= 0.1 * np.abs(g).max(0))
    jax.jit(tx.update)(g[0], averaged)


def test_pmean_of_a_quantized_state_raises_in_the_next_step():
    tx = adamax(0.1, m_dtype="int8", v_dtype="uint8")
    g = jnp.ones((2, 3))
    states = jax.vmap(lambda g: jax.lax.pmean(tx.init(g), "x"), axis_name="x")(g)
    state = jax.tree.map(lambda x: x[0], states)
    with pytest.raises(TypeError, match="To average states over workers, average the floats"):
        tx.update(g[0], state)


@pytest.mark.parametrize("m_dtype, v_dtype", FORMATS[:2])
def test_decoded_state_is_restored_by_unravel(m_dtype, v_dtype):
    tx = adamax(0.1, m_dtype=m_dtype, v_dtype=v_dtype)
    g = {"a": np.float32([0.5, -2.0, 0.0]), "b": np.ones((2, 2), np.float32)}
    _, state = jax.jit(tx.update)(g, tx.init(g))
    with jax.numpy_dtype_promotion("standard"):
        flat, unravel = ravel_pytree(decode_state(state))
    assert flat.dtype == jnp.float32 and flat.shape == (1 + 2 * 7,)
    same = encode_state(unravel(flat), m_dtype, v_dtype)
    assert jax.tree.map(jnp.result_type, same) == jax.tree.map(jnp.result_type, state)
    for x, y in zip(*(jax.tree.leaves(decode_state(s)) for s in (same, state)), strict=True):
        np.testing.assert_allclose(x, y, rtol=1 / 8)


@pytest.mark.parametrize("before, after", [(0.1, lambda _: 0.1), (lambda _: 0.1, 0.1)])
@pytest.mark.parametrize("formats", [{"m_dtype": "int8", "v_dtype": "uint8"}])
def test_number_can_be_replaced_by_a_schedule_during_a_run(before, after, formats):
    """The conversion that the error message proposes continues the run, in both directions."""
    old, new = adamax(before, **formats), adamax(after, **formats)
    g = {"w": np.float32([1.0, -3.0])}
    _, state = jax.jit(old.update)(g, old.init(g))
    moved = optax.tree.set(new.init(g), count=state[0].count, m=state[0].m, v=state[0].v)
    if callable(after):
        assert int(moved[1].count) == 1
    for x, y in zip(
        jax.tree.leaves(jax.jit(new.update)(g, moved)[0]),
        jax.tree.leaves(jax.jit(old.update)(g, state)[0]),
        strict=True,
    ):
        np.testing.assert_allclose(x, y, rtol=1e-6)


def test_parameters_of_filtered_gradients_are_ignored():
    """An unfiltered Equinox model contains functions and integers, with the gradient None."""
    tx = scale_by_adamax()
    g = {"w": np.ones(2, np.float32), "activation": None, "step": None}
    unfiltered = {"w": np.ones(2, jnp.bfloat16), "activation": jax.nn.relu, "step": 3}
    u, _ = tx.update(g, tx.init(g), unfiltered)
    assert u["activation"] is None and u["step"] is None
    np.testing.assert_allclose(u["w"], 1, rtol=1e-6)
