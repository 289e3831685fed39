"""Fills in tables and numbers of the documentation from the JSON files in benchmarks/results.

    python -m benchmarks.update_docs [--check]

Tables are between `<!-- table: NAME -->` and `<!-- end -->`; `benchmarks.tables` writes them.
Numbers in sentences are between `<!-- value: NAME -->` and `<!-- end -->`;
`benchmarks.sentence_values` computes them. `benchmarks.accelerators_page` fills in the page on TPU
and GPU.
"""

import argparse
import re
import sys
from pathlib import Path
from typing import Any

from benchmarks import reporting
from benchmarks.sentence_values import fill_values
from benchmarks.tables import FILES, TABLES

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md"]
PAGES += [ROOT / "docs" / f"{name}.md" for name in ("index", "benchmarks", "reliability")]
PAGES += [
    ROOT / "docs" / "guide" / f"{name}.md"
    for name in (
        "bfloat16_parameters",
        "formats",
        "low_precision",
        "nonfinite_and_outliers",
        "when_to_use",
    )
]
COMPUTED = ("bytes_by_part", "state_bytes")  # tables of sizes that follow from shapes and dtypes


def _load(made: dict[str, Any]) -> str:
    """Describes the threads, and the load of the machine before and at the end."""
    if "load" not in made:
        return ", load not recorded"
    before, after = made["load"]["before"][0], made["load"]["after"][0]
    threads = f"{made['threads']} thread{'s' * (made['threads'] > 1)}"
    return f", {threads}, load {before:.1f} before and {after:.1f} at the end"


def filled(text: str) -> str:
    """Returns the page with its numbers, and its tables with a note on how each was measured."""

    def fill(match: re.Match[str]) -> str:
        name = match[1]
        results = reporting.read_json(FILES.get(name, name))
        made = results["provenance"]
        versions = ", ".join(f"{k} {v}" for k, v in made["versions"].items())
        how = "Computed" if name in COMPUTED else "Measured"
        note = f"{how} by `{made['command']}` on {made['machine']}{_load(made)}; {versions}."
        if "one_thread" in results:
            alone = results["one_thread"]["provenance"]
            note += f" One thread: `{alone['command']}` on {alone['machine']}{_load(alone)}."
        table = TABLES[name](results)
        return f"<!-- table: {name} -->\n{table}\n\n<sub>{note}</sub>\n<!-- end -->"

    text = fill_values(text)
    return re.sub(r"<!-- table: (\w+) -->.*?<!-- end -->", fill, text, flags=re.DOTALL)


def main() -> int:
    """Fills in the tables; with --check, only returns 1 if a page differs from the JSON files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    stale = [page for page in PAGES if (text := page.read_text("utf-8")) != filled(text)]
    if check:
        return int(bool(stale))
    for page in stale:
        page.write_text(filled(page.read_text("utf-8")), "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
