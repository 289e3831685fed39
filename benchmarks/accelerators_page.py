"""Writes tables and numbers of docs/guide/accelerators.md and draws figures/accelerators.png.

python -m benchmarks.accelerators_page [--check]
"""

import argparse
import json
import re
import sys
from collections.abc import Callable
from typing import Any

from benchmarks import reporting
from benchmarks.compilers import TARGETS
from benchmarks.sentence_values import fill_values
from benchmarks.tables import table
from benchmarks.update_docs import ROOT

PAGE = ROOT / "docs" / "guide" / "accelerators.md"
BYTES = {"float32, float32": "8", "bfloat16, bfloat16": "4", "int8, uint8": "2"}
Rows = list[dict[str, Any]]


def _targets(rows: Rows) -> list[str]:
    return [name for name in TARGETS if any(row["target"] == name for row in rows)]


def _text(row: dict[str, Any] | None, against: str) -> str:
    """Formats a ratio of cycles; without an estimate of cycles, formats kernels and bytes."""
    if row is None:
        return ""
    if row[against] is None:
        kernels = "" if row["loops"] == 1 else f"{row['loops']} x, "
        return f"{kernels}{row['bytes_per_parameter']:.0f} B"
    # Small arrays are copied to on-chip memory first, so no loop accesses main memory.
    loops = "" if row["loops"] <= 1 else f", {row['loops']} loops"
    return f"{row[against]:.2f}{loops}"


def _by_bytes(rows: Rows, name: Callable[[dict[str, Any]], str], first: str) -> str:
    """Writes a table with one row per name and storage format, and one column per chip."""
    found = {(name(row), row["state"], row["target"]): row for row in rows}
    chips = _targets(rows)
    lines = [
        [
            label,
            BYTES[state],
            *(_text(found.get((label, state, chip)), "to_bound") for chip in chips),
        ]
        for label in dict.fromkeys(map(name, rows))
        for state in BYTES
    ]
    return table([first, "bytes of state", *chips], lines)


def accelerators(results: dict[str, Any]) -> str:
    """Writes the cycles of each storage format relative to optax.adamax, one column per chip."""
    rows = [x for x in results["rows"] if x["what"] == "plain" and x["dtypes"] == ["float32"] * 2]
    found = {(row["state"], row["target"]): row for row in rows}
    lines = []
    for state in dict.fromkeys(row["state"] for row in rows):
        bound = next(x["bytes_of_one_pass"] for x in rows if x["state"] == state)
        cells = [_text(found.get((state, target)), "to_optax") for target in _targets(rows)]
        lines.append([state, bound, f"{bound / 28:.2f}", *cells])
    return table(["m, v", "bytes of a step", "bound", *_targets(rows)], lines)


def accelerators_options(results: dict[str, Any]) -> str:
    """Writes the cycles of steps with options, relative to a memory-bound loop."""
    rows = [row for row in results["rows"] if row["what"] not in ("plain", "shape")]
    return _by_bytes(rows, lambda row: row["what"], "")


def accelerators_bfloat16(results: dict[str, Any]) -> str:
    """Writes the cycles for bfloat16 parameters, relative to a memory-bound loop."""
    rows = [x for x in results["rows"] if x["what"] == "plain" and x["dtypes"][0] == "bfloat16"]
    found = {(*row["dtypes"], row["state"], row["target"]): row for row in rows}
    lines = [
        [
            dtype,
            state,
            *(_text(found.get((*name, chip)), "to_bound") for chip in _targets(rows)),
        ]
        for name in dict.fromkeys(key[:3] for key in found)
        for dtype, state in [name[1:]]
    ]
    return table(["gradients", "m, v", *_targets(rows)], lines)


def accelerators_shapes(results: dict[str, Any]) -> str:
    """Writes the cycles for several shapes of a leaf, relative to a memory-bound loop."""
    rows = [row for row in results["rows"] if row["what"] == "shape" and row["state"] in BYTES]
    return _by_bytes(rows, lambda row: str(tuple(row["shape"])), "shape")


def accelerators_leaves(results: dict[str, Any]) -> str:
    """Writes compile times, kernels and padding for many leaves."""
    lines = [
        [
            row["target"],
            row["model"],
            row["what"],
            row["kernels"],
            f"{row['seconds']:.1f} ({row['to_optax']:.1f})",
            f"{row['state_bytes'] / row['state_bytes_of_elements']:.2f}",
        ]
        for row in results["rows"]
    ]
    header = ["chip", "leaves", "", "loops", "processor seconds of compilation (relative to optax)"]
    return table([*header, "bytes of the state, relative to its elements"], lines)


def model_size(results: dict[str, Any]) -> str:
    """Writes the largest model and the total bytes per parameter of each configuration."""
    lines = [
        [
            row["way"],
            f"{row['parameters'] / 1e9:.2f}",
            row["layers"],
            f"{row['bytes'] / row['parameters']:.1f}",
        ]
        for row in results["rows"]
    ]
    header = ["parameters and state", "largest model, billions", "layers"]
    return table([*header, "bytes per parameter, all included"], lines)


def model_layers(results: dict[str, Any]) -> str:
    """Writes the largest model and the bytes per added parameter, for stacked and listed layers."""

    def text(row: dict[str, Any]) -> list[str]:
        return [f"{row['parameters'] / 1e9:.2f}", f"{row['bytes_per_added_parameter']:.1f}"]

    lines = [
        [row["way"], *text(row), *text(row["unrolled"])]
        for row in results["rows"]
        if "unrolled" in row
    ]
    header = [f"{what}, {how}" for how in ("stacked", "a list") for what in ("largest", "bytes")]
    return table(["parameters and state", *header], lines)


def accelerators_chips(results: dict[str, Any]) -> str:
    """Writes collectives, cycles and bytes of the sharded steps."""
    lines = []
    for row in results["rows"]:
        kinds = [
            f"{x['count']} {kind}, {x['bytes'] / 1e6:.3g} MB"
            for kind, x in row["collectives"].items()
        ]
        state = f"{row['state_bytes'] / 1e6:.2f} ({row['state_bytes_predicted'] / 1e6:.2f})"
        temporaries = f"{row['temporaries'] / 1e6:.0f}"
        lines.append(
            [
                row["chips"],
                row["what"],
                "; ".join(kinds) or "none",
                "no estimate" if row["cycles"] is None else f"{row['cycles'] / 1e6:.2f}",
                temporaries,
                state,
            ]
        )
    header = ["chips", "", "collectives", "million cycles", "MB of temporaries"]
    return table([*header, "MB of state (by shapes)"], lines)


# The results file and the function for each table of the page.
TABLES: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "accelerators": ("accelerators", accelerators),
    "accelerators_options": ("accelerators", accelerators_options),
    "accelerators_bfloat16": ("accelerators", accelerators_bfloat16),
    "accelerators_leaves": ("accelerators_leaves", accelerators_leaves),
    "accelerators_shapes": ("accelerators", accelerators_shapes),
    "accelerators_chips": ("accelerators_chips", accelerators_chips),
    "model_size": ("model_size", model_size),
    "model_layers": ("model_size", model_layers),
}


def filled(text: str) -> str:
    """Fills in the numbers, and the tables for which results exist, each with its provenance."""

    def fill(match: re.Match[str]) -> str:
        file, write = TABLES[match[1]]
        path = reporting.RESULTS / f"{file}.json"
        if not path.exists():
            return match[0]
        results = json.loads(path.read_text("utf-8"))
        made = results["provenance"]
        versions = ", ".join(f"{k} {v}" for k, v in made["versions"].items())
        measured = [x for row in results["rows"] for x in (row, row.get("unrolled", row))]
        commits = dict.fromkeys(x.get("commit", made["commit"])[:8] for x in measured)
        note = f"<sub>Estimated by the compiler, `python -m benchmarks.{file}`, commit "
        note += f"{', '.join(commits)}; {versions}.</sub>"
        return f"<!-- table: {match[1]} -->\n{write(results)}\n\n{note}\n<!-- end -->"

    text = fill_values(text)
    return re.sub(r"<!-- table: (\w+) -->.*?<!-- end -->", fill, text, flags=re.DOTALL)


def draw(rows: Rows) -> None:
    """Draws the cycles of each storage format and its memory bound, one panel per chip."""
    import matplotlib.pyplot as plt

    plt.rcParams.update(reporting.STYLE)
    rows = [x for x in rows if x["what"] == "plain" and x["dtypes"] == ["float32"] * 2]
    targets = [x for x in _targets(rows) if any(r["to_optax"] for r in rows if r["target"] == x)]
    lines = -(-len(targets) // 2)
    figure, panels = plt.subplots(
        lines, 2, sharex=True, sharey=True, squeeze=False, figsize=(8, 0.5 + 2.8 * lines),
        layout="constrained", dpi=110,
    )  # fmt: skip
    for panel, target in zip(panels.flat, targets, strict=False):
        shown = [row for row in rows if row["target"] == target]
        names = [row["state"] for row in shown]
        colors = ["#5B6770" if name.startswith("optax") else "#0072B2" for name in names]
        panel.barh(names, [row["to_optax"] for row in shown], color=colors)
        bounds = [row["bytes_of_one_pass"] / 28 for row in shown]
        panel.plot(bounds, names, "|", color="#D55E00", markersize=14, markeredgewidth=2)
        panel.set_title(f"TPU {target}".replace(" 7x", "7x"), loc="left")
    panels[0, 0].invert_yaxis()
    figure.suptitle(
        "Cycles of a step relative to optax.adamax, estimated by the compiler (|: memory bound)",
        x=0.01, ha="left", fontsize=11,
    )  # fmt: skip
    figure.savefig(reporting.FIGURES / "accelerators.png")


def main() -> int:
    """Writes the tables and the figure; with --check, only compares the page with the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    text = PAGE.read_text("utf-8")
    if parser.parse_args().check:
        return int(text != filled(text))
    PAGE.write_text(filled(text), "utf-8")
    draw(json.loads((reporting.RESULTS / "accelerators.json").read_text("utf-8"))["rows"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
