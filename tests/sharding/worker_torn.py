"""Damages each file of an Orbax checkpoint, restores it, and prints the outcomes in JSON.

It is a process of its own, because Orbax threads report failed reads after the error.
Usage: worker_torn.py FOLDER
"""

import json
import shutil
import sys
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

from optax_adamax import sharding
from sharding.common import assert_same_bits, exact_adamaxw, mesh_of, random_like, structs

DAMAGES = {
    "halved": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "deleted": lambda file: file.unlink(),
    "zeroed": lambda file: file.write_bytes(bytes(file.stat().st_size)),
}


def count_up(x):
    """Returns an array like `x` with the entries 1, 2, ..., 99, repeated."""
    return jax.device_put(np.resize(np.arange(1, 100), x.shape).astype(x.dtype), x.sharding)


def main(folder):
    jax.config.update("jax_num_cpu_devices", 8)
    params = random_like({"wide": structs(mesh_of())["wide"]}, 0)
    tx = sharding.shard(exact_adamaxw("2 bytes"), params)
    state = jax.tree.map(count_up, tx.init(params))
    tree = {"params": params, "state": state}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "saved", tree)

    def outcome(path):
        try:
            with ocp.StandardCheckpointer() as checkpointer:
                restored = checkpointer.restore(path, tree)
        except Exception:  # Orbax raises `Exception` itself for a damaged chunk
            return "rejected"
        try:
            assert_same_bits(restored, tree)
        except AssertionError as error:
            return str(error)
        return "same"

    outcomes = {"nothing": outcome(folder / "saved")}
    files = [file for file in sorted((folder / "saved").rglob("*")) if file.is_file()]
    for file in files:
        name = file.relative_to(folder / "saved")
        for damage, apply in DAMAGES.items():
            torn = folder / "torn"
            shutil.copytree(folder / "saved", torn)
            apply(torn / name)
            outcomes[f"{name} {damage}"] = outcome(torn)
            shutil.rmtree(torn)
    print(json.dumps(outcomes))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
