"""Measures compile times, and counts kernels and padding, for many leaves on TPU and GPU.

    python -m benchmarks.accelerators_leaves [--targets v6e ...] [--quick]

The models are a GPT-2 (`LAYERS` layers of twelve leaves, and four more) and a thousand leaves of 64
elements. Compile times are measured processor seconds, also relative to `optax.adamax` in the same
run. On TPU the compiler pads a small leaf to a tile, so the state needs more bytes than its
elements; the rows contain both sizes. Needs libtpu (extra `tpu`), and for GPUs JAX's plugin for
CUDA (extra `cuda`). Rows of other targets are preserved.
"""

import argparse
import json
import math
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from tqdm import tqdm

from benchmarks import reporting
from benchmarks.compilers import TARGETS, Target, available, installed, lower, read
from optax_adamax import adamax, pack_small_leaves

LAYERS, WIDTH, VOCABULARY = 12, 768, 50_257
TWO_BYTES = {"m_dtype": "int8", "v_dtype": "uint8"}
MAKE: dict[str, Callable[[], Any]] = {
    "optax.adamax": lambda: optax.adamax(1e-3),
    "float32": lambda: adamax(1e-3),
    "4 bytes": lambda: adamax(1e-3, m_dtype="bfloat16", v_dtype="bfloat16"),
    "2 bytes": lambda: adamax(1e-3, **TWO_BYTES),
    "2 bytes, packed": lambda: pack_small_leaves(adamax(1e-3, **TWO_BYTES)),
}
LAYER = [(WIDTH,)] * 4 + [(3 * WIDTH,), (WIDTH,), (4 * WIDTH,), (WIDTH,)]
LAYER += [(WIDTH, 3 * WIDTH), (WIDTH, WIDTH), (WIDTH, 4 * WIDTH), (4 * WIDTH, WIDTH)]
MODELS: dict[str, list[tuple[int, ...]]] = {
    "GPT-2": LAYER * LAYERS + [(VOCABULARY, WIDTH), (1024, WIDTH), (WIDTH,), (WIDTH,)],
    "1,000 of 64": [(64,)] * 1000,
}


def measure(target: Target, shapes: list[tuple[int, ...]], tx: Any) -> dict[str, Any]:
    """Returns compile time in processor seconds, kernels, and bytes of state and elements."""
    params = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    state = jax.eval_shape(tx.init, params)

    def step(params: Any, state: Any, gradients: Any) -> Any:
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    start = time.process_time()
    program = lower(target, step, (params, state, params)).compile()
    seconds = time.process_time() - start
    held = lower(target, lambda state: state, (state,), (0,)).compile().memory_analysis()
    return {
        "seconds": seconds,
        "kernels": read(program, 2).loops,
        "state_bytes": held.argument_size_in_bytes,
        "state_bytes_of_elements": sum(
            math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(state)
        ),
    }


def main() -> None:
    """Compiles all models with all transformations, prints the rows and writes the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=["v6e", "H100"])
    parser.add_argument("--quick", action="store_true", help="one layer and a hundred leaves")
    arguments = parser.parse_args()
    path = reporting.RESULTS / "accelerators_leaves.json"
    before = json.loads(path.read_text("utf-8"))["rows"] if path.exists() else []
    targets = available(arguments.targets)
    made = reporting.provenance("benchmarks.accelerators_leaves", packages=installed())
    rows = [row for row in before if row["target"] not in {target.name for target in targets}]
    for target in targets:
        for model, shapes in MODELS.items():
            shapes = shapes[: len(shapes) // 12] if arguments.quick else shapes
            measure(target, shapes[:1], optax.adamax(1e-3))  # starts the compiler
            found: dict[str, dict[str, Any]] = {}
            for name, make in tqdm(MAKE.items(), desc=f"{target.name}, {model}"):
                row = found[name] = measure(target, shapes, make()) | {"commit": made["commit"]}
                row["to_optax"] = row["seconds"] / found["optax.adamax"]["seconds"]
                tqdm.write(f"{target.name:5}{model:12}{len(shapes):5} leaves  {name:16}{row}")
                rows.append({"target": target.name, "model": model, "what": name, **row})
    if not arguments.quick:
        reporting.write_json(path, {"provenance": made, "rows": rows})


if __name__ == "__main__":
    main()
