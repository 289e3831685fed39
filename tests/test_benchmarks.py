"""The benchmarks run, on small sizes; times are looked at by nobody."""

from pathlib import Path

import jax
import numpy as np
import optax
import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def _on_path(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def test_ratios_are_taken_round_by_round():
    from benchmarks import timing

    calls = []
    seconds = timing.alternate({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 2)
    assert calls == ["a", "b"] * (2 + timing.WARM_UP)
    assert {name: len(found) for name, found in seconds.items()} == {"a": 2, "b": 2}
    seconds = {"a": np.array([1.0, 2.0, 4.0]), "b": np.array([2.0, 2.0, 2.0])}
    assert timing.ratios(seconds, "b")["a"] == {"median": 1.0, "quartiles": [0.75, 1.5]}


def test_the_range_of_runs_is_that_of_their_medians():
    from benchmarks import low_bit, timing

    medians = (1.0, 4.0, 2.0)
    runs = [{"int8": {"ratio": {"median": x, "quartiles": [0, 9]}, "passes": 3}} for x in medians]
    found = low_bit.of_runs(runs)
    assert found == {"int8": {"ratio": {"median": 2.0, "runs": [1.0, 4.0]}, "passes": 3}}
    assert timing.text(found["int8"]["ratio"]) == "2.00 (1.00 to 4.00)"


def test_the_limit_takes_a_step_of_adamax():
    from benchmarks.bandwidth_bound import Limit

    try:
        limit = Limit(1001)
    except (OSError, RuntimeError) as reason:
        pytest.skip(str(reason))
    limit.adamax()
    parameter, m, v, g = (float(x[-1]) for x in limit._arrays)
    # The first step of Adamax, but for the bias correction.
    np.testing.assert_allclose([m, v], [0.1 * g, g], rtol=1e-5)
    np.testing.assert_allclose(parameter, 1 - 1e-3 * 0.1, rtol=1e-6)
    limit.copy()
    assert np.all(limit._arrays[1] == np.float32(g))


def test_peers(monkeypatch):
    from benchmarks import peers, update_docs

    def broken(gradient):
        raise RuntimeError("no such device")

    few = {name: peers.JAX[name] for name in (peers.REFERENCE, "optax_adamax")}
    found = peers.measure(64, 2, few | {"broken": broken})
    assert set(few) <= set(found["to_optax"])
    assert found["missing"]["broken"] == "RuntimeError: no such device"
    text = update_docs.peers({"default": found, "switched": None})
    assert "| broken | not measured: RuntimeError: no such device |" in text


def test_scaling_and_packing(tmp_path, monkeypatch):
    from benchmarks import packing, reporting, scaling, update_docs

    monkeypatch.setattr(reporting, "FIGURES", tmp_path)
    parameters = {"16": scaling.one_leaf(16, 1)}
    leaves = {"1": scaling.many_leaves(1, 1)}
    # Parameter, m, v and gradient in float32; the counts beside them.
    assert 16 * 16 <= parameters["16"]["adamax"]["peak_bytes"] <= 16 * 16 + 64
    scaling.draw({"parameters": parameters, "leaves": leaves})
    found = packing.compare(2, 1, 1)
    packing.draw({"by_size": packing.by_size(1, (4,), 1)})
    assert {path.name for path in tmp_path.iterdir()} == {"packing.png", "scaling.png"}
    assert packing.PACKED in update_docs.packing({"by_count": {"2": found}})


def test_slopes_are_fitted_to_the_upper_half():
    from benchmarks import scaling, update_docs

    curve = {str(10**k): {"x": {"bytes": 10.0 ** max(2, 2 * k)}} for k in range(5)}
    found = scaling.slopes(curve, "bytes")
    np.testing.assert_allclose(found["x"], 2)
    text = update_docs.scaling({"slopes": {"step, leaves": found}})
    assert text.endswith("| step, leaves | 2.00 |")


def test_overhead_and_gpu():
    from benchmarks import gpu, overhead, update_docs

    assert overhead.traces(3) == 1
    rows = {"1 leaf": overhead.python_time(1, 1, traced=True)}
    assert "adamax, 2 bytes" in update_docs.overhead({"rows": rows})
    found = gpu.measure(64, 1, [("int8", "uint8")])
    assert found["int8, uint8"]["bytes_a_parameter"] == 16
    assert found[gpu.REFERENCE]["bytes_a_parameter"] == 28


def test_a_step_is_that_of_the_transformation():
    from benchmarks import timing

    step = timing.Step(optax.sgd(1.0), np.ones(3, np.float32), timing.given, np.ones(3, np.float32))
    step()
    np.testing.assert_array_equal(step.carry[0], np.full(3, -1.0))


def test_texts_of_mutants_are_found():
    from benchmarks import mutation

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
    from benchmarks import mutation

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
