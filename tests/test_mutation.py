"""The mutants in the tables fit the code, and `benchmarks.mutation` classifies their outcomes."""

import pytest

from benchmarks import mutation


def test_texts_of_mutants_are_found():
    assert mutation.problems(mutation.read(mutation.TABLES), mutation.ROOT) == []


TABLE = """
file = "optax_adamax/__init__.py"
tests = ["tests/test_it.py"]
[[mutants]]
why = "adds 2"
text = "x + 1"
replacement = "x + 2"
[[mutants]]
why = "adds the other way round"
text = "x + 1"
replacement = "1 + x"
[[mutants]]
why = "doubles"
text = "2 * x"
replacement = "x * 2"
equivalent = "the product of two numbers has no order"
[[mutants]]
why = "fails another test"
text = "3 * x"
replacement = "4 * x"
"""


@pytest.mark.slow  # six runs of pytest
def test_mutants_are_caught_survive_or_are_equivalent(tmp_path):
    for name, text in {
        "optax_adamax/__init__.py": "def f(x):\n    return x + 1 + 2 * x + 3 * x\n",
        "tests/test_it.py": "from optax_adamax import f\n\ndef test_f():\n    assert f(0) == 1\n",
        "tests/test_more.py": "from optax_adamax import f\n\ndef test_f():\n    assert f(1) == 7\n",
        "table.toml": TABLE,
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    mutants = mutation.read(tmp_path)
    found = mutation.summary(mutants, mutation.run(mutants, tmp_path))
    kinds = {"caught": 1, "caught elsewhere": 1, "survived": 1, "equivalent": 1}
    assert found["total"] == found["modules"]["__init__"] == kinds
    assert [row["why"] for row in found["survived"]] == ["adds the other way round"]
    assert mutation.problems(mutants, tmp_path) == []
    (tmp_path / "optax_adamax/__init__.py").write_text("x + 1, x + 1, 2 * x")
    wrong = mutation.problems(mutants, tmp_path)
    assert ["2 times" in wrong[0], "2 times" in wrong[1], "0 times" in wrong[2]] == [True] * 3
