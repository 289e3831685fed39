"""A checkpoint is restored only into the storage format in which it was saved."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import serialization

from optax_adamax import (
    ScaleByAdamaxState,
    compensate_rounding,
    encode_state,
    pack_small_leaves,
    scale_by_adamax,
)
from tests.oracle.formats import FORMATS, SOME_FORMATS

PAIRS = list(itertools.permutations(FORMATS, 2))
ORBAX = re.compile("structure", re.IGNORECASE)  # words in the errors of Orbax and Flax
FLAX = re.compile("keys|field names")
PARAMS = {"a": np.float32([[0, 1, 2], [3, 4, 5]]), "b": {"c": np.ones((2, 3), np.float32)}}


def is_harmless(saved, wanted):
    """Returns whether two formats differ only in a float dtype of m, which a cast converts."""
    return saved[1] == wanted[1] and "int8" not in (saved[0], wanted[0])


def as_numpy(tree):
    return jax.tree.map(np.asarray, tree)


def assert_same_bits(got, wanted):
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    for x, y in zip(*map(jax.tree.leaves, (as_numpy(got), as_numpy(wanted))), strict=True):
        assert x.dtype == y.dtype and x.tobytes() == y.tobytes()


def cast_like(state, wanted):
    return jax.tree.map(lambda x, like: np.asarray(x).astype(like.dtype), state, wanted)


@pytest.fixture(scope="module")
def states():
    """Returns one state in the nine formats, with m and v of many magnitudes."""
    rng = np.random.default_rng(0)
    v = jax.tree.map(lambda p: np.exp(np.float32(rng.normal(size=p.shape))), PARAMS)
    m = jax.tree.map(lambda v: v * np.float32(rng.uniform(-1, 1, v.shape)), v)
    exact = ScaleByAdamaxState(jnp.int32(7), *jax.tree.map(jnp.asarray, (m, v)))
    return jax.jit(lambda s: {format: encode_state(s, *format) for format in FORMATS})(exact)


@pytest.fixture(scope="module")
def saved(states, tmp_path_factory):
    """Saves these states with Orbax and returns the folders."""
    folder = tmp_path_factory.mktemp("states")
    paths = {format: folder / "-".join(format) for format in FORMATS}
    with ocp.StandardCheckpointer() as checkpointer:
        for format in FORMATS:
            checkpointer.save(paths[format], states[format])
    return paths


def restore_standard(path, target):
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(path, target)


def restore_pytree(path, target):
    with ocp.PyTreeCheckpointer() as checkpointer:
        arguments = ocp.checkpoint_utils.construct_restore_args(target)
        return checkpointer.restore(path, item=target, restore_args=arguments)


@pytest.mark.parametrize("restore", [restore_standard, restore_pytree])
def test_orbax_rejects_every_pair_with_different_quantized_moments(restore, states, saved):
    for source, destination in PAIRS:
        target = jax.eval_shape(
            scale_by_adamax(m_dtype=destination[0], v_dtype=destination[1]).init, PARAMS
        )
        if is_harmless(source, destination):
            restored = restore(saved[source], target)
            assert_same_bits(restored, cast_like(states[source], target))
        else:
            with pytest.raises(ValueError, match=ORBAX):
                restore(saved[source], target)


def test_flax_rejects_every_pair_with_different_quantized_moments(states):
    data = {format: serialization.to_bytes(states[format]) for format in FORMATS}
    for source, destination in PAIRS:
        if is_harmless(source, destination):  # Flax does not cast: it returns the saved dtypes
            restored = serialization.from_bytes(states[destination], data[source])
            assert_same_bits(restored, states[source])
        else:
            with pytest.raises(ValueError, match=FLAX):
                serialization.from_bytes(states[destination], data[source])


@pytest.mark.parametrize("source, destination", [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_state_that_flax_restored_with_another_m_dtype_must_be_converted(
    source, destination, states
):
    tx = scale_by_adamax(m_dtype=destination, v_dtype="uint8")
    data = serialization.to_bytes(states[source, "uint8"])
    restored = serialization.from_bytes(tx.init(PARAMS), data)
    with pytest.raises(TypeError, match="encode_state"):
        tx.update(PARAMS, restored)
    jax.jit(tx.update)(PARAMS, encode_state(restored, destination, "uint8"))


def test_every_saved_format_is_converted_to_every_other(states, saved):
    """Tests the documented way: restore the saved format, then call `encode_state`."""
    restored = {
        form: restore_standard(saved[form], jax.eval_shape(lambda s=state: s))
        for form, state in states.items()
    }
    assert_same_bits(restored, states)
    for source, destination in PAIRS:
        convert = functools.partial(encode_state, m_dtype=destination[0], v_dtype=destination[1])
        is_run = source in SOME_FORMATS and destination in SOME_FORMATS
        run = jax.jit(convert) if is_run else functools.partial(jax.eval_shape, convert)
        converted = run(restored[source])
        tx = scale_by_adamax(m_dtype=destination[0], v_dtype=destination[1])
        wanted = jax.eval_shape(tx.init, PARAMS)
        assert jax.tree.map(jnp.result_type, converted) == jax.tree.map(jnp.result_type, wanted)


@pytest.mark.parametrize("wrap", [optax.chain, pack_small_leaves])
def test_chains_and_packed_states_reject_other_formats(wrap, tmp_path):
    saved, other = (wrap(scale_by_adamax(m_dtype="int8", v_dtype=v)) for v in ("uint8", "bfloat16"))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", saved.init(PARAMS))
    with pytest.raises(ValueError, match=ORBAX):
        restore_standard(tmp_path / "state", jax.eval_shape(other.init, PARAMS))
    with pytest.raises(ValueError, match=FLAX):
        serialization.from_bytes(other.init(PARAMS), serialization.to_bytes(saved.init(PARAMS)))


@pytest.mark.parametrize("source, destination", [("int8", "int16"), ("int16", "int8")])
def test_residuals_of_another_size_are_rejected(source, destination, tmp_path):
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
    txs = [compensate_rounding(optax.sgd(0.1), dtype) for dtype in (source, destination)]
    state, other = (tx.init(params) for tx in txs)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
    assert_same_bits(restore_standard(tmp_path / "state", jax.eval_shape(lambda: state)), state)
    with pytest.raises(ValueError, match=ORBAX):
        restore_standard(tmp_path / "state", jax.eval_shape(lambda: other))
    with pytest.raises(ValueError, match=FLAX):
        serialization.from_bytes(other, serialization.to_bytes(state))


def test_state_of_a_single_array_is_checked_after_restoring(tmp_path):
    """Flax returns a dict for the container if the target is a leaf; `update` rejects the dict."""
    params = np.ones(4, np.float32)
    coded, exact = scale_by_adamax(m_dtype="int8", v_dtype="uint8"), scale_by_adamax()
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "coded", coded.init(params))
        checkpointer.save(tmp_path / "exact", exact.init(params))
    for path, other in (("coded", exact), ("exact", coded)):
        with pytest.raises(ValueError, match=ORBAX):
            restore_standard(tmp_path / path, jax.eval_shape(other.init, params))
    data = serialization.to_bytes(coded.init(params))
    with pytest.raises(TypeError, match="Restore a checkpoint into the structure"):
        exact.update(params, serialization.from_bytes(exact.init(params), data))
    with pytest.raises((ValueError, AttributeError)):
        data = serialization.to_bytes(exact.init(params))
        serialization.from_bytes(coded.init(params), data)
