"""Layouts: functions that moved the weights, mappings that regroup axes, and what both reject."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peer_grid
import pytest

torch = pytest.importorskip("torch")

from optax_adamax.compat import torch as compat_torch  # noqa: E402

E, H, D = 4, 2, 3  # features, heads, size of a head


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
    """Equinox' bias (8, 1, 1), and Flax' kernels (E, H, D) from the fused projection."""
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
    """The way back."""
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
def test_a_function_moves_moments_there_and_back(formats):
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


def one_parameter(function, m=None, v=None, shape=(2, 3), **options):
    """Loads the state of a weight of (3, 2) by a function."""
    m = np.ones((3, 2), "f4") if m is None else m
    state_dict = {
        "state": {0: {"step": 5.0, "exp_avg": m, "exp_inf": np.ones_like(m) if v is None else v}},
        "param_groups": [{"params": [0]}],
    }
    params, tx = {"w": jnp.zeros(shape)}, compat_torch.adamax()
    return compat_torch.load_state(state_dict, params, tx, function, names=["w"], **options)


COMPUTES = "computes the elements of 'w'"
BAD_FUNCTIONS = [
    (lambda a: {"w": a["w"].T * 0.5}, COMPUTES),
    (lambda a: {"w": a["w"].T * 2}, COMPUTES),
    (lambda a: {"w": a["w"].T - 1}, COMPUTES),
    (lambda a: {"w": a["w"].T + 1}, COMPUTES),
    (lambda a: {"w": -a["w"].T}, COMPUTES),
    (lambda a: {"w": jnp.asarray(a["w"].T, jnp.bfloat16)}, COMPUTES),
    (lambda a: {"w": np.asarray(a["w"].T, np.float16)}, COMPUTES),
    (lambda a: {"w": np.ones((2, 3), "f4")}, COMPUTES),
    (lambda a: {"w": np.zeros((2, 3), "f4")}, COMPUTES),
    (lambda a: {"w": a["w"].T[:, :2]}, r"shape \(2, 2\) of \['w'\]"),
    (lambda a: {"w": a["w"].T[:, [0, 1, 1]]}, r"repeats elements of \['w'\] and loses others"),
    (lambda a: {"w": a["w"].T[:, [1, 1, 1]]}, r"repeats elements of \['w'\]"),
    (lambda a: {"w": a["w"].T, "x": a["w"]}, "makes 'x' .* no such parameter"),
    (lambda a: {"w": a["w"].reshape(6)}, r"shape \(6,\) of \['w'\] for the parameter 'w'"),
    (lambda a: {"v": a["w"].T}, "makes 'v' .* no such parameter"),
    (lambda a: {}, r"no place for the moments of \['w'\]"),
    (lambda a: {"w": a["weight"].T}, r"looks for 'weight', but .* only \['w'\].* as `names`"),
    (lambda a: {"w": "w"}, "The layout's 'w' must hold floats"),
]


@pytest.mark.parametrize(("function", "match"), BAD_FUNCTIONS)
def test_a_function_that_does_not_only_move_elements_raises(function, match):
    with pytest.raises((ValueError, TypeError), match=match):
        one_parameter(function)
    with pytest.raises((ValueError, TypeError), match=match.replace("the moments of ", "")):
        arrays = {"w": np.ones((3, 2), "f4")}
        compat_torch.load_params(arrays, {"w": jnp.zeros((2, 3))}, function)


def test_a_function_that_forgets_a_parameter_raises():
    state_dict = {"state": {}, "param_groups": [{"params": [0]}]}
    one = {"step": 5.0, "exp_avg": np.ones(2), "exp_inf": np.ones(2)}
    state_dict["state"][0] = one
    params, tx = {"w": jnp.zeros(2), "x": jnp.zeros(2)}, compat_torch.adamax()
    with pytest.raises(ValueError, match="There are no moments for 'x'"):
        compat_torch.load_state(state_dict, params, tx, lambda a: {"w": a["a"]}, names=["a"])
    with pytest.raises(ValueError, match=r"nothing for the parameters \['x'\]"):
        compat_torch.load_params({"a": np.ones(2)}, params, lambda a: {"w": a["a"]})
    state = tx.init(params)
    with pytest.raises(ValueError, match=r"no place for the moments of \['x'\]"):
        groups = [{"params": [0]}]
        compat_torch.dump_state(state, params, groups, lambda p: {"a": p["w"]}, names=["a"])
    with pytest.raises(ValueError, match=r"does not lead to \['x'\]"):
        compat_torch.dump_params(params, lambda p: {"a": p["w"]})
    with pytest.raises(ValueError, match=r"makes 'b' .* no such parameter"):
        to_torch = lambda p: {"a": p["w"], "b": p["x"]}  # noqa: E731
        compat_torch.dump_state(state, params, groups, to_torch, names=["a"])


def test_a_part_that_is_used_twice_raises():
    params = {"q": jnp.zeros((2, 2)), "k": jnp.zeros((2, 2))}
    arrays = {"qk": np.ones((4, 2), "f4")}
    load = lambda layout: compat_torch.load_params(arrays, params, layout)  # noqa: E731
    load(lambda a: {"q": a["qk"][:2], "k": a["qk"][2:]})
    with pytest.raises(ValueError, match=r"repeats elements of \['qk'\]"):
        load(lambda a: {"q": a["qk"][:2], "k": a["qk"][:2]})
    with pytest.raises(ValueError, match="uses 8 elements of 'one', which has 4"):
        tied = {"one": np.ones((2, 2), "f4")}
        compat_torch.load_params(tied, params, lambda a: {"q": a["one"], "k": a["one"]})


def test_parts_with_different_steps_raise():
    entry = {"exp_avg": np.ones(2), "exp_inf": np.ones(2)}
    state_dict = {
        "state": {0: entry | {"step": 5.0}, 1: entry | {"step": 6.0}},
        "param_groups": [{"params": [0, 1]}],
    }
    fuse = lambda a: {"w": np.concatenate([a["q"], a["k"]])}  # noqa: E731
    tx, how = compat_torch.adamax(), {"names": ["q", "k"]}
    with pytest.raises(
        ValueError, match=r"'w' consists of .* numbers of steps, \{'q': 5, 'k': 6\}"
    ):
        compat_torch.load_state(state_dict, {"w": jnp.zeros(4)}, tx, fuse, **how)
    state_dict["state"][1]["step"] = np.int64(5)
    state = compat_torch.load_state(state_dict, {"w": jnp.zeros(4)}, tx, fuse, **how)
    count = optax.tree.get(state, "count")
    assert (int(count), count.dtype) == (5, np.int32)


def test_a_function_gets_zeros_for_parameters_without_moments():
    model = torch.nn.Linear(2, 3)
    optimizer = torch.optim.Adamax(model.parameters(), lr=2e-3)
    model.weight.grad = torch.ones(3, 2)
    optimizer.step()
    layout = lambda a: {"kernel": a["weight"].numpy().T, "bias": a["bias"].numpy()}  # noqa: E731
    params, tx = {"kernel": jnp.zeros((2, 3)), "bias": jnp.zeros(3)}, compat_torch.adamax()
    args = optimizer.state_dict(), params, tx, layout
    how = {"names": ["weight", "bias"]}
    with pytest.raises(ValueError, match=r"looks for 'bias', .* give source_params"):
        compat_torch.load_state(*args, **how, missing="zero")
    how["source_params"] = model.state_dict()
    with pytest.raises(ValueError, match="no moments for 'bias'"):
        compat_torch.load_state(*args, **how)
    state = compat_torch.load_state(*args, **how, missing="zero")
    assert np.all(optax.tree.get(state, "m")["bias"] == 0)
    np.testing.assert_allclose(optax.tree.get(state, "v")["kernel"], 1.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_function_gets_tensors_of_float32_or_wider(dtype):
    exact = torch.tensor([[1.0, 0.5], [2.0, 3.0], [4.0, 0.25]], dtype=dtype)
    state = one_parameter(lambda a: {"w": a["w"].numpy().T}, exact, exact)
    np.testing.assert_array_equal(optax.tree.get(state, "v")["w"], exact.float().numpy().T)


REGROUPED = [
    ((8,), (0,), (8, 1, 1)),  # Equinox' bias of a convolution
    ((H * D, E), (1, 0), (E, H, D)),  # Flax' attention from a Linear
    ((E, H * D), (1, 0), (H, D, E)),
    ((H * D,), (0,), (H, D)),
    ((1, 3, 1), (0, 1, 2), (3,)),
    ((2, 3, 4), (2, 0, 1), (4, 6)),
]


@pytest.mark.parametrize(("source", "axes", "shape"), REGROUPED)
def test_neighbouring_axes_are_regrouped_there_and_back(source, axes, shape):
    array = np.arange(np.prod(source), dtype="f4").reshape(source)
    layout, params = {"w": ("w", axes)}, {"w": jnp.zeros(shape)}
    expected = array.transpose(axes).reshape(shape)
    loaded = compat_torch.load_params({"w": array}, params, layout)
    np.testing.assert_array_equal(loaded["w"], expected)
    state = one_parameter(layout, array, array + 1, shape)
    np.testing.assert_array_equal(optax.tree.get(state, "m")["w"], expected)
    how = {"source_params": {"w": array}}
    back = compat_torch.dump_params(loaded, layout, **how)
    np.testing.assert_array_equal(back["w"], array)
    groups = [{"params": [0]}]
    dumped = compat_torch.dump_state(state, params, groups, layout, names=["w"], **how)
    np.testing.assert_array_equal(dumped["state"][0]["exp_inf"], array + 1)
    with pytest.raises(ValueError, match="regroups axes: give source_params"):
        compat_torch.dump_params(loaded, layout)
    with pytest.raises(ValueError, match="regroups axes: give source_params"):
        compat_torch.dump_state(state, params, groups, layout, names=["w"])


@pytest.mark.parametrize(
    ("source", "entry", "shape"),
    [
        ((8,), "w", (8, 1, 1)),  # a path alone never regroups
        ((2, 6), ("w", (0, 1)), (2, 2, 2)),
        ((4, 6), ("w", (0, 1)), (8, 3, 1)),
        ((2, 6), ("w", (0, 1)), (6, 2)),
        ((3, 2), ("w", (0, 1)), (2, 3)),
        ((6, 4), ("w", (0, 1)), (4, 3, 2)),
        ((1, 8), ("w", (0, 1)), (8, 1)),
    ],
)
def test_other_axes_are_never_regrouped(source, entry, shape):
    with pytest.raises(ValueError, match="makes an array of shape"):
        one_parameter({"w": entry}, np.ones(source, "f4"), None, shape)


def test_none_leaves_an_array_out():
    arrays, params = {"w": np.ones(2), "scale": np.ones(1)}, {"w": jnp.zeros(2)}
    with pytest.raises(ValueError, match=r"no place for \['scale'\]"):
        compat_torch.load_params(arrays, params, {"w": "w"})
    loaded = compat_torch.load_params(arrays, params, {"w": "w", "scale": None})
    np.testing.assert_array_equal(loaded["w"], 1.0)
    entry = lambda n: {"step": 1, "exp_avg": np.ones(n), "exp_inf": np.ones(n)}  # noqa: E731
    state_dict = {"state": {0: entry(2), 1: entry(1)}, "param_groups": [{"params": [0, 1]}]}
    tx, how = compat_torch.adamax(), {"names": ["w", "scale"]}
    compat_torch.load_state(state_dict, params, tx, {"w": "w", "scale": None}, **how)
    with pytest.raises(ValueError, match=r"no place for the moments of \['scale'\]"):
        compat_torch.load_state(state_dict, params, tx, {"w": "w"}, **how)


@pytest.mark.parametrize("entry", [5, ("w",), ("w", (0,), 1), (0, "w")])
def test_an_entry_of_another_type_raises(entry):
    with pytest.raises(TypeError, match=r"layout\['w'\] must be a path or a pair"):
        one_parameter({"w": entry})
