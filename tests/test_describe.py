"""What describe_state counts is what a loop over the elements counts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from parameters import formats

import optax_adamax
from optax_adamax import (
    ScaleByAdamaxState,
    adamax,
    decode_state,
    describe_state,
    encode_state,
    pack_small_leaves,
    scale_by_adamax,
    unpack_state,
)
from optax_adamax._m_formats import M_FORMATS
from optax_adamax._v_formats import V_FORMATS
from tests.oracle.formats import SOME_FORMATS, state_bytes

# The others mix what these two have.
FORMATS = formats([*SOME_FORMATS, ("int8", "float32")], SOME_FORMATS[::2])
MAGNITUDES = [0.0, 1e-38, 1e-12, 1e-9, 1e-3, 1.0, 5e3, 7e3, 1e7, 1e38]


GRADIENTS = {
    "all": np.float32([MAGNITUDES, MAGNITUDES[::-1]]),
    "fits": np.resize(np.float32([0.0, -0.5, 2.0, 1.0]), (2, 10)),
    "one": np.float32(-3.0),
    "none": np.zeros((0, 4), np.float32),
}


@functools.cache
def optimizer(m_dtype, v_dtype):
    return adamax(0.1, m_dtype=m_dtype, v_dtype=v_dtype)


@functools.cache
def trained(m_dtype, v_dtype, steps=2):
    """A chain's state after steps on gradients of every magnitude, in leaves of several shapes."""
    tx = optimizer(m_dtype, v_dtype)
    state = tx.init(GRADIENTS)
    for _ in range(steps):
        _, state = jax.jit(tx.update)(GRADIENTS, state)
    return state


def by_path(description):
    return {leaf.path: leaf for leaf in description.leaves}


@pytest.mark.parametrize("m_dtype, v_dtype", FORMATS)
def test_counts_are_those_of_the_decoded_state(m_dtype, v_dtype):
    state = trained(m_dtype, v_dtype)
    floats = decode_state(state)[0]
    low, high = V_FORMATS[v_dtype].range
    eps = 1e-8
    described = by_path(describe_state(state))
    assert set(described) == {"['all']", "['fits']", "['one']", "['none']"}
    for name in floats.m:
        leaf = described[f"['{name}']"]
        m, v = (np.asarray(x, np.float64).ravel() for x in (floats.m[name], floats.v[name]))
        seen = (m != 0) | (v > max(low, eps * (1 + V_FORMATS[v_dtype].relative_error)))
        n = max(1, m.size)
        assert leaf.size == m.size
        assert leaf.bytes == m.size * state_bytes(m_dtype, v_dtype)
        assert (leaf.m_dtype, leaf.v_dtype) == (m_dtype, v_dtype)
        wanted = (v[seen].min(), v[seen].max()) if seen.any() else (np.nan, np.nan)
        np.testing.assert_allclose((leaf.v_min, leaf.v_max), wanted, rtol=1e-6)
        np.testing.assert_allclose(
            leaf.underflow_fraction, (seen & (v <= low)).sum() / n, rtol=1e-6
        )
        np.testing.assert_allclose(
            leaf.saturated_fraction, (seen & (v >= high)).sum() / n, rtol=1e-6
        )
        np.testing.assert_allclose(leaf.no_gradient_fraction, (~seen).sum() / n, rtol=1e-6)
        assert leaf.nonfinite_fraction == 0
    assert bool(describe_state(state).fits) == (v_dtype != "uint8")
    assert described["['fits']"].advice == described["['none']"].advice == ""
    assert described["['fits']"].no_gradient_fraction == 1 / 4


def test_what_uint8_cannot_hold_is_said():
    leaf = by_path(describe_state(trained("int8", "uint8")))["['all']"]
    assert leaf.saturated_fraction == pytest.approx(3 / 10)  # 7e3, 1e7, 1e38
    assert 'write v_dtype="bfloat16"' in leaf.advice and "optax.scale" in leaf.advice
    assert "upper end of uint8" in leaf.advice
    state = encode_state(trained("float32", "float32"), "bfloat16", "bfloat16")
    assert describe_state(state).fits


def state_of(m, v, *formats):
    return encode_state(ScaleByAdamaxState(jnp.int32(5), {"w": m}, {"w": v}), *formats)


@pytest.mark.parametrize("m_dtype, v_dtype", FORMATS)
def test_gradients_that_are_too_small(m_dtype, v_dtype):
    v = np.full(1000, 1e-11, np.float32)
    (leaf,) = describe_state(state_of(v, v, m_dtype, v_dtype), eps=0.0).leaves
    if v_dtype == "uint8":
        assert leaf.underflow_fraction == 1 and "lower end of uint8" in leaf.advice
    else:
        assert leaf.underflow_fraction == leaf.no_gradient_fraction == 0 and not leaf.advice


def test_a_gradient_that_the_format_cannot_tell_from_0():
    v = np.full(1000, 1e-30, np.float32)
    (leaf,) = describe_state(state_of(v, v, "int8", "uint8")).leaves
    assert leaf.no_gradient_fraction == 1
    (leaf,) = describe_state(state_of(v, v, "int8", "bfloat16"), eps=0.0).leaves
    assert leaf.no_gradient_fraction == 0


def test_a_few_small_gradients_are_worth_no_word():
    v = np.where(np.arange(1000) < 9, np.float32(1e-11), np.float32(1))
    (leaf,) = describe_state(state_of(v, v, "int8", "uint8")).leaves
    assert leaf.underflow_fraction == pytest.approx(9 / 1000) and not leaf.advice


def test_m_above_what_int8_holds():
    """As with b1 above b2, or a state of another optimizer."""
    v = np.ones(1000, np.float32)
    m = np.float32(([7.0, 7.4, 8.0, -100.0] + [1.0] * 6) * 100)
    (leaf,) = describe_state(state_of(m, v, "int8", "bfloat16")).leaves
    assert leaf.m_saturated_fraction == pytest.approx(0.3)  # 7.4 is rounded to the largest code
    assert 'write m_dtype="bfloat16"' in leaf.advice
    for m_dtype in ("bfloat16", "float32"):
        assert describe_state(state_of(m, v, m_dtype, "bfloat16")).fits


@pytest.mark.parametrize("m_dtype, v_dtype", FORMATS)
def test_what_is_not_finite_is_said(m_dtype, v_dtype):
    tx = optimizer(m_dtype, v_dtype)
    gradients = GRADIENTS | {"all": np.resize(np.float32([1, np.nan, 2, 0]), (2, 10))}
    _, state = jax.jit(tx.update)(gradients, tx.init(gradients))
    leaf = by_path(describe_state(state))["['all']"]
    assert leaf.nonfinite_fraction == leaf.no_gradient_fraction == 0.25
    assert leaf.v_max == pytest.approx(2, rel=1 / 8)
    assert 'nonfinite="zero"' in leaf.advice


@pytest.mark.parametrize("m_dtype, v_dtype", FORMATS)
def test_a_new_state_has_seen_nothing(m_dtype, v_dtype):
    state = scale_by_adamax(m_dtype=m_dtype, v_dtype=v_dtype).init({"w": GRADIENTS["all"]})
    description = describe_state(state)
    (leaf,) = description.leaves
    assert leaf.no_gradient_fraction == 1 and np.isnan(leaf.v_min) and np.isnan(leaf.v_max)
    assert description.fits and "-" in str(description)


def test_eps_in_v_is_no_gradient():
    tx = scale_by_adamax(eps=1e-3, v_dtype="uint8")
    gradients = {"w": np.float32([0.0, 1.0])}
    _, state = jax.jit(tx.update)(gradients, tx.init(gradients))
    assert describe_state(state, eps=1e-3).leaves[0].no_gradient_fraction == 0.5
    assert describe_state(state).leaves[0].no_gradient_fraction == 0


@pytest.mark.parametrize("spec", [P("x"), P(None, "x"), P()])
def test_a_sharded_state(spec):
    mesh = jax.make_mesh((2,), ("x",), (jax.sharding.AxisType.Explicit,), devices=jax.devices()[:2])
    v = np.exp(np.arange(-8, 8, dtype=np.float32)).reshape(4, 4)
    state = state_of(-v, v, "int8", "uint8")
    sharding = NamedSharding(mesh, spec)
    placed = jax.tree.map(
        lambda x: jax.device_put(x, sharding if x.ndim else NamedSharding(mesh, P())), state
    )
    assert describe_state(placed) == describe_state(state)


def test_a_state_in_host_memory():
    if "pinned_host" not in {memory.kind for memory in jax.devices()[0].addressable_memories()}:
        pytest.skip("this version of JAX has no pinned_host on CPU")
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0], memory_kind="pinned_host")
    v = np.exp(np.linspace(-8, 8, 1000, dtype=np.float32))
    state = state_of(-v, v, "int8", "uint8")
    assert describe_state(jax.device_put(state, place)) == describe_state(state)


def test_a_packed_state():
    shapes = {"a": (2, 3), "b": 4, "c": (40, 40)}
    params = {name: np.ones(shape, np.float32) for name, shape in shapes.items()}
    tx = pack_small_leaves(optimizer("int8", "uint8"))
    state = jax.jit(tx.init)(params)
    unpacked = jax.jit(unpack_state)(state, params)
    packed, unpacked = describe_state(state), describe_state(unpacked)
    assert [leaf.path for leaf in unpacked.leaves] == ["['a']", "['b']", "['c']"]
    assert packed.bytes == unpacked.bytes == 2 * 1610
    assert [leaf.size for leaf in packed.leaves] == [1600, 10]


def test_groups_each_in_its_format():
    """optax.partition: each state has its own leaves, and its own formats."""
    params = {"b": np.ones(3, np.float32), "w": np.ones(3, np.float32)}
    groups = {"exact": adamax(0.1), "coded": adamax(0.1, m_dtype="int8", v_dtype="uint8")}
    tx = optax.partition(groups, {"b": "exact", "w": "coded"})
    _, state = jax.jit(tx.update)(params, tx.init(params), params)
    leaves = by_path(describe_state(state))
    assert {path: leaf.v_dtype for path, leaf in leaves.items()} == {
        "['b']": "float32",
        "['w']": "uint8",
    }


def test_complex_parameters():
    tx = scale_by_adamax()
    gradients = {"w": np.complex64([3 + 4j, 0.0])}
    _, state = jax.jit(tx.update)(gradients, tx.init(gradients))
    (leaf,) = describe_state(state).leaves
    assert (
        leaf.m_dtype == "complex64"
        and leaf.v_max == pytest.approx(5)
        and leaf.no_gradient_fraction == 0.5
    )


def test_a_state_without_adamax_is_refused():
    with pytest.raises(TypeError, match="no ScaleByAdamaxState"):
        describe_state(optax.sgd(0.1).init({"w": jnp.ones(2)}))


def test_the_table_has_a_row_a_leaf_and_the_advice():
    description = describe_state(trained("int8", "uint8"))
    heading, *rows = str(description).splitlines()
    assert heading.split()[:2] == ["leaf", "elements"]
    assert len({len(row) for row in [heading, *rows[:4]]}) == 1
    assert rows[4] == f"{description.bytes:,} bytes"
    assert rows[5:] == [f"['all']: {by_path(description)['[' + repr('all') + ']'].advice}"]


def test_every_format_has_what_a_description_reads():
    assert all(format.range[0] < format.range[1] for format in V_FORMATS.values())
    assert all(format.largest_ratio > 1 for format in M_FORMATS.values())
    assert "describe_state" in optax_adamax.__all__
