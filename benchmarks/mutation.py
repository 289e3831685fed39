"""Breaks the package in one place at a time and checks that a test fails.

    python -m benchmarks.mutation [--only TABLE] [--check]

Reads the mutants from benchmarks/mutants/*.toml. Each mutant replaces one text in one file of a
copy of this tree. First its named tests run on the copy, up to the first failure. If they pass, the
default test suite runs. A mutant that passes it too survives. The exit status is 1 if a mutant
survives, or if a text is not found exactly once in its file.

`--only` runs one table and writes no JSON. `--check` only looks for the texts. The whole table
takes about twenty minutes on two cores.
"""

import argparse
import collections
import contextlib
import dataclasses
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks import reporting

ROOT = Path(__file__).parent.parent
TABLES = Path(__file__).parent / "mutants"
NOT_COPIED = (".git", ".*cache", ".hypothesis", ".venv*", "venv", "__pycache__", "build", "dist")
# This test fails for every mutant, because the text of the mutant is gone.
CHECK = "tests/test_mutation.py::test_texts_of_mutants_are_found"
WORKERS = 2
SECONDS = 1800  # a test run that takes longer counts as failed
# Exit statuses of pytest. The status is 2 if a test module cannot be imported.
PASSED, FAILED = 0, (1, 2)


@dataclasses.dataclass(frozen=True, eq=False)
class Mutant:
    """A row of a table."""

    table: str
    file: str
    text: str
    replacement: str
    tests: list[str]  # arguments of pytest, of which one must fail
    why: str  # what a user would see
    within: str = ""  # the text is looked for from here to the end of the definition
    equivalent: str = ""  # why no user can see a difference; such a mutant is not run

    @property
    def module(self) -> str:
        """The broken file, without the package's name."""
        return self.file.removeprefix("optax_adamax/").removesuffix(".py")

    def split(self, source: str) -> tuple[str, str, str]:
        """The part of a file in which the text is looked for, between what is before and after."""
        if not self.within:
            return "", source, ""
        before, start, rest = source.partition(self.within)
        definition, end, after = rest.partition("\n\n\n")
        return before, start + definition, end + after

    def __str__(self) -> str:
        return f"{self.table}.toml: {self.why} ({self.file})"


def read(tables: Path, only: str | None = None) -> list[Mutant]:
    """The mutants of all tables, or of one. Values above the rows hold for all rows of a table."""
    mutants = []
    for path in sorted(tables.glob("*.toml")):
        if only in (None, path.stem):
            shared = tomllib.loads(path.read_text("utf-8"))
            rows = shared.pop("mutants")
            mutants += [Mutant(table=path.stem, **(shared | row)) for row in rows]
    return mutants


def problems(mutants: list[Mutant], root: Path) -> list[str]:
    """The mutants whose text is not found exactly once."""
    found = []
    for mutant in mutants:
        path = root / mutant.file
        source = path.read_text("utf-8") if path.exists() else ""
        times = mutant.split(source)[1].count(mutant.text)
        if times != 1:
            found.append(f"{mutant}: the text is found {times} times: {mutant.text!r}")
        elif mutant.text == mutant.replacement:
            found.append(f"{mutant}: the replacement is the text itself")
    return found


class Copy:
    """A copy of the tree in which tests run."""

    def __init__(self, source: Path, root: Path):
        self.root = root
        shutil.copytree(source, root, ignore=shutil.ignore_patterns(*NOT_COPIED))
        code = "import optax_adamax; print(optax_adamax.__file__)"
        imported = Path(self._python("-c", code).stdout.strip())
        if root.resolve() not in imported.resolve().parents:
            raise RuntimeError(f"The tests would import {imported}, which is not in {root}.")

    @contextlib.contextmanager
    def broken(self, mutant: Mutant) -> Generator[None]:
        """Applies the mutant for a while."""
        path = self.root / mutant.file
        original = path.read_text("utf-8")
        before, part, after = mutant.split(original)
        path.write_text(before + part.replace(mutant.text, mutant.replacement) + after, "utf-8")
        try:
            yield
        finally:
            path.write_text(original, "utf-8")

    def failing_test(self, tests: list[str], processes: int = 0) -> str | None:
        """The first test that fails; None if all pass.

        Raises:
          RuntimeError: pytest could not run the tests.
        """
        arguments = ("-x", "-q", "-p", "no:cacheprovider", "-n", str(processes))
        try:
            run = self._python("-m", "pytest", *arguments, "--deselect", CHECK, *tests)
        except subprocess.TimeoutExpired:
            return "timeout"
        if run.returncode not in (PASSED, *FAILED):
            output = (run.stdout + run.stderr)[-2000:]
            raise RuntimeError(f"pytest ended with status {run.returncode}: {output}")
        if run.returncode == PASSED:
            return None
        lines = [x for x in run.stdout.splitlines() if x.startswith(("FAILED ", "ERROR "))]
        return lines[0].split(" - ")[0].split(" ", 1)[1]

    def _python(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {"PYTHONPATH": str(self.root)}
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=self.root,
            env=environment,
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )


def outcome(mutant: Mutant, copies: "queue.Queue[Copy]") -> tuple[str, str]:
    """`caught`, `caught elsewhere`, `survived` or `error`, and the failing test or the error."""
    copy = copies.get()
    try:
        with copy.broken(mutant):
            if failing := copy.failing_test(mutant.tests):
                return "caught", failing
            tqdm.write(f"passes its tests, runs all: {mutant}")
            if failing := copy.failing_test([]):
                return "caught elsewhere", failing
            return "survived", ""
    except RuntimeError as error:
        return "error", str(error)
    finally:
        copies.put(copy)


def run(mutants: list[Mutant], root: Path) -> dict[Mutant, tuple[str, str]]:
    """The outcome of each mutant that is not equivalent.

    Raises:
      RuntimeError: a named test is missing, or fails without a mutant.
    """
    real = [mutant for mutant in mutants if not mutant.equivalent]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(WORKERS) as pool:
        copies: queue.Queue[Copy] = queue.Queue()
        for index in range(WORKERS):
            copies.put(Copy(root, Path(folder) / str(index)))
        tests = sorted({test for mutant in real for test in mutant.tests})
        if failing := copies.queue[0].failing_test(tests, WORKERS):
            raise RuntimeError(f"{failing} fails without a mutant.")
        jobs = {pool.submit(outcome, mutant, copies): mutant for mutant in real}
        found = {}
        for job in tqdm(as_completed(jobs), total=len(jobs), desc="mutants", unit="mutant"):
            found[jobs[job]] = job.result()
            kind, detail = job.result()
            if kind != "caught":
                tqdm.write(f"{kind}: {jobs[job]} {detail}")
    return {mutant: found[mutant] for mutant in real}


def summary(mutants: list[Mutant], outcomes: dict[Mutant, tuple[str, str]]) -> dict[str, Any]:
    """Counts for each module, and the rows that a reader has to look at."""
    counts: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    kinds = {m: "equivalent" if m.equivalent else outcomes[m][0] for m in mutants}
    for mutant, kind in kinds.items():
        counts[mutant.module][kind] += 1

    def rows(kind: str) -> list[dict[str, str]]:
        named = ("file", "text", "replacement", "why", "equivalent")
        chosen = [mutant for mutant in mutants if kinds[mutant] == kind]
        return [{name: getattr(m, name) for name in named if getattr(m, name)} for m in chosen]

    return {
        "total": dict(collections.Counter(kinds.values())),
        "modules": {module: dict(count) for module, count in sorted(counts.items())},
        "survived": rows("survived"),
        "equivalent": rows("equivalent"),
    }


def main() -> int:
    """Runs the mutants; the exit status says whether every row is caught or equivalent."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    tables = sorted(path.stem for path in TABLES.glob("*.toml"))
    parser.add_argument("--only", choices=tables, metavar="TABLE", help=", ".join(tables))
    parser.add_argument("--check", action="store_true", help="only look for the texts")
    arguments = parser.parse_args()
    mutants = read(TABLES, arguments.only)
    if wrong := problems(mutants, ROOT):
        print("\n".join(wrong), file=sys.stderr)
        return 1
    if arguments.check:
        print(f"The texts of {len(mutants)} mutants are found.")
        return 0
    results = summary(mutants, run(mutants, ROOT))
    for module, counts in results["modules"].items():
        print(f"{module:28}", ", ".join(f"{n} {kind}" for kind, n in counts.items()))
    print("total", results["total"])
    if arguments.only is None:
        provenance = reporting.provenance("benchmarks.mutation")
        path = reporting.RESULTS / "mutation.json"
        reporting.write_json(path, {"provenance": provenance} | results)
    return int(not results["total"].keys() <= {"caught", "caught elsewhere", "equivalent"})


if __name__ == "__main__":
    sys.exit(main())
