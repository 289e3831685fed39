"""Compares optimizer steps of several frameworks with the memory bound on CPU.

    python -m benchmarks.peers [--quick]

A step updates one large float32 leaf. It runs in the fastest way that its framework documents: in
place or with donation, on all cores. Gradients are arguments. The bound is the measured time of a
single pass in C over the same bytes (benchmarks/bandwidth_bound.py). All steps are measured in
alternation in one process. The JAX steps are measured again in a process with XLA's multi-output
fusion and huge pages. Runs for two minutes.
"""

import argparse
import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import reporting, timing
from benchmarks.bandwidth_bound import STREAMS, MemoryBound
from optax_adamax import adamax

SIZE, ROUNDS, SEED, RATE = 1 << 24, 20, 0, 1e-3
SWITCH = "--xla_backend_extra_options=xla_cpu_use_multi_output_fusion=true"
HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
BOUND, COPY, REFERENCE = "one pass in C", "copy in C", "optax.adamax"
Runner = Callable[[], object]


def in_jax(tx: optax.GradientTransformation, gradient: np.ndarray) -> Runner:
    """Returns a jitted step with donation."""
    return timing.Step(tx, jnp.ones(gradient.size), timing.batch_as_gradient, jnp.asarray(gradient))


def in_torch(gradient: np.ndarray, *, compiled: bool = False, **options: Any) -> Runner:
    """Returns the step of `torch.optim.Adamax`."""
    import torch

    torch.set_num_threads(os.cpu_count() or 1)
    parameter = torch.ones(gradient.size, requires_grad=True)
    parameter.grad = torch.from_numpy(gradient.copy())
    optimizer = torch.optim.Adamax([parameter], lr=RATE, **options)
    return torch.compile(optimizer.step) if compiled else optimizer.step


def in_keras(gradient: np.ndarray) -> Runner:
    """Returns the jitted stateless step of `keras.optimizers.Adamax` on JAX, with donation."""
    os.environ["KERAS_BACKEND"] = "jax"
    import keras

    variable = keras.Variable(np.ones(gradient.size, np.float32))
    optimizer = keras.optimizers.Adamax(RATE)
    optimizer.build([variable])
    given = jnp.asarray(gradient)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(weights: Any, state: Any, gradient: jax.Array) -> Any:
        return optimizer.stateless_apply(state, [gradient], weights)

    carry = [jnp.array(variable.value)], [jnp.array(x.value) for x in optimizer.variables]

    def run() -> None:
        nonlocal carry
        carry = jax.block_until_ready(step(*carry, given))

    return run


def in_mlx(gradient: np.ndarray) -> Runner:
    """Returns the compiled step of `mlx.optimizers.Adamax` on CPU."""
    import mlx.core as mx
    import mlx.optimizers

    mx.set_default_device(mx.cpu)
    optimizer = mlx.optimizers.Adamax(RATE)
    params, given = {"w": mx.ones(gradient.size)}, {"w": mx.array(gradient)}
    optimizer.init(params)
    state = [params, optimizer.state]

    @functools.partial(mx.compile, inputs=state, outputs=state)
    def step() -> None:
        params.update(optimizer.apply_gradients(given, params))

    def run() -> None:
        step()
        mx.eval(state)

    return run


def in_flashoptim(gradient: np.ndarray) -> Runner:
    """Returns the step of flashoptim-jax's AdamW: 8-bit state and bfloat16 parameters only."""
    from flashoptim_jax import flash_adamw

    tx = flash_adamw(learning_rate=RATE)
    given = jnp.asarray(gradient, jnp.bfloat16)
    params = jnp.ones_like(given)
    carry = params, tx.init(params)

    def run() -> None:
        nonlocal carry
        carry = jax.block_until_ready(tx.step(*carry, given))

    return run


JAX: dict[str, Callable[[np.ndarray], Runner]] = {
    REFERENCE: lambda g: in_jax(optax.adamax(RATE), g),
    "optax_adamax": lambda g: in_jax(adamax(RATE), g),
    "optax.adam": lambda g: in_jax(optax.adam(RATE), g),
    "Keras on JAX": in_keras,
}
OTHERS: dict[str, Callable[[np.ndarray], Runner]] = {
    "PyTorch, single": lambda g: in_torch(g, foreach=False),
    "PyTorch, foreach": lambda g: in_torch(g, foreach=True),
    "PyTorch, torch.compile": lambda g: in_torch(g, compiled=True),
    "MLX on CPU": in_mlx,
    "flashoptim-jax, AdamW": in_flashoptim,
}


def measure(size: int, rounds: int, candidates: dict[str, Any]) -> dict[str, Any]:
    """Returns times relative to optax.adamax and to the bound; failed candidates with a reason."""
    gradient = np.random.default_rng(SEED).standard_normal(size, np.float32) * np.float32(0.01)
    runners: dict[str, Runner] = {}
    missing: dict[str, str] = {}
    for name, make in candidates.items():
        try:
            runner = make(gradient)
            runner()  # compiles
        except Exception as error:  # reported as a row
            missing[name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        else:
            runners[name] = runner
    try:
        bound = MemoryBound(size)
        runners |= {BOUND: bound.adamax, COPY: bound.copy}
    except (OSError, RuntimeError) as error:
        missing[BOUND] = str(error)
    seconds = timing.alternate(runners, rounds)
    found = {"to_optax": timing.ratios(seconds, REFERENCE), "missing": missing}
    if BOUND in runners:
        found["to_bound"] = timing.ratios(seconds, BOUND)
        found["copy_bytes_per_second"] = float(8 * size / np.median(seconds[COPY]))
        found["bound_bytes_per_second"] = float(4 * STREAMS * size / np.median(seconds[BOUND]))
    return found


def with_switch(quick: bool) -> dict[str, Any]:
    """Measures the JAX programs in a process with multi-output fusion and huge pages."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} {SWITCH}".strip()
    command = [sys.executable, "-m", "benchmarks.peers", "--jax-only", *["--quick"] * quick]
    environment = os.environ | HUGE_PAGES | {"XLA_FLAGS": flags}
    made = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
    if made.returncode:
        return {"missing": {"all": "this version of XLA lacks the flag"}, "to_optax": {}}
    return json.loads(made.stdout)


def main() -> None:
    """Runs all measurements, prints the ratios and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a sixteenth of the size, few rounds")
    parser.add_argument(
        "--jax-only", action="store_true", help="print the JSON of the JAX programs"
    )
    arguments = parser.parse_args()
    size, rounds = (SIZE // 16, 5) if arguments.quick else (SIZE, ROUNDS)
    if arguments.jax_only:
        print(json.dumps(measure(size, rounds, JAX)))
        return
    switched = with_switch(arguments.quick) if jax.default_backend() == "cpu" else None
    results = {
        "parameters": size,
        "rounds": rounds,
        "default": measure(size, rounds, JAX | OTHERS),
        "switched": switched,
    }
    for title in ("default", "switched"):
        found = results[title] or {"to_optax": {}, "missing": {}}
        for name, ratio in found["to_optax"].items():
            bound = found.get("to_bound", {}).get(name)
            suffix = f", to the bound {timing.format_ratio(bound)}" if bound else ""
            print(f"{title}: {name:24} to optax.adamax {timing.format_ratio(ratio)}{suffix}")
        for name, reason in found["missing"].items():
            print(f"{title}: {name:24} not measured: {reason}")
    if not arguments.quick:
        packages = [name for name in ("torch", "keras", "mlx", "flashoptim-jax") if installed(name)]
        provenance = reporting.provenance(
            "benchmarks.peers", dtype="float32", seeds=[SEED], packages=packages
        )
        reporting.write_json(reporting.RESULTS / "peers.json", {"provenance": provenance} | results)


def installed(package: str) -> bool:
    """Returns whether a package is installed."""
    try:
        return bool(version(package))
    except PackageNotFoundError:
        return False


if __name__ == "__main__":
    main()
