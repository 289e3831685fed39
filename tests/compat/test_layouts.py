"""Functions as layouts: they move moments and parameters, and must do nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peer_grid
import pytest
from small_checkpoints import load_one_parameter

torch = pytest.importorskip("torch")

from optax_adamax.compat import _layout  # noqa: E402
from optax_adamax.compat import torch as compat_torch  # noqa: E402

E = 4  # features


@pytest.fixture(autouse=True)
def as_frameworks_compute():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


class Net(torch.nn.Module):
    """A convolution with bias and a fused projection of an attention."""

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(2, 8, 3)
        self.attention = torch.nn.MultiheadAttention(E, 2)


def from_torch(arrays):
    """Makes Equinox' bias (8, 1, 1), and Flax' kernels (features, heads, size)."""
    weight, bias = arrays["attention.in_proj_weight"], arrays["attention.in_proj_bias"]
    heads = {
        name: {"kernel": jnp.asarray(w.numpy().T.reshape(E, 2, E // 2)), "bias": b.reshape(2, -1)}
        for name, w, b in zip(
            ("query", "key", "value"), weight.chunk(3), bias.chunk(3), strict=True
        )
    }
    out = arrays["attention.out_proj.weight"].numpy().T.reshape(2, E // 2, E)
    heads["out"] = {"kernel": out, "bias": arrays["attention.out_proj.bias"]}
    conv = {"weight": arrays["conv.weight"], "bias": arrays["conv.bias"].reshape(8, 1, 1)}
    return {"conv": conv, "attention": heads}


def to_torch(params):
    """Reverses `from_torch`."""
    heads = [params["attention"][name] for name in ("query", "key", "value")]
    return {
        "conv.weight": params["conv"]["weight"],
        "conv.bias": params["conv"]["bias"].reshape(8),
        "attention.in_proj_weight": np.concatenate([h["kernel"].reshape(E, E).T for h in heads]),
        "attention.in_proj_bias": np.concatenate([h["bias"].reshape(E) for h in heads]),
        "attention.out_proj.weight": params["attention"]["out"]["kernel"].reshape(E, E).T,
        "attention.out_proj.bias": params["attention"]["out"]["bias"],
    }


def some_grads(model, seed):
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(p.shape, generator=generator) for n, p in model.named_parameters()}


def train_in_torch(model, optimizer, seeds):
    for seed in seeds:
        for name, grad in some_grads(model, seed).items():
            model.get_parameter(name).grad = grad
        optimizer.step()


def as_params(arrays):
    return jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), from_torch(arrays))


@pytest.mark.parametrize("formats", [{}, {"m_dtype": "int8", "v_dtype": "uint8"}], ids=str)
def test_function_moves_moments_in_both_directions(formats):
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.Adamax(model.parameters(), lr=0.01)
    train_in_torch(model, optimizer, range(5))
    names = compat_torch.names_of(optimizer, model)
    template = as_params({n: torch.zeros(p.shape) for n, p in model.named_parameters()})
    tx = compat_torch.adamax(lr=0.01, **formats)
    params = compat_torch.load_params(model.state_dict(), template, from_torch)
    state = compat_torch.load_state(optimizer.state_dict(), params, tx, from_torch, names=names)
    grads = [as_params(some_grads(model, seed)) for seed in range(5, 8)]
    params, state = peer_grid.train(tx, params, state, grads)
    train_in_torch(model, optimizer, range(5, 8))
    back = compat_torch.dump_params(params, to_torch)
    groups = optimizer.state_dict()["param_groups"]
    dumped = compat_torch.dump_state(state, params, groups, to_torch, names=names)
    loose = 0.3 if formats else 2e-6
    for (name, p), entry in zip(model.named_parameters(), dumped["state"].values(), strict=True):
        np.testing.assert_allclose(back[name], p.detach(), rtol=1e-5, atol=0.02 * loose + 1e-7)
        v = optimizer.state[p]["exp_inf"]
        np.testing.assert_allclose(entry["exp_inf"], v, rtol=loose)
        assert entry["step"] == 8


COMPUTES = "must only move elements, but it computes elements of 'w'"
BAD_FUNCTIONS = [
    (lambda a: {"w": a["w"].T * 0.5}, COMPUTES),
    (lambda a: {"w": a["w"].T * 2}, COMPUTES),
    (lambda a: {"w": a["w"].T - 1}, COMPUTES),
    (lambda a: {"w": a["w"].T + 1}, COMPUTES),
    (lambda a: {"w": -a["w"].T}, COMPUTES),
    (lambda a: {"w": abs(a["w"].T)}, COMPUTES),
    (lambda a: {"w": np.maximum(a["w"].T, 0)}, COMPUTES),
    (lambda a: {"w": jnp.asarray(a["w"].T, jnp.bfloat16)}, COMPUTES),
    (lambda a: {"w": np.asarray(a["w"].T, np.float16)}, COMPUTES),
    (lambda a: {"w": np.ones((2, 3), "f4")}, COMPUTES),
    (lambda a: {"w": np.zeros((2, 3), "f4")}, COMPUTES),
    (
        lambda a: {"w": a["w"].T[:, :2]},
        r"shape \(2, 3\) for 'w', but it makes one of shape \(2, 2\)",
    ),
    (
        lambda a: {"w": a["w"].T[:, [0, 1, 1]]},
        r"of 'w' to one place, but it repeats 2 of the 6 elements and loses 2",
    ),
    (lambda a: {"w": a["w"].T[:, [1, 1, 1]]}, r"repeats 4 of the 6 elements and loses 4"),
    (lambda a: {"w": a["w"].T, "x": a["w"]}, "only arrays of known names, but it makes 'x'"),
    (lambda a: {"w": a["w"].reshape(6)}, r"for 'w', but it makes one of shape \(6,\) of \['w'\]"),
    (lambda a: {"v": a["w"].T}, "only arrays of known names, but it makes 'v'"),
    (lambda a: {}, r"has none for \['w'\]|but \['w'\] have none"),
    (lambda a: {"w": a["weight"].T}, r"must read only \['w'\], but it reads 'weight'.* as `names`"),
    (lambda a: {"w": "w"}, "The layout's 'w' must be an array of floats"),
]


@pytest.mark.parametrize(("function", "match"), BAD_FUNCTIONS)
def test_function_that_changes_elements_raises(function, match):
    with pytest.raises((ValueError, TypeError), match=match):
        load_one_parameter(function)
    with pytest.raises((ValueError, TypeError), match=match):
        arrays = {"w": np.ones((3, 2), "f4")}
        compat_torch.load_params(arrays, {"w": jnp.zeros((2, 3))}, function)


@pytest.mark.parametrize("function", [lambda a: a["w"].T, lambda a: a["w"].T[:, [0, 1, 1]]])
def test_more_elements_than_marks_are_checked_in_parts(function, monkeypatch):
    monkeypatch.setattr(_layout, "MAX_MARKS", 4)
    arrays = {"w": np.arange(6.0).reshape(3, 2), "x": np.arange(5.0)}
    params = {"w": jnp.zeros((2, 3)), "x": jnp.zeros(5)}
    layout = lambda a: {"w": function(a), "x": a["x"]}  # noqa: E731
    if np.any(function(arrays) != arrays["w"].T):
        with pytest.raises(ValueError, match="it repeats 2 of the 6 elements and loses 2"):
            compat_torch.load_params(arrays, params, layout)
        return
    loaded = compat_torch.load_params(arrays, params, layout)
    np.testing.assert_array_equal(loaded["w"], arrays["w"].T)


def test_function_that_omits_a_parameter_raises():
    state_dict = {"state": {}, "param_groups": [{"params": [0]}]}
    one = {"step": 5.0, "exp_avg": np.ones(2), "exp_inf": np.ones(2)}
    state_dict["state"][0] = one
    params, tx = {"w": jnp.zeros(2), "x": jnp.zeros(2)}, compat_torch.adamax()
    with pytest.raises(
        ValueError, match="moments for all trained parameters, but it has none for 'x'"
    ):
        compat_torch.load_state(state_dict, params, tx, lambda a: {"w": a["a"]}, names=["a"])
    with pytest.raises(ValueError, match=r"does not lead to \['x'\]"):
        compat_torch.load_params({"a": np.ones(2)}, params, lambda a: {"w": a["a"]})
    state = tx.init(params)
    with pytest.raises(ValueError, match=r"but \['x'\] have none"):
        groups = [{"params": [0]}]
        compat_torch.dump_state(state, params, groups, lambda p: {"a": p["w"]}, names=["a"])
    with pytest.raises(ValueError, match=r"has none for \['x'\]"):
        compat_torch.dump_params(params, lambda p: {"a": p["w"]})
    with pytest.raises(ValueError, match=r"only arrays of known names, but it makes 'b'"):
        to_torch = lambda p: {"a": p["w"], "b": p["x"]}  # noqa: E731
        compat_torch.dump_state(state, params, groups, to_torch, names=["a"])


def test_array_that_is_used_twice_raises():
    params = {"q": jnp.zeros((2, 2)), "k": jnp.zeros((2, 2))}
    arrays = {"qk": np.ones((4, 2), "f4")}
    load = lambda layout: compat_torch.load_params(arrays, params, layout)  # noqa: E731
    load(lambda a: {"q": a["qk"][:2], "k": a["qk"][2:]})
    with pytest.raises(ValueError, match=r"of 'qk' to one place, but it repeats 4 of the 8"):
        load(lambda a: {"q": a["qk"][:2], "k": a["qk"][:2]})
    with pytest.raises(ValueError, match="of 'one' to one place, but it repeats 4 of the 4"):
        tied = {"one": np.ones((2, 2), "f4")}
        compat_torch.load_params(tied, params, lambda a: {"q": a["one"], "k": a["one"]})


def test_joined_arrays_with_different_steps_raise():
    entry = {"exp_avg": np.ones(2), "exp_inf": np.ones(2)}
    state_dict = {
        "state": {0: entry | {"step": 5.0}, 1: entry | {"step": 6.0}},
        "param_groups": [{"params": [0, 1]}],
    }
    fuse = lambda a: {"w": np.concatenate([a["q"], a["k"]])}  # noqa: E731
    tx, how = compat_torch.adamax(), {"names": ["q", "k"]}
    with pytest.raises(
        ValueError, match=r"in 'w' must have the same number of steps, .* \{'q': 5, 'k': 6\}"
    ):
        compat_torch.load_state(state_dict, {"w": jnp.zeros(4)}, tx, fuse, **how)
    state_dict["state"][1]["step"] = np.int64(5)
    state = compat_torch.load_state(state_dict, {"w": jnp.zeros(4)}, tx, fuse, **how)
    count = optax.tree.get(state, "count")
    assert (int(count), count.dtype) == (5, np.int32)


def test_function_receives_zeros_for_missing_moments():
    model = torch.nn.Linear(2, 3)
    optimizer = torch.optim.Adamax(model.parameters(), lr=2e-3)
    model.weight.grad = torch.ones(3, 2)
    optimizer.step()
    layout = lambda a: {"kernel": a["weight"].numpy().T, "bias": a["bias"].numpy()}  # noqa: E731
    params, tx = {"kernel": jnp.zeros((2, 3)), "bias": jnp.zeros(3)}, compat_torch.adamax()
    args = optimizer.state_dict(), params, tx, layout
    how = {"names": ["weight", "bias"]}
    with pytest.raises(ValueError, match=r"reads 'bias'.* and source_params"):
        compat_torch.load_state(*args, **how, missing="zero")
    how["source_params"] = model.state_dict()
    with pytest.raises(ValueError, match="has none for 'bias'"):
        compat_torch.load_state(*args, **how)
    state = compat_torch.load_state(*args, **how, missing="zero")
    assert np.all(optax.tree.get(state, "m")["bias"] == 0)
    np.testing.assert_allclose(optax.tree.get(state, "v")["kernel"], 1.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_function_receives_float32_or_wider(dtype):
    exact = torch.tensor([[1.0, 0.5], [2.0, 3.0], [4.0, 0.25]], dtype=dtype)
    state = load_one_parameter(lambda a: {"w": a["w"].numpy().T}, exact, exact)
    np.testing.assert_array_equal(optax.tree.get(state, "v")["w"], exact.float().numpy().T)
