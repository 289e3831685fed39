"""Pytest plugin that runs the Adamax cases of optax's own suite with this package.

Run ``pytest -p optax_suite_plugin FILES`` on test files of the installed optax. The plugin checks
the number of cases. A case fails if it is skipped or does not call `init` of this package.
"""

import functools
import re

import jax
import optax
import pytest
from optax._src import alias, transform

import optax_adamax

CASES = {"0.2.6": 93, "0.2.7": 63, "0.2.8": 63}
FEWEST_CASES_OF_ANOTHER_VERSION = 51
SWAPPED = {
    "adamax": (optax, alias),
    "adamaxw": (optax, alias),
    "scale_by_adamax": (optax, transform),
}


class NumericVersion(str):
    """Version string that is compared by its numbers.

    `ShardingTest` of optax 0.2.8 is skipped if ``jax.__version__ < '0.7.2'``, and as strings,
    '0.10' < '0.7.2'. Try to remove this class with optax 0.2.9.
    """

    def __lt__(self, other):
        return self.numbers(self) < self.numbers(other)

    @staticmethod
    def numbers(version):
        return [int(number) for number in re.findall(r"\d+", version)]


calls = 0  # number of calls of `init`


def counted(constructor):
    """Wraps a constructor: its transformation counts the calls of `init`."""

    @functools.wraps(constructor)
    def construct(*args, **kwargs):
        tx = constructor(*args, **kwargs)

        def init(params):
            global calls
            calls += 1
            return tx.init(params)

        return tx._replace(init=init)

    return construct


def pytest_configure():
    jax.config.update("jax_num_cpu_devices", 8)
    jax.__version__ = NumericVersion(jax.__version__)
    for name, modules in SWAPPED.items():
        for module in modules:
            setattr(module, name, counted(getattr(optax_adamax, name)))


# Runs before the mark plugin, because -k and -m would change the count.
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items, config):
    cases = [item for item in items if "adamax" in name_of(item)]
    check_count(len(cases))
    config.hook.pytest_deselected(items=[item for item in items if item not in cases])
    items[:] = cases


def name_of(item):
    """Returns the name with its parameters; `parameterized.product` of absl hides them."""
    return item.name + getattr(item.obj, "__x_params_repr__", "")


def check_count(count):
    """Stops the run if the number of cases is not the expected number."""
    known = CASES.get(optax.__version__)
    if known is None and count >= FEWEST_CASES_OF_ANOTHER_VERSION:
        return
    if count != known:
        expected = known or f"at least {FEWEST_CASES_OF_ANOTHER_VERSION}"
        raise pytest.UsageError(
            f"Found {count} cases named adamax in optax {optax.__version__}, expected {expected}."
        )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call():
    before = calls
    result = yield
    assert calls > before, "init of optax_adamax was not called"
    return result


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
    report = yield
    if report.skipped:
        report.outcome, report.longrepr = "failed", f"{item.name} was skipped: {report.longrepr}"
    return report
