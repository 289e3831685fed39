"""Strict modes and eight CPU devices for every test, set before JAX starts."""

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
    """What is there before the first test stays: searched for garbage again and again, it costs."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def mutant(monkeypatch, request):
    """Replaces something in the package for one test, compiled programs included."""

    def replace(module, name, value):
        monkeypatch.setattr(module, name, value)
        forget_programs(request.module)

    yield replace
    monkeypatch.undo()
    forget_programs(request.module)


def forget_programs(test_module):
    """Clears what the package and a module of tests keep compiled, by jax.jit or functools.cache.

    jax.clear_caches would forget all that other tests compile again.
    """
    package = [m for name, m in sys.modules.items() if name.split(".")[0] == "optax_adamax"]
    found = [value for module in [*package, test_module] for value in vars(module).values()]
    found += [value for cls in found if isinstance(cls, type) for value in vars(cls).values()]
    for value in found:
        for clear in ("clear_cache", "cache_clear"):
            getattr(value, clear, lambda: None)()
