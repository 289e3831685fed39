"""Selects Keras' JAX backend, which Keras reads from the environment at import."""

import os

os.environ.setdefault("KERAS_BACKEND", "jax")
