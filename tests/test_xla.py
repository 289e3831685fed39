"""What is done for a compiler: the program is as meant, and would not be without the trick.

A test that fails under "needless" says that a trick can go: try without it, and remove both.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from formats import LOW_BIT

from optax_adamax import _xla, adamax

SIZE = 2 * _xla.LARGE


def compiled(tx, size=SIZE):
    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, g):
        u, state = tx.update(g, state, params)
        return optax.apply_updates(params, u), state

    params = jax.ShapeDtypeStruct((size,), jnp.float32)
    return step.lower(params, jax.eval_shape(tx.init, params), params).compile()


def copies_and_temporaries(executable, size=SIZE):
    """Copies of whole arrays, and bytes of temporaries a parameter."""
    copies = re.findall(rf"= \w+\[{size}\]\S* copy\(", executable.as_text())
    return len(copies), executable.memory_analysis().temp_size_in_bytes // size


def without_tricks(next_m, next_v, m, v, g, t, **_):
    return next_m(m, v, g, jnp.add), next_v(v, g)


@pytest.fixture
def plain(monkeypatch):
    monkeypatch.setattr(_xla, "store", without_tricks)
    jax.clear_caches()
    yield
    monkeypatch.undo()
    jax.clear_caches()


since_010 = pytest.mark.skipif(
    jax.__version_info__ < (0, 10), reason="earlier compilers copy: slower, with the same results"
)


@since_010
@pytest.mark.parametrize("m_dtype, v_dtype", LOW_BIT)
def test_nothing_is_copied_and_nothing_kept(m_dtype, v_dtype):
    step = compiled(adamax(1e-3, m_dtype=m_dtype, v_dtype=v_dtype))
    assert copies_and_temporaries(step) == (0, 0)


@since_010
def test_needless_store(plain):
    steps = [
        compiled(adamax(1e-3, m_dtype=m_dtype, v_dtype=v_dtype))
        for m_dtype, v_dtype in [("bfloat16", "bfloat16"), ("int8", "uint8")]
    ]
    found = [copies_and_temporaries(step) for step in steps]
    assert found != [(0, 0), (0, 0)], "XLA needs no branch any more"


def test_products_are_rounded_before_they_are_added():
    rng = np.random.default_rng(0)
    x, y = (jnp.asarray(rng.normal(size=1 << 12), jnp.float32) for _ in range(2))
    exact = np.float32(0.1) * np.asarray(x) + np.float32(0.9) * np.asarray(y)

    @jax.jit
    def pinned(x, y, t):
        return _xla.without_fma(jnp.float32(0.1) * x, t) + _xla.without_fma(jnp.float32(0.9) * y, t)

    np.testing.assert_array_equal(pinned(x, y, jnp.int32(1)), exact)


def test_needless_without_fma():
    rng = np.random.default_rng(0)
    x, y = (jnp.asarray(rng.normal(size=1 << 12), jnp.float32) for _ in range(2))
    exact = np.float32(0.1) * np.asarray(x) + np.float32(0.9) * np.asarray(y)
    contracted = jax.jit(lambda x, y: jnp.float32(0.1) * x + jnp.float32(0.9) * y)(x, y)
    assert np.any(np.asarray(contracted) != exact), "XLA on CPU contracts no more"


def test_all_finite_finds_every_place_without_memory():
    def temporaries(function):
        x = jax.ShapeDtypeStruct((SIZE,), jnp.float32)
        return jax.jit(function).lower(x).compile().memory_analysis().temp_size_in_bytes

    find = jax.jit(_xla.all_finite)
    assert find(jnp.full(SIZE, 3e38))
    for bad in (np.nan, np.inf, -np.inf):
        for place in (0, SIZE // 3, SIZE - 1):
            assert not find(jnp.ones(SIZE).at[place].set(bad))
    if jax.__version_info__ >= (0, 10):
        assert temporaries(_xla.all_finite) < SIZE
        needless = temporaries(lambda x: jnp.all(jnp.isfinite(x)))
        assert needless >= SIZE, "XLA writes no mask any more"
