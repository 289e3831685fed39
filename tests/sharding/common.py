"""Shared by the sharding tests: meshes, parameters, gradients, train steps and comparisons."""

import contextlib
import functools
import logging
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import optax_adamax
from optax_adamax import sharding

# Storage formats of the state, as arguments of scale_by_adamax.
FORMATS = {
    "float32": {},
    "4 bytes": {"m_dtype": "bfloat16", "v_dtype": "bfloat16"},
    "3 bytes": {"m_dtype": "int8", "v_dtype": "bfloat16"},
    "2 bytes": {"m_dtype": "int8", "v_dtype": "uint8"},
}

# XLA on CPU contracts a product and a sum to a fused multiply-add for some shard shapes only, so
# results can differ in the last bit (https://github.com/openxla/xla/issues/41579, open with JAX
# 0.10.2). Products with powers of two are exact, so contraction does not change them.
EXACT_PRODUCTS = {"learning_rate": 2.0**-4, "b1": 0.5}

# Two formats cover the placement of a state. float32 has no containers, and its only scalar is the
# count. The 2-byte state has every kind of leaf. The other two formats are slow tests.
SEVERAL = {name: pytest.mark.slow if name in ("3 bytes", "4 bytes") else () for name in FORMATS}
each_format = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=mark) for name, mark in SEVERAL.items()]
)
# For tests that need one format: the 2-byte state has every kind of leaf.
fewest_bits = pytest.mark.parametrize(
    "name", [pytest.param(x, marks=() if x == "2 bytes" else pytest.mark.slow) for x in FORMATS]
)


@functools.cache
def exact_adamaxw(name):
    """Returns an optimizer with exact products and a state in the format `name`."""
    return optax_adamax.adamaxw(**EXACT_PRODUCTS, weight_decay=2.0**-6, **FORMATS[name])


AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
AXIS_TYPES = {
    "auto": (AUTO, AUTO),
    "explicit": (EXPLICIT, EXPLICIT),
    "mixed": (AUTO, EXPLICIT),
}

# Placements of the state, as arguments of shard.
OPTIONS = {
    "like parameters": {},
    "zero": {"zero1_axis": "data"},
    "host": {"memory_kind": "pinned_host"},
    "zero and host": {"zero1_axis": "data", "memory_kind": "pinned_host"},
}

HOST_MEMORY = pytest.mark.skipif(
    jax.__version_info__ < (0, 10, 2),
    reason="JAX before 0.10.2 compiles no moves between host and device memory for CPU",
)

# Format, axis types and options of tests that compile a step. Each value occurs, not each triple.
CASES = [
    ("float32", "auto", "like parameters"),
    ("2 bytes", "explicit", "zero"),
    *(pytest.param(name, "auto", "zero", marks=mark) for name, mark in SEVERAL.items()),
    pytest.param("float32", "explicit", "host", marks=HOST_MEMORY),
    pytest.param("2 bytes", "auto", "zero and host", marks=HOST_MEMORY),
]

# Shape, dtype and PartitionSpec of each parameter, for a mesh of data x model = 4 x 2.
PARAMETERS = {
    "wide": ((24, 40), np.float32, P(None, "model")),
    "fsdp": ((16, 5), np.float32, P("data")),
    "bias": ((6,), np.float32, P()),
    "half": ((16, 8), jnp.bfloat16, P(None, "model")),
}

# PartitionSpecs after ZeRO-1 over "data", which shards the largest free dimension divisible by 4.
ZERO = {
    "wide": P("data", "model"),
    "fsdp": P("data"),
    "bias": P(),
    "half": P("data", "model"),
}
SHARDED_BY_ZERO1 = ("wide", "half")


def mesh_of(axis_types=AXIS_TYPES["auto"], shape=(4, 2), devices=None):
    """Returns a mesh of data x model over the first devices."""
    devices = jax.devices() if devices is None else devices
    count = int(np.prod(shape))
    return Mesh(np.array(devices[:count]).reshape(shape), ("data", "model"), axis_types=axis_types)


def structs(mesh):
    """Returns the parameters as shapes with shardings."""
    return {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
        for name, (shape, dtype, spec) in PARAMETERS.items()
    }


def struct(x, sharding):
    """Returns the shape and dtype of `x` with a sharding."""
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def state_structs(tx, params, **options):
    """Returns the state of `tx` as shapes with shardings."""
    shapes = jax.tree.map(lambda p: struct(p, p.sharding), params)
    return sharding.shard(tx, shapes, **options).init(shapes)


def random_like(tree, seed):
    """Returns heavy-tailed arrays, a tenth of them zeros; values do not depend on the sharding."""
    rng = np.random.default_rng(seed)

    def fill(leaf):
        parts = rng.standard_t(2, (2, *leaf.shape)) * (rng.random((2, *leaf.shape)) > 0.1)
        values = parts[0] + 1j * parts[1] if np.iscomplexobj(leaf) else parts[0]
        values = values.astype(leaf.dtype)
        return jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda i: values[i])

    return jax.tree.map(fill, tree)


def assert_same_bits(got, wanted):
    """Checks that the trees are equal in structure, dtypes and every bit."""
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    leaves = zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(wanted), strict=True)
    for (path, a), b in leaves:
        a, b = np.asarray(a), np.asarray(b)
        where = jax.tree_util.keystr(path)
        assert (a.dtype, a.shape) == (b.dtype, b.shape), where
        assert a.tobytes() == b.tobytes(), f"{where} differs in {np.sum(a != b)} elements"


STEPS = 6


def step_of(tx, **jit_options):
    """Compiles a step that returns parameters, state and updates."""

    @functools.partial(jax.jit, **jit_options)
    def step(params, state, gradients):
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, updates

    return step


def train(tx, params, state, **jit_options):
    """Returns parameters and updates of every step, the last state, and the compiled step."""
    step, history = step_of(tx, donate_argnums=1, **jit_options), []
    for t in range(STEPS):
        params, state, updates = step(params, state, random_like(params, t))
        history.append((params, updates))
    return history, state, step


@functools.cache
def on_one_device(name):
    """Returns history and state of `train` on one device, without `sharding.shard`."""
    params = random_like(structs(mesh_of(shape=(1, 1))), 99)
    tx = exact_adamaxw(name)
    return train(tx, params, jax.jit(tx.init)(params))[:2]


@contextlib.contextmanager
def count_compilations(name):
    """Collects the messages with which JAX logs a compilation of the function `name`."""
    found, logger = [], logging.getLogger("jax")
    handler = logging.Handler()
    handler.emit = lambda record: found.append(record.getMessage())
    logger.addHandler(handler)
    with jax.log_compiles():
        yield found
    logger.removeHandler(handler)
    found[:] = [x for x in found if re.match(rf"Compiling (jit\()?{name}\b", x)]


def is_at(array, sharding):
    """Returns whether an array has this sharding, including its memory kind."""
    in_memory = array.sharding.memory_kind == sharding.memory_kind
    return in_memory and array.sharding.is_equivalent_to(sharding, array.ndim)


COLLECTIVE = re.compile(
    r"= (.+?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-\w+)(?:-start)?\("
)


def collectives(compiled):
    """Returns kind and result (dtype and shape in HLO notation) of each collective, sorted."""
    found = []
    for line in compiled.as_text().splitlines():
        match = COLLECTIVE.search(line)
        if match:
            found += [(match[2], shape) for shape in re.findall(r"\w+\[[\d,]*\]", match[1])]
    return sorted(found)
