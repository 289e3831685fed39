"""Adamax for JAX: an optax gradient transformation that is right in every dtype."""

from importlib.metadata import version

from optax_adamax._alias import adamax, adamaxw
from optax_adamax._skip import SkipState
from optax_adamax._state import ScaleByAdamaxState, decode_state, encode_state
from optax_adamax._storage import FramedMaximum
from optax_adamax._transform import adamax_step, scale_by_adamax
from optax_adamax.wrappers.compensation import (
    CompensateRoundingState,
    compensate_rounding,
    master_params,
    split_master_params,
)
from optax_adamax.wrappers.packing import (
    PackedState,
    PackedTree,
    pack_small_leaves,
    repack_state,
    unpack_state,
)
from optax_adamax.wrappers.spikes import SpikeState, limit_spikes

__version__ = version("optax_adamax")

__all__ = [
    "CompensateRoundingState",
    "FramedMaximum",
    "PackedState",
    "PackedTree",
    "ScaleByAdamaxState",
    "SkipState",
    "SpikeState",
    "adamax",
    "adamax_step",
    "adamaxw",
    "compensate_rounding",
    "decode_state",
    "encode_state",
    "limit_spikes",
    "master_params",
    "pack_small_leaves",
    "repack_state",
    "scale_by_adamax",
    "split_master_params",
    "unpack_state",
]
