"""A transformation can be shared by threads and processes, copied, and its state pickled."""

import copy
import functools
import os
import pickle
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor

import cloudpickle
import jax
import numpy as np
import optax
import pytest

from optax_adamax import adamax, adamaxw, limit_spikes, scale_by_adamax

TRANSFORMATIONS = {
    "float32": lambda: adamax(0.1),
    "2 bytes": lambda: adamaxw(0.1, m_dtype="int8", v_dtype="uint8", nonfinite="zero"),
    "spikes": lambda: limit_spikes(scale_by_adamax(v_dtype="bfloat16"), 5.0),
}
every_transformation = pytest.mark.parametrize("name", TRANSFORMATIONS)
PARAMS = {"a": np.ones((2, 3), np.float32)}


@functools.cache
def made(name):
    """Returns a transformation, its compiled update, and the result of five steps."""
    tx = TRANSFORMATIONS[name]()
    update = jax.jit(tx.update)
    return tx, update, run(tx, update=update)


def run(tx, seed=0, update=None):
    """Returns parameters and state after five steps."""
    rng, params = np.random.default_rng(seed), PARAMS
    state, update = tx.init(params), update or jax.jit(tx.update)
    for _ in range(5):
        g = {name: np.float32(rng.normal(size=p.shape)) for name, p in params.items()}
        updates, state = update(g, state, params)
        params = {name: p + np.asarray(updates[name]) for name, p in params.items()}
    return params, state


def assert_same(tree, other):
    jax.tree.map(np.testing.assert_array_equal, tree, other)


@every_transformation
@pytest.mark.parametrize("compiled", [True, False], ids=["one program", "program per thread"])
def test_eight_threads_share_a_transformation(name, compiled):
    """Each thread gets the result of a single-threaded run, so no state is shared."""
    tx = TRANSFORMATIONS[name]()
    update = jax.jit(tx.update) if compiled else None
    with ThreadPoolExecutor(8) as threads:
        together = list(threads.map(lambda seed: run(tx, seed, update), range(8)))
    for seed, found in enumerate(together):
        assert_same(found, run(tx, seed, update or jax.jit(tx.update)))


@pytest.mark.parametrize(
    "name", ["2 bytes", *(pytest.param(x, marks=pytest.mark.slow) for x in ("float32", "spikes"))]
)
def test_copies_give_the_same_result(name):
    """`pickle` does not support transformations, also from optax, because they are closures."""
    tx, _, expected = made(name)
    for closures in (tx, optax.adamax(0.1)):
        with pytest.raises((AttributeError, pickle.PicklingError)):
            pickle.dumps(closures)
    for other in (copy.copy(tx), copy.deepcopy(tx), cloudpickle.loads(cloudpickle.dumps(tx))):
        assert_same(run(other), expected)


def test_partial_of_a_constructor_can_be_pickled():
    recipe = functools.partial(adamax, 0.1, m_dtype="int8", v_dtype="uint8")
    assert_same(run(pickle.loads(pickle.dumps(recipe))()), run(recipe()))


@every_transformation
def test_pickled_and_copied_states_continue_the_run(name):
    _, update, (params, state) = made(name)
    expected = update(PARAMS, state, params)
    for copied in (pickle.loads(pickle.dumps(state)), copy.deepcopy(state)):
        assert jax.tree.structure(copied) == jax.tree.structure(state)
        assert_same(update(PARAMS, copied, params), expected)


PROCESS = """
    import os, warnings
    import jax, numpy as np
    from optax_adamax import adamax

    tx = adamax(0.1, m_dtype="int8", v_dtype="uint8")  # before the fork; JAX has not started
    read, write = os.pipe()
    child = os.fork()
    step = jax.jit(lambda g: tx.update(g, tx.init(g)))
    updates, state = step(np.ones(3, np.float32))
    result = f"{updates} {state[0].v.scaled_uint8}".encode()
    if child == 0:
        os.write(write, result)
        os._exit(0)
    os.close(write)
    assert os.read(read, 1000) == result
    assert os.waitpid(child, 0)[1] == 0
    with warnings.catch_warnings(record=True) as caught:  # JAX has started its threads
        warnings.simplefilter("always")
        child = os.fork()
        if child == 0:
            os._exit(0)
    os.waitpid(child, 0)
    assert any("JAX is multithreaded" in str(warning.message) for warning in caught), caught
    jax.clear_caches()
    updates, state = step(np.ones(3, np.float32))
    assert f"{updates} {state[0].v.scaled_uint8}".encode() == result
    print("ok")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_transformation_works_after_a_fork_and_cleared_caches():
    """JAX warns about a fork only if JAX has started before."""
    command = [sys.executable, "-c", textwrap.dedent(PROCESS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.stdout == "ok\n", done.stderr
