"""Tests of `optax_adamax.sharding`; a package, so that its modules need no unique names."""
