"""What a compiled, donated train step keeps and allocates, from XLA's own account of it."""

import functools

import jax
import jax.numpy as jnp
import optax
import pytest

from optax_adamax import adamax

SIZE = 1 << 20
WIDTH = {"float32": 4, "bfloat16": 2, "int8": 1, "uint8": 1}


def compiled_step(m_dtype, v_dtype):
    tx = adamax(1e-3, m_dtype=m_dtype, v_dtype=v_dtype)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, g):
        u, state = tx.update(g, state, params)
        return optax.apply_updates(params, u), state

    params = jax.ShapeDtypeStruct((SIZE,), jnp.float32)
    return step.lower(params, jax.eval_shape(tx.init, params), params).compile()


@pytest.mark.parametrize("m_dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("v_dtype", ["float32", "bfloat16", "uint8"])
def test_state_is_as_small_as_stated_and_nothing_else_is_kept(m_dtype, v_dtype):
    account = compiled_step(m_dtype, v_dtype).memory_analysis()
    state = SIZE * (WIDTH[m_dtype] + WIDTH[v_dtype])
    scalars = account.argument_size_in_bytes - SIZE * (4 + 4) - state
    assert 0 < scalars <= 8
    assert account.alias_size_in_bytes >= SIZE * 4 + state
    assert account.temp_size_in_bytes < 4096
