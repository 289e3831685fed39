"""`compat.lucid` against a transcription of Lucid's rule, step by step.

Lucid needs Apple's frameworks and cannot be installed here. So its CPU kernel (`Adamax::update_one`
in Lucid 3.8) is transcribed below, operation by operation and in its dtypes. The transcription
follows Lucid's source. Its agreement with Lucid's binary has not been tested.
"""

import jax
import jax.numpy as jnp
import numpy as np
import peer_grid
import pytest
from peer_grid import Step, assert_same

from optax_adamax.compat import lucid as compat_lucid
from optax_adamax.compat import torch as compat_torch

OPTIONS = [
    {},
    {"lr": 0.1},
    {"betas": (0.5, 0.9)},
    {"betas": (0.0, 0.999)},
    {"betas": (0.99, 0.0)},
    {"eps": 1e-3},
    {"weight_decay": 0.1},
    {"lr": 0.01, "weight_decay": 0.01},
]


def lucid_run(
    params,
    grads,
    lr=2e-3,
    betas=(0.9, 0.999),
    eps=1e-8,
    weight_decay=0.0,
):
    """Runs the transcription of Lucid."""
    real = next(iter(params.values())).dtype.type
    zeros = {k: np.zeros_like(x) for k, x in params.items()}
    p, m, u = dict(params), dict(zeros), dict(zeros)
    steps = []
    for t, gradient in enumerate(grads, 1):
        step_size = real(lr / (1.0 - betas[0] ** t))
        for k in p:
            g = gradient[k]
            if weight_decay != 0.0:
                g = g + real(weight_decay) * p[k]
            m[k] = real(betas[0]) * m[k] + real(1.0 - betas[0]) * g
            b2u = real(betas[1]) * u[k]
            u[k] = np.where(b2u > np.abs(g), b2u, np.abs(g))
            with np.errstate(invalid="ignore"):
                p[k] = p[k] - step_size * (m[k] / (u[k] + real(eps)))
        steps.append(Step(dict(p), dict(m), dict(u)))
    return steps


@pytest.mark.parametrize(("dtype", "options"), peer_grid.grid(OPTIONS))
def test_steps_equal_those_of_lucid(dtype, options):
    # 2 ULPs per step in float32; at most 1.3 were measured.
    start, grads = peer_grid.parameters(dtype), peer_grid.gradients(dtype)
    with jax.enable_x64(dtype == np.float64):
        run = peer_grid.our_run(compat_lucid.adamax(**options), start, grads)
    assert_same(start, run, lucid_run(start, grads, **options), dtype)


def lone_element(grads, **options):
    """Runs this package and Lucid on a single element."""
    start, grads = {"x": np.ones(1, np.float32)}, [{"x": np.full(1, g, "f4")} for g in grads]
    run = peer_grid.our_run(compat_lucid.adamax(**options), start, grads)
    return run, lucid_run(start, grads, **options)


def test_zero_gradient_without_eps_is_finite_unlike_lucid():
    run, peer = lone_element([0.0], eps=0.0)
    assert np.isnan(peer[-1].p["x"])
    assert run[-1].p["x"] == 1.0


def test_v_keeps_nan_unlike_lucid():
    # Lucid's u recovers at once, which hides that m and the parameter are NaN permanently.
    run, peer = lone_element([np.nan, 1.0])
    assert peer[-1].v["x"] == 1.0
    assert np.isnan(peer[-1].m["x"])
    assert np.isnan(run[-1].v["x"])
    assert np.isnan(run[-1].m["x"])


def test_bfloat16_step_has_full_length():
    start = {"x": jnp.ones(3, jnp.bfloat16)}
    run = peer_grid.our_run(compat_lucid.adamax(lr=0.1), start, [{"x": jnp.ones(3, jnp.bfloat16)}])
    np.testing.assert_allclose(run[-1].p["x"].astype(np.float32), 0.9, rtol=2**-8)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_run_continues_from_state_dict_of_lucid_2(dtype):
    # It has the form of PyTorch's, and the step is an int. Lucid 3 saves no moments.
    params, grads = peer_grid.model_run(dtype)
    options, half = {"lr": 0.01, "weight_decay": 0.01}, peer_grid.STEPS // 2
    with jax.enable_x64(dtype == np.float64):
        names = compat_lucid.flax_names(params, {"Dense_0": "fc", "Conv_0": "conv"})
        arrays = compat_lucid.dump_params(params, names)
        their_grads = [compat_lucid.dump_params(g, names) for g in grads]
        whole = lucid_run(arrays, their_grads, **options)
        last = whole[half - 1]
        entries = {
            i: {"step": half, "exp_avg": last.m[k], "exp_inf": last.v[k]}
            for i, k in enumerate(arrays)
        }
        saved = {"state": entries, "param_groups": [{"lr": 0.01, "params": list(entries)}]}
        tx = compat_lucid.adamax(**options)
        params = compat_lucid.load_params(last.p, params, names)
        state = compat_torch.load_state(saved, params, tx, names, names=list(arrays))
        params, state = peer_grid.train(tx, params, state, grads[half:])
        back = compat_lucid.dump_params(params, names)
        peer_grid.assert_equal_trees(back, whole[-1].p, dtype)


def test_groups_equal_those_of_lucid():
    start, grads = peer_grid.parameters(np.float64), peer_grid.gradients(np.float64)
    first = ("normal", "tiny", "huge", "spike")
    options = {"lr": 0.1, "betas": (0.5, 0.99), "eps": 1e-3, "weight_decay": 0.1}

    def part(tree, of_first):
        return {k: x for k, x in tree.items() if (k in first) == of_first}

    runs = [
        lucid_run(part(start, flag), [part(g, flag) for g in grads], **how)
        for flag, how in ((True, options), (False, {"lr": 0.01}))
    ]
    merged = [
        Step(*(a | b for a, b in zip(*both, strict=True))) for both in zip(*runs, strict=True)
    ]
    group = {"lr": 0.1, "beta1": 0.5, "beta2": 0.99, "eps": 1e-3, "weight_decay": 0.1}
    chosen = {"params": [f"^{k}$" for k in first]}
    with jax.enable_x64(True):
        tx = compat_lucid.adamax(lr=0.01, groups=[chosen | group, {}])
        assert_same(start, peer_grid.our_run(tx, start, grads), merged, np.float64)
