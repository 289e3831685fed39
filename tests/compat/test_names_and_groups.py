"""Names, groups and hyperparameters of PyTorch's optimizers are compared when loading."""

import copy
import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

torch = pytest.importorskip("torch")

from optax_adamax import compensate_rounding  # noqa: E402
from optax_adamax.compat import optax as compat_optax  # noqa: E402
from optax_adamax.compat import torch as compat_torch  # noqa: E402
from optax_adamax.compat._comparison import measure  # noqa: E402


@pytest.fixture(autouse=True)
def as_frameworks_compute():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def two_groups(body_lr=1e-3, head_lr=1e-2, body_decay=0.0, head_decay=0.0):
    """Returns a model of two equal layers, and an optimizer in which the head comes first."""
    model = torch.nn.ModuleDict({"body": torch.nn.Linear(2, 2), "head": torch.nn.Linear(2, 2)})
    groups = [
        {"params": model["head"].parameters(), "lr": head_lr, "weight_decay": head_decay},
        {"params": model["body"].parameters(), "lr": body_lr, "weight_decay": body_decay},
    ]
    optimizer = torch.optim.Adamax(groups)
    for name, p in model.named_parameters():
        p.grad = torch.full(p.shape, 1.0 if name.startswith("head") else 2.0)
    optimizer.step()
    return model, optimizer


LAYER = {"weight": jnp.zeros((2, 2)), "bias": jnp.zeros(2)}
PARAMS = {"body": LAYER, "head": LAYER}
GROUPS = compat_torch.adamax(lr=1e-3, groups=[{"params": "^head/", "lr": 1e-2}, {}])


def load(optimizer, tx=GROUPS, **options):
    return compat_torch.load_state(optimizer.state_dict(), PARAMS, tx, **options)


def test_names_per_group_load_each_group():
    model, optimizer = two_groups()
    names = compat_torch.names_of(optimizer, model)
    assert names == [["head.weight", "head.bias"], ["body.weight", "body.bias"]]
    state = load(optimizer, names=names)
    v = {
        k: optax.tree.get(s, "v")[k]
        for k, s in zip(("head", "body"), state.inner_states.values(), strict=True)
    }
    for name, expected in (("head", 1.0), ("body", 2.0)):
        for x in v[name].values():
            np.testing.assert_allclose(x, expected)
    groups = optimizer.state_dict()["param_groups"]
    dumped = compat_torch.dump_state(state, PARAMS, groups, names=names)
    assert [float(e["exp_inf"].max()) for e in dumped["state"].values()] == [1.0, 1.0, 2.0, 2.0]


def test_flat_names_for_several_groups_raise():
    model, optimizer = two_groups()
    flat = [name for name, _ in model.named_parameters()]
    with pytest.raises(
        ValueError, match=r"with \[2, 2\] names, but \[4\] were .* names_of\(optimizer, model\)"
    ):
        load(optimizer, names=flat)
    with pytest.raises(ValueError, match=r"with \[2, 2\] names, but \[4\] were given"):
        load(optimizer, names=[flat])
    with pytest.raises(ValueError, match=r"but \[3, 1\] were given"):
        load(optimizer, names=[flat[:3], flat[3:]])
    with pytest.raises(ValueError, match=r"'head.bias' was given twice"):
        load(optimizer, names=[["head.weight", "head.bias"], ["body.weight", "head.bias"]])


def test_groups_in_the_reverse_order_raise():
    model, optimizer = two_groups()
    swapped = compat_torch.names_of(optimizer, model)[::-1]
    with pytest.raises(
        ValueError,
        match=r"learning rate of 'body/.*' and of 'head/.*' is 0.001 and 0.01 in the "
        r"transformation, and 0.01 and 0.001 in the source",
    ):
        load(optimizer, names=swapped)


def test_weight_decays_in_the_reverse_order_raise():
    model, optimizer = two_groups(1e-3, 1e-3, body_decay=0.1)
    names = compat_torch.names_of(optimizer, model)
    tx = compat_torch.adamax(1e-3, groups=[{"params": "^body/", "weight_decay": 0.1}, {}])
    load(optimizer, tx, names=names)  # without a warning
    with pytest.raises(ValueError, match=r"the L2 weight decay of .* is .* in the transformation"):
        load(optimizer, tx, names=names[::-1])
    with pytest.warns(UserWarning, match="L2 weight decay 0 instead of 0.1 for 'body/weight'"):
        load(optimizer, compat_torch.adamax(1e-3), names=names)


def test_groups_that_overlap_those_of_the_transformation_raise():
    model, optimizer = two_groups(1e-3, 1e-3)
    names = compat_torch.names_of(optimizer, model)
    crossed = compat_torch.adamax(lr=1e-3, groups=[{"params": "bias$"}, {}])
    with pytest.raises(
        ValueError, match=r"group 0, .* is spread over 2 groups of the transformation"
    ):
        load(optimizer, crossed, names=names)
    finer = [{"params": "^head/w"}, {"params": "^head/b"}, {}]
    for tx in (compat_torch.adamax(lr=1e-3), compat_torch.adamax(lr=1e-3, groups=finer)):
        load(optimizer, tx, names=names)


def test_names_of_part_of_a_model_raises():
    model, optimizer = two_groups()
    with pytest.raises(ValueError, match="but parameter 0 of group 1 is not in"):
        compat_torch.names_of(optimizer, model["head"])
    tied = torch.nn.ModuleDict({"a": torch.nn.Linear(2, 2), "b": torch.nn.Linear(2, 2)})
    tied["b"].weight = tied["a"].weight
    optimizer = torch.optim.Adamax(tied.parameters())
    assert compat_torch.names_of(optimizer, tied) == [["a.weight", "a.bias", "b.bias"]]


def test_names_in_groups_are_used_and_checked():
    model, _ = two_groups()
    named = [
        {"params": [(f"head.{n}", p) for n, p in model["head"].named_parameters()], "lr": 1e-2},
        {"params": [(f"body.{n}", p) for n, p in model["body"].named_parameters()], "lr": 1e-3},
    ]
    optimizer = torch.optim.Adamax(named)
    torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)  # which adds initial_lr
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    names = compat_torch.names_of(optimizer, model)
    jax.tree.map(np.testing.assert_array_equal, load(optimizer), load(optimizer, names=names))
    with pytest.raises(ValueError, match="names must be the param_names of param_groups"):
        load(optimizer, names=names[::-1])


def one_parameter(**options):
    p = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.Adamax([p], **options)
    p.grad = torch.ones(2)
    optimizer.step()
    return optimizer.state_dict(), {"w": jnp.ones(2)}


FORMATS = [{}, {"m_dtype": "int8", "v_dtype": "uint8"}]


@pytest.mark.parametrize("formats", FORMATS, ids=str)
def test_other_constant_rate_warns(formats):
    state_dict, params = one_parameter(lr=0.01)
    make = compat_torch.adamax
    for tx in (
        make(lr=0.1, **formats),
        optax.chain(optax.clip_by_global_norm(1.0), make(lr=0.1, weight_decay=0.1, **formats)),
        optax.inject_hyperparams(make)(lr=0.1),
        make(lr=lambda count: 0.1),
        optax.MultiSteps(make(lr=0.1, **formats), 3),
        optax.chain(make(lr=0.1), optax.contrib.reduce_on_plateau()),
    ):
        with pytest.warns(UserWarning, match="learning rate 0.1 instead of 0.01 for 'w'"):
            compat_torch.load_state(state_dict, params, tx, names=["w"])
    for tx in (make(lr=0.01, **formats), make(lr=optax.linear_schedule(0.1, 0.0, 100))):
        compat_torch.load_state(state_dict, params, tx, names=["w"])  # without a warning


@pytest.mark.parametrize("formats", FORMATS, ids=str)
def test_other_constant_betas_warn(formats):
    state_dict, params = one_parameter(lr=0.01, betas=(0.8, 0.99))

    def load(tx):
        return compat_torch.load_state(state_dict, params, tx, names=["w"])

    with pytest.warns(UserWarning, match=r"b1 0\.9\d* instead of 0\.8 for 'w', b2 0\.999 instead"):
        load(compat_torch.adamax(lr=0.01, **formats))
    load(compat_torch.adamax(lr=0.01, betas=(0.8, 0.99), **formats))  # without a warning
    cycled = optax.inject_hyperparams(compat_optax.adamax)
    load(cycled(0.01, b1=optax.linear_schedule(0.95, 0.85, 10), b2=0.99, **formats))


@pytest.mark.parametrize("formats", FORMATS, ids=str)
def test_other_weight_decay_warns(formats):
    make = functools.partial(compat_torch.adamax, lr=0.01, **formats)

    def load(saved, tx, dtype=jnp.float32):
        state_dict, _ = one_parameter(lr=0.01, weight_decay=saved)
        compat_torch.load_state(state_dict, {"w": jnp.ones(2, dtype)}, tx, names=["w"])

    for saved, other in ((0.0, 1e-4), (1e-4, 1.5e-4)):
        load(saved, make(weight_decay=saved))  # without a warning
        with pytest.warns(UserWarning, match=f"L2 weight decay .* instead of {saved:g} for 'w'"):
            load(saved, make(weight_decay=other))
    load(0.1, make(weight_decay=0.1, eps=1e-3))  # without a warning
    clip = optax.clip_by_global_norm(1.0)
    load(0.1, optax.chain(optax.add_decayed_weights(0.1), clip, make()))  # without a warning
    for wrap in (compensate_rounding, lambda tx: optax.MultiSteps(tx, 2)):
        load(0.1, wrap(make(weight_decay=0.1)), jnp.bfloat16)  # without a warning
        with pytest.warns(UserWarning, match="L2 weight decay 0 instead of 0.1 for 'w'"):
            load(0.1, wrap(make()), jnp.bfloat16)


def test_decoupled_weight_decay_is_another():
    state_dict, params = one_parameter(lr=0.01, weight_decay=0.1)
    with pytest.warns(UserWarning, match=r"has L2 weight decay 0 instead of 0\.1 for 'w'\. To"):
        compat_torch.load_state(
            state_dict, params, compat_optax.adamaxw(0.01, weight_decay=0.1), names=["w"]
        )


def test_transformation_without_a_rate_is_not_compared():
    state_dict, params = one_parameter(lr=0.01)
    compat_torch.load_state(
        state_dict, params, optax.chain(compat_torch.adamax(0.1), optax.apply_every(2)), names=["w"]
    )
    del state_dict["param_groups"][0]["lr"]
    compat_torch.load_state(state_dict, params, compat_torch.adamax(0.1), names=["w"])


def test_transformation_that_cannot_be_measured_warns():
    state_dict, params = one_parameter(lr=0.01)

    def update(updates, state, params=None, *, metric, **extra_args):
        del params, metric, extra_args
        return updates, state

    needs_metric = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    tx = optax.chain(compat_torch.adamax(0.1), needs_metric)
    with pytest.warns(UserWarning, match=r"must be measurable .* TypeError: .*'metric'"):
        state = compat_torch.load_state(state_dict, params, tx, names=["w"])
    assert int(optax.tree.get(state, "count")) == 1


def test_hyperparameters_are_measured():
    params = {"w": jnp.ones((3, 2), jnp.bfloat16), "z": jnp.ones(2, jnp.complex64)}
    groups = [{"params": "w", "betas": (0.5, 0.9), "lr": 0.3, "weight_decay": 0.25}, {}]
    tx = compat_torch.adamax(lr=optax.linear_schedule(0.2, 0.0, 10), groups=groups)
    measured = measure(tx, params, {"w": 5, "z": 5})
    np.testing.assert_allclose(measured["w"], (0.3, 0.5, 0.9, 0.25), rtol=1e-5)
    np.testing.assert_allclose(measured["z"], (0.1, 0.9, 0.999, 0.0), rtol=1e-5)


def test_half_precision_step_loads():
    state_dict, params = one_parameter(lr=2e-3)
    for dtype in (torch.bfloat16, torch.float16, torch.int64, torch.float64):
        state_dict["state"][0]["step"] = torch.tensor(7, dtype=dtype)
        state = compat_torch.load_state(state_dict, params, compat_torch.adamax(), names=["w"])
        count = optax.tree.get(state, "count")
        assert (int(count), count.dtype) == (7, np.int32)
    state_dict["state"][0]["step"] = torch.tensor(True)
    with pytest.raises(TypeError, match="must be a number"):
        compat_torch.load_state(state_dict, params, compat_torch.adamax(), names=["w"])


def test_dumped_groups_are_copies_and_steps_are_float32():
    state_dict, params = one_parameter(lr=2e-3)
    state = compat_torch.load_state(state_dict, params, compat_torch.adamax(), names=["w"])
    groups = state_dict["param_groups"]
    before = copy.deepcopy(groups)
    dumped = compat_torch.dump_state(state, params, groups, names=["w"])
    dumped["param_groups"][0]["lr"] = 5.0
    dumped["param_groups"][0]["params"].append(1)
    assert groups == before
    assert dumped["state"][0]["step"].dtype == np.float32


class WithBuffers(torch.nn.Module):
    """A model with a batch norm, a tied weight, and buffers of several dtypes."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = torch.nn.Embedding(3, 2), torch.nn.Linear(2, 3, bias=False)
        self.head.weight = self.embed.weight
        self.bn = torch.nn.BatchNorm1d(2)
        self.register_buffer("mask", torch.ones(3, 3, dtype=torch.bool))
        self.bn.running_mean.fill_(3.0)


VARIABLES = {
    "params": {
        "embed": {"embedding": jnp.zeros((3, 2))},
        "bn": {"scale": jnp.zeros(2), "bias": jnp.ones(2)},
    },
    "batch_stats": {"bn": {"mean": jnp.zeros(2), "var": jnp.zeros(2)}},
}


def test_model_state_dict_with_buffers_and_ties_loads():
    model, params = WithBuffers(), VARIABLES["params"]
    layout = compat_torch.flax_names(params)

    def function(arrays):
        norm = {"scale": arrays["bn.weight"], "bias": arrays["bn.bias"]}
        return {"embed": {"embedding": arrays["embed.weight"]}, "bn": norm}

    for arrays in (model.state_dict(), dict(model.named_parameters())):
        for how in (layout, function):
            loaded = compat_torch.load_params(arrays, params, how)
            np.testing.assert_array_equal(loaded["bn"]["scale"], 1.0)
    variables = compat_torch.load_params(
        model.state_dict(), VARIABLES, compat_torch.flax_names(VARIABLES)
    )
    np.testing.assert_array_equal(variables["batch_stats"]["bn"]["mean"], 3.0)
    named = {
        "head": {"weight": jnp.zeros((3, 2))},
        "bn": {"weight": jnp.ones(2), "bias": jnp.ones(2)},
    }
    loaded = compat_torch.load_params(
        {k: x for k, x in model.state_dict().items() if k != "embed.weight"}, named
    )
    np.testing.assert_array_equal(loaded["bn"]["weight"], 1.0)


def test_unknown_buffer_raises():
    model, params = WithBuffers(), VARIABLES["params"]
    layout = compat_torch.flax_names(params)
    model.register_buffer("scale", torch.ones(3, 2))
    with pytest.raises(ValueError, match=r"has none for \['scale'\].*named_parameters"):
        compat_torch.load_params(model.state_dict(), params, layout)
    compat_torch.load_params(dict(model.named_parameters()), params, layout)
    compat_torch.load_params(model.state_dict(), params, {**layout, "scale": None})
    equal = {**model.state_dict(), "scale": model.embed.weight.detach().clone()}  # but no tie
    with pytest.raises(ValueError, match=r"has none for \['scale'\]"):
        compat_torch.load_params(equal, params, layout)


def test_moments_of_tied_weight_load_once():
    model = WithBuffers()
    optimizer = torch.optim.Adamax(model.parameters(), lr=2e-3)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    params, names = VARIABLES["params"], compat_torch.names_of(optimizer, model)
    layout, tx = compat_torch.flax_names(params), compat_torch.adamax()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        state = compat_torch.load_state(optimizer.state_dict(), params, tx, layout, names=names)
    np.testing.assert_allclose(optax.tree.get(state, "v")["embed"]["embedding"], 1.0)
