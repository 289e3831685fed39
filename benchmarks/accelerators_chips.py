"""The sharded step on 256 chips of TPU v5e, estimated by the compiler.

    python -m benchmarks.accelerators_chips

The leaves are those of one layer of a transformer, in float32, the state in 2 bytes. FSDP:
parameters, gradients and state split over all chips. ZeRO-1: parameters and gradients whole, the
state split; once by `keep_sharded`, once by `make_update_params`, and once by `out_shardings`
alone. Counted are the collectives by kind and bytes on a device, temporaries, estimated cycles, and
the bytes of the state on a device beside those of `state_shardings`. Needs libtpu (extra `tpu`).
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
from optax_adamax import adamax, sharding
from oracle.compilers import WIDTHS, Target, installed

CHIPS = Target("v5e, 256 chips", "tpu", "v5e:16x16")
SHAPES = {"embedding": (32_768, 4096), "up": (4096, 11008), "down": (11008, 4096), "norm": (4096,)}
KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
Step = Callable[..., Any]


def arrays(spec: P) -> dict[str, Any]:
    """The parameters, split by `spec` over the mesh of all chips."""
    place = NamedSharding(Mesh(np.array(CHIPS.devices), ("data",)), spec)
    return {
        name: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=place)
        for name, shape in SHAPES.items()
    }


def plain(tx: optax.GradientTransformation) -> Step:
    """The step as optax's users write it."""

    def step(gradients: Any, state: Any, params: Any) -> Any:
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    return step


def measure(step: Step, params: Any, zero_axis: str | None, tx: Any) -> dict[str, Any]:
    """What the compiler makes of `step(gradients, state, params)`."""
    places = sharding.state_shardings(tx, params, zero_axis=zero_axis)
    state = jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        jax.eval_shape(tx.init, params),
        places,
    )
    out = jax.tree.map(lambda p: p.sharding, params), places
    program = (
        jax.jit(step, donate_argnums=(1, 2), out_shardings=out)
        .lower(params, state, params)
        .compile()
    )
    text, memory = program.as_text(), program.memory_analysis()
    predicted = sum(
        math.prod(place.shard_shape(x.shape)) * x.dtype.itemsize
        for x, place in zip(jax.tree.leaves(state), jax.tree.leaves(places), strict=True)
    )
    held = sum(
        math.prod(p.sharding.shard_shape(p.shape)) * 4 for p in jax.tree.leaves((params, params))
    )
    return {
        "collectives": {kind: found for kind in KINDS if (found := collectives(text, kind))},
        "temporaries": memory.temp_size_in_bytes,
        "cycles": sum(int(x) for x in re.findall(r'"estimated_cycles":"(\d+)"', text)),
        "state_bytes": memory.argument_size_in_bytes - held,
        "state_bytes_predicted": predicted,
    }


def collectives(text: str, kind: str) -> dict[str, int] | None:
    """How many there are of a kind, and the bytes of their results on a device."""
    types = re.findall(rf"= (.*?) {kind}(?:-start)?\(", text)
    sizes = [
        WIDTHS[dtype] * math.prod(int(n) for n in shape.split(",") if n)
        for found in types
        for dtype, shape in re.findall(r"(\w+)\[([\d,]*)\]", found)[-1:]
    ]
    return {"count": len(types), "bytes": sum(sizes)} if types else None


def main() -> None:
    """Compiles the four steps, prints what came of them and writes the JSON."""
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    tx = adamax(1e-3, m_dtype="int8", v_dtype="uint8")
    split, whole = arrays(P("data")), arrays(P())
    update_params = sharding.make_update_params(tx, whole, zero_axis="data")
    kept = sharding.keep_sharded(tx, whole, zero_axis="data")
    steps: dict[str, tuple[Step, Any, str | None]] = {
        "FSDP": (plain(tx), split, None),
        "ZeRO-1, out_shardings": (plain(tx), whole, "data"),
        "ZeRO-1, keep_sharded": (plain(kept), whole, "data"),
        "ZeRO-1, make_update_params": (update_params, whole, "data"),
    }
    rows = {}
    for name, (step, params, axis) in tqdm(steps.items(), desc="estimated by the compiler"):
        rows[name] = measure(step, params, axis, tx)
        tqdm.write(f"{name:30}{rows[name]}")
    made = reporting.provenance("benchmarks.accelerators_chips", packages=installed())
    results = {"provenance": made, "topology": CHIPS.topology, "rows": rows}
    reporting.write_json(reporting.RESULTS / "accelerators_chips.json", results)


if __name__ == "__main__":
    main()
