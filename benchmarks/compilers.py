"""Compiles a step for TPU and CUDA without an accelerator, and reads loops, bytes and cycles.

`jax[tpu]` and `jax[cuda12]` compile ahead of time on any Linux machine. Bytes, loops and
temporaries are read from the compiled program. Cycles are estimated by the compiler from its model
of the chip; nothing is run.
"""

import dataclasses
import functools
import importlib.util
import math
import os
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies

WIDTHS = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2}
WIDTHS |= {"f32": 4, "s32": 4, "u32": 4, "f64": 8, "s64": 8, "u64": 8}
PLUGINS = {"tpu": "libtpu", "cuda": "jax_cuda12_plugin"}
# Operations without memory access, and operations whose access is counted elsewhere.
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "conditional"}
FREE |= {"copy-done", "all-gather-done", "all-reduce-done", "async-done", "partition-id"}


@dataclasses.dataclass(frozen=True)
class Target:
    """A chip for which XLA can compile."""

    name: str
    platform: str
    topology: str
    gpu: tuple[float, ...] = ()  # properties of a GPU that the compiler needs: see `_gpu`

    @functools.cached_property
    def devices(self) -> list[Any]:
        """Devices of this chip, for compilation only."""
        jax.config.update("jax_platforms", "cpu")
        # Without these, libtpu queries a cloud service and allows one process per machine.
        variables = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
        for variable, value in {**variables, "TPU_LOG_DIR": "disabled"}.items():
            os.environ.setdefault(variable, value)
        if self.platform == "tpu":
            described = topologies.get_topology_desc(self.topology, platform="tpu")
        else:
            described = topologies.get_topology_desc(
                "", platform="cuda", target_config=_gpu(self.name, *self.gpu), topology="1x1x1"
            )
        return list(described.devices)


def _gpu(name: str, major: float, cores: float, ghz: float, memory: float, speed: float) -> str:
    """Returns XLA's description of a GPU, with figures from NVIDIA's data sheets."""
    l2, shared = (41943040, 167936) if major == 8 else (52428800, 233472)
    return f"""
    platform_name: "CUDA"
    device_description_str: "{name}"
    dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
    gpu_device_info {{
      threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
      shared_memory_per_block: 49152 shared_memory_per_core: {shared}
      shared_memory_per_block_optin: {shared - 1024}
      registers_per_core_limit: 65536 registers_per_block_limit: 65536
      core_count: {cores} fpus_per_core: {64 if major == 8 else 128} clock_rate_ghz: {ghz}
      block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
      memory_bandwidth: {speed * 10**9:.0f} l2_cache_size: {l2}
      device_memory_size: {memory * 2**30:.0f}
      cuda_compute_capability {{ major: {major} minor: 0 }}
    }}"""


TPUS = {
    name: Target(name, "tpu", topology)
    for name, topology in {
        "v5e": "v5e:2x2",
        "v5p": "v5p:2x2x1",
        "v6e": "v6e:2x2",
        "7x": "tpu7x:2x2x1",
    }.items()
}
# Compute capability, multiprocessors, GHz, GiB of memory, GB/s.
GPUS = {
    "A100": Target("A100", "cuda", "", (8, 108, 1.41, 80, 2039)),
    "H100": Target("H100", "cuda", "", (9, 132, 1.98, 80, 3352)),
    "B200": Target("B200", "cuda", "", (10, 148, 1.965, 180, 7700)),
}
TARGETS = TPUS | GPUS


def installed() -> list[str]:
    """Returns the packages of the installed compilers."""
    return [plugin for plugin in PLUGINS.values() if importlib.util.find_spec(plugin)]


def available(names: Sequence[str]) -> list[Target]:
    """Returns the targets whose compiler is installed, and prints the names of the others."""
    jax.config.update("jax_platforms", "cpu")  # without a GPU, JAX would disable CUDA
    found = []
    for target in (TARGETS[name] for name in names):
        if (plugin := PLUGINS[target.platform]) in installed():
            found.append(target)
        else:
            print(f"{target.name}: skipped, {plugin} is not installed")
    return found


@dataclasses.dataclass(frozen=True)
class Report:
    """Costs of a compiled step, without branches that run only in exceptional cases."""

    loops: int  # over arrays of the parameters' size
    bytes: int  # that these loops read and write
    temporaries: int  # bytes of memory beyond arguments and results
    cycles: int | None  # estimated by the compiler; None without an estimate


def compile_step(
    target: Target,
    step: Callable[..., Any],
    avals: tuple[Any, ...],
    donate: tuple[int, ...] = (0, 1),
) -> Report:
    """Compiles `step(*avals)` for one device of `target` and reports its costs.

    Args:
      target: the chip.
      step: a function of arrays.
      avals: `jax.ShapeDtypeStruct`s. Only arrays of at least half the largest size are counted.
      donate: indices of the donated arguments.
    """
    compiled = lower(target, step, avals, donate).compile()
    largest = max(math.prod(x.shape) for x in jax.tree.leaves(avals))
    return read(compiled, largest // 2)


def lower(
    target: Target,
    step: Callable[..., Any],
    avals: tuple[Any, ...],
    donate: tuple[int, ...] = (0, 1),
) -> Any:
    """Lowers `step(*avals)` for one device of `target`."""
    sharding = jax.sharding.SingleDeviceSharding(target.devices[0])

    def placed(x: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.jit(step, donate_argnums=donate).lower(*jax.tree.map(placed, avals))


def read(compiled: Any, large: int) -> Report:
    """Reports the costs of a compiled step; counts arrays of at least `large` elements only."""
    entry = compiled.as_text().split("\nENTRY")[1]
    types: dict[str, str] = {}
    loops = traffic = cycles = 0
    for line in entry.splitlines():
        # S(1) marks on-chip memory. Other layouts, metadata and configurations are in braces.
        line = re.sub(r"\w+\[[\d,]*\]\{[^{}]*S\(1\)\}", "on-chip", line)
        found = re.match(r"\s*(?:ROOT )?%(\S+) = (.*?) ([\w-]+)\((.*?)\)", _without_braces(line))
        if not found:
            continue
        name, types[name], opcode, operands = found[1], found[2], found[3], found[4]
        estimate = re.search(r'"estimated_cycles":"(\d+)"', line)
        cycles += int(estimate[1]) if estimate else 0
        if opcode in FREE:
            continue
        names = dict.fromkeys(re.findall(r"%([\w.-]+)", operands))
        inputs = [types[x] for x in names if x in types]
        touched = sum(_bytes(x, large) for x in [types[name], *inputs])
        loops += touched > 0 and not opcode.endswith("-start")  # these copies run during the loops
        traffic += touched
    return Report(loops, traffic, compiled.memory_analysis().temp_size_in_bytes, cycles or None)


def _without_braces(line: str) -> str:
    while (shorter := re.sub(r"\{[^{}]*\}", "", line)) != line:
        line = shorter
    return line


def _bytes(type_text: str, large: int) -> int:
    """Returns the bytes of the large arrays in an HLO type such as `(f32[4096], s8[])`."""
    total = 0
    for dtype, dimensions in re.findall(r"(\w+)\[([\d,]*)\]", type_text):
        size = math.prod(int(x) for x in dimensions.split(",") if x)
        total += size * WIDTHS[dtype] if size >= large else 0
    return total


@functools.cache
def cycles_per_byte(target: Target, size: int) -> float | None:
    """Estimates the cycles per byte of a memory-bound loop that adds float32 arrays."""

    def add(p: jax.Array, m: jax.Array, v: jax.Array, g: jax.Array) -> Any:
        return p + g, m + g, v + g

    array = jax.ShapeDtypeStruct((size,), jnp.float32)
    report = compile_step(target, add, (array,) * 4, (0, 1, 2))
    return None if report.cycles is None else report.cycles / (28 * size)
