"""`load_state` sets the counters of Adamax and of its schedules, and no other counter."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_adamax.compat import optax as compat_optax
from optax_adamax.compat import torch

PARAMS = {"w": jnp.ones(2), "x": jnp.ones(3)}
STEP = 7


def schedule(count):
    return 0.1 / (jnp.asarray(count, jnp.float32) + 1)


def state_dict(params):
    entry = lambda x: {"step": STEP, "exp_avg": np.ones(x.shape), "exp_inf": np.ones(x.shape)}  # noqa: E731
    entries = {i: entry(x) for i, x in enumerate(params.values())}
    return {"state": entries, "param_groups": [{"params": list(entries)}]}


def load(tx, names=("w", "x")):
    params = {name: PARAMS[name] for name in names}
    return torch.load_state(state_dict(params), PARAMS, tx, names=list(params))


def twice_masked(tx):
    return optax.masked(optax.masked(tx, {"w": True, "x": True}), {"w": True, "x": True})


def counters(state):
    """Returns all counts of a state by path."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    named = {jax.tree_util.keystr(path): x for path, x in leaves}
    return {name: int(x) for name, x in named.items() if name.endswith("count")}


def test_counters_of_another_optimizer_in_a_partition_are_unchanged():
    labels = {"w": "w", "x": "x"}
    groups = {"x": torch.adamax(schedule), "w": optax.adam(schedule)}
    state = load(optax.partition(groups, labels), ["x"])
    ours, theirs = (counters(state.inner_states[name]) for name in ("x", "w"))
    assert set(ours.values()) == {STEP} and len(ours) == 2
    assert set(theirs.values()) == {0} and len(theirs) == 2


def test_schedule_in_a_group_without_adamax_is_unchanged():
    sgd = optax.scale_by_schedule(lambda count: -0.1)
    groups = {"x": torch.adamax(), "w": sgd}
    tx = optax.chain(optax.partition(groups, {"w": "w", "x": "x"}), optax.identity())
    assert counters(load(tx, ["x"])[0].inner_states["w"]) == {".inner_state.count": 0}


@pytest.mark.parametrize(
    "other",
    [
        optax.ema(0.99),
        optax.contrib.reduce_on_plateau(patience=2),
        optax.apply_every(2),
        optax.adam(schedule),
        optax.scale_by_adam(),
    ],
)
def test_counters_of_other_transformations_in_a_chain_are_unchanged(other):
    tx = optax.chain(torch.adamax(schedule), other)
    state = load(tx)
    jax.tree.map(np.testing.assert_array_equal, state[1], tx.init(PARAMS)[1])
    assert set(counters(state[0]).values()) == {STEP}


@pytest.mark.parametrize(
    ("tx", "number"),
    [
        (torch.adamax(schedule), 2),
        (optax.chain(torch.adamax(), optax.scale_by_schedule(schedule)), 2),
        (optax.chain(optax.scale_by_schedule(schedule), torch.adamax(schedule)), 3),
        (optax.chain(torch.adamax(), optax.add_decayed_weights(schedule)), 2),
        (compat_optax.adamaxw(schedule, weight_decay=schedule, mask={"w": True, "x": False}), 3),
        (optax.named_chain(("a", torch.adamax()), ("b", optax.scale_by_schedule(schedule))), 2),
        (optax.masked(torch.adamax(schedule), {"w": True, "x": True}), 2),
        (optax.chain(torch.adamax(), twice_masked(optax.scale_by_schedule(schedule))), 2),
        (twice_masked(optax.chain(torch.adamax(), optax.scale_by_schedule(schedule))), 2),
        (optax.inject_hyperparams(torch.adamax)(lr=0.1), 2),
        (optax.inject_hyperparams(torch.adamax)(lr=schedule), 3),
        (
            optax.chain(
                optax.inject_hyperparams(torch.adamax)(lr=schedule),
                optax.scale_by_schedule(schedule),
            ),
            4,
        ),
        (optax.inject_hyperparams(lambda lr: optax.chain(torch.adamax(schedule)))(lr=0.1), 3),
        (torch.adamax(schedule, groups=[{"params": "w"}, {"weight_decay": 0.1}]), 4),
    ],
)
def test_schedules_of_adamax_have_its_step(tx, number):
    found = counters(load(tx))
    assert list(found.values()) == [STEP] * number, found


def test_inject_hyperparams_of_another_optimizer_is_unchanged():
    adam = optax.inject_hyperparams(optax.adam)(learning_rate=schedule)
    tx = optax.partition({"x": torch.adamax(), "w": adam}, {"w": "w", "x": "x"})
    assert set(counters(load(tx, ["x"]).inner_states["w"]).values()) == {0}


def test_counters_of_multi_steps_are_zero():
    state = load(optax.MultiSteps(torch.adamax(schedule), 3))
    assert (int(state.mini_step), int(state.gradient_step)) == (0, 0)
    assert set(counters(state.inner_opt_state).values()) == {STEP}


def test_schedule_of_several_groups_has_the_largest_step():
    tx = optax.chain(torch.adamax(groups=[{"params": "w"}, {}]), optax.scale_by_schedule(schedule))
    saved = state_dict(PARAMS)
    saved["state"][0]["step"] = 3
    state = torch.load_state(saved, PARAMS, tx, names=list(PARAMS))
    assert sorted(counters(state).values()) == [3, STEP, STEP]
    assert int(state[1].count) == STEP


def test_injected_schedule_continues_at_its_step():
    tx = optax.inject_hyperparams(torch.adamax)(lr=schedule)
    state = load(tx)
    updates, _ = tx.update(PARAMS, state, PARAMS)
    np.testing.assert_allclose(updates["w"], -schedule(STEP) / (1 - 0.9 ** (STEP + 1)), rtol=1e-5)


def test_counters_of_other_optimizers_are_unchanged_by_dumping():
    labels = {"w": "w", "x": "x"}
    ours = optax.partition({"x": torch.adamax(), "w": optax.sgd(0.1)}, labels)
    theirs = optax.partition({"x": optax.adamax(schedule), "w": optax.sgd(schedule)}, labels)
    state = compat_optax.dump_state(load(ours, ["x"]), PARAMS, theirs)
    assert set(counters(state.inner_states["x"]).values()) == {STEP}
    assert set(counters(state.inner_states["w"]).values()) == {0}
