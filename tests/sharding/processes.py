"""Starts worker processes for the tests, and always terminates them."""

import json
import os
import platform
import socket
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent

# XLA cannot contract products without fused multiply-add instructions (see EXACT_PRODUCTS).
CAN_AVOID_CONTRACTION = platform.machine() in ("x86_64", "AMD64")


def environment():
    """Returns the environment of a worker: the path of the tests, and no contraction."""
    path = [str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    flags = [os.environ.get("XLA_FLAGS", "")]
    if CAN_AVOID_CONTRACTION:
        flags.append("--xla_cpu_max_isa=AVX")
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path), "XLA_FLAGS": " ".join(flags)}


def free_port():
    """Returns an unused port of the loopback interface."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(script, *arguments, log):
    """Starts a worker script that writes its output to the file `log`."""
    with open(log, "wb") as file:
        return subprocess.Popen(
            [sys.executable, str(HERE / script), *map(str, arguments)],
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment(),
        )


def run_alone(script, folder, timeout=240):
    """Runs one worker on a folder, and returns the JSON of its last line of output."""
    finished = subprocess.run(
        [sys.executable, str(HERE / script), str(folder)],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=timeout,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return json.loads(finished.stdout.splitlines()[-1])


def run_together(script, config, folder, timeout):
    """Runs `config["processes"]` workers on one port; fails if one of them fails."""
    config = json.dumps({**config, "port": free_port()})
    processes = json.loads(config)["processes"]
    return run_all(script, [(config, i) for i in range(processes)], folder, timeout)


def run_all(script, arguments, folder, timeout):
    """Runs one worker for each entry of `arguments`, and returns their output."""
    logs = [folder / f"process_{i}.log" for i in range(len(arguments))]
    workers = []
    try:
        for each, log in zip(arguments, logs, strict=True):
            workers.append(start(script, *each, log=log))
        codes = [worker.wait(timeout) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    printed = [log.read_text() for log in logs]
    assert codes == [0] * len(workers), "\n".join(printed)
    return printed
