"""A transformation gives the same bits with and without `pack_small_leaves`."""

import functools
import pickle
import re

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.tree
import pytest

from optax_adamax import (
    adamax,
    adamaxw,
    decode_state,
    encode_state,
    pack_small_leaves,
    repack_state,
    unpack_state,
)

MAX_SIZE = 64
FORMATS = [("bfloat16", "bfloat16"), ("float32", "uint8"), ("int8", "float32"), ("int8", "uint8")]
TRANSFORMATIONS = {
    "adamaxw, schedule": adamaxw(optax.linear_schedule(0.1, 0.0, 10), weight_decay=0.1),
    "nonfinite": adamax(0.1, nonfinite="skip_step"),
    "optax": optax.adamaxw(0.1),
    **{f"{m}, {v}": adamax(0.1, m_dtype=m, v_dtype=v) for m, v in FORMATS},
}


def full(shape, value=1.0, dtype=np.float32):
    return jnp.asarray(np.full(shape, value, dtype))


# Leaves of three sizes; leaves of equal size are not neighbors.
PARAMS = {
    "a": full((4, 3), 2.0),
    "b": [full(3), None],
    "c": (full((9, 9)), optax.MaskedNode(), {}),
    "d": full((2, 2, 3), -1.0),
}
FEW = {"a": full((2, 3)), "b": full(65), "c": full(6, -1.0)}
MIXED = {
    "half": [full(5, dtype=jnp.bfloat16), full((2, 2), dtype=jnp.bfloat16)],
    "small half": full(5, dtype=np.float16),
    "single": full(5),
    "complex": full((3, 2), dtype=np.complex64),
    "empty": [full(0), full((3, 0, 2))],
    "NumPy": np.ones(4, np.float32),
    "NumPy scalar": np.float32(2.0),
    "Python float": 1.5,
}


def gradient(params, step):
    rng = np.random.default_rng(step)

    def like(p):
        scale = 10.0 ** (step % 5 - 2)
        return jnp.asarray(scale * rng.standard_t(2, np.shape(p)), jnp.result_type(p))

    return jax.tree.map(like, params)


def run(tx, params, steps=6, compiler=jax.jit):
    """Returns the updates of each step, and the last state."""
    update, state, found = compiler(tx.update), tx.init(params), []
    for step in range(steps):
        updates, state = update(gradient(params, step), state, params)
        found.append(updates)
    return found, state


def same(x, y):
    assert jax.tree.structure(x) == jax.tree.structure(y)
    jax.tree.map(np.testing.assert_array_equal, x, y)
    assert jax.tree.map(jnp.result_type, x) == jax.tree.map(jnp.result_type, y)


def test_eager_updates_are_the_same_bit_for_bit():
    """optax.trace has few operations; `test_packing_layout.py` tests eager steps of adamax."""
    tx, params = optax.sgd(0.1, momentum=0.9), {"a": full(3), "b": full(6), "c": full(3)}
    unpacked, _ = run(tx, params, steps=2, compiler=lambda f: f)
    packed, _ = run(pack_small_leaves(tx, 5), params, steps=2, compiler=lambda f: f)
    same(packed, unpacked)


TREES = {
    "mixed": MIXED, "{}": {}, "none": None, "array": full(3), "float": 2.0, "empty": [full(0)]
}  # fmt: skip
SIZES = [0, 5, MAX_SIZE]


@functools.cache
def unpacked_updates(name):
    return run(adamax(0.1), TREES[name])[0]


@pytest.mark.parametrize(
    "name, max_size",
    [
        # For max_size=0 no leaf is packed.
        pytest.param("mixed", 0, marks=pytest.mark.slow),
        *(("mixed", size) for size in SIZES[1:]),
        *((name, size) for name in list(TREES)[1:] for size in SIZES),
    ],
)
def test_updates_of_every_tree_are_the_same(name, max_size):
    packed, _ = run(pack_small_leaves(adamax(0.1), max_size), TREES[name])
    same(packed, unpacked_updates(name))


def test_extra_arguments_reach_the_inner_transformation():
    def update(updates, state, params=None, *, value):
        return jax.tree.map(lambda g: value * g, updates), state

    inner = optax.GradientTransformationExtraArgs(lambda _: (), update)
    params = {"a": np.ones(2, np.float32), "b": np.ones(3, np.float32)}
    tx = pack_small_leaves(inner)
    updates, _ = tx.update(params, tx.init(params), value=np.float32(3.0))
    np.testing.assert_array_equal(updates["b"], np.full(3, 3, np.float32))


def test_equal_leaves_get_their_own_updates():
    """Ten leaves of one size have offsets of two digits; see `_buffers.slice_leaves`."""
    gradients = [full(2, float(i)) for i in range(10)] + [full(3, 10.0)]
    tx = pack_small_leaves(optax.scale(2.0))
    updates, _ = jax.jit(tx.update)(gradients, tx.init(gradients))
    assert [u.tolist() for u in updates] == [[2.0 * i] * 2 for i in range(10)] + [[20.0] * 3]


def test_scan_without_params_gives_the_same_updates():
    sequence = jax.tree.map(lambda *x: np.stack(x), *(gradient(FEW, t) for t in range(6)))

    def scan(tx):
        def body(state, g):
            return tuple(reversed(tx.update(g, state)))

        return jax.jit(lambda: jax.lax.scan(body, tx.init(FEW), sequence))()

    tx = adamax(0.1, v_dtype="bfloat16")
    state, updates = scan(tx)
    packed_state, packed_updates = scan(pack_small_leaves(tx, MAX_SIZE))
    same(packed_updates, updates)
    same(optax.tree.get(packed_state, "count"), optax.tree.get(state, "count"))


def test_vmap_gives_the_same_updates():
    stacked = jax.tree.map(lambda x: np.stack([x, np.negative(x)]), FEW)

    def updates(tx, g):
        return tx.update(g, tx.init(g))[0]

    tx = adamax(0.1, m_dtype="int8", v_dtype="uint8")
    packed = jax.jit(jax.vmap(functools.partial(updates, pack_small_leaves(tx, MAX_SIZE))))
    same(packed(stacked), jax.jit(jax.vmap(functools.partial(updates, tx)))(stacked))


def test_inner_init_receives_the_values():
    tx = pack_small_leaves(optax.contrib.schedule_free(optax.sgd(0.1), 0.1), MAX_SIZE)
    z = optax.tree.get(tx.init(PARAMS), "z")
    assert sorted(z.buffers["float32"].tolist()) == [-1] * 12 + [1] * 3 + [2] * 12


def test_gradients_of_mixed_dtypes_raise():
    params = {"a": full(3, dtype=jnp.bfloat16), "b": full(5, dtype=jnp.bfloat16)}
    g = {"a": full(3, 1 / 3), "b": full(5, 1 / 3)}
    tx, plain = pack_small_leaves(adamax(0.1)), adamax(0.1)
    start = tx.init(params)
    updates, state = jax.jit(tx.update)(g, start, params)
    same(updates, jax.jit(plain.update)(g, plain.init(params), params)[0])
    assert jax.tree.structure(state) == jax.tree.structure(start)
    with pytest.raises(TypeError, match=r"bfloat16 and float32 were given\. Cast the gradients"):
        tx.update(g | {"b": params["b"]}, state, params)


WRAPPERS = {
    "masked": lambda tx: optax.masked(tx, lambda p: jax.tree.map(lambda x: jnp.ndim(x) > 1, p)),
    "partition": lambda tx: optax.partition(
        {0: tx, 1: optax.set_to_zero()}, lambda p: jax.tree.map(lambda x: jnp.ndim(x) % 2, p)
    ),
    "MultiSteps": lambda tx: optax.MultiSteps(tx, 2).gradient_transformation(),
    "chain": lambda tx: optax.chain(
        optax.clip_by_global_norm(1.0), tx, optax.add_decayed_weights(0.1)
    ),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 2),
}


@functools.cache
def runs(name):
    """Returns both runs, without and with packing, and the shapes of the packed state."""
    tx, wrap = TRANSFORMATIONS.get(name, adamax(0.1, v_dtype="bfloat16")), WRAPPERS.get(name)
    wrap = wrap or (lambda tx: tx)
    with jax.numpy_dtype_promotion("standard"):  # optax needs it
        packed = wrap(pack_small_leaves(tx, MAX_SIZE))
        return run(wrap(tx), PARAMS), run(packed, PARAMS), jax.eval_shape(packed.init, PARAMS)


QUANTIZED = TRANSFORMATIONS["int8, uint8"]


# Slow, because other formats test their moments.
SLOW = ("float32, uint8", "int8, float32")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name in SLOW else ())
        for name in [*TRANSFORMATIONS, *WRAPPERS]
    ],
)
def test_updates_are_the_same_bit_for_bit(name):
    (expected, _), (found, _), _ = runs(name)
    same(found, expected)


def test_hyperparameters_can_be_injected():
    inject = functools.partial(optax.inject_hyperparams, hyperparam_dtype=jnp.float32)
    tx = inject(adamax)(learning_rate=0.1)
    found = []
    for each in (tx, pack_small_leaves(tx, MAX_SIZE)):
        state = optax.tree.set(each.init(FEW), learning_rate=jnp.float32(0.2))
        found.append(jax.jit(each.update)(gradient(FEW, 0), state)[0])
    same(*found)


def test_state_is_converted_and_restored_from_checkpoints():
    _, (_, state), _ = runs("int8, uint8")
    start = pack_small_leaves(QUANTIZED, MAX_SIZE).init(PARAMS)
    same(pickle.loads(pickle.dumps(state)), state)
    same(flax.serialization.from_bytes(start, flax.serialization.to_bytes(state)), state)
    floats = decode_state(state)
    assert jax.eval_shape(encode_state, floats).layout == state.layout
    plain = pack_small_leaves(adamax(0.1), MAX_SIZE)
    assert jax.tree.structure(plain.init(PARAMS)) == jax.tree.structure(floats)
    jax.eval_shape(plain.update, gradient(PARAMS, 0), floats)


@pytest.mark.parametrize("name", ["nonfinite", "int8, uint8", *WRAPPERS])
def test_unpacked_state_equals_the_run_without_packing(name):
    (_, expected), (_, state), like = runs(name)
    unpacked = unpack_state(state, PARAMS)
    same(unpacked, expected)
    same(repack_state(unpacked, like), state)
    same(unpack_state(expected, PARAMS), expected)  # nothing to unpack


def test_state_is_converted_to_another_max_size():
    old, new = (pack_small_leaves(adamax(0.1), size) for size in (5, MAX_SIZE))
    _, state = run(old, FEW)
    carried = repack_state(unpack_state(state, FEW), like=new.init(FEW))
    g = gradient(FEW, 6)
    same(jax.jit(new.update)(g, carried)[0], jax.jit(old.update)(g, state)[0])


def test_state_of_other_parameters_or_formats_raises():
    tx = pack_small_leaves(adamax(0.1), MAX_SIZE)
    state = tx.init(PARAMS)
    with pytest.raises(ValueError, match=r"it lacks \['a'\]. Pass the parameters given to init"):
        unpack_state(state, {name: x for name, x in PARAMS.items() if name != "a"})
    unpacked = unpack_state(state, PARAMS)
    other_format = pack_small_leaves(adamax(0.1, v_dtype="uint8"), MAX_SIZE)
    other_chain = pack_small_leaves(optax.sgd(0.1, momentum=0.9), MAX_SIZE)
    larger = jax.tree.map(lambda x: np.stack([x, x]), PARAMS)
    for other, params in ((other_format, PARAMS), (other_chain, PARAMS), (tx, larger)):
        like = jax.eval_shape(other.init, params)
        with pytest.raises(ValueError):
            repack_state(unpacked, like)
    half = optax.tree.set(unpacked, count=jnp.zeros((), jnp.int16))
    with pytest.raises(ValueError, match=r"count must have shape \(\) and dtype int32"):
        repack_state(half, state)


def test_leaves_of_equal_size_share_one_kernel():
    tx = pack_small_leaves(adamax(0.1))
    params = [full(16) for _ in range(90)] + [full((4, 4)) for _ in range(10)]
    state = jax.eval_shape(tx.init, params)
    text = jax.jit(tx.update).lower(params, state).compile().as_text()
    assert len(re.findall(r"dynamic-slice\(", text)) >= 100
    assert len(re.findall(r" slice\(", text)) == 1  # the predicate of the branch
    bodies = re.findall(r"\n%fused_computation\S* [^\n]*\{\n(.*?)\n\}", text, re.DOTALL)
    cuts = [re.sub(r"%?[\w.-]+ = |\.\d+|, metadata=\{.*?\}", "", b) for b in bodies]
    cuts = {re.sub(r"%[\w.-]+", "%", b) for b in cuts if "dynamic-slice" in b}
    assert len(cuts) <= 4


def test_state_is_updated_in_place():
    tx = pack_small_leaves(adamax(0.1), MAX_SIZE)
    state = jax.eval_shape(tx.init, PARAMS)
    compiled = jax.jit(tx.update, donate_argnums=1).lower(PARAMS, state).compile()
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    assert compiled.memory_analysis().alias_size_in_bytes == size
