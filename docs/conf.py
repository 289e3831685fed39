"""Sphinx: `sphinx-build -W --keep-going docs docs/_build/html`."""

import ast
import dataclasses
import inspect
import re
import shutil
import sys
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

project = "optax_adamax"
author = "The optax_adamax authors"
release = version = version_of(project)

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "mathml",
]
exclude_patterns = ["_build"]
default_role = "code"
nitpicky = True
# Names of other packages: looking them up would need the network.
nitpick_ignore_regex = [
    (r"py:\w+", r"(jax|optax)\..*"),
    (r"py:class", r"(np|Any|ArrayLike|ArrayTree|DTypeLike|T)(\..*)?"),
    (r"py:class", r"(AxisName|Entry|EpsPlacement|Exclusion|Groups|Key)"),
    (r"py:class", r"(Layout|Missing|Names|Nonfinite)"),
]

# The notebooks are committed with their outputs.
nb_execution_mode = "off"
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

autodoc_default_options = {"members": True}
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # `sign` writes types
maximum_signature_line_length = 80
napoleon_numpy_docstring = False
napoleon_custom_sections = [("Reference", "References")]

html_theme = "furo"
html_title = f"optax_adamax {release}"
html_static_path = ["_static"]
html_css_files = ["style.css"]
html_search_scorer = str(HERE / "_static" / "scorer.js")
html_show_sphinx = False
html_show_copyright = False
html_copy_source = False
copybutton_prompt_text = r">>> |\.\.\. "
copybutton_prompt_is_regexp = True


def copy_notebooks(app: Sphinx) -> None:
    """Copies the notebooks into the folder of the pages, because Sphinx reads no other."""
    del app
    folder = HERE / "notebooks"
    folder.mkdir(exist_ok=True)
    for notebook in (HERE.parent / "notebooks").glob("*.ipynb"):
        shutil.copy(notebook, folder)


def sign(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, signature: str, returns: str
) -> tuple[str, str] | None:
    """Returns signatures with types and defaults as the source writes them."""
    del app, name, options, signature, returns
    if what == "class":
        return "", ""
    if what != "function":
        return None
    function = ast.parse(inspect.getsource(obj)).body[0]
    assert isinstance(function, ast.FunctionDef) and function.returns is not None
    for node in ast.walk(function):  # types in quotes
        if isinstance(node, ast.arg) and isinstance(node.annotation, ast.Constant):
            node.annotation = ast.parse(str(node.annotation.value), mode="eval").body
    private = re.compile(r"\b_\w+\.")  # modules
    arguments, result = (ast.unparse(node) for node in (function.args, function.returns))
    return f"({private.sub('', arguments)})", private.sub("", result)


def keep_results_whole(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]
) -> None:
    """Gives results an empty type, because napoleon reads the text before a colon as the type."""
    del app, what, name, obj, options
    for i, line in enumerate(lines):
        if line == "Returns:":
            lines[i + 1] = f"  : {lines[i + 1].strip()}"


def comment_on(cls: type, field: str) -> str:
    """Returns the comment after a field of a class, or above it."""
    found = re.search(
        rf"((?:    # .*\n)*)    {field}: .*?(?:  # (?!pyright)(.*))?\n", inspect.getsource(cls)
    )
    assert found, (cls, field)
    above = " ".join(line.strip(" #") for line in found[1].splitlines())
    return (found[2] or above).replace("|", r"\|")


def describe(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Describes the fields of NamedTuples and dataclasses by their comments."""
    del app, options
    if what == "class" and dataclasses.is_dataclass(obj):
        for field in dataclasses.fields(obj):
            if not field.name.startswith("_") and (comment := comment_on(obj, field.name)):
                lines += ["", f".. attribute:: {field.name}", "", f"   {comment}"]
    elif what == "attribute" and lines[0].startswith("Alias for field number"):
        module, of, field = name.rsplit(".", 2)
        comment = comment_on(getattr(sys.modules[module], of), field)
        assert comment, name
        lines[:] = [comment]


def setup(app: Sphinx) -> None:
    app.connect("builder-inited", copy_notebooks)
    app.connect("autodoc-process-signature", sign)
    app.connect("autodoc-process-docstring", keep_results_whole, priority=400)  # napoleon: 500
    app.connect("autodoc-process-docstring", describe)
