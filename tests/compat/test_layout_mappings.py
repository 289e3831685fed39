"""Mappings as layouts: permuted and regrouped axes, omitted arrays, wrong entries."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small_checkpoints import load_one_parameter

from optax_adamax.compat import torch as compat_torch

E, H, D = 4, 2, 3  # features, heads, size of a head
REGROUPED = [
    ((8,), (0,), (8, 1, 1)),  # Equinox' bias of a convolution
    ((H * D, E), (1, 0), (E, H, D)),  # Flax' attention from a Linear
    ((E, H * D), (1, 0), (H, D, E)),
    ((H * D,), (0,), (H, D)),
    ((1, 3, 1), (0, 1, 2), (3,)),
    ((2, 3, 4), (2, 0, 1), (4, 6)),
]


@pytest.mark.parametrize(("source", "axes", "shape"), REGROUPED)
def test_neighbouring_axes_are_regrouped_in_both_directions(source, axes, shape):
    array = np.arange(np.prod(source), dtype="f4").reshape(source)
    layout, params = {"w": ("w", axes)}, {"w": jnp.zeros(shape)}
    expected = array.transpose(axes).reshape(shape)
    loaded = compat_torch.load_params({"w": array}, params, layout)
    np.testing.assert_array_equal(loaded["w"], expected)
    state = load_one_parameter(layout, array, array + 1, shape)
    np.testing.assert_array_equal(optax.tree.get(state, "m")["w"], expected)
    how = {"source_params": {"w": array}}
    back = compat_torch.dump_params(loaded, layout, **how)
    np.testing.assert_array_equal(back["w"], array)
    groups = [{"params": [0]}]
    dumped = compat_torch.dump_state(state, params, groups, layout, names=["w"], **how)
    np.testing.assert_array_equal(dumped["state"][0]["exp_inf"], array + 1)
    with pytest.raises(ValueError, match="regroups axes, but it does not"):
        compat_torch.dump_params(loaded, layout)
    with pytest.raises(ValueError, match="regroups axes, but it does not"):
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
    with pytest.raises(ValueError, match="must make an array of shape"):
        load_one_parameter({"w": entry}, np.ones(source, "f4"), None, shape)


def test_none_in_layout_omits_an_array():
    arrays, params = {"w": np.ones(2), "scale": np.ones(1)}, {"w": jnp.zeros(2)}
    with pytest.raises(ValueError, match=r"has none for \['scale'\]"):
        compat_torch.load_params(arrays, params, {"w": "w"})
    loaded = compat_torch.load_params(arrays, params, {"w": "w", "scale": None})
    np.testing.assert_array_equal(loaded["w"], 1.0)
    entry = lambda n: {"step": 1, "exp_avg": np.ones(n), "exp_inf": np.ones(n)}  # noqa: E731
    state_dict = {"state": {0: entry(2), 1: entry(1)}, "param_groups": [{"params": [0, 1]}]}
    tx, how = compat_torch.adamax(), {"names": ["w", "scale"]}
    compat_torch.load_state(state_dict, params, tx, {"w": "w", "scale": None}, **how)
    with pytest.raises(ValueError, match=r"but \['scale'\] have none"):
        compat_torch.load_state(state_dict, params, tx, {"w": "w"}, **how)


@pytest.mark.parametrize("entry", [5, ("w",), ("w", (0,), 1), (0, "w")])
def test_layout_entry_of_another_type_raises(entry):
    with pytest.raises(TypeError, match=r"layout\['w'\] must be a path or a pair"):
        load_one_parameter({"w": entry})
