"""Parameter groups of `compat.torch` and `compat.lucid`; needs no peer."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_adamax.compat import lucid, torch

PARAMS = {
    "body": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)},
    "head": {"kernel": jnp.ones((3, 1)), "bias": jnp.ones(1)},
}
FLAT = {"body": {"kernel": 0, "bias": 1}, "head": {"kernel": 2, "bias": 2}}


def is_bias(params):
    return jax.tree.map(lambda x: x.ndim == 1, params)


# The same groups, chosen in every way: head 0.3, the other bias 0.2, the rest 0.1.
CHOICES = [
    {"groups": [{"lr": 0.1}, {"params": "body/bias$", "lr": 0.2}, {"params": "^head", "lr": 0.3}]},
    {
        "groups": [
            {"params": {"body": {"kernel": True, "bias": False}, "head": False}, "lr": 0.1},
            {"params": lambda p: is_bias(p) | {"head": False}, "lr": 0.2},
            {"params": {"body": False, "head": True}, "lr": 0.3},
        ]
    },
    {
        "groups": {"a": {"lr": 0.1}, "b": {"lr": 0.2}, "c": {"lr": 0.3}},
        "labels": {"body": {"kernel": "a", "bias": "b"}, "head": "c"},
    },
    {
        "groups": {0: {"lr": 0.1}, 1: {"lr": 0.2}, 2: {"lr": 0.3}},
        "labels": lambda params: FLAT,
    },
]


@pytest.mark.parametrize("module", [torch, lucid])
@pytest.mark.parametrize("choice", CHOICES)
def test_groups_are_chosen(module, choice):
    tx = module.adamax(**choice)
    state = tx.init(PARAMS)
    updates, _ = jax.jit(tx.update)(PARAMS, state, PARAMS)  # gradients of 1: steps of lr
    expected = {"body": {"kernel": 0.1, "bias": 0.2}, "head": {"kernel": 0.3, "bias": 0.3}}
    jax.tree.map(lambda u, lr: np.testing.assert_allclose(u, -lr, rtol=1e-6), updates, expected)


@pytest.mark.parametrize("choice", CHOICES)
def test_groups_are_like_any_transformation(choice):
    tx = torch.adamax(**choice, weight_decay=0.1)
    state = tx.init(PARAMS)
    doubled = optax.tree.map_params(tx, lambda x: x + 1, state)
    assert jax.tree.structure(doubled) == jax.tree.structure(state)
    moments = [m for _, m in optax.tree.get_all_with_path(doubled, "m")]
    assert all(np.all(x == 1) for x in jax.tree.leaves(moments))
    assert len(jax.tree.leaves(moments)) == len(jax.tree.leaves(PARAMS))


REFUSED = [
    ({"groups": [{"params": "bias"}]}, ValueError, "'body/kernel' is in no group"),
    ({"groups": [{"params": "."}, {"params": "bias"}]}, ValueError, r"'body/bias' is in the gro"),
    ({"groups": [{"params": "bias"}, {}, {}]}, ValueError, "'body/kernel' is in no group"),
    ({"groups": [{"learning_rate": 0.1}]}, TypeError, r"groups\[0\] has \['learning_rate'\]"),
    ({"groups": [{}, {"lr": -0.1}]}, ValueError, r"In groups\[1\]: lr must be in"),
    ({"groups": {"a": {"lr": "x"}}, "labels": FLAT}, TypeError, r"In groups\['a'\]: lr must be"),
    ({"groups": ["bias"]}, TypeError, r"groups\[0\] must be a dict"),
    ({"groups": []}, ValueError, "groups is empty"),
    ({"groups": {"a": {}}}, ValueError, "go together"),
    ({"groups": [{}], "labels": FLAT}, ValueError, "go together"),
    ({"labels": FLAT}, ValueError, "go together"),
    ({"groups": {0: {}}, "labels": FLAT}, ValueError, "no corresponding transformation"),
    ({"lr": -1.0, "groups": [{"lr": 0.1}]}, ValueError, "lr must be in"),
]


@pytest.mark.parametrize("module", [torch, lucid])
@pytest.mark.parametrize(("arguments", "error", "match"), REFUSED)
def test_refused(module, arguments, error, match):
    with pytest.raises(error, match=match):
        module.adamax(**arguments).init(PARAMS)


def test_what_a_copied_line_carries_is_taken():
    group = {"params": ".", "foreach": True, "capturable": False, "differentiable": False}
    torch.adamax(groups=[group]).init(PARAMS)
    with pytest.raises(TypeError, match="foreach"):
        lucid.adamax(groups=[group])
    with pytest.raises(TypeError, match="betas"):
        lucid.adamax(groups=[{"betas": (0.9, 0.999)}])
    lucid.adamax(groups=[{"beta1": 0.8, "beta2": 0.99, "eps": 1e-6, "weight_decay": 0.1}])


def test_a_group_is_a_list_of_paths():
    groups = [{"params": ["head/kernel", "head/bias"], "lr": 0.3}, {"lr": 0.1}]
    tx = torch.adamax(groups=groups)
    updates, _ = tx.update(PARAMS, tx.init(PARAMS), PARAMS)
    np.testing.assert_allclose(updates["head"]["bias"], -0.3, rtol=1e-6)
    np.testing.assert_allclose(updates["body"]["bias"], -0.1, rtol=1e-6)


NO_MATCH = [
    ("biass$", r"groups\[0\] has the pattern 'biass\$', which no parameter matches: .*/bias'"),
    (["head/weight"], r"groups\[0\] has 'head/weight', which is no parameter: .*'head/kernel'"),
    (["head.kernel"], r"'head.kernel', which is no parameter: near it are \['head/kernel'"),
]


@pytest.mark.parametrize(("chosen", "match"), NO_MATCH)
def test_a_group_of_no_parameter_shows_near_names(chosen, match):
    with pytest.raises(ValueError, match=match):
        torch.adamax(groups=[{"params": chosen}, {}]).init(PARAMS)


def test_paths_that_collide_are_refused():
    params = {"a/b": jnp.ones(2), "a": {"b": jnp.ones(3)}}
    for groups in ([{"params": "a"}, {}], [{"params": ["a/b"]}, {}]):
        with pytest.raises(ValueError, match="Several parameters have the path 'a/b'"):
            torch.adamax(groups=groups).init(params)


@pytest.mark.parametrize("module", [torch, lucid])
@pytest.mark.parametrize(
    "arguments",
    [
        ((PARAMS,), {"lr": 0.1}),
        ((PARAMS,), {}),
        ((iter([jnp.ones(2)]),), {}),
        (([{"params": [jnp.ones(2)], "lr": 0.1}],), {"weight_decay": 0.1}),
        ((jnp.ones(2),), {"lr": 0.1}),
        ((), {"params": PARAMS, "lr": 0.1}),
    ],
)
def test_parameters_are_told_to_go(module, arguments):
    args, kwargs = arguments
    with pytest.raises(TypeError, match=r"The first argument is lr, .* leave them out"):
        module.adamax(*args, **kwargs)
    for lr in (0.1, jnp.asarray(0.1), np.float32(0.1), lambda count: 0.1):
        module.adamax(lr)
