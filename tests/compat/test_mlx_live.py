"""`compat.mlx` against the installed MLX, step by step."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peer_grid
import pytest
from peer_grid import Step, assert_same

mx = pytest.importorskip("mlx.core")
mlx_optimizers = pytest.importorskip("mlx.optimizers")

from optax_adamax.compat import mlx as compat_mlx  # noqa: E402

OPTIONS = [
    {},
    {"learning_rate": 0.1},
    {"betas": [0.5, 0.9]},
    {"betas": [0.0, 0.999]},
    {"betas": [0.99, 0.0]},
    {"eps": 1e-3},
    {"eps": 1e-20, "learning_rate": 0.01},
]
DTYPES = {
    np.float32: mx.float32,
    np.float64: mx.float64,
    jnp.bfloat16: mx.bfloat16,
    np.float16: mx.float16,
    np.complex64: mx.complex64,
}


@pytest.fixture(autouse=True, scope="module")
def on_the_cpu():
    before = mx.default_device()
    mx.set_default_device(mx.cpu)  # only the CPU has float64
    yield
    mx.set_default_device(before)


def mlx_array(x):
    x = np.asarray(x)
    wide = x.astype(np.float32) if x.dtype == jnp.bfloat16 else x
    return mx.array(wide, DTYPES[x.dtype.type])


def array(x):
    return np.array(x.astype(mx.float32) if x.dtype == mx.bfloat16 else x)


def mlx_run(params, grads, *, compiled=False, **options):
    """Runs MLX."""
    optimizer = mlx_optimizers.Adamax(**{"learning_rate": 1e-3, **options})
    params = jax.tree.map(mlx_array, params)
    optimizer.init(params)
    call = optimizer.apply_gradients
    if compiled:
        call = mx.compile(call, inputs=optimizer.state, outputs=optimizer.state)
    steps = []
    for g in grads:
        params = call(jax.tree.map(mlx_array, g), params)
        moments = ({k: array(optimizer.state[k][name]) for k in params} for name in "mv")
        steps.append(Step({k: array(p) for k, p in params.items()}, *moments))
    return steps


def ours(**options):
    return compat_mlx.adamax(**{"learning_rate": 1e-3, **options})


@pytest.mark.parametrize(  # refers to MLX only
    "compiled", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["eager", "compiled"]
)
@pytest.mark.parametrize(("dtype", "options"), peer_grid.grid(OPTIONS))
def test_steps_equal_those_of_mlx(dtype, options, compiled):
    # 2 ULPs per step in float32; at most 0.9 were measured. MLX eager and compiled are equal.
    start, grads = peer_grid.parameters(dtype), peer_grid.gradients(dtype)
    with jax.enable_x64(dtype == np.float64):
        run = peer_grid.our_run(ours(**options), start, grads)
    assert_same(start, run, mlx_run(start, grads, compiled=compiled, **options), dtype)


def test_schedule_receives_number_of_previous_steps():
    # MLX's schedules compute in float32. The rates of optax's differ by at most 2 ULPs, which
    # `peer_fault` allows.
    theirs = mlx_optimizers.exponential_decay(0.1, 0.5)
    start, grads = peer_grid.parameters(np.float32), peer_grid.gradients(np.float32)
    tx = ours(learning_rate=optax.exponential_decay(0.1, 1, 0.5))
    peer = mlx_run(start, grads, learning_rate=theirs)
    assert_same(start, peer_grid.our_run(tx, start, grads), peer, np.float32, peer_fault=2.5e-7)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float16])
def test_step_in_half_precision_differs_by_rounding(dtype):
    # Each step starts from MLX's state. MLX rounds to the dtype of the parameters after each of the
    # five operations of m and of the step: 3 ULPs; at most 2.14 were measured.
    kinds = peer_grid.IN_FLOAT16 if dtype == np.float16 else peer_grid.KINDS
    start = peer_grid.parameters(dtype, kinds=kinds)
    grads = peer_grid.gradients(dtype, kinds=kinds)[:20]
    peer = mlx_run(start, grads, learning_rate=0.1)
    tx = ours(learning_rate=0.1)
    for t in range(1, len(grads)):
        before = {k: peer[t - 1].p[k].astype(dtype) for k in kinds}
        step = peer_grid.our_step(tx, before, grads[t], peer[t - 1], t + 1)
        assert_same(before, [step], [peer[t]], dtype, ulps=3.0, m=peer[t - 1].m)


def test_complex_parameters_have_real_v():
    rng = np.random.default_rng(4)
    grads = [{"z": (a + 1j * b).astype(np.complex64)} for a, b in rng.standard_normal((20, 2, 6))]
    start = {"z": np.ones(6, np.complex64)}
    run, peer = peer_grid.our_run(ours(), start, grads), mlx_run(start, grads)
    assert run[-1].v["z"].dtype == np.float32
    for a, b in zip(run, peer, strict=True):
        for name in Step._fields:
            np.testing.assert_allclose(getattr(a, name)["z"], getattr(b, name)["z"], rtol=1e-5)


def lone_element(dtype, grads, **options):
    """Runs this package and MLX on a single element."""
    start, grads = {"x": np.ones(1, dtype)}, [{"x": np.full(1, g, dtype)} for g in grads]
    return peer_grid.our_run(ours(**options), start, grads), mlx_run(start, grads, **options)


def test_v_decays_in_bfloat16_unlike_mlx():
    run, peer = lone_element(jnp.bfloat16, [1.0] + [0.0] * 500)
    assert peer[-1].v["x"] == 1.0
    np.testing.assert_allclose(run[-1].v["x"], 0.999**500, rtol=1e-4)


def test_zero_gradient_in_float16_is_finite_unlike_mlx():
    run, peer = lone_element(np.float16, [0.0])
    assert np.isnan(peer[-1].p["x"])
    assert run[-1].p["x"] == 1.0


def test_zero_gradient_without_eps_is_finite_unlike_mlx():
    run, peer = lone_element(np.float32, [0.0], eps=0.0)
    assert np.isnan(peer[-1].p["x"])
    assert run[-1].p["x"] == 1.0


@pytest.mark.parametrize(
    "options",
    [{"eps": -1e-8}, {"betas": [1.0, 0.999]}, {"betas": [0.9, 1.0]}, {"betas": [-0.1, 0.999]}],
    ids=str,
)
def test_values_invalid_in_mlx_raise(options):
    with pytest.raises(ValueError):
        mlx_optimizers.Adamax(1e-3, **options)
    with pytest.raises(ValueError):
        compat_mlx.adamax(1e-3, **options)


def test_signature_equals_that_of_mlx():
    theirs = list(inspect.signature(mlx_optimizers.Adamax).parameters.values())
    mine = inspect.signature(compat_mlx.adamax).parameters
    assert list(mine)[: len(theirs)] == [p.name for p in theirs]
    assert list(mine["betas"].default) == theirs[1].default
    assert mine["eps"].default == theirs[2].default
