"""Which backend Keras runs on is read from the environment when it is imported."""

import os

os.environ.setdefault("KERAS_BACKEND", "jax")
