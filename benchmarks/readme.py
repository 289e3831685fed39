"""Writes the tables of README.md from the JSON files beside this one.

python -m benchmarks.readme [--check]
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
Row = Iterable[object]


def table(header: Row, rows: Iterable[Row]) -> str:
    """A table in Markdown."""
    lines = [list(header), ["---"] * len(list(header)), *map(list, rows)]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def dtypes(results: dict[str, Any]) -> str:
    """v and the parameter in every dtype, a row a dtype."""
    who = {"ours": "optax_adamax", "optax": "optax", "torch": "PyTorch"}
    cells = {(row["dtype"], row["who"]): row for row in results["rows"]}
    rows = []
    for dtype in dict.fromkeys(row["dtype"] for row in results["rows"]):
        found = [cells[dtype, name] for name in who]
        v = [f"{row['v']:.4f}" for row in found]
        kept = ["NaN" if row["parameter"] != row["parameter"] else "kept" for row in found]
        rows.append([dtype, *v, *kept])
    header = ["parameters", *(f"v, {x}" for x in who.values())]
    return table([*header, *(f"g = 0, {x}" for x in who.values())], rows)


def low_bit(results: dict[str, Any]) -> str:
    """Bytes and step time of every format."""
    rows = []
    for name, row in results["rows"].items():
        low, high = row["ratio_quartiles"]
        time = f"{row['ratio']:.2f} ({low:.2f} to {high:.2f})"
        rows.append([name, row["state_bytes"], time, row["passes"]])
    return table(["m, v", "bytes a parameter", "step time", "passes over memory"], rows)


def quality(results: dict[str, Any]) -> str:
    """Final held-out losses: each format's paired gap to float32 state, in deviations of it."""
    shown = ["optax.adamax, float32", "4 bytes: bfloat16, bfloat16", "2 bytes: int8, uint8"]
    shown += ["naive bfloat16"]
    rows = []
    for name, task in results["tasks"].items():
        found = task["held_out_loss"]
        deviation = found["float32_deviation"]
        gaps = [f"{found['gap'][x] / deviation:+.2f}" for x in shown]
        rows.append([name, f"{found['float32_mean']:.4f}", f"{deviation:.4f}", *gaps])
    return table(["task", "float32 loss", "deviation", *shown], rows)


def state_bytes(results: dict[str, Any]) -> str:
    """Gigabytes of state a device, like the parameters and with ZeRO-1."""
    rows: dict[tuple[str, int], list[str]] = {}
    formats = list(dict.fromkeys(row["format"] for row in results["rows"]))
    for row in results["rows"]:
        sizes = f"{row['like_parameters'] / 1e9:.3g} → {row['zero'] / 1e9:.3g}"
        rows.setdefault((row["model"], row["devices"]), []).append(sizes)
    return table(["model", "devices", *formats], [[*key, *cells] for key, cells in rows.items()])


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "dtypes": dtypes,
    "low_bit": low_bit,
    "quality": quality,
    "state_bytes": state_bytes,
}


def filled(text: str) -> str:
    """The README with each table, and below it how it was measured."""

    def fill(match: re.Match[str]) -> str:
        name = match[1]
        results = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())
        made = results["provenance"]
        versions = ", ".join(f"{k} {v}" for k, v in made["versions"].items())
        note = f"<sub>`{made['command']}` on {made['machine']}; {versions}.</sub>"
        return f"<!-- table: {name} -->\n{TABLES[name](results)}\n\n{note}\n<!-- end -->"

    return re.sub(r"<!-- table: (\w+) -->.*?<!-- end -->", fill, text, flags=re.DOTALL)


def main() -> int:
    """Fills the tables in, or only says whether they are as the JSON files have them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    text = README.read_text("utf-8")
    if parser.parse_args().check:
        return int(text != filled(text))
    README.write_text(filled(text), "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
