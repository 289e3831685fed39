"""Smoke tests: the benchmarks run on small sizes; measured times are not checked."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tqdm import tqdm

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def _on_path(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def test_ratios_are_computed_round_by_round():
    from benchmarks import timing

    calls = []
    seconds = timing.alternate({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 2)
    assert calls == ["a", "b"] * (2 + timing.WARM_UP)
    assert {name: len(found) for name, found in seconds.items()} == {"a": 2, "b": 2}
    seconds = {"a": np.array([1.0, 2.0, 4.0]), "b": np.array([2.0, 2.0, 2.0])}
    assert timing.ratios(seconds, "b")["a"] == {"median": 1.0, "quartiles": [0.75, 1.5]}


def test_range_of_runs_is_the_range_of_their_medians():
    from benchmarks import low_bit, timing

    medians = (1.0, 4.0, 2.0)
    runs = [{"int8": {"ratio": {"median": x, "quartiles": [0, 9]}, "passes": 3}} for x in medians]
    found = low_bit.merge_runs(runs)
    assert found == {"int8": {"ratio": {"median": 2.0, "runs": [1.0, 4.0]}, "passes": 3}}
    assert timing.format_ratio(found["int8"]["ratio"]) == "2.00 (1.00 to 4.00)"


def test_c_loop_computes_a_step_of_adamax():
    from benchmarks.bandwidth_bound import MemoryBound

    try:
        bound = MemoryBound(1001)
    except (OSError, RuntimeError) as reason:
        pytest.skip(str(reason))
    bound.adamax()
    parameter, m, v, g = (float(x[-1]) for x in bound._arrays)
    # The first step of Adamax without bias correction.
    np.testing.assert_allclose([m, v], [0.1 * g, g], rtol=1e-5)
    np.testing.assert_allclose(parameter, 1 - 1e-3 * 0.1, rtol=1e-6)
    bound.copy()
    assert np.all(bound._arrays[1] == np.float32(g))


def test_peers_reports_missing_frameworks(monkeypatch):
    from benchmarks import peers, tables

    def broken(gradient):
        raise RuntimeError("no such device")

    few = {name: peers.JAX[name] for name in (peers.REFERENCE, "optax_adamax")}
    found = peers.measure(64, 2, few | {"broken": broken})
    assert set(few) <= set(found["to_optax"])
    assert found["missing"]["broken"] == "RuntimeError: no such device"
    text = tables.peers({"default": found, "switched": None})
    assert "| broken | not measured: RuntimeError: no such device |" in text


@pytest.mark.slow
def test_scaling_and_packing_write_results_and_figures(tmp_path, monkeypatch):
    from benchmarks import packing, reporting, scaling, tables

    monkeypatch.setattr(reporting, "FIGURES", tmp_path)
    parameters = {"16": scaling.measure_one_leaf(16, 1)}
    leaves = {"1": scaling.measure_many_leaves(1, 1)}
    # 16 bytes per parameter: parameter, m, v and gradient. The remaining bytes are counts.
    assert 16 * 16 <= parameters["16"]["adamax"]["peak_bytes"] <= 16 * 16 + 64
    scaling.draw({"parameters": parameters, "leaves": leaves})
    found = packing.compare(2, 1, 1)
    packing.draw({"by_size": packing.compare_sizes(1, (4,), 1)})
    assert {path.name for path in tmp_path.iterdir()} == {"packing.png", "scaling.png"}
    assert packing.PACKED in tables.packing({"by_count": {"2": found}})


def test_slopes_are_fitted_to_the_upper_half():
    from benchmarks import scaling, tables

    curve = {str(10**k): {"x": {"bytes": 10.0 ** max(2, 2 * k)}} for k in range(5)}
    found = scaling.slopes(curve, "bytes")
    np.testing.assert_allclose(found["x"], 2)
    text = tables.scaling({"slopes": {"step, leaves": found}})
    assert text.endswith("| step, leaves | 2.00 |")


def test_overhead_and_gpu_return_rows():
    from benchmarks import gpu, overhead, tables

    assert overhead.count_traces(3) == 1
    rows = {"1 leaf": overhead.measure_update(1, 1, traced=True)}
    assert "adamax, 2 bytes" in tables.overhead({"rows": rows})
    found = gpu.measure(64, 1, [("int8", "uint8")])
    assert found["int8, uint8"]["bytes_per_parameter"] == 16
    assert found[gpu.REFERENCE]["bytes_per_parameter"] == 28


def test_timed_step_applies_the_transformation():
    from benchmarks import timing

    step = timing.Step(
        optax.sgd(1.0), np.ones(3, np.float32), timing.batch_as_gradient, np.ones(3, np.float32)
    )
    step()
    np.testing.assert_array_equal(step.carry[0], np.full(3, -1.0))


def test_readme_figure_counts_bytes_and_draws(tmp_path, monkeypatch):
    from benchmarks import readme_figure, reporting, tables
    from benchmarks.tasks import Task

    monkeypatch.setattr(reporting, "FIGURES", tmp_path)
    counted = {name: readme_figure.bytes_of(way) for name, way in readme_figure.WAYS.items()}
    assert sum(counted[readme_figure.OURS].values()) == 7
    assert sum(counted[readme_figure.FLOAT32].values()) == 16
    assert "| 2 | 2 | 1 | 2 | 7 |" in tables.bytes_by_part({"bytes": counted})

    def loss(params, key=None):
        return jnp.sum(params["w"] ** 2)

    init = {"w": jnp.ones(3)}
    task = Task("a quadratic", 4, 3, lambda key: init, loss, loss, loss)
    with tqdm(disable=True) as progress:
        found = readme_figure.measure(task, 0.1, 1, progress)
    assert np.shape(found["ways"][readme_figure.OURS]["loss"]) == (3, 4)
    readme_figure.draw({"bytes": counted, "tasks": {"quadratic": found}})
    assert (tmp_path / "readme.png").exists()


def test_update_error_of_a_few_steps():
    from benchmarks import tables, update_error

    (row,) = update_error.measure(50, 20, [("int8", "uint8")])
    assert 0.95 < row["constant_mean"] < 1 and 0.01 < row["random_rms"] < 0.2
    assert "1.2e-10 to 9.4e8" in tables.storage_formats({"rows": [row]})


@pytest.mark.slow
def test_learning_rates_of_a_few_steps(tmp_path, monkeypatch):
    from benchmarks import learning_rate, learning_rate_figure, reporting, tables
    from benchmarks.tasks import Task

    monkeypatch.setattr(reporting, "FIGURES", tmp_path)

    def loss(params, key):
        return jnp.sum((params["w"] - jax.random.normal(key, (4,))) ** 2)

    task = Task(
        description="a quadratic",
        steps=3,
        seeds=2,
        init=lambda key: {"w": 3 + jax.random.normal(key, (4,))},
        loss=loss,
        train_loss=lambda params: jnp.sum(params["w"] ** 2),
        held_out_loss=lambda params: jnp.sum(params["w"] ** 2),
    )
    adamax = learning_rate.OPTIMIZERS[learning_rate.ADAMAX]._replace(rates=(0.1, 1e30))
    with tqdm(disable=True) as progress:
        found = learning_rate.measure(task, {learning_rate.ADAMAX: adamax}, progress)
    row = found["own gradients"][learning_rate.ADAMAX]
    assert np.shape(row["held_out_loss"]) == (2, 2)
    assert max(row["held_out_loss"][0]) < found["initial_loss"] < min(row["held_out_loss"][1])
    assert 0.9 < row["largest_update"][0] <= 1.01

    rows = {noise: dict.fromkeys(learning_rate.OPTIMIZERS, row) for noise in learning_rate.NOISES}
    tasks = dict.fromkeys(("one", "other"), found | rows)
    results = {"noises": learning_rate.NOISES, "tasks": tasks}
    learning_rate_figure.draw(results)
    assert (tmp_path / "learning_rate.png").exists()
    assert "| one, noise added | " in tables.learning_rate(results)
    assert "sgd" not in tables.largest_update(results)


def test_noise_has_the_tails_of_student_t_and_the_scale_of_the_gradient():
    from benchmarks import learning_rate

    zeros = {"w": np.zeros(100_000, np.float32).reshape(100, 1000)}
    gradients = {"w": zeros["w"] + np.float32([3, -3] * 500)}
    noise = learning_rate.with_noise(gradients, jax.random.key(0), 2.0)["w"] - gradients["w"]
    t = np.sort(np.abs(np.asarray(noise)).ravel()) / 6
    # P(|t| > x) = 1 - x / sqrt(2 + x**2) with two degrees of freedom.
    for x in (0.5, 1.0, 5.0, 50.0):
        expected = 1 - x / np.sqrt(2 + x**2)
        assert np.mean(t > x) == pytest.approx(expected, rel=0.3, abs=3e-3 * expected**0.5)
    np.testing.assert_array_equal(
        learning_rate.with_noise(zeros, jax.random.key(0), 1.0)["w"], zeros["w"]
    )


def test_good_rates_lack_a_twentieth_of_the_decrease():
    from benchmarks.learning_rate_summary import format_rates, summary

    losses = {"a": [[3.0], [1.0], [1.09]], "b": [[np.nan], [1.2], [1.11]]}
    rows = {
        name: {"rates": [1, 2, 3], "held_out_loss": x, "largest_update": [1.0, 2.0, 1.5]}
        for name, x in losses.items()
    }
    found = summary({"initial_loss": 3.0, "noise": rows}, "noise")
    assert (found["a"]["loss"], found["a"]["rate"], found["a"]["good_rates"]) == (1.0, 2, [2, 3])
    assert (found["b"]["loss"], found["b"]["rate"], found["b"]["good_rates"]) == (1.11, 3, [])
    assert found["b"]["largest_update"] == 2.0
    assert [format_rates(row["good_rates"]) for row in found.values()] == ["2 to 3", "none"]
