"""What there is can be found from the package itself: attributes, `dir`, `help`."""

import importlib
import pkgutil
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
    """Runs it where nothing has been imported before."""
    run = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); {program}"]
    subprocess.run(run, check=True, timeout=120)


@pytest.mark.parametrize(
    "program",
    [
        "import optax_adamax; optax_adamax.sharding.shard",
        "import optax_adamax; optax_adamax.compat.torch.adamax(lr=0.1)",
        pytest.param(  # the import of the next one, the attribute of the one before
            "from optax_adamax import compat; compat.torch.adamax(lr=0.1)", marks=pytest.mark.slow
        ),
        "from optax_adamax import compat, sharding; compat.keras, sharding.shard",
    ],
)
def test_submodules_are_attributes(program):
    in_a_new_process(program)


def test_submodules_are_imported_when_they_are_asked_for():
    loaded = "{name for name in sys.modules if name.startswith('optax_adamax.')}"
    in_a_new_process(
        f"import optax_adamax; dir(optax_adamax); before = {loaded}; optax_adamax.compat; "
        f"new = {loaded} - before; assert not any('sharding' in name for name in before), before; "
        f"assert new == {{'optax_adamax.compat'}}, new"
    )


@pytest.mark.parametrize("package", PACKAGES)
def test_dir_has_the_public_names_and_submodules_alone(package):
    submodules = PACKAGES[package]
    public = set(getattr(package, "__all__", ()))
    assert set(dir(package)) - {"__version__"} == public | submodules
    found = [getattr(package, name) for name in dir(package)]
    modules = {x.__name__.rpartition(".")[2] for x in found if isinstance(x, types.ModuleType)}
    assert modules == submodules
    for name in submodules:
        assert getattr(package, name) is importlib.import_module(f"{package.__name__}.{name}")


def test_every_module_without_an_underscore_is_in_dir():
    """`wrappers` is a folder of the source alone: its functions are in the package itself."""
    for package in PACKAGES:
        modules = {module.name for module in pkgutil.iter_modules(package.__path__)}
        public = {name for name in modules if not name.startswith("_")} - {"wrappers"}
        assert public == PACKAGES[package]


@pytest.mark.parametrize("package", PACKAGES)
def test_a_name_that_is_not_there(package):
    with pytest.raises(
        AttributeError, match=f"module '{package.__name__}' has no attribute 'adam'"
    ):
        package.adam  # noqa: B018
    with pytest.raises(ImportError):
        importlib.import_module(f"{package.__name__}.adam")


@pytest.mark.parametrize("package", PACKAGES)
def test_the_docstring_lists_what_there_is(package):
    listed = re.findall(r"^  ([a-z_, ]+): ", package.__doc__, re.M)
    names = {name for line in listed for name in line.split(", ")}
    functions = {
        name
        for name in getattr(package, "__all__", ())
        if isinstance(getattr(package, name), types.FunctionType)
    }
    assert names == functions | PACKAGES[package]
