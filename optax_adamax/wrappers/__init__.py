"""Wrappers around any optax transformation: nothing here knows Adamax."""
