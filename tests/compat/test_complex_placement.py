"""The two parts of complex moments are sharded like their parameters, also for shapes."""

import jax
import numpy as np
import optax
import optax.tree
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from optax_adamax.compat import torch


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_moments_of_complex_shapes_are_sharded_like_them(axis_type):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(axis_type,))
    sharding = NamedSharding(mesh, PartitionSpec("x"))
    state = torch.adamax().init(jax.ShapeDtypeStruct((16, 4), np.complex64, sharding=sharding))
    moments = jax.tree.leaves([optax.tree.get(state, name) for name in ("m", "v")])
    assert [x.sharding for x in moments] == [sharding] * 4
