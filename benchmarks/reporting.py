"""Records the machine, the versions and the command with each result, and writes JSON."""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

LINUX = hasattr(os, "sched_getaffinity")
ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
FIGURES = ROOT / "benchmarks" / "figures"
STYLE = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}  # of figures
LOAD_BEFORE = os.getloadavg()  # a benchmark imports this before it measures
PACKAGES = ("jax", "jaxlib", "numpy", "optax", "optax_adamax")


def provenance(
    module: str,
    *,
    dtype: str = "float32",
    seeds: Sequence[int] = (),
    packages: Sequence[str] = (),
) -> dict[str, Any]:
    """Returns command, commit, machine and versions of a run of `module`.

    `packages` are packages whose versions are recorded in addition to `PACKAGES`.
    """
    return {
        "command": " ".join(["python", "-m", module, *sys.argv[1:]]),
        "commit": _commit(),
        "machine": f"{_processor()}, {os.cpu_count()} cores",
        "threads": len(os.sched_getaffinity(0)) if LINUX else os.cpu_count(),
        "load": {"before": LOAD_BEFORE, "after": os.getloadavg()},  # means over 1, 5, 15 minutes
        "device": jax.devices()[0].device_kind,
        "versions": {"python": platform.python_version()}
        | {package: version(package) for package in (*PACKAGES, *packages)},
        "dtype": dtype,
        "seeds": list(seeds),
    }


def write_json(path: Path, results: dict[str, Any]) -> None:
    """Writes `results` as JSON and creates the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=2) + "\n", "utf-8")


def read_json(name: str) -> dict[str, Any]:
    """Reads results/NAME.json."""
    return json.loads((RESULTS / f"{name}.json").read_text("utf-8"))


def _commit() -> str:
    """Returns the commit of this tree, with "-dirty" if a tracked file except results differs."""
    try:
        commit = _git("rev-parse", "HEAD")
        results = (f":(exclude){folder}" for folder in (RESULTS, FIGURES))
        changed = _git("status", "--porcelain", "--untracked-files=no", "--", ".", *results)
    except FileNotFoundError:
        return "unknown"
    return (commit + "-dirty" * bool(changed)) or "unknown"


def _git(*arguments: str) -> str:
    """Returns what git prints; nothing if this tree is not a repository."""
    command = ["git", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
