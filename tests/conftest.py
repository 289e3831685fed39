"""Sets strict modes and eight CPU devices for every test, before JAX starts."""

import gc
import os
import sys

import jax
import jax.experimental
import pytest
from hypothesis import settings

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

if not hasattr(jax, "enable_x64"):  # JAX 0.7
    jax.enable_x64 = jax.experimental.enable_x64

settings.register_profile("quick", max_examples=5, deadline=None, derandomize=True)
settings.register_profile("normal", max_examples=50, deadline=None, derandomize=True)
settings.register_profile("long", max_examples=5000, deadline=None, derandomize=True)
settings.load_profile(os.environ.get("OPTAX_ADAMAX_TEST_PROFILE", "normal"))


def pytest_collection_finish():
    """Excludes all imported modules from garbage collection, which would scan them repeatedly."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def mutant(monkeypatch, request):
    """Returns a function that replaces an attribute of the package for one test.

    Programs compiled with the other value are dropped from the caches before and after the test.
    """

    def replace(module, name, value):
        monkeypatch.setattr(module, name, value)
        clear_caches(request.module)

    yield replace
    monkeypatch.undo()
    clear_caches(request.module)


def is_helper(module):
    return str(getattr(module, "__file__", "")).startswith(os.path.dirname(__file__))


def clear_caches(test_module):
    """Clears the caches of jax.jit and functools.cache that a test module uses.

    They are in the package, in the test module, and in the helper modules that it imports from.
    jax.clear_caches would also drop the programs of all other test modules.
    """
    imported = {getattr(value, "__module__", None) for value in vars(test_module).values()}
    modules = [
        module
        for name, module in sys.modules.items()
        if name.split(".")[0] == "optax_adamax" or (name in imported and is_helper(module))
    ]
    found = [value for module in [*modules, test_module] for value in vars(module).values()]
    found += [value for cls in found if isinstance(cls, type) for value in vars(cls).values()]
    for value in found:
        for clear in ("clear_cache", "cache_clear"):
            getattr(value, clear, lambda: None)()
