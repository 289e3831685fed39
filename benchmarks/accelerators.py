"""Compares steps with a memory-bound loop on TPU and GPU, as estimated by the compiler.

    python -m benchmarks.accelerators [--targets v5e ...] [--what plain ...] [--resume] [--quick]

Needs libtpu (extra `tpu`). GPUs also need JAX's plugin for CUDA (extra `cuda`) and are skipped
without it. No accelerator is needed: see `benchmarks/compilers.py`. Each case has one leaf, by
default of `SIZE` elements. Parameters and state are donated, and gradients are arguments. The bound
is the estimated time of a loop of additions that reads and writes parameters and state once and
reads the gradients. Compiling all cases of a target needs about five minutes on two idle CPU cores.
Rows of other targets are preserved, and `--resume` continues an interrupted run.
"""

import argparse
import dataclasses
import functools
import json
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from tqdm import tqdm

from benchmarks import compilers, reporting
from benchmarks.compilers import TARGETS, Target
from optax_adamax import adamax, adamaxw, compensate_rounding, limit_spikes, pack_small_leaves
from tests.oracle.formats import FORMATS as DTYPES
from tests.oracle.formats import SOME_FORMATS

SIZE = 1 << 28  # elements; too many for on-chip memory
RATE = 1e-3
SCHEDULE = optax.cosine_decay_schedule(RATE, 1000)
B2_SCHEDULE = optax.linear_schedule(0.9, 0.999, 1000)
OPTAX = "optax.adamax"

FORMATS = {f"{m}, {v}": {"m_dtype": m, "v_dtype": v} for m, v in DTYPES}
FEW = [f"{m}, {v}" for m, v in SOME_FORMATS]

Make = Callable[..., optax.GradientTransformationExtraArgs]  # called with the format's dtypes


def _compensated(**dtypes: Any) -> optax.GradientTransformationExtraArgs:
    return compensate_rounding(adamax(RATE, **dtypes), "int8")


def _injected(function: Make, **hyperparameters: Any) -> Make:
    inject = optax.inject_hyperparams(function, hyperparam_dtype=jnp.float32)
    return functools.partial(inject, **hyperparameters)


OPTIONS: dict[str, Make] = {
    "nesterov": functools.partial(adamax, RATE, nesterov=True),
    "decoupled decay, masked": functools.partial(
        adamaxw, RATE, mask=functools.partial(jax.tree.map, lambda p: p.ndim > 0)
    ),
    "schedule of the rate": functools.partial(adamax, SCHEDULE),
    "schedule of b2": _injected(adamax, learning_rate=RATE, b2=B2_SCHEDULE),
    "all injected": _injected(adamax, learning_rate=RATE, b1=0.9, b2=0.999, eps=1e-8),
    "all injected, with decay": _injected(
        adamaxw, learning_rate=RATE, b1=0.9, b2=0.999, eps=1e-8, weight_decay=1e-4
    ),
    "nonfinite zero": functools.partial(adamax, RATE, nonfinite="zero"),
    "nonfinite skip_step": functools.partial(adamax, RATE, nonfinite="skip_step"),
    "clip by global norm": lambda **x: optax.chain(
        optax.clip_by_global_norm(1.0), adamax(RATE, **x)
    ),
    "limit_spikes, clip": lambda **x: limit_spikes(adamax(RATE, **x), 5.0, action="clip"),
    "MultiSteps": lambda **x: optax.MultiSteps(adamax(RATE, **x), 4).gradient_transformation(),
    "pack_small_leaves": lambda **x: pack_small_leaves(adamax(RATE, **x)),
}
SHAPES = ((268_435_399,), (16_381, 16_385), (4096, 11008), (50257, 768), (768,), (3, 3, 64, 128))
SHAPES += ((32, 4096, 4096),)


@dataclasses.dataclass(frozen=True)
class Case:
    """A step to compile, which becomes a row of the results."""

    what: str
    state: str  # "m_dtype, v_dtype", or OPTAX
    make: Callable[[], Any]
    dtype: str = "float32"  # of the parameters
    grad_dtype: str = "float32"
    shape: tuple[int, ...] = (SIZE,)

    @property
    def name(self) -> str:
        return f"{self.what} · {self.state} · {self.dtype}, {self.grad_dtype} · {self.shape}"

    def row(self, target: Target) -> dict[str, Any]:
        """Returns the first entries of the row: target, options, dtypes and shape."""
        return {
            "target": target.name,
            "what": self.what,
            "state": self.state,
            "dtypes": [self.dtype, self.grad_dtype],
            "shape": list(self.shape),
        }


def cases() -> list[Case]:
    """Returns all cases; for each shape and pair of dtypes, the optax.adamax case is first."""
    rows = []
    for dtypes in (("float32",) * 2, ("bfloat16",) * 2, ("bfloat16", "float32")):
        rows.append(Case("plain", OPTAX, lambda: optax.adamax(RATE), *dtypes))
        for state in FORMATS if dtypes[0] == "float32" else FEW:
            make = functools.partial(adamax, RATE, **FORMATS[state])
            rows.append(Case("plain", state, make, *dtypes))
    for state in FEW:
        chosen = FORMATS[state]
        make = functools.partial(_compensated, **chosen)
        rows.append(Case("compensation", state, make, "bfloat16", "bfloat16"))
        rows += [
            Case(what, state, functools.partial(make, **chosen)) for what, make in OPTIONS.items()
        ]
    for shape in SHAPES:
        rows.append(Case("shape", OPTAX, lambda: optax.adamax(RATE), shape=shape))
        for state in FEW:
            make = functools.partial(adamax, RATE, **FORMATS[state])
            rows.append(Case("shape", state, make, shape=shape))
    return rows


def compile_case(target: Target, case: Case) -> dict[str, Any]:
    """Compiles a case; returns its row, with the bytes of one pass and the time over the bound."""
    tx = case.make()
    params = jax.ShapeDtypeStruct(case.shape, case.dtype)
    gradient = jax.ShapeDtypeStruct(case.shape, case.grad_dtype)
    state = jax.eval_shape(tx.init, params)

    def step(params: Any, state: Any, gradient: Any) -> Any:
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    report = compilers.compile_step(target, step, (params, state, gradient))
    size = math.prod(case.shape)
    arrays = [x for x in jax.tree.leaves((params, state)) if x.size == size]
    one_pass = 2 * sum(x.dtype.itemsize for x in arrays) + gradient.dtype.itemsize
    cost = compilers.cycles_per_byte(target, size)
    return {
        **case.row(target),
        **dataclasses.asdict(report),
        "bytes_per_parameter": report.bytes / size,
        "bytes_of_one_pass": one_pass,
        "to_bound": report.cycles / (cost * one_pass * size) if report.cycles and cost else None,
    }


def compare(rows: list[dict[str, Any]]) -> None:
    """Adds to each row its ratio to optax.adamax on the same chip, dtypes and shape."""

    def group(row: dict[str, Any]) -> tuple[Any, ...]:
        return row["target"], *row["dtypes"], *row["shape"]

    reference = {group(row): row["cycles"] for row in rows if row["state"] == OPTAX}
    for row in rows:
        optax_cycles = reference.get(group(row))
        row["to_optax"] = row["cycles"] / optax_cycles if row["cycles"] and optax_cycles else None


def row_key(row: dict[str, Any]) -> tuple[Any, ...]:
    """Returns the entries that identify a row."""
    return row["target"], row["what"], row["state"], *row["dtypes"], *row["shape"]


def main() -> None:
    """Compiles the cases of each target; prints each row and writes the JSON after it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = list(dict.fromkeys(case.what for case in cases()))
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--what", nargs="+", choices=names, default=names, metavar="WHAT")
    parser.add_argument("--quick", action="store_true", help="only the storage formats on v5e")
    parser.add_argument("--resume", action="store_true", help="skip cases that have a row")
    arguments = parser.parse_args()
    chosen = compilers.available(["v5e"] if arguments.quick else arguments.targets)
    every = [case for case in cases() if case.what in arguments.what]
    if arguments.quick:
        every = [x for x in every if x.what == "plain"][:10]
    path = reporting.RESULTS / "accelerators.json"
    before: dict[str, Any] = {"rows": []}
    if path.exists():
        before = json.loads(path.read_text("utf-8"))
    rows = {row_key(row): row for row in before["rows"]}
    made = reporting.provenance("benchmarks.accelerators", packages=compilers.installed())
    for target in chosen:
        for case in tqdm(every, desc=f"{target.name}, estimated by the compiler"):
            if arguments.resume and row_key(case.row(target)) in rows:
                continue
            row = compile_case(target, case)
            rows[row_key(row)] = row
            bound = "" if row["to_bound"] is None else f"{row['to_bound']:.2f} of the bound"
            tqdm.write(
                f"{target.name:5}{case.name:75}{row['loops']} loops "
                f"{row['bytes_per_parameter']:5.1f} B {row['temporaries'] / 1e6:6.0f} MB  {bound}"
            )
            if not arguments.quick:
                compare(list(rows.values()))
                reporting.write_json(path, {"provenance": made, "rows": list(rows.values())})


if __name__ == "__main__":
    main()
