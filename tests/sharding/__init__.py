"""Tests of `optax_adamax.sharding`. A package, because its modules share names with others."""
