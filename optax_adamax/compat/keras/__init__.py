"""`keras.optimizers.Adamax`: its constructor, and its variables in and out."""

from optax_adamax.compat._params import dump_params, load_params
from optax_adamax.compat.keras._constructor import adamax
from optax_adamax.compat.keras._state import dump_state, finalize_variable_values, load_state

__all__ = [
    "adamax",
    "dump_params",
    "dump_state",
    "finalize_variable_values",
    "load_params",
    "load_state",
]


def __dir__() -> list[str]:
    return list(__all__)
