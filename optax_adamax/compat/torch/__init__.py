"""`torch.optim.Adamax`: its constructor, and its ``state_dict`` in and out."""

from optax_adamax.compat._mapping import Entry as Entry
from optax_adamax.compat._mapping import Key as Key
from optax_adamax.compat._mapping import Names as Names
from optax_adamax.compat._mapping import dump_params, load_params
from optax_adamax.compat.torch._constructor import adamax
from optax_adamax.compat.torch._state_dict import dump_state, flax_names, load_state

__all__ = ["adamax", "dump_params", "dump_state", "flax_names", "load_params", "load_state"]


def __dir__() -> list[str]:
    return list(__all__)
