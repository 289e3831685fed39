"""Adamax for JAX: an optax optimizer with low-precision arithmetic and quantized state.

Optimizers:
  adamax, adamaxw: the optimizer, without and with decoupled weight decay.
  scale_by_adamax: the Adamax rule as one transformation of a chain.
  adamax_step: one step for one array, as a pure function.

Wrappers around an optimizer:
  compensate_rounding: accumulates updates that are too small to change bfloat16 parameters.
  master_params: returns the float32 parameters that compensate_rounding maintains.
  limit_spikes: skips or clips a step whose gradient norm is an outlier.
  pack_small_leaves: stores the state of many small arrays in a few buffers, for CPU.
  unpack_state, repack_state: convert a packed state to and from the tree of the parameters.

State:
  decode_state, encode_state: convert a state from a storage format to float32, and back.
  describe_state: summarizes a state leaf by leaf and shows whether its storage format fits.
  probe_gradients: reports whether gradients fit a storage format, for loops that hide the state.

Submodules, imported at first use:
  sharding: shards the state like its parameters or further (ZeRO-1), or stores it in host memory.
  compat: Adamax of PyTorch, Keras, MLX, Lucid and optax: constructors and checkpoints.

Example:
  >>> import jax.numpy as jnp, optax
  >>> from optax_adamax import adamax
  >>> params = jnp.array([1.0, 2.0])
  >>> tx = adamax(learning_rate=0.002)
  >>> updates, state = tx.update(jnp.array([0.1, -0.2]), tx.init(params), params)
  >>> print(optax.apply_updates(params, updates))
  [0.998 2.002]
"""

import importlib
from importlib.metadata import version
from typing import TYPE_CHECKING

from optax_adamax._alias import adamax, adamaxw
from optax_adamax._conversion import decode_state, encode_state
from optax_adamax._describe import LeafDescription, StateDescription, describe_state
from optax_adamax._m_formats import RatioInt8
from optax_adamax._nonfinite import HandleNonfiniteState
from optax_adamax._state import ScaleByAdamaxState
from optax_adamax._transform import adamax_step, scale_by_adamax
from optax_adamax._v_formats import ScaledBfloat16, ScaledUint8
from optax_adamax.wrappers.compensation import (
    CompensateRoundingState,
    Int8Residual,
    Int16Residual,
    compensate_rounding,
    master_params,
)
from optax_adamax.wrappers.packing import (
    PackedState,
    PackedTree,
    pack_small_leaves,
    repack_state,
    unpack_state,
)
from optax_adamax.wrappers.probe import GradientRange, ProbeGradientsState, probe_gradients
from optax_adamax.wrappers.spikes import LimitSpikesState, limit_spikes

if TYPE_CHECKING:
    from optax_adamax import compat as compat
    from optax_adamax import sharding as sharding
else:

    def __getattr__(name):
        if name in _SUBMODULES:
            return importlib.import_module(f"{__name__}.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


_SUBMODULES = ("compat", "sharding")

__version__ = version("optax_adamax")

__all__ = [
    "CompensateRoundingState",
    "GradientRange",
    "HandleNonfiniteState",
    "Int8Residual",
    "Int16Residual",
    "LeafDescription",
    "LimitSpikesState",
    "PackedState",
    "PackedTree",
    "ProbeGradientsState",
    "RatioInt8",
    "ScaleByAdamaxState",
    "ScaledBfloat16",
    "ScaledUint8",
    "StateDescription",
    "adamax",
    "adamax_step",
    "adamaxw",
    "compensate_rounding",
    "decode_state",
    "describe_state",
    "encode_state",
    "limit_spikes",
    "master_params",
    "pack_small_leaves",
    "probe_gradients",
    "repack_state",
    "scale_by_adamax",
    "unpack_state",
]


def __dir__() -> list[str]:
    return [*__all__, *_SUBMODULES, "__version__"]
