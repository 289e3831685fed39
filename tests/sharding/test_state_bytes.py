"""The table of state bytes agrees with the bytes of states on eight devices."""

import json
import math
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh

from optax_adamax import sharding
from sharding.common import mesh_of

ROOT = Path(__file__).parents[2]


@pytest.fixture
def table(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import state_bytes

    return state_bytes


@pytest.mark.parametrize("name", ["float32", "4 bytes", "2 bytes"])
@pytest.mark.parametrize("zero1_axis", [None, "data"])
def test_predicted_bytes_equal_bytes_on_devices(name, zero1_axis, table):
    small = table.Transformer(64, 32, 2, 4, 2, 8, 48, tied=False)
    tx = table.transformation(name)
    predicted = table.state_bytes(
        tx, small.parameters(AbstractMesh((4, 2), ("data", "model"))), zero1_axis
    )
    params = jax.tree.map(
        lambda p: jax.device_put(np.ones(p.shape, p.dtype), p.sharding),
        small.parameters(mesh_of()),
    )
    state = sharding.shard(tx, params, zero1_axis=zero1_axis).init(params)
    for device in jax.devices():
        shards = [
            shard.data.nbytes
            for leaf in jax.tree.leaves(state)
            for shard in leaf.addressable_shards
            if shard.device == device
        ]
        assert sum(shards) == predicted


@pytest.mark.parametrize(
    ("model", "count"),
    [("1 B", 1_235_814_400), ("8 B", 8_030_261_248), ("70 B", 70_553_706_496)],
)
def test_the_models_have_as_many_parameters_as_published(model, count, table):
    params = table.MODELS[model].parameters(mesh_of())
    assert sum(math.prod(p.shape) for p in jax.tree.leaves(params)) == count


@pytest.mark.parametrize(
    "case", [("1 B", 512, "float32"), ("8 B", 8, "4 bytes"), ("70 B", 64, "2 bytes")]
)
def test_committed_table_is_current(case, table):
    committed = json.loads((ROOT / "benchmarks" / "results" / "state_bytes.json").read_text())
    wanted = table.row(*case)
    assert wanted in committed["rows"]
    assert len(committed["rows"]) == len(table.MODELS) * len(table.MESHES) * len(table.FORMATS)
    scalars = 3 * 4  # two counts of steps, and the phase of v
    assert abs(wanted["zero"] - wanted["unsharded"] - _sharded_bytes(wanted)) <= scalars


def _sharded_bytes(row):
    """Returns the bytes of the state after ZeRO-1, without the leaves that it cannot shard."""
    return (row["like_parameters"] - row["unsharded"]) / row["mesh"]["data"]
