"""Names, ranges and moments that `load_state` rejects, and states of wrappers."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_adamax import pack_small_leaves
from optax_adamax._v_formats import v_format_of
from optax_adamax.compat import keras, mlx, torch
from optax_adamax.compat import optax as compat_optax

COLLIDING = {"a/b": jnp.ones(2), "a": {"b": jnp.ones(2)}}
DOTTED = {"a.b": jnp.ones(2), "a": {"b": jnp.ones(2)}}


def state_dict(m, v, step=5.0):
    return {
        "state": {0: {"step": step, "exp_avg": np.asarray(m), "exp_inf": np.asarray(v)}},
        "param_groups": [{"params": [0]}],
    }


def load(m, v, **options):
    params = {"w": np.zeros(np.shape(v), np.float32)}
    return torch.load_state(state_dict(m, v), params, torch.adamax(**options), names=["w"])


def test_colliding_paths_raise():
    refused = pytest.raises(ValueError, match="different names, but 'a/b' was given twice")
    with refused:
        torch.dump_params(COLLIDING)
    with refused:
        torch.load_params({"a/b": np.ones(2)}, COLLIDING)
    tx = torch.adamax()
    with refused:
        torch.load_state(state_dict(np.ones(2), np.ones(2)), COLLIDING, tx, names=["a/b"])
    with refused:
        torch.dump_state(tx.init(COLLIDING), COLLIDING, [{"params": [0]}], names=["a/b"])


def test_colliding_names_raise():
    with pytest.raises(ValueError, match=r"'a\.b' was given twice\. .* as `layout`"):
        torch.dump_params(DOTTED)
    with pytest.raises(ValueError, match=r"'a\.b' was given twice\. .* as `layout`"):
        mlx.dump_state(mlx.adamax(0.1).init(DOTTED), DOTTED, learning_rate=0.1)
    names = {"one": "a.b", "two": "a/b"}
    assert set(torch.dump_params(DOTTED, names)) == {"one", "two"}


def test_repeated_name_raises():
    params = {"w": jnp.ones(2), "x": jnp.ones(2)}
    saved = state_dict(np.ones(2), np.ones(2))
    saved["state"][1] = saved["state"][0]
    saved["param_groups"][0]["params"] = [0, 1]
    with pytest.raises(ValueError, match="'w' was given twice"):
        torch.load_state(saved, params, torch.adamax(), names=["w", "w"])
    with pytest.raises(ValueError, match="'w' was given twice"):
        torch.dump_state(torch.adamax().init(params), params, [{"params": [0, 1]}], names=["w"] * 2)
    variables = [5, 0.1, *[np.ones(2)] * 4]
    with pytest.raises(ValueError, match="'w' was given twice"):
        keras.load_state(variables, params, keras.adamax(), names=["w", "w"])


LOW, HIGH = v_format_of("uint8").range


@pytest.mark.parametrize("largest", [1e12, 1.01 * HIGH, 0.99 * LOW, 1e-12])
def test_v_outside_the_range_of_uint8_raises(largest):
    v = largest * np.array([1.0, 0.5, 1e-3])
    held = re.escape(f"must be in [{LOW:.2g}, {HIGH:.3g}]")
    with pytest.raises(ValueError, match=rf"of 'w' {held}, .*optax\.scale"):
        load(0.1 * v, v, m_dtype="int8", v_dtype="uint8")
    for options in ({}, {"v_dtype": "bfloat16"}):
        state = load(0.1 * v, v, **options)
        assert int(optax.tree.get(state, "count")) == 5


@pytest.mark.parametrize("v", [[0.99 * HIGH, 1e-12, 0.0], [1.01 * LOW, 0.0, 0.0], [0.0] * 3])
def test_v_within_the_range_of_uint8_loads(v):
    state = load(0.1 * np.array(v), v, m_dtype="int8", v_dtype="uint8")
    assert jax.tree.leaves(state)[0].shape == ()


def test_state_of_optax_outside_the_range_of_uint8_raises():
    params, tx = {"w": jnp.ones(2)}, optax.adamax(0.1)
    with jax.numpy_dtype_promotion("standard"):
        _, theirs = jax.jit(tx.update)({"w": np.full(2, 1e10, np.float32)}, tx.init(params))
    with pytest.raises(ValueError, match=r"of 'w' must be in .* but it is 1e\+10"):
        compat_optax.load_state(theirs, params, compat_optax.adamax(0.1, v_dtype="uint8"))


@pytest.mark.parametrize("scale", [1e-3, 0.1])
def test_state_of_adam_raises_and_of_adamax_loads(scale):
    rng = np.random.default_rng(2)
    params = {"w": np.zeros(200, np.float32)}
    for theirs, is_refused in ((optax.adam(0.1), True), (optax.adamax(0.1), False)):
        state, update = theirs.init(params), jax.jit(theirs.update)
        for g in rng.standard_normal((30, 200)):
            with jax.numpy_dtype_promotion("standard"):
                _, state = update({"w": np.float32(scale * g)}, state)
        if not is_refused:
            compat_optax.load_state(state, params, compat_optax.adamax(0.1))
            continue
        with pytest.raises(
            ValueError, match=r"must come from an Adamax, .* 1.009 v .* Adam's v is a"
        ):
            compat_optax.load_state(state, params, compat_optax.adamax(0.1))


@pytest.mark.parametrize("b1", [0.5, 0.9, 0.99])
@pytest.mark.parametrize("b2", [0.0, 0.9, 0.99, 0.999])
def test_state_of_adamax_loads_for_all_decay_rates(b1, b2):
    rng = np.random.default_rng(2)
    m = v = np.zeros(200)
    for g in rng.standard_t(2, (100, 200)):
        m, v = b1 * m + (1 - b1) * g, np.maximum(b2 * v, np.abs(g))
    load(m, v)


def test_parameter_without_gradient_starts_at_zero_on_request():
    params = {"w": jnp.ones(2), "x": jnp.ones(3)}
    saved = state_dict(np.ones(2), np.ones(2))
    saved["param_groups"][0]["params"] = [0, 1]
    how = {"names": ["w", "x"]}
    with pytest.raises(
        ValueError, match=r"none for 'x' \('x' in the source\).* give missing='zero'"
    ):
        torch.load_state(saved, params, torch.adamax(), **how)
    with pytest.raises(ValueError, match="missing must be"):
        torch.load_state(saved, params, torch.adamax(), **how, missing="one")
    state = torch.load_state(saved, params, torch.adamax(), **how, missing="zero")
    assert int(optax.tree.get(state, "count")) == 5
    assert np.all(optax.tree.get(state, "m")["x"] == 0)
    tx = torch.adamax(groups=[{"params": "x"}, {}])
    state = torch.load_state(saved, params, tx, **how, missing="zero")
    counts = {name: int(optax.tree.get(s, "count")) for name, s in state.inner_states.items()}
    assert counts == {0: 0, 1: 5}


@pytest.mark.parametrize("formats", [{}, {"m_dtype": "int8", "v_dtype": "uint8"}], ids=str)
def test_packed_state_equals_plain_state(formats):
    shapes = {"w": (40, 40), "b": (4,), "s": (4,)}
    params = {name: np.ones(shape, np.float32) for name, shape in shapes.items()}
    rng = np.random.default_rng(4)
    saved = {"state": {}, "param_groups": [{"params": [0, 1, 2]}]}
    for i, x in enumerate(params.values()):
        v = rng.uniform(0.5, 2, x.shape).astype(np.float32)
        saved["state"][i] = {"step": 5.0, "exp_avg": v / 2, "exp_inf": v}
    plain, how = torch.adamax(**formats), {"names": list(params)}
    packed = optax.chain(optax.clip(1.0), pack_small_leaves(plain))
    state = torch.load_state(saved, params, packed, **how)
    assert jax.tree.structure(state) == jax.tree.structure(jax.eval_shape(packed.init, params))
    bare = torch.load_state(saved, params, plain, **how)
    both = [torch.dump_state(s, params, saved["param_groups"], **how) for s in (state, bare)]
    jax.tree.map(np.testing.assert_array_equal, *both)
    updates = jax.jit(
        lambda: [tx.update(params, s, params)[0] for tx, s in ((packed, state), (plain, bare))]
    )()
    jax.tree.map(np.testing.assert_array_equal, *updates)
    theirs = compat_optax.dump_state(state, params, pack_small_leaves(optax.adamax(0.1)))
    again = compat_optax.load_state(theirs, params, packed)
    jax.tree.map(np.testing.assert_array_equal, again, state)


def test_two_adamax_for_one_parameter_raise():
    tx = optax.chain(torch.adamax(), torch.adamax())
    with pytest.raises(ValueError, match="must have one Adamax, but 'w' has several"):
        torch.load_state(state_dict([1.0], [1.0]), {"w": jnp.ones(1)}, tx, names=["w"])


def test_dumping_a_state_of_optax_raises_with_advice():
    params = {"w": jnp.ones(2)}
    for theirs in (optax.adamax(0.1), optax.sgd(0.1)):
        with pytest.raises(
            TypeError, match=r"state of optax\.adamax, write compat\.optax\.load_state"
        ):
            torch.dump_state(theirs.init(params), params, [{"params": [0]}], names=["w"])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("options", [{}, {"m_dtype": "int8", "v_dtype": "uint8"}])
def test_nonfinite_moments_raise_with_their_index(bad, options):
    good = np.array([0.5, 1.0, 2.0])
    wrong = np.array([0.5, bad, bad])
    where = r"2 of 3 elements are NaN or infinite, the first at index \(1,\)"
    with pytest.raises(ValueError, match=f"infinity norm of 'w' must be finite, but {where}"):
        load(0.1 * good, wrong, **options)
    with pytest.raises(ValueError, match=f"first moment of 'w' must be finite, but {where}"):
        load(wrong, good, **options)
