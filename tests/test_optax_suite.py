"""This package passes optax's own Adamax tests; see optax_suite_plugin.py."""

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
    """Runs optax's tests with this package in a new process.

    The process uses neither the plugins nor the configuration of this project, because optax fails
    under its strict modes.

    Returns:
      The number of tests by outcome, such as {"passed": 63}, and the output.
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
    """Returns the test files of optax that name adamax, or use the list of all aliases.

    The plugin counts the cases, so a missing file makes the test fail.
    """
    suite = sorted(Path(optax.__file__).parent.rglob("*_test.py"))
    return [str(path) for path in suite if re.search("adamax|alias_test", path.read_text("utf-8"))]


def is_every_case(number):
    """Returns whether the installed optax has this number of cases."""
    known = CASES.get(optax.__version__)
    return number == known if known else number >= FEWEST_CASES_OF_ANOTHER_VERSION


@pytest.mark.slow  # test_protocol.py and test_composition.py check the same behaviour
def test_optax_suite_passes_with_this_package(tmp_path):
    """A case passes only if it calls `init` of this package."""
    outcomes, output = run_suite(tmp_path)
    assert set(outcomes) == {"passed"} and is_every_case(outcomes["passed"]), output
