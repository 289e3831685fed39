"""The schedulers in docs/guide/moving.md equal those of PyTorch and Keras, in both directions."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_moving import PAGE, run, table

from optax_adamax.compat import keras as compat_keras
from optax_adamax.compat import torch as compat_torch

torch = pytest.importorskip("torch")
STEPS = 40
ARGUMENTS = {
    "lr": 0.1,
    "gamma": 0.7,
    "step_size": 6,
    "milestones": [5, 9, 30],
    "T_max": STEPS,
    "eta_min": 0.003,
    "start_factor": 0.25,
    "end_factor": 0.9,
    "total_iters": 11,
    "lr_lambda": lambda count: 1 / (1 + count),
    "max_lr": 0.1,
    "base_lr": 0.02,
    "step_size_up": 7,
    "total_steps": STEPS + 2,
    "factor": 0.5,
    "patience": 3,
}
ROWS = table("`torch.optim.lr_scheduler`")
SCHEDULES = [row for row in ROWS if "Plateau" not in row[0]]
CYCLED = [row for row in ROWS if row[0].startswith(("OneCycle", "Cyclic"))]


@pytest.fixture(autouse=True)
def as_optax_computes():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture(scope="module")
def page():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return run()


def both(row, page, **options):
    """Returns PyTorch's parameter, optimizer and scheduler, and optax's schedule."""
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.Adamax([parameter], lr=ARGUMENTS["lr"])
    # All arguments are given by keyword, because PyTorch's order has others between them.
    call, given = re.fullmatch(r"(\w+)\(optimizer, (.*)\)", row[0]).groups()
    options |= {name: ARGUMENTS[name] for name in given.split(", ")}
    scheduler = getattr(torch.optim.lr_scheduler, call)(optimizer, **options)
    return parameter, optimizer, scheduler, eval(row[1], page | ARGUMENTS)


def gradient(count):
    return np.array([1.0, -0.5, 0.25], "f4") * (1 + count % 3)


def step_in_torch(parameter, optimizer, scheduler, count):
    parameter.grad = torch.tensor(gradient(count))
    optimizer.step()
    scheduler.step()


@pytest.mark.parametrize("row", SCHEDULES, ids=lambda row: row[0])
def test_schedule_equals_its_scheduler(row, page):
    *_, optimizer, scheduler, schedule = both(row, page)
    for count in range(STEPS):
        assert float(schedule(count)) == pytest.approx(scheduler.get_last_lr()[0], rel=2e-6), count
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("row", SCHEDULES, ids=lambda row: row[0])
def test_schedule_continues_in_both_directions(row, page):
    options = {"cycle_momentum": False} if row in CYCLED else {}
    whole = both(row, page, **options)
    for count in range(STEPS):
        step_in_torch(*whole[:3], count)
    parameter, optimizer, scheduler, schedule = both(row, page, **options)
    for count in range(10):
        step_in_torch(parameter, optimizer, scheduler, count)

    params = {"w": jnp.asarray(parameter.detach().numpy())}
    tx = compat_torch.adamax(schedule)
    state = compat_torch.load_state(optimizer.state_dict(), params, tx, names=["w"])
    update = jax.jit(tx.update)
    for count in range(10, 20):
        updates, state = update({"w": gradient(count)}, state, params)
        params = optax.apply_updates(params, updates)

    parameter, optimizer, scheduler, _ = both(row, page, **options)
    parameter.data = torch.from_numpy(np.array(params["w"]))
    code = re.search(r":caption: scheduler\n\n(.*?)^```", PAGE, re.M | re.S).group(1)
    names = {"to_source": None, "names": ["w"], "torch": torch, "schedule": schedule}
    names |= {"compat_torch": compat_torch, "optax": optax, "state": state, "params": params}
    exec(code, names | {"optimizer": optimizer, "scheduler": scheduler})
    for count in range(20, STEPS):
        step_in_torch(parameter, optimizer, scheduler, count)
    after, expected = (x.detach().numpy() for x in (parameter, whole[0]))
    np.testing.assert_allclose(after, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("row", CYCLED, ids=lambda row: row[0])
def test_cycled_momentum_is_a_schedule_of_b1(row, page):
    parameter, optimizer, scheduler, schedule = both(row, page)
    momentum = page["one_cycle"](0.95, 0.85, 0.95, ARGUMENTS["total_steps"])
    if row[0].startswith("Cyclic"):
        momentum = eval(re.search(r"# CyclicLR: (.*)", PAGE).group(1), page | ARGUMENTS)
    tx = optax.inject_hyperparams(page["compat_optax"].adamax)(learning_rate=schedule, b1=momentum)
    params = {"w": jnp.ones(3)}
    state, update = tx.init(params), jax.jit(tx.update)
    for count in range(STEPS):
        if count == STEPS // 2:
            sd = optimizer.state_dict()
            state = compat_torch.load_state(sd, params, tx, names=["w"])
        updates, state = update({"w": gradient(count)}, state, params)
        params = optax.apply_updates(params, updates)
        step_in_torch(parameter, optimizer, scheduler, count)
    np.testing.assert_allclose(params["w"], parameter.detach().numpy(), rtol=1e-4, atol=1e-5)


def test_reduce_on_plateau_continues_with_scale_best_value_and_patience():
    (row,) = [row for row in ROWS if "Plateau" in row[0]]
    *_, optimizer, scheduler, plateau = both(row, {"optax": optax})
    metrics = [3.0, 2.0, 2.5, *[2.1] * 9, 1.5, *[1.6] * 12]
    optimizer.step()
    lr, params = ARGUMENTS["lr"], {"w": jnp.ones(2)}
    tx = optax.chain(compat_torch.adamax(lr=lr), plateau)
    code = PAGE[PAGE.index("state = optax.tree.set(\n") :].split("```")[0]
    for start in (0, 4, 8, 14):  # a continued run equals an uninterrupted one
        if start:
            for metric in metrics[:start]:
                scheduler.step(metric)
            names = {"plateau": scheduler.state_dict(), "tx": tx, "params": params}
            exec(code, names := names | {"optax": optax, "jnp": jnp})
            state = names["state"]
        else:
            state = tx.init(params)
        for metric in metrics[start:]:
            _, state = tx.update(params, state, params, value=metric)
            scheduler.step(metric)
            scale = optax.tree.get(state, "scale")
            assert lr * float(scale) == pytest.approx(scheduler.get_last_lr()[0], rel=1e-5)
        assert float(scale) < 0.3
        *_, optimizer, scheduler, _ = both(row, {"optax": optax})


KERAS_SCHEDULES = [
    ("ExponentialDecay", (0.1, 10, 0.5)),
    ("PiecewiseConstantDecay", ([5, 20], [0.1, 0.05, 0.01])),
    ("PolynomialDecay", (0.1, 30, 0.01)),
    ("InverseTimeDecay", (0.1, 5, 0.5)),
    ("CosineDecay", (0.1, 30)),
    ("CosineDecayRestarts", (0.1, 12)),
]


KERAS_ARGUMENTS = {
    "lr": 0.1,
    "decay_steps": 20,
    "decay_rate": 0.5,
    "boundaries": [5, 20],
    "values": [0.1, 0.05, 0.01],
    "end": 0.01,
    "alpha": 0.1,
    "peak": 0.3,
    "warmup": 7,
}


@pytest.mark.parametrize(
    "row", table("`keras.optimizers.schedules`"), ids=lambda row: row[0].replace('"', "")
)
def test_a_schedule_has_the_rates_of_keras(row):
    schedules = pytest.importorskip("keras").optimizers.schedules
    expected = eval(f"schedules.{row[0]}", KERAS_ARGUMENTS | {"schedules": schedules})
    schedule = jax.jit(eval(row[1], KERAS_ARGUMENTS | {"optax": optax}))
    for count in range(STEPS):
        assert float(schedule(count)) == pytest.approx(float(expected(count)), rel=1e-5), count


@pytest.mark.parametrize(("name", "arguments"), KERAS_SCHEDULES, ids=lambda x: str(x))
def test_schedule_object_of_keras_is_a_schedule(name, arguments):
    keras = pytest.importorskip("keras")
    schedule = getattr(keras.optimizers.schedules, name)(*arguments)
    tx = compat_keras.adamax(schedule)
    params = {"w": jnp.ones(1)}
    state, update = tx.init(params), jax.jit(tx.update)
    for count in range(25):
        updates, state = update(params, state, params)
        assert -float(updates["w"][0]) == pytest.approx(float(schedule(count)), rel=1e-5)
