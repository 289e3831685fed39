"""Two and four processes on one machine give the bits of one process with one device."""

import pickle
import re

import orbax.checkpoint as ocp
import pytest

from sharding.common import (
    PARAMETERS,
    SHARDED_BY_ZERO1,
    assert_same_bits,
    exact_adamaxw,
    mesh_of,
    state_structs,
    structs,
)
from sharding.processes import CAN_AVOID_CONTRACTION, free_port, run_all, run_together

ALL = tuple(PARAMETERS)

# Each layout: number of processes, devices per process, mesh of data x model, parameters, runs.
# Each process compiles its own programs, so two processes run one format only: the 2-byte state,
# which has every kind of leaf, and the parameters that ZeRO-1 shards and communicates.
LAYOUTS = {
    "one process": (1, 8, (4, 2), ALL, [("float32", "like parameters"), ("2 bytes", "zero")]),
    "two processes": (2, 4, (4, 2), SHARDED_BY_ZERO1, [("2 bytes", "zero")]),
    "four processes": (
        4,
        2,
        (4, 2),
        ALL,
        [
            ("float32", "zero"),
            ("3 bytes", "like parameters"),
            ("4 bytes", "zero"),
            ("2 bytes", "zero"),
        ],
    ),
}
TIMEOUT = 240  # seconds; a run needs 5 to 25


def run(processes, devices, mesh, parameters, runs, folder, **config):
    folder.mkdir()
    config |= {"processes": processes, "devices": devices, "mesh": mesh}
    config |= {"parameters": parameters, "runs": runs}
    config |= {"out": str(folder), "exact_products": not CAN_AVOID_CONTRACTION}
    run_together("worker_train.py", config, folder, TIMEOUT)
    return {name: pickle.loads((folder / f"{name}.pickle").read_bytes()) for name, _ in runs}


def run_and_compare_with_one_device(layout, folder, **config):
    """Returns the results of a layout, and the results on one device."""
    *places, runs = LAYOUTS[layout]
    without = [(name, "like parameters") for name, _ in runs]
    alone = run(1, 1, (1, 1), places[-1], without, folder / "alone")
    return run(*places, runs, folder / "together", **config), alone


@pytest.mark.slow  # test_update.py covers this in the process of the tests
def test_one_process_gives_the_bits_of_one_device(tmp_path):
    results, alone = run_and_compare_with_one_device("one process", tmp_path)
    for name, result in results.items():
        assert_same_bits(result, alone[name])


@pytest.mark.parametrize(
    "layout", ["two processes", pytest.param("four processes", marks=pytest.mark.slow)]
)
def test_processes_and_their_checkpoint_have_the_bits_of_one_device(layout, tmp_path):
    saved = tmp_path / "saved"
    results, alone = run_and_compare_with_one_device(layout, tmp_path, checkpoint=str(saved))
    for name, result in results.items():
        assert_same_bits(result, alone[name])
    tx = exact_adamaxw("2 bytes")
    for shape in ((1, 1), (4, 2)):
        params = structs(mesh_of(shape=shape))
        params = {name: params[name] for name in LAYOUTS[layout][3]}
        target = {"params": params, "state": state_structs(tx, params)}
        with ocp.StandardCheckpointer() as checkpointer:
            restored = checkpointer.restore(saved / "2 bytes", target)
        _, params, state = results["2 bytes"]
        assert_same_bits(restored, {"params": params, "state": state})


@pytest.mark.slow
def test_program_of_the_guide_gives_equal_losses(tmp_path):
    address = f"127.0.0.1:{free_port()}"
    printed = run_all("train.py", [(address, 2, i) for i in range(2)], tmp_path, TIMEOUT)
    losses = [re.search(r"process (\d) of 2: loss (\S+)", text).groups() for text in printed]
    assert [index for index, _ in losses] == ["0", "1"]
    assert losses[0][1] == losses[1][1]
    assert float(losses[0][1]) < 1e-2
