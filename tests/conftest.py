"""Strict modes and eight CPU devices for every test, set before JAX starts."""

import os

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


@pytest.fixture
def mutant(monkeypatch):
    """Replaces something in the package for one test, compiled programs included."""

    def replace(module, name, value):
        monkeypatch.setattr(module, name, value)
        jax.clear_caches()

    yield replace
    monkeypatch.undo()
    jax.clear_caches()
