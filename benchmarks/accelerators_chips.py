"""Compiles the sharded step for hundreds and thousands of TPU chips and counts communication.

    python -m benchmarks.accelerators_chips

The parameters are one float32 layer of a transformer, with 2-byte state.

FSDP: parameters, gradients and state are sharded over 256 devices. Larger topologies replicate them
over groups of 256 devices.
ZeRO-1: parameters and gradients are replicated, and the state is sharded. Three programs do this:
`update` of `sharding.shard`, its `apply_gradients`, and `out_shardings` alone.

Each row contains the count and bytes per device of every kind of collective, the bytes of
temporaries, and the cycles estimated by the compiler. It also contains the bytes of state per
device, and the bytes predicted from shapes and shardings. The programs of `init` have rows, too.
Nothing is run. Needs libtpu (extra `tpu`).
"""

import argparse
import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

from benchmarks import reporting
from benchmarks.compilers import WIDTHS, Target, installed
from optax_adamax import adamax, sharding

TOPOLOGIES = {
    "256 of v5e": Target("v5e", "tpu", "v5e:16x16"),
    "8,960 of v5p": Target("v5p", "tpu", "v5p:16x20x28"),
    "9,216 of 7x": Target("7x", "tpu", "tpu7x:16x24x24"),
}
GROUP = 256  # devices per group; a TPU7x chip is two devices
SHAPES = {"embedding": (32_768, 4096), "up": (4096, 11008), "down": (11008, 4096), "norm": (4096,)}
KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
Step = Callable[..., Any]


def parameter_shapes(chips: Target, spec: P) -> dict[str, Any]:
    """Returns the parameters as shapes, sharded by `spec` over the mesh of all chips."""
    devices = np.array(chips.devices).reshape(-1, GROUP)
    place = NamedSharding(Mesh(devices, ("group", "data")), spec)
    return {
        name: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=place)
        for name, shape in SHAPES.items()
    }


def train_step(tx: optax.GradientTransformation) -> Step:
    """Returns the usual step of an optax transformation."""

    def step(gradients: Any, state: Any, params: Any) -> Any:
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    return step


def measure(step: Step | None, params: Any, zero1_axis: str | None, tx: Any) -> dict[str, Any]:
    """Compiles `step(gradients, state, params)`, or `init` if step is None; returns its costs."""
    sharded = sharding.shard(tx, params, zero1_axis=zero1_axis)
    if step is None:
        program = jax.jit(sharded.init).lower(params).compile()
        held = program.memory_analysis().output_size_in_bytes
    else:
        state = sharded.init(params)
        out = jax.tree.map(lambda p: p.sharding, params), sharded.shardings
        jitted = jax.jit(step, donate_argnums=(1, 2), out_shardings=out)
        program = jitted.lower(params, state, params).compile()
        held = program.memory_analysis().argument_size_in_bytes - 2 * bytes_per_chip(
            params, jax.tree.map(lambda p: p.sharding, params)
        )
    text = program.as_text()
    cycles = sum(int(x) for x in re.findall(r'"estimated_cycles":"(\d+)"', text))
    return {
        "collectives": {kind: found for kind in KINDS if (found := collectives(text, kind))},
        "temporaries": program.memory_analysis().temp_size_in_bytes,
        "cycles": cycles if cycles < 2**62 else None,  # no estimate for the all-gather on TPU7x
        "state_bytes": held,
        "state_bytes_predicted": bytes_per_chip(sharded.init(params), sharded.shardings),
    }


def bytes_per_chip(tree: Any, places: Any) -> int:
    """Predicts the bytes on each chip from shapes and shardings."""
    return sum(
        math.prod(place.shard_shape(x.shape)) * x.dtype.itemsize
        for x, place in zip(jax.tree.leaves(tree), jax.tree.leaves(places), strict=True)
    )


def collectives(text: str, kind: str) -> dict[str, int] | None:
    """Counts the collectives of a kind, and the bytes of their results per device."""
    types = re.findall(rf"= (.*?) {kind}(?:-start)?\(", text)
    sizes = [
        WIDTHS[dtype] * math.prod(int(n) for n in shape.split(",") if n)
        for found in types
        for dtype, shape in re.findall(r"(\w+)\[([\d,]*)\]", found)[-1:]
    ]
    return {"count": len(types), "bytes": sum(sizes)} if types else None


def programs(chips: Target, tx: Any) -> dict[str, tuple[Step | None, Any, str | None]]:
    """Returns step, parameters and ZeRO-1 axis of each program; a step of None means `init`."""
    fsdp, replicated = parameter_shapes(chips, P("data")), parameter_shapes(chips, P())
    zero1 = sharding.shard(tx, replicated, zero1_axis="data")
    return {
        "FSDP": (train_step(tx), fsdp, None),
        "FSDP, init": (None, fsdp, None),
        "ZeRO-1, out_shardings": (train_step(tx), replicated, "data"),
        "ZeRO-1, update": (train_step(zero1), replicated, "data"),
        "ZeRO-1, apply_gradients": (zero1.apply_gradients, replicated, "data"),
        "ZeRO-1, init": (None, replicated, "data"),
    }


def main() -> None:
    """Compiles the programs, prints the rows and writes the JSON."""
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    tx = adamax(1e-3, m_dtype="int8", v_dtype="uint8")
    rows = []
    for topology, chips in TOPOLOGIES.items():
        for name, (step, params, axis) in tqdm(programs(chips, tx).items(), desc=topology):
            rows.append({"chips": topology, "what": name, **measure(step, params, axis, tx)})
            tqdm.write(str(rows[-1]))
    made = reporting.provenance("benchmarks.accelerators_chips", packages=installed())
    path = reporting.RESULTS / "accelerators_chips.json"
    reporting.write_json(path, {"provenance": made, "rows": rows})


if __name__ == "__main__":
    main()
