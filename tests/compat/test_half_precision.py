"""The constructors compute in float32 for every dtype of gradients and parameters.

A step in half precision is compared with the same step from the same numbers in float32.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_adamax.compat import keras, lucid, mlx, torch

CONSTRUCTORS = {
    "torch": lambda: torch.adamax(lr=0.1, weight_decay=0.1, maximize=True),
    "lucid": lambda: lucid.adamax(lr=0.1, weight_decay=0.1),
    "mlx": lambda: mlx.adamax(0.1),
    "clipnorm": lambda: keras.adamax(0.1, clipnorm=1.0),
    "global_clipnorm": lambda: keras.adamax(0.1, global_clipnorm=1.0),
    "clipvalue": lambda: keras.adamax(0.1, clipvalue=1.0),
    "decay": lambda: keras.adamax(0.1, weight_decay=0.1),
    "loss_scale_factor": lambda: keras.adamax(0.1, loss_scale_factor=2.0**14),
    "accumulation": lambda: keras.adamax(0.1, gradient_accumulation_steps=2),
}


def steps(tx, params, grads):
    """Returns the updates for these gradients and constant parameters, and the last state."""
    state, found = jax.jit(tx.init)(params), []
    update = jax.jit(tx.update)
    for g in grads:
        updates, state = update(g, state, params)
        found.append(updates)
    return found, state


def draw(dtype):
    rng = np.random.default_rng(3)
    params = {"w": rng.standard_normal(500).astype(dtype)}
    grads = [{"w": rng.standard_normal(500).astype(dtype)} for _ in range(4)]
    return params, grads


def widened(tree, dtype=np.float32):
    return jax.tree.map(lambda x: np.asarray(x).astype(dtype), tree)


@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        *((jnp.float16, name) for name in CONSTRUCTORS),
        (jnp.bfloat16, "torch"),
        *(
            pytest.param(jnp.bfloat16, name, marks=pytest.mark.slow)
            for name in CONSTRUCTORS
            if name != "torch"
        ),
    ],
)
def test_step_is_rounded_once(dtype, name):
    tx, (params, grads) = CONSTRUCTORS[name](), draw(dtype)
    found, _ = steps(tx, params, grads)
    expected, _ = steps(tx, widened(params), widened(grads))
    # Half an ULP of rounding, and 2 float32 ULPs of 0.1 because XLA may contract products.
    kind = jnp.finfo(dtype)
    atol = 0.1 * 2**-22 + float(kind.smallest_subnormal) / 2
    for ours, exact in zip(found, expected, strict=True):
        assert ours["w"].dtype == dtype
        x = ours["w"].astype(np.float32)
        np.testing.assert_allclose(x, exact["w"], rtol=float(kind.eps) / 2, atol=atol)


@pytest.mark.parametrize("limit", ["clipnorm", "global_clipnorm"])
def test_norm_above_256_gives_full_step_in_float16(limit):
    params = {"w": jnp.ones(100, jnp.float16)}
    grads = {"w": jnp.full(100, 60.0, jnp.float16)}  # a norm of 600, whose square overflows
    tx = keras.adamax(0.1, **{limit: 1.0})
    (updates,), state = steps(tx, params, [grads])
    np.testing.assert_allclose(updates["w"].astype(np.float32), -0.1, rtol=2**-10)
    m = next(x for x in jax.tree.leaves(state) if x.shape == (100,))
    np.testing.assert_allclose(m, 0.1 * 0.1, rtol=1e-3)  # (1 - beta_1) times 1 / sqrt(100)


def test_scaled_loss_gives_full_step_in_float16():
    # 1e-4 / 2**14 is 0 in float16, whose smallest number is 6e-8.
    params = {"w": jnp.ones(3, jnp.float16)}
    tx = keras.adamax(0.1, epsilon=1e-12, loss_scale_factor=2.0**14)
    (updates,), _ = steps(tx, params, [{"w": jnp.full(3, 1e-4, jnp.float16)}])
    np.testing.assert_allclose(updates["w"].astype(np.float32), -0.1, rtol=2**-10)


WIDER = [
    (jnp.bfloat16, jnp.float32, jnp.float32),
    (jnp.float32, jnp.bfloat16, jnp.float32),
    (jnp.float16, jnp.bfloat16, jnp.bfloat16),
    (jnp.float16, jnp.float16, jnp.float16),
]


@pytest.mark.parametrize(
    ("name", "gradient", "parameter", "wider"),
    [
        *(("torch", *dtypes) for dtypes in WIDER),
        *((name, *WIDER[0]) for name in ("mlx", "accumulation")),
        *(
            pytest.param(name, *dtypes, marks=pytest.mark.slow)
            for name in ("mlx", "accumulation")
            for dtypes in WIDER[1:]
        ),
    ],
)
def test_updates_have_the_wider_dtype(gradient, parameter, wider, name):
    (params, _), (_, (gradient, *_)) = draw(parameter), draw(gradient)
    before, updates, after = step_types(CONSTRUCTORS[name](), params, gradient)
    assert updates["w"].dtype == np.dtype(wider)
    assert jax.tree.map(lambda x: x.dtype, after) == jax.tree.map(lambda x: x.dtype, before)


def step_types(tx, params, gradient):
    """Returns the types of the first state, the updates and the next state."""
    state = jax.eval_shape(tx.init, params)
    return state, *jax.eval_shape(tx.update, gradient, state, params)


def test_averages_of_bfloat16_parameters_are_float32():
    params = {"w": jnp.ones(3, jnp.bfloat16)}
    tx = keras.adamax(0.1, use_ema=True, ema_momentum=0.999)
    grads = [{"w": jnp.full(3, g, jnp.bfloat16)} for g in (1.0, 0.0, 0.0)]
    (_, first), (_, last) = steps(tx, params, grads[:1]), steps(tx, params, grads)
    assert first.average["w"].dtype == last.average["w"].dtype == np.float32
    assert np.all(last.average["w"] > first.average["w"])  # by less than an ULP of bfloat16


def test_float64_stays_float64():
    with jax.enable_x64(True):
        (params, _), (_, grads) = draw(jnp.float64), draw(jnp.float32)
        found, _ = steps(CONSTRUCTORS["torch"](), params, grads)
        assert found[-1]["w"].dtype == np.float64
        for name, make in CONSTRUCTORS.items():
            _, updates, _ = step_types(make(), params, grads[0])
            assert updates["w"].dtype == np.float64, name


def test_update_without_weight_decay_needs_no_parameters():
    grads = {"w": jnp.ones(3, jnp.bfloat16)}
    for tx in (torch.adamax(), lucid.adamax(), mlx.adamax(0.1), keras.adamax(clipnorm=1.0)):
        updates, _ = jax.eval_shape(tx.update, grads, jax.eval_shape(tx.init, grads))
        assert updates["w"].dtype == jnp.bfloat16


def test_invalid_gradients_raise_as_in_the_core():
    params = {"w": jnp.ones(3), "z": jnp.ones(2, jnp.complex64)}
    tx = torch.adamax()
    state = tx.init(params)
    for bad, error in (
        ({"w": jnp.ones(3, jnp.int32), "z": params["z"]}, TypeError),
        ({"w": "gradient", "z": params["z"]}, TypeError),
        ({"w": params["w"]}, ValueError),
        ({"w": jnp.ones(4), "z": params["z"]}, ValueError),
        ({"w": jnp.ones(3, jnp.complex64), "z": params["z"]}, ValueError),
    ):
        with pytest.raises(error):
            tx.update(bad, state, params)
