"""Each notebook has the cells of its script and was executed; `sync.py --check` verifies it."""

import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import nbformat
import pytest

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"


@pytest.fixture(scope="module")
def sync():
    spec = importlib.util.spec_from_file_location("sync", NOTEBOOKS / "sync.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_notebooks_agree_with_their_scripts(sync):
    notebooks = {path.stem for path in NOTEBOOKS.glob("*.ipynb")}
    assert "quickstart" in notebooks
    assert {script.stem for script in sync.scripts(NOTEBOOKS)} == notebooks
    assert sync.faults(NOTEBOOKS) == []


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text("utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), "utf-8")


def edit_notebook(path: Path, change: Callable[[nbformat.NotebookNode], object]) -> None:
    notebook = nbformat.read(path, as_version=4)
    change(notebook)
    nbformat.write(notebook, path)


def make_raw(notebook: nbformat.NotebookNode) -> None:
    cell = notebook.cells[0]
    notebook.cells[0] = nbformat.v4.new_raw_cell(cell.source, id=cell.id)


DRIFT = {
    "code edited": (
        lambda folder: edit(folder / "quickstart.py", "import jax\n", "import jax  # !\n"),
        "quickstart.ipynb: cell 1 differs from quickstart.py",
    ),
    "text edited": (
        lambda folder: edit(folder / "quickstart.py", "# # Quickstart", "# # Slow start"),
        "quickstart.ipynb: cell 0 differs from quickstart.py",
    ),
    "kind of cell changed": (
        lambda folder: edit_notebook(folder / "quickstart.ipynb", make_raw),
        "quickstart.ipynb: cell 0 differs from quickstart.py",
    ),
    "last cell lost": (
        lambda folder: edit_notebook(folder / "quickstart.ipynb", lambda n: n.cells.pop()),
        "differs from quickstart.py",
    ),
    "not executed": (
        lambda folder: edit_notebook(
            folder / "quickstart.ipynb", lambda n: n.cells[1].update(execution_count=None)
        ),
        "quickstart.ipynb was not executed once from top to bottom",
    ),
    "no notebook": (
        lambda folder: (folder / "quickstart.ipynb").unlink(),
        "quickstart.ipynb does not exist",
    ),
    "no script": (
        lambda folder: (folder / "quickstart.py").unlink(),
        "quickstart.py does not exist",
    ),
}


@pytest.mark.parametrize(("drift", "fault"), DRIFT.values(), ids=DRIFT.keys())
def test_every_difference_is_reported(sync, tmp_path, drift, fault):
    for name in ("quickstart.py", "quickstart.ipynb"):
        shutil.copy(NOTEBOOKS / name, tmp_path)
    assert sync.faults(tmp_path) == []
    drift(tmp_path)
    faults = sync.faults(tmp_path)
    assert len(faults) == 1
    assert fault in faults[0]


def test_check_command_fails_after_an_edit(tmp_path):
    for name in ("sync.py", "quickstart.py", "quickstart.ipynb"):
        shutil.copy(NOTEBOOKS / name, tmp_path)
    command = [sys.executable, str(tmp_path / "sync.py"), "--check"]
    equal = subprocess.run(command, capture_output=True, text=True)
    assert (equal.returncode, equal.stderr) == (0, "")
    edit(tmp_path / "quickstart.py", "BATCH, EPOCHS = 50", "BATCH, EPOCHS = 51")
    drifted = subprocess.run(command, capture_output=True, text=True)
    assert drifted.returncode == 1
    assert "quickstart.ipynb: cell 1" in drifted.stderr
