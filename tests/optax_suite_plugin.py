"""Pytest plugin: the adamax cases of optax's own suite, with our functions in place of its own.

Run ``pytest -p optax_suite_plugin FILES`` on those of the installed optax, which ships its suite.
Its cases are counted, so that none goes missing, and a case fails that skips itself or does not
call our `init`.
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
    """A version that is ordered by its numbers.

    `ShardingTest` of optax 0.2.8 skips itself where ``jax.__version__ < '0.7.2'``, which as strings
    is true of 0.10. Try without from optax 0.2.9.
    """

    def __lt__(self, other):
        return self.numbers(self) < self.numbers(other)

    @staticmethod
    def numbers(version):
        return [int(number) for number in re.findall(r"\d+", version)]


calls = 0  # of our `init`


def counted(constructor):
    """The constructor, of a transformation whose `init` is counted."""

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


# Before the mark plugin, so that -k and -m do not change the count.
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items, config):
    cases = [item for item in items if "adamax" in name_of(item)]
    check_count(len(cases))
    config.hook.pytest_deselected(items=[item for item in items if item not in cases])
    items[:] = cases


def name_of(item):
    """The name with its parameters; those of absl's `parameterized.product` are in an attribute."""
    return item.name + getattr(item.obj, "__x_params_repr__", "")


def check_count(count):
    """Stops the run if optax's suite has not the cases that it should have."""
    known = CASES.get(optax.__version__)
    if known is None and count >= FEWEST_CASES_OF_ANOTHER_VERSION:
        return
    if count != known:
        expected = known or f"at least {FEWEST_CASES_OF_ANOTHER_VERSION}"
        raise pytest.UsageError(
            f"{count} cases are named adamax in optax {optax.__version__}: expected {expected}."
        )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call():
    before = calls
    result = yield
    assert calls > before, "our init was not called"
    return result


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
    report = yield
    if report.skipped:
        report.outcome, report.longrepr = "failed", f"{item.name} skipped itself: {report.longrepr}"
    return report
