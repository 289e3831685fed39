"""Finds the largest model whose training step compiles for one TPU v5e with 16 GB.

    python -m benchmarks.model_size [--ways WAY ...] [--unrolled] [--quick]

The model is a decoder-only transformer of width `WIDTH`. A training step computes gradients on one
sequence of `LENGTH` tokens. Parameters and state are donated, and every layer is rematerialized.
The compiler rejects programs that exceed device memory. Layers are stacked under `lax.scan`, and
their number is varied until one model compiles and a model with one more layer does not. The bytes
per added parameter are computed from two small models. `--unrolled` repeats this with a list of
layers and adds the results to the rows. The difference shows whether XLA frees each gradient after
its use. Needs libtpu (extra `tpu`); nothing is run. One compilation needs a minute on an idle CPU
core, or several minutes for a long list of layers.
"""

import argparse
import dataclasses
import json
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import optax
from tqdm import tqdm

from benchmarks import reporting
from benchmarks.compilers import TARGETS, installed, lower
from optax_adamax import adamax, compensate_rounding

CHIP = TARGETS["v5e"]
WIDTH, HEAD, VOCABULARY, LENGTH = 2048, 128, 32_768, 1024
FEW = (2, 4)  # numbers of layers of the two small models
BYTES = 16.9e9  # approximate memory of the chip, for the first guess only
RATE = 1e-3


@dataclasses.dataclass(frozen=True)
class Way:
    """One configuration: an optimizer, and the dtypes of parameters and computation."""

    make: Callable[[], Any]
    params: Any = jnp.float32
    compute: Any = jnp.float32  # dtype of activations and gradients


SEVEN = "7 bytes for all: bfloat16, int8 residual, 2 bytes of state"
TWO_BYTES = {"m_dtype": "int8", "v_dtype": "uint8"}
WAYS = {
    "optax.adamw, float32": Way(lambda: optax.adamw(RATE)),
    "optax.adamax, float32": Way(lambda: optax.adamax(RATE)),
    "optax.adamax, bfloat16 with float32 masters": Way(
        lambda: optax.adamax(RATE), compute=jnp.bfloat16
    ),
    "4 bytes of state, float32": Way(lambda: adamax(RATE, m_dtype="bfloat16", v_dtype="bfloat16")),
    "2 bytes of state, float32": Way(lambda: adamax(RATE, **TWO_BYTES)),
    SEVEN: Way(
        lambda: compensate_rounding(adamax(RATE, **TWO_BYTES), "int8"),
        jnp.bfloat16,
        jnp.bfloat16,
    ),
}


def shapes(layers: int, scanned: bool, dtype: Any) -> dict[str, Any]:
    """Returns the shapes of the parameters, with layers stacked or in a list."""
    one = {
        "attention_norm": (WIDTH,),
        "query_key_value": (WIDTH, 3 * WIDTH),
        "output": (WIDTH, WIDTH),
        "norm": (WIDTH,),
        "up": (WIDTH, 4 * WIDTH),
        "down": (4 * WIDTH, WIDTH),
    }

    def array(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    if scanned:
        stacked: Any = {name: array(layers, *shape) for name, shape in one.items()}
    else:
        stacked = [{name: array(*shape) for name, shape in one.items()} for _ in range(layers)]
    return {
        "embedding": array(VOCABULARY, WIDTH),
        "position": array(LENGTH, WIDTH),
        "layers": stacked,
    }


def norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6) * scale


@jax.checkpoint
def layer(x: jax.Array, w: dict[str, jax.Array]) -> jax.Array:
    """Applies causal attention and a perceptron, each with a residual connection."""
    mixed = norm(x, w["attention_norm"]) @ w["query_key_value"]
    q, k, v = jnp.split(mixed.reshape(LENGTH, -1, 3 * HEAD), 3, axis=-1)
    attended = jax.nn.dot_product_attention(q, k, v, is_causal=True)
    x = x + attended.reshape(LENGTH, WIDTH) @ w["output"]
    return x + jax.nn.gelu(norm(x, w["norm"]) @ w["up"]) @ w["down"]


def loss(params: dict[str, Any], tokens: jax.Array) -> jax.Array:
    """Returns the mean cross-entropy of the next token."""
    x = params["embedding"][tokens] + params["position"]
    if isinstance(params["layers"], list):
        for w in params["layers"]:
            x = layer(x, w)
    else:
        x, _ = jax.lax.scan(lambda x, w: (layer(x, w), None), x, params["layers"])
    logits = (x @ params["embedding"].T).astype(jnp.float32)
    targets = jnp.roll(tokens, -1)
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()


def compile_step(way: Way, layers: int, scanned: bool) -> tuple[int, Any]:
    """Returns the number of parameters, and the compiled train step, or None if it does not fit."""
    tx, params = way.make(), shapes(layers, scanned, way.params)

    def step(params: Any, state: Any, tokens: jax.Array) -> Any:
        used = jax.tree.map(lambda p: p.astype(way.compute), params)
        value, gradient = jax.value_and_grad(loss)(used, tokens)
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value

    tokens = jax.ShapeDtypeStruct((LENGTH,), jnp.int32)
    count = sum(math.prod(p.shape) for p in jax.tree.leaves(params))
    try:
        return count, lower(CHIP, step, (params, jax.eval_shape(tx.init, params), tokens)).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return count, None


def used_bytes(program: Any) -> int:
    """Returns the bytes of arguments and temporaries."""
    found = program.memory_analysis()
    return found.argument_size_in_bytes + found.temp_size_in_bytes


def extrapolate(way: Way, scanned: bool) -> tuple[float, int]:
    """Returns the bytes per added parameter, and the number of layers expected to fit."""
    (few, small), (many, big) = (compile_step(way, n, scanned) for n in FEW)
    grown, layers = used_bytes(big) - used_bytes(small), FEW[1] - FEW[0]
    room = BYTES - used_bytes(small)
    return grown / (many - few), FEW[0] + int(room / (grown / layers))


def find_largest(way: Way, scanned: bool, start: int) -> dict[str, Any]:
    """Returns the largest model that fits; with one more layer, it does not."""
    used: dict[int, int | None] = {}  # bytes by layers; None if the model does not fit
    counts: dict[int, int] = {}
    layers = start
    while layers not in used:
        counts[layers], program = compile_step(way, layers, scanned)
        used[layers] = None if program is None else used_bytes(program)
        result = used[layers] or "does not fit"
        tqdm.write(f"{layers} layers, {counts[layers]} parameters: {result}")
        layers += -1 if used[layers] is None else 1
    fits = max(n for n, found in used.items() if found is not None)
    return {"layers": fits, "parameters": counts[fits], "bytes": used[fits]}


def draw(rows: list[dict[str, Any]]) -> None:
    """Draws the number of parameters as one bar per row."""
    plt.rcParams.update(reporting.STYLE)
    figure, axes = plt.subplots(figsize=(8.5, 3.4), layout="constrained", dpi=110)
    sizes = [row["parameters"] / 1e9 for row in rows]
    colors = ["#5B6770" if row["way"].startswith("optax") else "#0072B2" for row in rows]
    bars = axes.barh([row["way"].replace(": ", ":\n") for row in rows], sizes, color=colors)
    axes.bar_label(bars, [f"{size:.2f}" for size in sizes], padding=3)
    axes.invert_yaxis()
    axes.set_xlabel("billions of parameters")
    title = "Largest transformer whose step fits in one TPU v5e (16 GB), according to the compiler"
    figure.suptitle(title, x=0.01, ha="left")
    figure.savefig(reporting.FIGURES / "model_size.png")


def main() -> None:
    """Compiles the models; after each, prints its row, writes the JSON and draws the figure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), metavar="WAY")
    parser.add_argument("--unrolled", action="store_true", help="use a list of layers")
    parser.add_argument("--quick", action="store_true", help="one model of one layer")
    arguments = parser.parse_args()
    if arguments.quick:
        print(used_bytes(compile_step(WAYS[SEVEN], 1, scanned=True)[1]))
        return
    path = reporting.RESULTS / "model_size.json"
    rows = {}
    if path.exists():
        rows = {row["way"]: row for row in json.loads(path.read_text("utf-8"))["rows"]}
    if arguments.unrolled and (missing := set(arguments.ways) - set(rows)):
        parser.error(f"--unrolled needs the rows {sorted(missing)}; run without it first")
    made = reporting.provenance("benchmarks.model_size", packages=installed())
    for name in tqdm(arguments.ways, desc="ways"):
        way, scanned = WAYS[name], not arguments.unrolled
        slope, layers = extrapolate(way, scanned)
        found = {"commit": made["commit"], "bytes_per_added_parameter": slope}
        found |= find_largest(way, scanned, layers)
        row = rows.setdefault(name, {"way": name})
        row.update(found if scanned else {"unrolled": found})
        tqdm.write(f"{name:60}{rows[name]}")
        shown = [rows[name] for name in WAYS if name in rows]
        reporting.write_json(path, {"provenance": made, "rows": shown})
        draw(shown)


if __name__ == "__main__":
    main()
