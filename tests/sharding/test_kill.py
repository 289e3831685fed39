"""A run that is killed at random moments and resumed ends with the bits of an undisturbed run."""

import subprocess
import sys
import threading

import numpy as np
import pytest

from sharding.processes import HERE, environment

LIMIT = 120  # seconds for one run of the worker, which needs 3 to 10


class WorkerRun:
    """One run of the worker: the events that it printed, and the files on disk at its end."""

    def __init__(self, folder, steps, delay=None):
        """Runs the worker to its end, or kills it `delay` seconds after its first step."""
        worker = subprocess.Popen(
            [sys.executable, str(HERE / "worker_kill.py"), str(folder), str(steps)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(),
        )
        watchdog = threading.Timer(LIMIT, worker.kill)
        watchdog.start()
        errors = []
        reader = threading.Thread(target=lambda: errors.append(worker.stderr.read()))
        reader.start()
        lines = []
        killer = None
        with worker.stdout:
            for line in worker.stdout:
                if not line.endswith("\n"):  # the worker was killed while it printed the line
                    break
                lines.append(line.split())
                if delay is not None and lines[-1][0] == "stepping":
                    killer = threading.Timer(delay, worker.kill)
                    killer.start()
        code = worker.wait()
        watchdog.cancel()
        reader.join()
        worker.stderr.close()
        assert code == (0 if delay is None else -9), errors
        assert killer is not None or delay is None, errors
        self.torn = [words[1:] for words in lines if words[0] == "torn"]
        ((self.start, self.resumed),) = [
            (int(words[1]), words[2]) for words in lines if words[0] == "resumed"
        ]
        self.saving = {int(words[1]): words[2] for words in lines if words[0] == "saving"}
        self.saved = [int(words[1]) for words in lines if words[0] == "saved"]
        self.done = [words[2] for words in lines if words[0] == "done"]
        self.on_disk = [int(path.name) for path in folder.iterdir() if path.name.isdigit()]
        self.was_writing = any("tmp" in path.name for path in folder.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("kills", [1, 60])  # 60 take 4 minutes on two busy cores
def test_killed_run_resumes_with_the_same_bits(kills, tmp_path):
    rng = np.random.default_rng(kills)
    (tmp_path / "killed").mkdir()
    (tmp_path / "undisturbed").mkdir()
    runs = [
        WorkerRun(tmp_path / "killed", 1_000_000, delay) for delay in rng.uniform(0, 1.5, kills)
    ]
    steps = max([0, *(step for run in runs for step in run.saving)]) + 50
    last = WorkerRun(tmp_path / "killed", steps)
    undisturbed = WorkerRun(tmp_path / "undisturbed", steps)

    assert last.done == undisturbed.done
    known = {0: undisturbed.resumed, **undisturbed.saving}
    for run in [*runs, last]:
        # Checkpoints that were written or restored have the right bits. So have unfinished
        # checkpoints, unless restoring them raises.
        assert run.saving.items() <= known.items()
        assert known[run.start] == run.resumed
        for name, outcome in run.torn:
            assert outcome in ("rejected", known[int(name.split(".")[0])])
    for before, after in zip(runs, [*runs[1:], last], strict=True):
        # Only the steps since the last finished checkpoint are lost.
        assert after.start == max([0, *before.on_disk])
        assert after.start >= max([0, *before.saved])
    if kills >= 50:
        writing = sum(run.was_writing for run in runs)
        rejected = sum(outcome == "rejected" for run in runs for _, outcome in run.torn)
        assert min(writing, kills - writing, rejected) >= kills // 10
