"""Each framework's Adamax: its constructor, and its state in and out.

There is one module per framework. It is imported at first use, and does not import its framework:

  torch: ``torch.optim.Adamax``.
  keras: ``keras.optimizers.Adamax``.
  mlx: ``mlx.optimizers.Adamax``.
  lucid: ``lucid.optim.Adamax``.
  optax: the state of ``optax.adamax`` and ``optax.adamaxw``; the constructors are this package's.

Example:
  >>> from optax_adamax import compat
  >>> tx = compat.torch.adamax(lr=2e-3, weight_decay=1e-4)
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from optax_adamax.compat import keras as keras
    from optax_adamax.compat import lucid as lucid
    from optax_adamax.compat import mlx as mlx
    from optax_adamax.compat import optax as optax
    from optax_adamax.compat import torch as torch
else:

    def __getattr__(name):
        if name in _SUBMODULES:
            return importlib.import_module(f"{__name__}.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


_SUBMODULES = ("keras", "lucid", "mlx", "optax", "torch")


def __dir__() -> list[str]:
    return [*_SUBMODULES]
