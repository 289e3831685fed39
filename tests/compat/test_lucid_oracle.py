"""`compat.lucid` against a transcription of Lucid's rule, step by step.

Lucid needs Apple's frameworks and cannot be installed here, so its CPU kernel (`Adamax::update_one`
in Lucid 3.8) is transcribed below, operation by operation and in its dtypes. This oracle knows
Lucid's source; that it agrees with Lucid's binary has not been tested.
"""

import jax
import jax.numpy as jnp
import numpy as np
import peer_grid
import pytest
from peer_grid import Step, assert_same

from optax_adamax.compat import lucid as compat_lucid

FIELDS = ("exp_avg", "exp_inf")
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
    *,
    start=None,
    steps_before=0,
):
    """Lucid's run, from the moments in `start` if there are any."""
    real = next(iter(params.values())).dtype.type
    zeros = {k: np.zeros_like(x) for k, x in params.items()}
    p, m, u = (dict(x) for x in (start or Step(params, zeros, zeros)))
    steps = []
    for t, gradient in enumerate(grads, steps_before + 1):
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


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_every_step_is_that_of_lucid(dtype, options):
    # 2 ulps a step in float32: measured, at most 1.3.
    start, grads = peer_grid.parameters(dtype), peer_grid.gradients(dtype)
    with jax.enable_x64(dtype == np.float64):
        run = peer_grid.our_run(compat_lucid.adamax(**options), start, grads)
    assert_same(start, run, lucid_run(start, grads, **options), dtype)


def lone_element(grads, **options):
    """Both runs of a single parameter, ours first."""
    start, grads = {"x": np.ones(1, np.float32)}, [{"x": np.full(1, g, "f4")} for g in grads]
    run = peer_grid.our_run(compat_lucid.adamax(**options), start, grads)
    return run, lucid_run(start, grads, **options)


def test_a_zero_gradient_without_eps_is_no_nan_but_in_lucid():
    run, peer = lone_element([0.0], eps=0.0)
    assert np.isnan(peer[-1].p["x"])
    assert run[-1].p["x"] == 1.0


def test_v_remembers_a_nan_but_in_lucid():
    # Lucid's u forgets at once, which hides that m, and with it the parameter, is lost.
    run, peer = lone_element([np.nan, 1.0])
    assert peer[-1].v["x"] == 1.0
    assert np.isnan(peer[-1].m["x"])
    assert np.isnan(run[-1].v["x"])
    assert np.isnan(run[-1].m["x"])


def test_bfloat16_works_where_lucid_has_none():
    start = {"x": jnp.ones(3, jnp.bfloat16)}
    run = peer_grid.our_run(compat_lucid.adamax(lr=0.1), start, [{"x": jnp.ones(3, jnp.bfloat16)}])
    np.testing.assert_allclose(run[-1].p["x"].astype(np.float32), 0.9, rtol=2**-8)


def lucid_state_dict(params, run):
    """What Lucid 2 saves after a run: its moments, and the step as an int."""
    last = run[-1]
    entries = {
        i: {"step": len(run), "exp_avg": last.m[k], "exp_inf": last.v[k]}
        for i, k in enumerate(params)
    }
    return {"state": entries, "param_groups": [{"lr": 0.01, "params": list(entries)}]}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_continued_from_lucid_and_in_lucid(dtype):
    params, grads = peer_grid.model_run(dtype)
    modules = {"Dense_0": "fc", "Conv_0": "conv"}
    options, half = {"lr": 0.01, "weight_decay": 0.01}, peer_grid.STEPS // 2
    with jax.enable_x64(dtype == np.float64):
        names = compat_lucid.flax_names(params, modules)
        theirs = compat_lucid.dump_params(params, names)
        their_grads = [compat_lucid.dump_params(g, names) for g in grads]
        whole = lucid_run(theirs, their_grads, **options)
        tx = compat_lucid.adamax(**options)
        how = {"order": list(theirs)}

        saved = lucid_state_dict(theirs, whole[:half])
        mine = compat_lucid.load_params(whole[half - 1].p, params, names)
        state = compat_lucid.load_state(saved, params, tx, names, **how)
        mine, state = peer_grid.train(tx, mine, state, grads[half:])
        back = compat_lucid.dump_params(mine, names)
        peer_grid.assert_equal_trees(back, whole[-1].p, dtype)

        mine, state = peer_grid.train(tx, params, tx.init(params), grads[:half])
        groups = saved["param_groups"]
        dumped = compat_lucid.dump_state(state, params, groups, names, **how)
    entries = dumped["state"].values()
    assert all(type(x["step"]) is int and x["step"] == half for x in entries)
    moments = ({k: x[field] for k, x in zip(theirs, entries, strict=True)} for field in FIELDS)
    start = Step(compat_lucid.dump_params(mine, names), *moments)
    end = lucid_run(start.p, their_grads[half:], start=start, steps_before=half, **options)[-1]
    for ours, expected in zip(end, whole[-1], strict=True):
        peer_grid.assert_equal_trees(ours, expected, dtype)


def test_groups_are_those_of_lucid():
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
    chosen = {"params": {k: k in first for k in start}}
    with jax.enable_x64(True):
        tx = compat_lucid.adamax(lr=0.01, groups=[chosen | group, {}])
        assert_same(start, peer_grid.our_run(tx, start, grads), merged, np.float64)
