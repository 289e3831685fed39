"""Parameter groups of `compat.torch` and `compat.lucid`; no source framework is needed."""

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


# The same groups, chosen by patterns and by labels: head 0.3, the other bias 0.2, the rest 0.1.
CHOICES = [
    {"groups": [{"lr": 0.1}, {"params": "body/bias$", "lr": 0.2}, {"params": "^head", "lr": 0.3}]},
    {
        "groups": [
            {"params": ["body/kernel"], "lr": 0.1},
            {"params": ["^body.*bias$"], "lr": 0.2},
            {"params": ["head/bias", "head/kernel"], "lr": 0.3},
            {"params": [], "lr": 0.4},
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
def test_patterns_and_labels_choose_groups(module, choice):
    tx = module.adamax(**choice)
    state = tx.init(PARAMS)
    updates, _ = jax.jit(tx.update)(PARAMS, state, PARAMS)  # gradients of 1: steps of lr
    expected = {"body": {"kernel": 0.1, "bias": 0.2}, "head": {"kernel": 0.3, "bias": 0.3}}
    jax.tree.map(lambda u, lr: np.testing.assert_allclose(u, -lr, rtol=1e-6), updates, expected)


@pytest.mark.parametrize("choice", CHOICES)
def test_groups_compose_like_other_transformations(choice):
    tx = torch.adamax(**choice, weight_decay=0.1)
    state = tx.init(PARAMS)
    doubled = optax.tree.map_params(tx, lambda x: x + 1, state)
    assert jax.tree.structure(doubled) == jax.tree.structure(state)
    moments = [m for _, m in optax.tree.get_all_with_path(doubled, "m")]
    assert all(np.all(x == 1) for x in jax.tree.leaves(moments))
    assert len(jax.tree.leaves(moments)) == len(jax.tree.leaves(PARAMS))


NEEDS_PATTERN = r"groups\[0\]\['params'\] must be a pattern or a list of patterns"
INVALID = [
    ({"groups": [{"params": "bias"}]}, ValueError, "'body/kernel' is in no group"),
    ({"groups": [{"params": "."}, {"params": "bias"}]}, ValueError, r"'body/bias' is in the gro"),
    ({"groups": [{"params": "bias"}, {}, {}]}, ValueError, r"but the groups \[1, 2\] are"),
    ({"groups": [{"learning_rate": 0.1}]}, TypeError, r"but it has \['learning_rate'\]"),
    ({"groups": [{}, {"lr": -0.1}]}, ValueError, r"In groups\[1\]: lr must be in"),
    ({"groups": {"a": {"lr": "x"}}, "labels": FLAT}, TypeError, r"In groups\['a'\]: lr must be"),
    ({"groups": {"a": {"params": "bias"}}, "labels": "a"}, TypeError, r"but it has \['params'\]"),
    ({"groups": ["bias"]}, TypeError, r"groups\[0\] must be a dict"),
    ({"groups": []}, ValueError, "Pass at least one group"),
    ({"groups": 5}, TypeError, "groups must be a list or a dict"),
    ({"groups": iter([{}])}, TypeError, "groups must be a list or a dict"),
    ({"groups": {"a": {}}}, ValueError, "must be given together"),
    ({"groups": [{}], "labels": FLAT}, ValueError, "must be given together"),
    ({"labels": FLAT}, ValueError, "must be given together"),
    ({"groups": {0: {}}, "labels": FLAT}, ValueError, "no corresponding transformation"),
    ({"lr": -1.0, "groups": [{"lr": 0.1}]}, ValueError, "lr must be in"),
    (
        {"groups": [{"params": "", "lr": 0.1}]},
        ValueError,
        "must be a valid pattern, but '' was given: an empty",
    ),
    (
        {"groups": [{"params": "*bias"}, {}]},
        ValueError,
        "must be a valid pattern, .*nothing to repeat",
    ),
    *(
        ({"groups": [{"params": x}, {}]}, TypeError, NEEDS_PATTERN)
        for x in (
            *(5, 0, True, None, b"bias", {"body/bias"}, [0, 1], [b"bias"], iter(["bias"])),
            *(PARAMS, jnp.ones(2), lambda params: params, {"body": True, "head": False}),
        )
    ),
]


@pytest.mark.parametrize("module", [torch, lucid])
@pytest.mark.parametrize(("arguments", "error", "match"), INVALID)
def test_invalid_group_raises(module, arguments, error, match):
    with pytest.raises(error, match=match):
        module.adamax(**arguments).init(PARAMS)


def test_keys_of_lucid_groups_are_those_of_lucid():
    for unknown in ({"foreach": True}, {"betas": (0.9, 0.999)}, {"param_names": []}):
        with pytest.raises(TypeError, match="must have only the keys"):
            lucid.adamax(groups=[unknown])
    lucid.adamax(groups=[{"beta1": 0.8, "beta2": 0.99, "eps": 1e-6, "weight_decay": 0.1}])
    with pytest.raises(ValueError, match=r"In groups\[0\]: beta2 must be in"):
        lucid.adamax(groups=[{"beta2": 1.0}])


NO_MATCH = [
    ("biass$", r"but 'biass\$' matches none. .*/bias'"),
    (["bias", "head/weight"], r"but 'head/weight' matches none. .*'head/kernel'"),
]


@pytest.mark.parametrize(("chosen", "match"), NO_MATCH)
def test_pattern_without_a_match_shows_similar_paths(chosen, match):
    with pytest.raises(ValueError, match=match):
        torch.adamax(groups=[{"params": chosen}, {}]).init(PARAMS)


def test_groups_of_colliding_paths_raise():
    params = {"a/b": jnp.ones(2), "a": {"b": jnp.ones(3)}}
    with pytest.raises(ValueError, match="different names, but 'a/b' was given twice"):
        torch.adamax(groups=[{"params": "a"}, {}]).init(params)


@pytest.mark.parametrize("module", [torch, lucid])
@pytest.mark.parametrize(
    ("args", "kwargs", "match"),
    [
        ((PARAMS,), {"lr": 0.1}, "first argument of adamax must be lr"),
        ((jnp.ones(2),), {"lr": 0.1}, "first argument of adamax must be lr"),
        ((), {"params": PARAMS, "lr": 0.1}, "first argument of adamax must be lr"),
        ((PARAMS,), {}, "lr must be .* Pass parameters to init"),
        ((iter([jnp.ones(2)]),), {}, "lr must be .* Pass parameters to init"),
        (([{"params": [jnp.ones(2)], "lr": 0.1}],), {"weight_decay": 0.1}, "lr must be .* to init"),
    ],
)
def test_parameters_as_an_argument_raise(module, args, kwargs, match):
    with pytest.raises(TypeError, match=match):
        module.adamax(*args, **kwargs)
    for lr in (0.1, jnp.asarray(0.1), np.float32(0.1), lambda count: 0.1):
        module.adamax(lr)
