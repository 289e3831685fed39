"""Shards the optimizer state like the parameters or further (ZeRO-1), or stores it in host memory.

Functions:
  shard: wraps any optax transformation or chain, and shards its state.
"""

from optax_adamax.sharding._placement import UnshardedLeaf
from optax_adamax.sharding._transformation import ShardedTransformation, shard

__all__ = ["ShardedTransformation", "UnshardedLeaf", "shard"]


def __dir__() -> list[str]:
    return list(__all__)
