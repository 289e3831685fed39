"""Runs that move from the installed PyTorch to `compat.torch` and back."""

import io

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peer_grid
import pytest

torch = pytest.importorskip("torch")

from optax_adamax.compat import torch as compat_torch  # noqa: E402

MODULES = {"Dense_0": "encoder.0", "Conv_0": "conv", "LayerNorm_0": "norm", "Embed_0": "embed"}
HALF = peer_grid.STEPS // 2
OPTIONS = {"lr": 0.01, "weight_decay": 0.01}


class Peer:
    """PyTorch's optimizer over the arrays of a model, by name."""

    def __init__(self, params, **options):
        self.params = {k: torch.nn.Parameter(torch.tensor(p)) for k, p in params.items()}
        self.optimizer = torch.optim.Adamax(self.params.values(), **options)

    def train(self, grads):
        for g in grads:
            for name, p in self.params.items():
                p.grad = torch.tensor(g[name])
            self.optimizer.step()
        return self

    def arrays(self):
        return {k: p.detach().numpy().copy() for k, p in self.params.items()}

    def moments(self, field):
        return {k: self.optimizer.state[p][field].numpy() for k, p in self.params.items()}

    def saved(self):
        """Returns the state dict after saving and loading it."""
        file = io.BytesIO()
        torch.save(self.optimizer.state_dict(), file)
        file.seek(0)
        return torch.load(file)


def setup(dtype):
    """Returns parameters and gradients in JAX, the layout, and both as PyTorch has them."""
    params, grads = peer_grid.model_run(dtype)
    names = compat_torch.flax_names(params, MODULES)
    theirs = compat_torch.dump_params(params, names)
    return params, grads, names, theirs, [compat_torch.dump_params(g, names) for g in grads]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_continued_from_torch(dtype):
    with jax.enable_x64(dtype == np.float64):
        params, grads, names, theirs, their_grads = setup(dtype)
        peer = Peer(theirs, **OPTIONS).train(their_grads[:HALF])
        tx = compat_torch.adamax(**OPTIONS)
        params = compat_torch.load_params(peer.params, params, names)
        state = compat_torch.load_state(peer.saved(), params, tx, names, names=list(theirs))
        params, state = peer_grid.train(tx, params, state, grads[HALF:])
        whole = peer.train(their_grads[HALF:])
        back = compat_torch.dump_params(params, names)
        peer_grid.assert_equal_trees(back, whole.arrays(), dtype)
        moments = optax.tree.get(state, "ScaleByAdamaxState")
        assert moments.count == peer_grid.STEPS
        for field, tree in (("exp_avg", moments.m), ("exp_inf", moments.v)):
            ours = compat_torch.dump_params(tree, names)
            peer_grid.assert_equal_trees(ours, whole.moments(field), dtype)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_continued_in_torch(dtype):
    with jax.enable_x64(dtype == np.float64):
        params, grads, names, theirs, their_grads = setup(dtype)
        tx = compat_torch.adamax(**OPTIONS)
        params, state = peer_grid.train(tx, params, tx.init(params), grads[:HALF])
        peer = Peer(compat_torch.dump_params(params, names), **OPTIONS)
        groups = peer.optimizer.state_dict()["param_groups"]
        dumped = compat_torch.dump_state(
            state, params, groups, names, names=list(theirs), to_array=torch.from_numpy
        )
        peer.optimizer.load_state_dict(dumped)
        peer.train(their_grads[HALF:])
        whole = Peer(theirs, **OPTIONS).train(their_grads)
        peer_grid.assert_equal_trees(peer.arrays(), whole.arrays(), dtype)
        for field in ("exp_avg", "exp_inf"):
            peer_grid.assert_equal_trees(peer.moments(field), whole.moments(field), dtype)
        steps = {float(s["step"]) for s in peer.optimizer.state.values()}
        assert steps == {peer_grid.STEPS}


def test_names_in_the_state_dict_are_used():
    params = {"a": jnp.zeros(2), "b": jnp.zeros(2)}
    leaves = {"b": torch.nn.Parameter(torch.ones(2)), "a": torch.nn.Parameter(torch.ones(2))}
    optimizer = torch.optim.Adamax(leaves.items())
    for i, p in enumerate(leaves.values()):
        p.grad = torch.full((2,), float(i + 1))
    optimizer.step()
    tx = compat_torch.adamax()
    state = compat_torch.load_state(optimizer.state_dict(), params, tx)
    v = optax.tree.get(state, "ScaleByAdamaxState").v
    assert (float(v["b"][0]), float(v["a"][0])) == (1.0, 2.0)
    with pytest.raises(ValueError, match="names must be"):
        compat_torch.load_state(optimizer.state_dict(), params, tx, names=["a", "b"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.complex64])
def test_tensors_of_every_dtype_load(dtype):
    p = torch.nn.Parameter(torch.ones(3, 2).to(dtype))
    optimizer = torch.optim.Adamax([p])
    p.grad = torch.linspace(-1, 1, 6).reshape(3, 2).to(dtype) * (1j if dtype.is_complex else 1)
    optimizer.step()
    ours = jnp.zeros((3, 2), jnp.complex64 if dtype.is_complex else jnp.float32)
    tx = compat_torch.adamax()
    state = compat_torch.load_state(optimizer.state_dict(), {"w": ours}, tx, {0: "w"})
    moments = optax.tree.get(state, "ScaleByAdamaxState")
    for name, mine in (("exp_avg", moments.m["w"]), ("exp_inf", moments.v["w"])):
        theirs = optimizer.state[p][name]
        theirs = theirs.to(torch.complex64 if dtype.is_complex else torch.float32).numpy()
        mine = np.asarray(jax.lax.complex(*mine) if dtype.is_complex else mine)
        np.testing.assert_array_equal(mine, theirs)
    groups = optimizer.state_dict()["param_groups"]
    dumped = compat_torch.dump_state(
        state, {"w": ours}, groups, {0: "w"}, to_array=torch.from_numpy
    )
    before = optimizer.state[p]["exp_inf"].clone()
    optimizer.load_state_dict(dumped)
    assert optimizer.state[p]["exp_inf"].dtype == dtype
    rounding = 2**-24 if dtype == torch.float64 else 0
    torch.testing.assert_close(optimizer.state[p]["exp_inf"], before, rtol=rounding, atol=0)


def test_tracked_tensor_loads():
    params, names = {"w": jnp.zeros(2)}, {"w": "w"}
    loaded = compat_torch.load_params({"w": torch.nn.Parameter(torch.ones(2))}, params, names)
    np.testing.assert_array_equal(loaded["w"], 1.0)


def test_frozen_parameter_needs_no_moments():
    leaves = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
    optimizer = torch.optim.Adamax(leaves)
    leaves[1].grad = torch.ones(2)
    optimizer.step()
    params = {"frozen": jnp.ones(2), "head": jnp.ones(2)}
    both = {"train": compat_torch.adamax(), "freeze": optax.set_to_zero()}
    tx = optax.partition(both, {"frozen": "freeze", "head": "train"})
    how = {"names": ["frozen", "head"]}
    state = compat_torch.load_state(optimizer.state_dict(), params, tx, **how)
    assert int(optax.tree.get(state, "count")) == 1
    groups = optimizer.state_dict()["param_groups"]
    assert list(compat_torch.dump_state(state, params, groups, **how)["state"]) == [1]
    with pytest.raises(ValueError, match="'frozen'"):
        compat_torch.load_state(optimizer.state_dict(), params, compat_torch.adamax(), **how)


def test_schedule_continues_at_its_step():
    p = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.Adamax([p], lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5)
    params, tx = (
        {"w": jnp.ones(2)},
        compat_torch.adamax(lambda t: jnp.array([0.1, 0.05, 0.025, 0.0125])[t // 3]),
    )
    for step in range(10):
        if step == 4:
            mine = {"w": jnp.asarray(p.detach().numpy())}
            state = compat_torch.load_state(optimizer.state_dict(), params, tx, {0: "w"})
        if step >= 4:
            mine, state = peer_grid.our_call(tx)(mine, state, {"w": jnp.ones(2)})
        p.grad = torch.ones(2)
        optimizer.step()
        scheduler.step()
    np.testing.assert_allclose(mine["w"], p.detach().numpy(), rtol=1e-6)


def test_groups_continue_with_their_own_steps():
    params, grads, names, theirs, their_grads = setup(np.float32)
    biases = [k for k in theirs if k.endswith("bias")]
    others = [k for k in theirs if not k.endswith("bias")]

    def start(arrays):
        peer = Peer(arrays)
        groups = [
            {"params": [peer.params[k] for k in others], "weight_decay": 0.1},
            {"params": [peer.params[k] for k in biases], "lr": 0.1},
        ]
        peer.optimizer = torch.optim.Adamax(groups, lr=0.01)
        return peer

    peer = start(theirs)
    for k in others:  # not trained for the first ten steps
        peer.params[k].requires_grad_(False)
    for g in their_grads[:10]:
        for k in biases:
            peer.params[k].grad = torch.tensor(g[k])
        peer.optimizer.step()
    peer.train(their_grads[10:HALF])

    groups = [{"weight_decay": 0.1}, {"params": "bias$", "lr": 0.1}]
    tx = compat_torch.adamax(lr=0.01, groups=groups)
    order = [others, biases]
    params = compat_torch.load_params(peer.params, params, names)
    state = compat_torch.load_state(peer.saved(), params, tx, names, names=order)
    counts = {int(x) for _, x in optax.tree.get_all_with_path(state, "count")}
    assert counts == {HALF, HALF - 10}
    half = peer_grid.train(tx, params, state, grads[HALF:-5])
    back = start(compat_torch.dump_params(half[0], names))
    dumped = compat_torch.dump_state(
        half[1],
        half[0],
        back.optimizer.state_dict()["param_groups"],
        names,
        names=order,
        to_array=torch.from_numpy,
    )
    back.optimizer.load_state_dict(dumped)
    whole = peer.train(their_grads[HALF:])
    peer_grid.assert_equal_trees(back.train(their_grads[-5:]).arrays(), whole.arrays(), np.float32)
    with pytest.raises(ValueError, match="must have the same number of steps"):
        compat_torch.load_state(peer.saved(), params, compat_torch.adamax(), names, names=order)


def test_groups_copied_from_torch_equal_torch():
    leaves = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
    groups = [{"params": leaves[:1], "lr": 0.1}, {"params": leaves[1:], "eps": 1e-3}]
    optimizer = torch.optim.Adamax(groups, lr=0.01, weight_decay=0.1)
    torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)  # which adds initial_lr
    assert "initial_lr" in optimizer.param_groups[0]
    copied = [
        {**group, "params": [name]}
        for group, name in zip(optimizer.param_groups, "ab", strict=True)
    ]
    params = {"a": jnp.ones(2), "b": jnp.ones(2)}
    tx = compat_torch.adamax(groups=copied)
    params, _ = peer_grid.train(tx, params, tx.init(params), [params])
    for leaf in leaves:
        leaf.grad = torch.ones(2)
    optimizer.step()
    for ours, theirs in zip(params.values(), leaves, strict=True):
        np.testing.assert_allclose(ours, theirs.detach().numpy(), rtol=1e-6)


@pytest.mark.parametrize("missing", ["raise", "zero"])
def test_fresh_optimizer_of_torch_starts_at_zero_on_request(missing):
    params = {"a": jnp.ones(2), "b": jnp.ones(3)}
    leaves = [torch.nn.Parameter(torch.ones(n)) for n in (2, 3)]
    saved, tx = torch.optim.Adamax(leaves).state_dict(), compat_torch.adamax()
    if missing == "raise":
        with pytest.raises(ValueError, match=r"none for 'a' .*, 'b' .* missing='zero'"):
            compat_torch.load_state(saved, params, tx, names=list(params))
        return
    state = compat_torch.load_state(saved, params, tx, names=list(params), missing=missing)
    jax.tree.map(np.testing.assert_array_equal, state, tx.init(params))


@pytest.mark.parametrize("by_function", [False, True])
def test_empty_arrays_and_scalars_round_trip(by_function):
    shapes = {"empty": (0, 3), "scalar": (), "w": (2,)}
    leaves = {name: torch.nn.Parameter(torch.ones(shape)) for name, shape in shapes.items()}
    optimizer = torch.optim.Adamax(leaves.values())
    for p in leaves.values():
        p.grad = torch.ones_like(p)
    optimizer.step()
    params = {name: jnp.ones(shape) for name, shape in shapes.items()}
    layout = (lambda arrays: {k: x.numpy() for k, x in arrays.items()}) if by_function else None
    tx, how = compat_torch.adamax(), {"names": list(shapes)}
    saved = optimizer.state_dict()
    state = compat_torch.load_state(saved, params, tx, layout, **how)
    assert jax.tree.structure(state) == jax.tree.structure(tx.init(params))
    how["to_array"] = torch.from_numpy
    dumped = compat_torch.dump_state(state, params, saved["param_groups"], **how)
    assert float(dumped["state"][1]["exp_inf"]) == 1.0
    optimizer.load_state_dict(dumped)
    optimizer.step()
    assert float(optimizer.state[leaves["scalar"]]["step"]) == 2


def test_views_of_bfloat16_tensors_load():
    entry = {"step": 5.0, "exp_avg": torch.ones(4, 3).bfloat16(), "exp_inf": torch.ones(4, 3)}
    entry = {name: x[::2] if name != "step" else x for name, x in entry.items()}
    saved = {"state": {0: entry}, "param_groups": [{"params": [0]}]}
    state = compat_torch.load_state(
        saved, {"w": jnp.zeros((2, 3))}, compat_torch.adamax(), names=["w"]
    )
    np.testing.assert_array_equal(optax.tree.get(state, "m")["w"], 1.0)
