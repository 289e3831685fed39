"""Attributes, `dir`, `help` and pasted docstring examples work in an interactive session."""

import ast
import builtins
import doctest
import importlib
import pkgutil
import pydoc
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest

import optax_adamax
from optax_adamax import compat, sharding

PACKAGES = {
    optax_adamax: {"compat", "sharding"},
    compat: {"keras", "lucid", "mlx", "optax", "torch"},
    sharding: set(),
}
ROOT = Path(optax_adamax.__file__).parents[1]


def in_a_new_process(program):
    """Runs a program in a new process, without earlier imports."""
    run = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); {program}"]
    subprocess.run(run, check=True, timeout=120)


@pytest.mark.parametrize(
    "program",
    [
        "import optax_adamax; optax_adamax.sharding.shard",
        "import optax_adamax; optax_adamax.compat.torch.adamax(lr=0.1)",
        pytest.param(  # combines the previous and the next program
            "from optax_adamax import compat; compat.torch.adamax(lr=0.1)", marks=pytest.mark.slow
        ),
        "from optax_adamax import compat, sharding; compat.keras, sharding.shard",
    ],
)
def test_submodules_are_attributes(program):
    in_a_new_process(program)


def test_submodules_are_imported_at_first_use():
    loaded = "{name for name in sys.modules if name.startswith('optax_adamax.')}"
    in_a_new_process(
        f"import optax_adamax; dir(optax_adamax); before = {loaded}; optax_adamax.compat; "
        f"new = {loaded} - before; assert not any('sharding' in name for name in before), before; "
        f"assert new == {{'optax_adamax.compat'}}, new"
    )


@pytest.mark.parametrize("package", PACKAGES)
def test_dir_has_only_public_names_and_submodules(package):
    submodules = PACKAGES[package]
    public = set(getattr(package, "__all__", ()))
    assert set(dir(package)) - {"__version__"} == public | submodules
    found = [getattr(package, name) for name in dir(package)]
    modules = {x.__name__.rpartition(".")[2] for x in found if isinstance(x, types.ModuleType)}
    assert modules == submodules
    for name in submodules:
        assert getattr(package, name) is importlib.import_module(f"{package.__name__}.{name}")


def test_every_module_without_an_underscore_is_in_dir():
    """The exception is `wrappers`: the package itself exports its functions."""
    for package in PACKAGES:
        modules = {module.name for module in pkgutil.iter_modules(package.__path__)}
        public = {name for name in modules if not name.startswith("_")} - {"wrappers"}
        assert public == PACKAGES[package]


@pytest.mark.parametrize("package", PACKAGES)
def test_an_unknown_name_raises(package):
    with pytest.raises(
        AttributeError, match=f"module '{package.__name__}' has no attribute 'adam'"
    ):
        package.adam  # noqa: B018
    with pytest.raises(ImportError):
        importlib.import_module(f"{package.__name__}.adam")


@pytest.mark.parametrize("package", PACKAGES)
def test_the_docstring_lists_every_function(package):
    listed = re.findall(r"^  ([a-z_, ]+): ", package.__doc__, re.M)
    names = {name for line in listed for name in line.split(", ")}
    functions = {
        name
        for name in getattr(package, "__all__", ())
        if isinstance(getattr(package, name), types.FunctionType)
    }
    assert names == functions | PACKAGES[package]


MODULES = [
    "optax_adamax",
    "optax_adamax.sharding",
    *(f"optax_adamax.compat.{name}" for name in ("keras", "lucid", "mlx", "optax", "torch")),
]
FUNCTIONS = {
    f"{module}.{name}": getattr(importlib.import_module(module), name)
    for module in MODULES
    for name in importlib.import_module(module).__all__
}


@pytest.mark.parametrize("name", MODULES[1:])
def test_dir_of_a_module_has_only_public_names(name):
    module = importlib.import_module(name)
    assert sorted(module.__all__) == dir(module)
    assert not any(
        isinstance(x, types.ModuleType) for x in map(module.__dict__.get, module.__all__)
    )


@pytest.mark.parametrize("name", ["adamax", "adamaxw", "adamax_step", "scale_by_adamax"])
def test_help_has_a_readable_signature_and_says_where_eps_is(name):
    function = getattr(optax_adamax, name)
    text = pydoc.render_doc(function, renderer=pydoc.plaintext)
    # Python 3.13 prints one argument per line.
    signature = text.split(f"\n{name}(")[1].split("-> ")[0]
    arguments = signature.split("b1:")[1]  # without learning_rate; optax reads the type of it
    assert "jaxlib" not in arguments and "Union" not in arguments
    assert len(arguments) < 500
    if name in ("adamax", "adamax_step"):  # their default eps_placement differs
        summary = function.__doc__.split("Args:")[0]
        assert "denominator" in summary and re.search(r"eps|varepsilon", summary)


def undefined_names(source):
    """Returns the names that a program uses but neither defines nor imports."""
    nodes = list(ast.walk(ast.parse(source)))
    names = [node for node in nodes if isinstance(node, ast.Name)]
    defined = {node.id for node in names if not isinstance(node.ctx, ast.Load)}
    defined |= {node.arg for node in nodes if isinstance(node, ast.arg)}
    defined |= {node.name for node in nodes if isinstance(node, ast.FunctionDef)}
    for node in nodes:
        if isinstance(node, ast.Import | ast.ImportFrom):
            defined |= {alias.asname or alias.name.split(".")[0] for alias in node.names}
    return {node.id for node in names} - defined - set(vars(builtins))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_an_example_runs_when_it_is_pasted_alone(name):
    """doctest also defines the names of the module, which a reader does not have."""
    examples = doctest.DocTestParser().get_examples(FUNCTIONS[name].__doc__ or "")
    assert undefined_names("".join(example.source for example in examples)) == set()


def test_the_example_of_the_package_runs_when_it_is_pasted_alone():
    for module in (optax_adamax, compat):
        examples = doctest.DocTestParser().get_examples(module.__doc__)
        assert examples and undefined_names("".join(x.source for x in examples)) == set()


def test_undefined_names_are_found():
    assert undefined_names("import jax\nx = [jax.Array for y in optax.z]") == {"optax"}
