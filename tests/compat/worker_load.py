"""One of several processes that load and dump the same checkpoint; see `test_placement.py`.

Usage: worker_load.py CONFIG INDEX, with CONFIG in JSON.
"""

import json
import sys

import jax.numpy as jnp
import numpy as np
import optax
from compat.test_placement import ARRAYS, FORMATS, SAVED, assert_placed_like, sharded_params
from sharding.worker_train import connect

from optax_adamax.compat import optax as compat_optax
from optax_adamax.compat import torch as compat_torch


def main():
    layout = {"w": ("w", (1, 0)), "b": "b"}
    saved = {**SAVED, "state": dict(SAVED["state"])}
    saved["state"][0] = {k: np.transpose(x) for k, x in SAVED["state"][0].items()}
    params = sharded_params()
    assert not params["w"].is_fully_addressable
    for formats in FORMATS:
        tx, how = compat_torch.adamax(lr=0.1, **formats), {"names": ["w", "b"]}
        state = compat_torch.load_state(saved, params, tx, layout, **how)
        assert_placed_like(state, tx.init(params))
        groups = saved["param_groups"]
        dumped = compat_torch.dump_state(state, params, groups, layout, **how)
        if not formats:
            v = dumped["state"][0]["exp_inf"]
            np.testing.assert_array_equal(v, saved["state"][0]["exp_inf"])
    loaded = compat_torch.load_params({**ARRAYS, "w": ARRAYS["w"].T}, params, layout)
    assert_placed_like(loaded, params)
    np.testing.assert_array_equal(compat_torch.dump_params(loaded)["w"], ARRAYS["w"])
    theirs = optax.adamax(0.1).init(params)
    ours = compat_optax.adamax(0.1)
    state = compat_optax.load_state(theirs, params, ours)
    assert float(jnp.sum(state[0].v["w"])) == 0.0


if __name__ == "__main__":
    connect(json.loads(sys.argv[1]), int(sys.argv[2]))
    main()
    print("done", flush=True)
