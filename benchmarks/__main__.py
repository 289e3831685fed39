"""Runs the named benchmarks, or all except the long ones.

    python -m benchmarks [NAME ...] [--quick]

Each prints its table, writes benchmarks/results/NAME.json and draws its figure into
benchmarks/figures. `--quick` runs the code on small sizes in a minute or two and writes nothing. It
skips dtypes and state_bytes, which have one size only.
The default set needs about ten minutes on two CPU cores, with the extras `peers` and `benchmarks`
installed. The long benchmarks run only if they are named: quality, learning_rate, compensation and
reliability. So do model_size, accelerators, accelerators_leaves and accelerators_chips, which need
the extra `tpu`.
Afterwards, `python -m benchmarks.update_docs` writes the results into the documentation. For
benchmarks with the extra `tpu`, `python -m benchmarks.accelerators_page` does.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from tqdm import tqdm

SHORT = (
    "dtypes",
    "readme_figure",
    "update_error",
    "peers",
    "scaling",
    "packing",
    "low_bit",
    "overhead",
    "state_bytes",
    "gpu",
    "deep_vaes",
)
NO_QUICK = ("dtypes", "state_bytes")
LONG = ("quality", "learning_rate", "compensation", "reliability", "model_size")
LONG += ("accelerators", "accelerators_leaves", "accelerators_chips")
ROOT = Path(__file__).parent.parent


def main() -> int:
    """Runs each benchmark in a new process; returns 1 if any of them failed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", choices=[*SHORT, *LONG, []], metavar="NAME")
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    names = arguments.names or SHORT
    if arguments.quick:
        names = [name for name in names if name not in NO_QUICK]
    failed = []
    for name in tqdm(names, desc="benchmarks"):
        tqdm.write(f"\n== {name}")
        command = [sys.executable, "-m", f"benchmarks.{name}", *["--quick"] * arguments.quick]
        if subprocess.run(command, cwd=ROOT).returncode:
            failed.append(name)
    if failed:
        print(f"\nFailed: {', '.join(failed)}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
