"""`torch.optim.Adamax`: its constructor, and its ``state_dict`` in and out."""

from optax_adamax.compat._layout import Entry as Entry
from optax_adamax.compat._layout import Key as Key
from optax_adamax.compat._layout import Layout as Layout
from optax_adamax.compat._params import dump_params, load_params
from optax_adamax.compat.torch._constructor import adamax
from optax_adamax.compat.torch._state_dict import dump_state, flax_names, load_state, names_of

__all__ = [
    "adamax",
    "dump_params",
    "dump_state",
    "flax_names",
    "load_params",
    "load_state",
    "names_of",
]


def __dir__() -> list[str]:
    return list(__all__)
