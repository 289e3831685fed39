"""Computes bytes of optimizer state per device for models of 1, 8 and 70 billion parameters.

    python -m benchmarks.state_bytes

The models have the shapes of Llama. The shardings are computed by `sharding.shard` on a
`jax.sharding.AbstractMesh`, so nothing is allocated. Runs for half a minute.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import optax_adamax
from benchmarks import reporting
from optax_adamax import sharding

FORMATS = {
    "float32": {},
    "4 bytes": {"m_dtype": "bfloat16", "v_dtype": "bfloat16"},
    "2 bytes": {"m_dtype": "int8", "v_dtype": "uint8"},
}
# Number of devices, and the shape of their mesh: data-parallel x tensor-parallel.
MESHES = {8: (8, 1), 64: (8, 8), 512: (64, 8)}


class Transformer(NamedTuple):
    """Sizes of a decoder with the architecture of Llama."""

    vocabulary: int
    width: int
    layers: int
    heads: int
    key_value_heads: int
    head_width: int
    hidden: int
    tied: bool  # whether the last layer shares the weights of the embedding

    def shapes(self) -> dict[str, Any]:
        """Returns shape and PartitionSpec of each parameter, sharded over "model" like Megatron."""
        queries, keys = self.heads * self.head_width, self.key_value_heads * self.head_width
        layer = {
            "attention_norm": ((self.width,), P()),
            "query": ((self.width, queries), P(None, "model")),
            "key": ((self.width, keys), P(None, "model")),
            "value": ((self.width, keys), P(None, "model")),
            "output": ((queries, self.width), P("model", None)),
            "feed_forward_norm": ((self.width,), P()),
            "gate": ((self.width, self.hidden), P(None, "model")),
            "up": ((self.width, self.hidden), P(None, "model")),
            "down": ((self.hidden, self.width), P("model", None)),
        }
        ends = {
            "embedding": ((self.vocabulary, self.width), P("model", None)),
            "norm": ((self.width,), P()),
        }
        if not self.tied:
            ends["unembedding"] = ((self.width, self.vocabulary), P(None, "model"))
        return {"layers": [layer] * self.layers, **ends}

    def parameters(self, mesh: Mesh | AbstractMesh) -> Any:
        """Returns the bfloat16 parameters as shapes with shardings."""
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(
                leaf[0], jnp.bfloat16, sharding=NamedSharding(mesh, leaf[1])
            ),
            self.shapes(),
            is_leaf=lambda x: isinstance(x, tuple),
        )


# https://github.com/meta-llama/llama-models: Llama 3.2 1B, Llama 3.1 8B and 70B.
MODELS = {
    "1 B": Transformer(128256, 2048, 16, 32, 8, 64, 8192, tied=True),
    "8 B": Transformer(128256, 4096, 32, 32, 8, 128, 14336, tied=False),
    "70 B": Transformer(128256, 8192, 80, 64, 8, 128, 28672, tied=False),
}


def transformation(name: str) -> optax.GradientTransformation:
    """Returns adamaxw with a cosine schedule and the storage formats `name`."""
    return optax_adamax.adamaxw(optax.cosine_decay_schedule(1e-3, 1000), **FORMATS[name])


def state_bytes(tx: optax.GradientTransformation, params: Any, zero1_axis: str | None) -> int:
    """Returns the bytes of the state of `tx` on each device."""
    state = sharding.shard(tx, params, zero1_axis=zero1_axis).init(params)
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(state)
    )


def row(model: str, devices: int, name: str) -> dict[str, Any]:
    """Returns one row of the table."""
    mesh = AbstractMesh(MESHES[devices], ("data", "model"))
    params, tx = MODELS[model].parameters(mesh), transformation(name)
    return {
        "model": model,
        "parameters": sum(math.prod(p.shape) for p in jax.tree.leaves(params)),
        "devices": devices,
        "mesh": dict(mesh.shape),
        "format": name,
        "like_parameters": state_bytes(tx, params, None),
        "zero": state_bytes(tx, params, "data"),
        "unsharded": sum(x.bytes for x in sharding.shard(tx, params, "data").unsharded),
    }


def main() -> None:
    """Computes every row, prints the table and writes the JSON."""
    cases = [(m, d, f) for m in MODELS for d in MESHES for f in FORMATS]
    rows = [row(*case) for case in cases]
    provenance = reporting.provenance("benchmarks.state_bytes", dtype="bfloat16", seeds=())
    results = {"provenance": provenance, "rows": rows}
    reporting.write_json(reporting.RESULTS / "state_bytes.json", results)
    print("GB of state on each device     like parameters       ZeRO-1")
    for r in rows:
        print(
            f"{r['model']:5} {r['devices']:4} devices  {r['format']:8} "
            f"{r['like_parameters'] / 1e9:12.3f} {r['zero'] / 1e9:12.3f}"
        )


if __name__ == "__main__":
    main()
