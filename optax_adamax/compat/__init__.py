"""Every framework's Adamax: its constructor, and its state in and out.

One module a framework, none imported unless asked for, none importing its framework::

    from optax_adamax.compat import torch as compat_torch

    tx = compat_torch.adamax(lr=2e-3, weight_decay=1e-4)
"""
