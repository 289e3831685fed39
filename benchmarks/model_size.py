"""How large a model one chip trains: what the compiler for TPU v5e (16 GB) accepts.

    python -m benchmarks.model_size [--quick]

A decoder-only transformer of width `WIDTH`, one training step with gradients on one sequence of
`LENGTH` tokens, parameters and state donated, every layer rematerialised. The compiler refuses at
compile time what exceeds the memory of the chip. Arguments and temporaries of models of `SCANNED`
layers, stacked under `lax.scan`, say where the largest that it accepts must be; models around it
are compiled until one is accepted and the next refused. The same for `UNROLLED` layers says whether
a layer's gradient lives until the end of the step, or is released when it is used. Needs libtpu
(extra `tpu`); nothing is run. Each of six compilations a way takes most of a minute.
"""

import argparse
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import optax
from tqdm import tqdm

from benchmarks import reporting
from benchmarks.accelerators_compiler import TARGETS, lower
from optax_adamax import adamax, compensate_rounding

CHIP = TARGETS["v5e"]
WIDTH, HEAD, VOCABULARY, LENGTH = 2048, 128, 32_768, 1024
SCANNED, UNROLLED = (8, 12), (2, 4)  # numbers of layers from which bytes a parameter are found
MEMORY = 15.75 * 2**30  # of the chip, as the compiler says when it refuses
RATE = 1e-3


@dataclasses.dataclass(frozen=True)
class Way:
    """A way to keep parameters and state."""

    make: Callable[[], Any]
    params: Any = jnp.float32
    compute: Any = jnp.float32  # and the gradients; parameters of another dtype are masters


TWO_BYTES = {"m_dtype": "int8", "v_dtype": "uint8"}
WAYS = {
    "optax.adamw, float32": Way(lambda: optax.adamw(RATE)),
    "optax.adamax, float32": Way(lambda: optax.adamax(RATE)),
    "optax.adamax, bfloat16 with float32 masters": Way(
        lambda: optax.adamax(RATE), compute=jnp.bfloat16
    ),
    "4 bytes of state, float32": Way(lambda: adamax(RATE, m_dtype="bfloat16", v_dtype="bfloat16")),
    "2 bytes of state, float32": Way(lambda: adamax(RATE, **TWO_BYTES)),
    "2 bytes of state, bfloat16 with float32 masters": Way(
        lambda: adamax(RATE, **TWO_BYTES), compute=jnp.bfloat16
    ),
    "7 bytes for all: bfloat16, int8 residual, 2 bytes of state": Way(
        lambda: compensate_rounding(adamax(RATE, **TWO_BYTES), "int8"),
        jnp.bfloat16,
        jnp.bfloat16,
    ),
}


def shapes(layers: int, scanned: bool, dtype: Any) -> dict[str, Any]:
    """The parameters, with the layers stacked or as a list."""
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
    """Causal attention and a perceptron, each with its residual."""
    mixed = norm(x, w["attention_norm"]) @ w["query_key_value"]
    q, k, v = jnp.split(mixed.reshape(LENGTH, -1, 3 * HEAD), 3, axis=-1)
    attended = jax.nn.dot_product_attention(q, k, v, is_causal=True)
    x = x + attended.reshape(LENGTH, WIDTH) @ w["output"]
    return x + jax.nn.gelu(norm(x, w["norm"]) @ w["up"]) @ w["down"]


def loss(params: dict[str, Any], tokens: jax.Array) -> jax.Array:
    """Mean cross entropy of the next token."""
    x = params["embedding"][tokens] + params["position"]
    if isinstance(params["layers"], list):
        for w in params["layers"]:
            x = layer(x, w)
    else:
        x, _ = jax.lax.scan(lambda x, w: (layer(x, w), None), x, params["layers"])
    logits = (x @ params["embedding"].T).astype(jnp.float32)
    targets = jnp.roll(tokens, -1)
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()


def compiled(way: Way, layers: int, scanned: bool) -> tuple[int, Any]:
    """The number of parameters, and a train step for the chip; None if it does not fit."""
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
    except jax.errors.JaxRuntimeError as refusal:
        if "RESOURCE_EXHAUSTED" not in str(refusal):
            raise
        return count, None


def memory(way: Way, layers: int, scanned: bool) -> tuple[int, int]:
    """Parameters, and bytes of arguments and temporaries together."""
    count, program = compiled(way, layers, scanned)
    found = program.memory_analysis()
    return count, found.argument_size_in_bytes + found.temp_size_in_bytes


def bytes_a_parameter(way: Way, layers: tuple[int, int], scanned: bool) -> tuple[float, float]:
    """What one more parameter takes, and what a model of none would take."""
    (few, small), (many, big) = (memory(way, n, scanned) for n in layers)
    slope = (big - small) / (many - few)
    return slope, small - slope * few


def largest(way: Way, slope: float, rest: float) -> dict[str, Any]:
    """The largest model that fits, looked for where it must be, and the smallest that does not."""
    one, two = (
        sum(math.prod(p.shape) for p in jax.tree.leaves(shapes(n, True, way.params)))
        for n in (1, 2)
    )
    layers = int(((MEMORY - rest) / slope - one) / (two - one)) + 1
    sizes = {layers: compiled(way, layers, scanned=True)}
    grows = sizes[layers][1] is not None
    while all((program is not None) == grows for _, program in sizes.values()):
        layers += 1 if grows else -1
        sizes[layers] = compiled(way, layers, scanned=True)
    fits = max(n for n, (_, program) in sizes.items() if program)
    return {"layers": fits, "parameters": sizes[fits][0], "refused": sizes[fits + 1][0]}


def draw(rows: list[dict[str, Any]]) -> None:
    """One bar a way."""
    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(figsize=(8.5, 3.4), layout="constrained", dpi=110)
    sizes = [row["parameters"] / 1e9 for row in rows]
    colors = ["#5B6770" if row["way"].startswith("optax") else "#0072B2" for row in rows]
    bars = axes.barh([row["way"].replace(": ", ":\n") for row in rows], sizes, color=colors)
    axes.bar_label(bars, [f"{size:.2f}" for size in sizes], padding=3)
    axes.invert_yaxis()
    axes.set_xlabel("billions of parameters")
    title = "The largest transformer that one TPU v5e (16 GB) trains, by the compiler's verdict"
    figure.suptitle(title, x=0.01, ha="left")
    figure.savefig(reporting.FIGURES / "model_size.png")


def main() -> None:
    """Compiles everything, prints the rows, writes the JSON and draws the figure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="bytes a parameter of one way")
    quick = parser.parse_args().quick
    rows = []
    for name in tqdm(list(WAYS)[-1:] if quick else WAYS, desc="ways"):
        way = WAYS[name]
        slope, rest = bytes_a_parameter(way, SCANNED, scanned=True)
        row: dict[str, Any] = {"way": name, "scanned": slope}
        if not quick:
            row["unrolled"], _ = bytes_a_parameter(way, UNROLLED, scanned=False)
            row |= largest(way, slope, rest)
        tqdm.write(f"{name:60}{row}")
        rows.append(row)
    if not quick:
        made = reporting.provenance(
            "benchmarks.model_size", dtype="float32", seeds=(), packages=["libtpu"]
        )
        reporting.write_json(
            reporting.RESULTS / "model_size.json", {"provenance": made, "rows": rows}
        )
        draw(rows)


if __name__ == "__main__":
    main()
