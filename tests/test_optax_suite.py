"""optax's own suite, run with our functions in place of its own: see optax_suite_plugin.py."""

import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import optax
import pytest
from optax_suite_plugin import CASES, FEWEST_CASES_OF_ANOTHER_VERSION


def run_suite(directory):
    """Outcomes of the swapped suite in a fresh process, counted: {"passed": 63}, and its output.

    The process sees no plugin and no configuration of ours, whose strict modes optax's own code
    fails.
    """
    (directory / "pytest.ini").write_text("[pytest]\n")
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider"]
    command += ["-c", str(directory / "pytest.ini"), "--rootdir", str(directory)]
    command += ["-p", "optax_suite_plugin", *files_of_adamax()]
    path = [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]
    environment = {key: value for key, value in os.environ.items() if key != "PYTEST_ADDOPTS"}
    environment |= {"PYTHONPATH": os.pathsep.join(filter(None, path)), "JAX_PLATFORMS": "cpu"}
    environment |= {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    process = subprocess.run(
        command,
        cwd=directory,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    summary = " ".join(process.stdout.splitlines()[-1:])
    words = r"(\d+) (passed|failed|skipped|errors?|xfailed|xpassed)"
    outcomes = Counter({word: int(number) for number, word in re.findall(words, summary)})
    return outcomes, process.stdout + process.stderr


def files_of_adamax():
    """Those of the suite with its cases: they say its name, or use the list of all in alias_test.

    A case that is missed is missed by the plugin, which counts them.
    """
    suite = sorted(Path(optax.__file__).parent.rglob("*_test.py"))
    return [str(path) for path in suite if re.search("adamax|alias_test", path.read_text("utf-8"))]


def is_every_case(number):
    """Whether `number` cases are all that the installed optax has."""
    known = CASES.get(optax.__version__)
    return number == known if known else number >= FEWEST_CASES_OF_ANOTHER_VERSION


@pytest.mark.slow  # what it looks at, test_protocol.py and test_composition.py look at in every run
def test_optax_suite_passes_with_our_functions(tmp_path):
    """A case passes only if it calls our `init`."""
    outcomes, output = run_suite(tmp_path)
    assert set(outcomes) == {"passed"} and is_every_case(outcomes["passed"]), output
