"""2 and 4 processes with collectives over loopback: the bits of one process with one device."""

import pickle
import re

import orbax.checkpoint as ocp
import pytest

from sharding.common import (
    FORMATS,
    assert_same_bits,
    exact_adamaxw,
    mesh_of,
    state_structs,
    structs,
)
from sharding.processes import CAN_AVOID_CONTRACTION, free_port, run_all, run_together

# For each layout: processes, devices of each, mesh of data x model, and what to run.
LAYOUTS = {
    "one device": (1, 1, (1, 1), [(name, "like parameters") for name in FORMATS]),
    "one process": (1, 8, (4, 2), [("float32", "like parameters"), ("2 bytes", "zero")]),
    "two processes": (2, 4, (4, 2), [("3 bytes", "like parameters"), ("4 bytes", "zero")]),
    "four processes": (4, 2, (4, 2), [("float32", "zero"), ("2 bytes", "zero")]),
}
TIMEOUT = 240  # seconds; a run takes 5 to 25


def run(layout, folder, **config):
    processes, devices, mesh, runs = LAYOUTS[layout]
    config |= {"processes": processes, "devices": devices, "mesh": mesh, "runs": runs}
    config |= {"out": str(folder), "exact_products": not CAN_AVOID_CONTRACTION}
    run_together("worker_train.py", config, folder, TIMEOUT)
    return {name: pickle.loads((folder / f"{name}.pickle").read_bytes()) for name, _ in runs}


@pytest.fixture(scope="module")
def on_one_device(tmp_path_factory):
    return run("one device", tmp_path_factory.mktemp("one_device"))


@pytest.mark.parametrize(
    "layout",
    [
        "one process",
        pytest.param("two processes", marks=pytest.mark.slow),  # 15 s; four are in every run
    ],
)
def test_same_bits(layout, on_one_device, tmp_path):
    results = run(layout, tmp_path)
    for name, result in results.items():
        assert_same_bits(result, on_one_device[name])


def test_four_processes_and_their_checkpoint(on_one_device, tmp_path):
    results = run("four processes", tmp_path, checkpoint=str(tmp_path / "saved"))
    for name, result in results.items():
        assert_same_bits(result, on_one_device[name])
    tx = exact_adamaxw("2 bytes")
    for shape in ((1, 1), (4, 2)):
        params = structs(mesh_of(shape=shape))
        target = {"params": params, "state": state_structs(tx, params)}
        with ocp.StandardCheckpointer() as checkpointer:
            restored = checkpointer.restore(tmp_path / "saved" / "2 bytes", target)
        _, params, state = results["2 bytes"]
        assert_same_bits(restored, {"params": params, "state": state})


def test_the_program_of_the_guide(tmp_path):
    address = f"127.0.0.1:{free_port()}"
    printed = run_all("train.py", [(address, 2, i) for i in range(2)], tmp_path, TIMEOUT)
    losses = [re.search(r"process (\d) of 2: loss (\S+)", text).groups() for text in printed]
    assert [index for index, _ in losses] == ["0", "1"]
    assert losses[0][1] == losses[1][1]
    assert float(losses[0][1]) < 1e-2
