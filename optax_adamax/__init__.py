"""Adamax for JAX: an optax gradient transformation that is right in every dtype."""

from importlib.metadata import version

from optax_adamax._alias import adamax, adamaxw
from optax_adamax._state import ScaleByAdamaxState, decode_state, encode_state
from optax_adamax._storage import FramedMaximum
from optax_adamax._transform import adamax_step, scale_by_adamax

__version__ = version("optax_adamax")

__all__ = [
    "FramedMaximum",
    "ScaleByAdamaxState",
    "adamax",
    "adamax_step",
    "adamaxw",
    "decode_state",
    "encode_state",
    "scale_by_adamax",
]
