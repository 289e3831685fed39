"""`compat.torch` against the installed PyTorch, step by step."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import peer_grid
import pytest
from peer_grid import Step, assert_same

torch = pytest.importorskip("torch")

from optax_adamax.compat import torch as compat_torch  # noqa: E402

OPTIONS = [
    {},
    {"lr": 0.1},
    {"betas": (0.5, 0.9)},
    {"betas": (0.0, 0.999)},
    {"betas": (0.99, 0.0)},
    {"eps": 1e-3},
    {"weight_decay": 0.1},
    {"maximize": True},
    {"lr": 0.01, "weight_decay": 0.01, "maximize": True, "foreach": True},
]
DTYPES = {
    np.float32: torch.float32,
    np.float64: torch.float64,
    jnp.bfloat16: torch.bfloat16,
    np.float16: torch.float16,
    np.complex64: torch.complex64,
    np.complex128: torch.complex128,
}


def tensor(x):
    x = np.asarray(x)
    wide = x.astype(np.float32) if x.dtype == jnp.bfloat16 else x
    return torch.tensor(wide).to(DTYPES[x.dtype.type])


def array(x):
    x = x.detach()
    return np.array((x.float() if x.dtype == torch.bfloat16 else x).numpy())


def torch_run(params, grads, **options):
    """Runs PyTorch."""
    leaves = {k: torch.nn.Parameter(tensor(p)) for k, p in params.items()}
    return torch_steps(torch.optim.Adamax(leaves.values(), **options), leaves, grads)


def torch_steps(optimizer, leaves, grads):
    """Runs an optimizer of these parameters."""
    steps = []
    for g in grads:
        for k, p in leaves.items():
            p.grad = tensor(g[k])
        optimizer.step()
        state = {k: optimizer.state[p] for k, p in leaves.items()}
        steps.append(
            Step(
                {k: array(p) for k, p in leaves.items()},
                {k: array(s["exp_avg"]) for k, s in state.items()},
                {k: array(s["exp_inf"]) for k, s in state.items()},
            )
        )
    return steps


@pytest.mark.parametrize(("dtype", "options"), peer_grid.grid(OPTIONS))
def test_steps_equal_those_of_torch(dtype, options):
    # 2 ULPs per step in float32; at most 1.3 were measured.
    start, grads = peer_grid.parameters(dtype), peer_grid.gradients(dtype)
    with jax.enable_x64(dtype == np.float64):
        run = peer_grid.our_run(compat_torch.adamax(**options), start, grads)
    assert_same(start, run, torch_run(start, grads, **options), dtype)


def part(steps, name):
    """Returns the real or the imaginary half of a complex run."""
    is_leaf = lambda x: hasattr(x, name)  # noqa: E731
    return [jax.tree.map(lambda x: getattr(x, name), s, is_leaf=is_leaf) for s in steps]


@pytest.mark.parametrize("options", [{"weight_decay": 0.01}, {"maximize": True}], ids=str)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_complex_parameters_are_pairs_of_reals(dtype, options):
    def join(a, b):
        return jax.tree.map(lambda x, y: (x + 1j * y).astype(np.result_type(x, np.complex64)), a, b)

    start = join(peer_grid.parameters(dtype), peer_grid.parameters(dtype, seed=2))
    grads = list(map(join, peer_grid.gradients(dtype), peer_grid.gradients(dtype, seed=3)))
    with jax.enable_x64(dtype == np.float64):
        run = peer_grid.our_run(compat_torch.adamax(**options), start, grads)
    peer = torch_run(start, grads, **options)
    for name in ("real", "imag"):
        halves = (jax.tree.map(lambda x, n=name: getattr(x, n), start), part(run, name))
        assert_same(*halves, part(peer, name), dtype)


@pytest.mark.parametrize("options", [{}, {"lr": 0.1, "weight_decay": 0.1}], ids=str)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float16])
def test_step_in_half_precision_differs_by_rounding(dtype, options):
    # Each step starts from PyTorch's state, whose m and u have the dtype of the parameters.
    kinds = peer_grid.IN_FLOAT16 if dtype == np.float16 else peer_grid.KINDS
    start = peer_grid.parameters(dtype, kinds=kinds)
    grads = peer_grid.gradients(dtype, kinds=kinds)[:20]
    peer = torch_run(start, grads, **options)
    tx = compat_torch.adamax(**options)
    for t in range(1, len(grads)):
        before = {k: peer[t - 1].p[k].astype(dtype) for k in kinds}
        step = peer_grid.our_step(tx, before, grads[t], peer[t - 1], t + 1)
        assert_same(before, [step], [peer[t]], dtype, m=peer[t - 1].m)


def lone_element(dtype, grads, **options):
    """Runs this package and PyTorch on a single element."""
    start, grads = {"x": np.ones(1, dtype)}, [{"x": np.full(1, g, dtype)} for g in grads]
    ours = peer_grid.our_run(compat_torch.adamax(**options), start, grads)
    return ours, torch_run(start, grads, **options)


def test_u_decays_in_bfloat16_unlike_torch():
    ours, theirs = lone_element(jnp.bfloat16, [1.0] + [0.0] * 500)
    assert theirs[-1].v["x"] == 1.0
    np.testing.assert_allclose(ours[-1].v["x"], 0.999**500, rtol=1e-4)


def test_zero_gradient_in_float16_is_finite_unlike_torch():
    ours, theirs = lone_element(np.float16, [0.0, 1.0])
    assert np.isnan(theirs[-1].p["x"])
    assert ours[0].p["x"] == 1.0
    assert np.isfinite(ours[1].p["x"])


def test_zero_gradient_without_eps_is_finite_unlike_torch():
    ours, theirs = lone_element(np.float32, [0.0, 0.0], eps=0.0)
    assert np.isnan(theirs[-1].p["x"])
    assert ours[-1].p["x"] == 1.0


def test_opposite_huge_gradients_are_finite_unlike_torch():
    ours, theirs = lone_element(np.float32, [3e38] * 20 + [-3e38])
    assert np.isinf(theirs[-1].m["x"])
    assert np.isfinite(ours[-1].m["x"])
    assert np.isfinite(ours[-1].p["x"])


@pytest.mark.parametrize(
    "options",
    [
        {"lr": -1.0},
        {"lr": float("nan")},
        {"eps": -1e-8},
        {"betas": (1.0, 0.999)},
        {"betas": (0.9, 1.0)},
        {"betas": (-0.1, 0.999)},
        {"betas": (0.9, float("nan"))},
        {"weight_decay": -0.1},
    ],
    ids=str,
)
def test_values_invalid_in_torch_raise(options):
    with pytest.raises(ValueError):
        torch.optim.Adamax([torch.nn.Parameter(torch.ones(1))], **options)
    with pytest.raises(ValueError):
        compat_torch.adamax(**options)


def test_signature_equals_that_of_torch():
    theirs = list(inspect.signature(torch.optim.Adamax).parameters.values())[1:]
    ours = inspect.signature(compat_torch.adamax).parameters
    assert list(ours)[: len(theirs)] == [p.name for p in theirs]
    for p in theirs:
        assert (ours[p.name].default, ours[p.name].kind) == (p.default, p.kind)


GROUPS = [
    {"lr": 0.1, "betas": (0.5, 0.99), "weight_decay": 0.1},
    {"eps": 1e-3, "maximize": True},
    {},
]
CHOSEN = [("normal", "tiny", "huge"), ("decades", "fading"), ("sparse", "zeros", "spike")]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_groups_equal_those_of_torch(dtype):
    start, grads = peer_grid.parameters(dtype), peer_grid.gradients(dtype)
    leaves = {k: torch.nn.Parameter(tensor(p)) for k, p in start.items()}
    groups = [
        {"params": [leaves[k] for k in chosen]} | group
        for group, chosen in zip(GROUPS, CHOSEN, strict=True)
    ]
    peer = torch_steps(torch.optim.Adamax(groups, lr=0.01), leaves, grads)
    patterns = [f"^({'|'.join(chosen)})$" for chosen in CHOSEN]
    groups = [{"params": pattern} | group for pattern, group in zip(patterns, GROUPS, strict=True)]
    with jax.enable_x64(dtype == np.float64):
        run = peer_grid.our_run(compat_torch.adamax(lr=0.01, groups=groups), start, grads)
    assert_same(start, run, peer, dtype)


SCHEDULERS = {
    "OneCycleLR": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=9),
    "CyclicLR": lambda o: torch.optim.lr_scheduler.CyclicLR(o, 0.01, 0.1),
    "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, 0.1),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_groups_copied_from_torch_are_accepted(name):
    optimizer = torch.optim.Adamax([("w", torch.nn.Parameter(torch.ones(1)))], lr=0.01)
    SCHEDULERS[name](optimizer)
    (group,) = optimizer.state_dict()["param_groups"]
    assert "param_names" in group and "initial_lr" in group
    tx = compat_torch.adamax(groups=[{**group, "params": "w"}])
    params = {"w": jnp.ones(1)}
    updates, _ = tx.update(params, tx.init(params), params)
    np.testing.assert_allclose(updates["w"], -group["lr"], rtol=1e-6)
    with pytest.raises(TypeError, match="must be a pattern"):
        compat_torch.adamax(groups=[group])


def test_empty_group_is_allowed_as_in_torch():
    groups = [{"params": [], "lr": 0.1}, {"params": [torch.nn.Parameter(torch.ones(1))]}]
    assert len(torch.optim.Adamax(groups).param_groups) == 2
    params = {"w": jnp.ones(1)}
    tx = compat_torch.adamax(groups=[{"params": [], "lr": 0.1}, {"params": "w"}])
    updates, _ = tx.update(params, tx.init(params), params)
    np.testing.assert_allclose(updates["w"], -2e-3, rtol=1e-6)


def test_dtype_of_torch_is_not_a_storage_format():
    with pytest.raises(TypeError, match="float32, float64, bfloat16, int8, but a torch dtype was"):
        compat_torch.adamax(m_dtype=torch.bfloat16)
