"""Generates each notebook from the script with the same name, and checks that they agree.

Edit the script, which is in percent format; the notebook has its text and the outputs of a run.

  python notebooks/sync.py --check              fails if a notebook differs from its script
  python notebooks/sync.py --execute            generates and runs all notebooks
  python notebooks/sync.py --execute quickstart generates and runs one notebook
"""

import argparse
import itertools
import os
import sys
from pathlib import Path

import jupytext
import nbformat

FOLDER = Path(__file__).resolve().parent
KERNEL = {"name": "python3", "display_name": "Python 3", "language": "python"}


def scripts(folder: Path) -> list[Path]:
    """Returns the scripts in percent format."""
    return [p for p in sorted(folder.glob("*.py")) if p.read_text("utf-8").startswith("# %%")]


def read_script(script: Path) -> nbformat.NotebookNode:
    """Returns the notebook of a script, without outputs."""
    notebook = jupytext.reads(script.read_text("utf-8"), fmt="py:percent")
    notebook.metadata = nbformat.NotebookNode(kernelspec=KERNEL)
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"  # jupytext sets a random id
        cell.metadata.pop("lines_to_next_cell", None)
    return notebook


def faults(folder: Path) -> list[str]:
    """Returns a message for each difference between the notebooks and scripts of a folder."""
    names = {path.stem for path in [*scripts(folder), *folder.glob("*.ipynb")]}
    return [fault for name in sorted(names) for fault in notebook_faults(folder / name)]


def notebook_faults(stem: Path) -> list[str]:
    """Returns the messages for the notebook `stem`.ipynb."""
    script, path = stem.with_suffix(".py"), stem.with_suffix(".ipynb")
    missing = [f"{p.name} does not exist" for p in (script, path) if not p.exists()]
    if missing:
        return missing
    notebook = nbformat.read(path, as_version=4)
    wanted, present = (
        [(cell.cell_type, cell.source) for cell in n.cells] for n in (read_script(script), notebook)
    )
    found = [
        f"{path.name}: cell {number} differs from {script.name}"
        for number, (one, other) in enumerate(itertools.zip_longest(wanted, present))
        if one != other
    ]
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    if [cell.execution_count for cell in code] != list(range(1, len(code) + 1)):
        found.append(f"{path.name} was not executed once from top to bottom")
    return found


def execute(script: Path) -> None:
    """Writes the notebook of a script, with the outputs of a run in the script's folder.

    Raises:
      RuntimeError: a cell wrote to stderr, so readers would see a warning.
    """
    from nbclient import NotebookClient

    environment = os.environ | {"TQDM_DISABLE": "1"}  # a notebook stores no progress bars
    notebook = read_script(script)
    resources = {"metadata": {"path": str(script.parent)}}
    NotebookClient(notebook, record_timing=False, resources=resources).execute(env=environment)
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            if output.get("name") == "stderr":
                raise RuntimeError(f"A cell of {script.name} wrote to stderr: {output.text}")
    notebook.metadata.language_info.pop("version")
    nbformat.write(notebook, script.with_suffix(".ipynb"))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--check", action="store_true")
    action.add_argument("--execute", nargs="*", metavar="name")
    arguments = parser.parse_args()
    if not arguments.check:
        known = {script.stem: script for script in scripts(FOLDER)}
        if unknown := set(arguments.execute) - set(known):
            parser.error(f"unknown notebook {', '.join(unknown)}; choose from {', '.join(known)}")
        for name in arguments.execute or known:
            execute(known[name])
    found = faults(FOLDER)
    for fault in found:
        print(fault, file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
