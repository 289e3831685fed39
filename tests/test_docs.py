"""The reference describes every public name, and code on the pages prints the stated output."""

import contextlib
import importlib
import inspect
import io
import re
import signal
import subprocess
import sys
import textwrap
import tomllib
import types
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(path for path in DOCS.rglob("*.md") if "_build" not in path.parts)
# Slow tests, because these pages train networks. Other tests cover the functions they use.
MODULES = [
    "optax_adamax",
    "optax_adamax.sharding",
    *(f"optax_adamax.compat.{name}" for name in ("keras", "lucid", "mlx", "optax", "torch")),
]


def public(module: types.ModuleType) -> dict[str, object]:
    """Returns the public names of a module: `__all__`, or else the names that it defines."""
    names = getattr(module, "__all__", None)
    if names is None:
        made_here = (
            n for n, x in vars(module).items() if getattr(x, "__module__", "") == module.__name__
        )
        names = [n for n in made_here if not n.startswith("_")]
    return {name: getattr(module, name) for name in names}


def documented() -> list[object]:
    """Returns the objects that the reference pages describe."""
    found, module = [], None
    for page in sorted((DOCS / "reference").glob("*.md")):
        for directive, name in re.findall(r"^\.\. (\w+):: (\S+)$", page.read_text("utf-8"), re.M):
            if directive in ("module", "currentmodule"):
                module = importlib.import_module(name)
            else:
                assert directive in ("autofunction", "autoclass"), (page, directive)
                found.append(getattr(module, name))
    return found


def test_every_public_name_is_described_once():
    wanted = {
        id(x): f"{m}.{n}" for m in MODULES for n, x in public(importlib.import_module(m)).items()
    }
    described = [id(x) for x in documented()]
    assert {name for key, name in wanted.items() if key not in described} == set()
    assert len(described) == len(set(described)) and set(described) <= set(wanted)


def test_every_module_is_in_the_list():
    package = Path(importlib.import_module("optax_adamax").__file__).parent
    compat = {f"optax_adamax.compat.{p.stem}" for p in package.glob("compat/[a-z]*")}
    assert {"optax_adamax", "optax_adamax.sharding"} | compat == set(MODULES)


def test_every_public_function_says_what_goes_in_and_out():
    for function in filter(inspect.isfunction, documented()):
        parts = r"^ *Args:$.*^ *Returns:$|^ *As :func:"
        assert re.search(parts, function.__doc__ or "", re.M | re.S), function


def program(text: str) -> str:
    """Returns the code of all blocks of a page."""
    blocks = re.findall(r"^ *```python\n.*?^ *```", text, re.M | re.S)
    return "\n".join(textwrap.dedent(block).split("\n", 1)[1].rstrip("`") for block in blocks)


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(DOCS).as_posix())
def test_code_of_a_page_runs_and_prints_what_it_says(page):
    """The blocks of a page are one program."""
    code = program(page.read_text("utf-8"))
    said = re.findall(r"^ *print\(.*\)  # (.*)$", code, re.M)
    printed = io.StringIO()
    with (
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
        contextlib.redirect_stdout(printed),
    ):
        exec(compile(code, page.name, "exec"), {})
    assert printed.getvalue().splitlines() == said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("heading", "make_run", "step"),
    [
        ("Plain JAX", "make_run", "step"),
        ("Flax nnx", "make_nnx_run", "nnx_step"),
        ("Flax linen", "make_linen_run", "linen_step"),
        ("Equinox", "make_equinox_run", "equinox_step"),
    ],
)
def test_recipe_resumes_after_sigkill_with_the_same_bits(tmp_path, heading, make_run, step):
    page = (DOCS / "guide" / "recipes.md").read_text("utf-8")
    shared, *sections = re.split(r"^###? ", page, flags=re.M)
    (section,) = [text for text in sections if text.startswith(f"{heading}\n")]
    shared += next(text for text in sections if text.startswith("Complete training programs"))
    code = program(f"{shared}\n{section}").rpartition("print(")[0]
    code += f"folder, make_run, step = Path({str(tmp_path)!r}), {make_run}, {step}\n"
    killed = """
import os, signal
def killed_step(run, x, y):
    if bool((x == make_batch(100)[0]).all()):
        os.kill(os.getpid(), signal.SIGKILL)
    return step(run, x, y)
train(killed_step, make_run(), folder / "killed")
"""
    resumed = """
runs = [train(step, make_run(), folder / name)[0] for name in ("killed", "undisturbed")]
print(jax.tree.all(jax.tree.map(lambda x, y: bool((x == y).all()), *runs)))
"""
    found = subprocess.run([sys.executable, "-c", code + killed], capture_output=True, text=True)
    assert found.returncode == -signal.SIGKILL, found.stderr
    assert (tmp_path / "killed" / "40").exists()
    found = subprocess.run([sys.executable, "-c", code + resumed], capture_output=True, text=True)
    assert found.stdout == "True\n", found.stderr


@pytest.mark.parametrize(
    "query", ["ema", "gradient accumulation", "clip", "bfloat16 parameters", "resume"]
)
def test_search_finds_a_heading_of_the_recipes(query):
    """docs/_static/scorer.js puts recipes first if a heading contains the query."""
    page = (DOCS / "guide" / "recipes.md").read_text("utf-8")
    headings = [title.lower().split() for title in re.findall(r"^## (.*)$", page, re.M)]
    assert any(set(query.split()) <= set(title) for title in headings)


def test_links_between_pages_have_targets():
    for page in PAGES:
        for path in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text("utf-8")):
            target = (page.parent / path).resolve()
            if target.is_relative_to(DOCS / "notebooks"):  # the build copies notebooks there
                target = ROOT / target.relative_to(DOCS)
            assert target.exists(), (page, path)


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]


def test_the_version_is_the_same_everywhere():
    version = re.escape(project()["version"])
    assert re.search(rf"^version: {version}$", (ROOT / "CITATION.cff").read_text("utf-8"), re.M)
    changes = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.M)
    assert re.fullmatch(version, changes[0])


def test_oldest_versions_agree_with_the_table():
    oldest = dict(bound.split(">=") for bound in project()["dependencies"])
    table = (DOCS / "guide" / "compatibility.md").read_text("utf-8")
    assert re.search(rf"^\| 3\.11 \| {oldest['jax']} \| {oldest['optax']} \|", table, re.M)
