"""Wrappers for any optax transformation; they do not depend on Adamax."""
