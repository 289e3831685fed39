"""The table of `describe_state` and the repr of a state are readable, also for sharded states."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import optax_adamax
from optax_adamax import (
    ScaleByAdamaxState,
    adamax,
    compensate_rounding,
    describe_state,
    encode_state,
    limit_spikes,
    pack_small_leaves,
)
from optax_adamax._describe import MAX_ROWS, WIDTH, StateDescription

ROOT = Path(optax_adamax.__file__).parents[1]


def state_of(m, v, *formats):
    return encode_state(ScaleByAdamaxState(jnp.int32(5), {"w": m}, {"w": v}), *formats)


def big_state(count=3, **formats):
    """Returns a state of leaves with long names; the last leaf saturates and is not finite."""
    names = [f"transformer/layer_{i}/attention/query/kernel" for i in range(count)]
    v = {name: np.full((2, 3), 1e30, np.float32) for name in names}
    m = {name: np.full((2, 3), np.nan, np.float32) for name in names}
    state = ScaleByAdamaxState(jnp.int32(5), {**v, names[-1]: m[names[-1]]}, v)
    return encode_state((state, optax.EmptyState()), **formats)


def test_the_table_has_a_row_per_leaf_and_the_advice():
    description = describe_state(big_state(m_dtype="int8", v_dtype="uint8"))
    heading, *rows = str(description).splitlines()
    assert heading.split() == ["leaf", "shape", "m/v", "v", "min", "v", "max", "no", "gradient"]
    assert len({len(row) for row in [heading, *rows[:3]]}) == 1
    assert all("(2, 3)  i8/u8" in row and row.startswith("...") for row in rows[:3])
    assert rows[3] == f"{description.bytes:,} bytes, 36 of them in m and v"
    advice = " ".join(rows[4:])
    assert all(word in advice for leaf in description.leaves for word in leaf.advice.split())
    assert repr(description) == str(description)


@pytest.mark.parametrize("formats", [{}, {"m_dtype": "int8", "v_dtype": "uint8"}])
@pytest.mark.parametrize("count", [2, 100])
def test_the_table_fits_a_terminal(count, formats):
    lines = str(describe_state(big_state(count, **formats))).splitlines()
    assert max(map(len, lines)) <= WIDTH
    assert len(lines) <= 1 + (MAX_ROWS + 1) * (1 + 5)


def test_leaves_with_advice_are_shown_first_if_there_are_many():
    description = describe_state(big_state(100))
    (bad,) = [leaf for leaf in description.leaves if leaf.advice]
    assert str(description).splitlines()[1].split()[-1] == "0"
    assert f"and {100 - MAX_ROWS} more leaves" in str(description)
    assert bad.advice.split()[0] in str(description)


def test_the_repr_of_a_state_has_dtypes_instead_of_arrays():
    tx = adamax(0.1, m_dtype="int8", v_dtype="uint8")
    params = {f"layer_{i}": jnp.ones((30, 30)) for i in range(20)}
    state = tx.init(params)
    wanted = "ScaleByAdamaxState(count=0, m=<20 int8 arrays>, v=<20 uint8 arrays>)"
    assert repr(state[0]) == str(state[0]) == wanted
    assert repr(state) == f"({wanted}, EmptyState())"
    assert "float32 arrays" in repr(adamax(0.1).init(params))
    mixed = state[0]._replace(m={"a": jnp.ones(2), "b": jnp.ones(2, jnp.bfloat16)})
    assert "m=<2 bfloat16/float32 arrays>" in repr(mixed)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda tx: adamax(0.1, nonfinite="zero"),
        lambda tx: limit_spikes(tx, 5.0),
        pack_small_leaves,
        lambda tx: compensate_rounding(
            limit_spikes(pack_small_leaves(tx), 5.0), check_applied=True
        ),
    ],
)
def test_repr_of_wrapper_states_has_no_arrays(wrap):
    params = {f"layer_{i}": np.ones((30, 2), jnp.bfloat16) for i in range(50)}
    text = repr(wrap(adamax(0.1)).init(params))
    assert len(text) < 400 and "[[" not in text and "layer" not in text
    assert "ScaleByAdamaxState(count=0, m=<" in text


def test_repr_of_abstract_states_has_dtypes():
    tx = adamax(0.1)
    structs = jax.eval_shape(tx.init, jnp.ones(2))
    assert "count=int32" in repr(structs)
    printed = []
    jax.eval_shape(lambda state: printed.append(repr(state[0])), structs)
    assert "int32[]" in printed[0] and "m=<1 float32 arrays>" in printed[0]
    assert "count=None" in repr(structs[0]._replace(count=None))


@pytest.mark.parametrize("spec", [P("x"), P(None, "x"), P()])
def test_sharded_state_has_the_same_description(spec):
    mesh = jax.make_mesh((2,), ("x",), (jax.sharding.AxisType.Explicit,), devices=jax.devices()[:2])
    v = np.exp(np.arange(-8, 8, dtype=np.float32)).reshape(4, 4)
    state = state_of(-v, v, "int8", "uint8")
    sharding = NamedSharding(mesh, spec)
    placed = jax.tree.map(
        lambda x: jax.device_put(x, sharding if x.ndim else NamedSharding(mesh, P())), state
    )
    assert describe_state(placed) == describe_state(state)


def test_state_in_host_memory_is_described():
    if "pinned_host" not in {memory.kind for memory in jax.devices()[0].addressable_memories()}:
        pytest.skip("this version of JAX has no pinned_host on CPU")
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0], memory_kind="pinned_host")
    v = np.exp(np.linspace(-8, 8, 1000, dtype=np.float32))
    state = state_of(-v, v, "int8", "uint8")
    assert describe_state(jax.device_put(state, place)) == describe_state(state)


class Spread:
    """Mimics an array of which this process has only a part."""

    is_fully_addressable = False


def test_a_state_over_several_processes_raises_instead_of_hanging():
    m = {"w": jnp.ones(2)}
    with pytest.raises(ValueError, match="all_processes=True was not given"):
        describe_state(ScaleByAdamaxState(Spread(), m, m))
    with pytest.raises(TypeError):  # the check of processes passes, the check of count fails
        describe_state(ScaleByAdamaxState(Spread(), m, m), all_processes=True)


PROCESS = """
import os, sys
import jax
jax.config.update("jax_num_cpu_devices", 2)
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
import jax.numpy as jnp
from optax_adamax import adamax, describe_state, sharding
mesh = jax.make_mesh((4,), ("data",), (jax.sharding.AxisType.Auto,))
place = jax.NamedSharding(mesh, jax.P("data"))
g = jax.jit(lambda: jnp.arange(8.0), out_shardings=place)()
tx = adamax(0.1, m_dtype="int8", v_dtype="uint8")
state = jax.jit(lambda g: tx.update(g, tx.init(g))[1])(g)
state = jax.jit(lambda s: jax.tree.map(lambda x: jax.lax.with_sharding_constraint(
    x, place) if x.ndim else x, s))(state)
print(repr(state))
try:
    describe_state(state)
except ValueError as error:
    assert "2 processes" in str(error), error
else:
    raise AssertionError
description = describe_state(state, all_processes=True)
assert description.leaves[0].no_gradient_fraction == 1 / 8, description
assert description.leaves[0].v_max > 6 and description.bytes == 24
print("described")
"""


@pytest.mark.slow
def test_two_processes_describe_a_state_together():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, address, str(i)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert all("described" in output for output in outputs), outputs


def test_descriptions_are_public():
    assert {"describe_state", "StateDescription"} <= set(optax_adamax.__all__)
    assert isinstance(describe_state(adamax(0.1).init(jnp.ones(2))), StateDescription)
