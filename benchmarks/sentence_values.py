"""Numbers in the sentences of the documentation, each from a JSON file in benchmarks/results.

A number is between `<!-- value: NAME -->` and `<!-- end -->`. In Markdown, a comment at the
beginning of a line would end the paragraph.
"""

import re
import statistics
from collections.abc import Callable, Iterable
from typing import Any

from benchmarks import reporting
from benchmarks.tables import summaries

SEVEN_BYTES = "7 bytes for all: bfloat16, int8 residual, 2 bytes of state"


def _v(*who: str) -> str:
    """Returns v after 2,000 small gradients with bfloat16 parameters."""
    rows = reporting.read_json("dtypes")["rows"]
    found = (f"{x['v']:.3g}" for x in rows if x["dtype"] == "bfloat16" and x["who"] in who)
    return " and ".join(dict.fromkeys(found))


def _bytes(name: str) -> str:
    return str(sum(reporting.read_json("readme_figure")["bytes"][name].values()))


def _range(numbers: Iterable[float], digits: int = 1) -> str:
    """Returns the least and the largest number, or one number if they are written alike."""
    numbers = list(numbers)
    ends = dict.fromkeys(f"{x:.{digits}f}" for x in (min(numbers), max(numbers)))
    return " to ".join(ends)


def _full_precision_times() -> str:
    results = reporting.read_json("low_bit")
    found = (results["rows"], results["one_thread"]["rows"])
    return _range(rows["float32, float32"]["ratio"]["median"] for rows in found)


def _quantized_times(results: dict[str, Any]) -> str:
    rows = results["rows"]
    full = ("optax.adamax", "float32, float32")
    return _range(row["ratio"]["median"] for name, row in rows.items() if name not in full)


def _compensation_times() -> str:
    rows = reporting.read_json("compensation")["step"]["rows"]
    return f"{rows['bfloat16, int8 residual']['ratio']['median']:.1f}"


def _gap_of_two_bytes() -> str:
    """Returns the largest mean gap of 2-byte state to float32 state, in standard deviations."""
    found = reporting.read_json("quality")["gap_in_deviations"]
    return f"{max(abs(gap) for gaps in found.values() for gap in gaps.values()):.2f}"


def _gap_of_residuals() -> str:
    """Returns the largest mean gap in held-out loss of parameters with a residual."""
    tasks = reporting.read_json("compensation")["tasks"].values()
    return "{:.2f}".format(
        max(
            abs(task["held_out_loss"]["gap"][f"bfloat16, {dtype} residual"])
            / task["held_out_loss"]["float32_deviation"]
            for task in tasks
            for dtype in ("int8", "int16")
        )
    )


def _shortened() -> str:
    """Returns how much shorter updates with uint8 v are for constant gradients, in percent."""
    rows = [row for row in reporting.read_json("update_error")["rows"] if row["v_dtype"] == "uint8"]
    return _range(100 * (1 - row["constant_mean"]) for row in rows)


def _to_bandwidth_bound(where: str) -> str:
    rows = reporting.read_json("peers")[where]["to_bound"]
    names = ("optax.adamax", "optax_adamax", "optax.adam", "Keras on JAX")
    return _range(rows[name]["median"] for name in names)


def _packed(leaves: str) -> str:
    rows = reporting.read_json("packing")["by_count"][leaves]
    return f"{rows['pack_small_leaves(adamax)']['step']['median']:.1f}"


def _learning_rates(noise: str = "") -> dict[str, dict[str, dict[str, Any]]]:
    """Returns the rows of the table of learning rates whose name contains `noise`."""
    rows = summaries(reporting.read_json("learning_rate"))
    return {name: row for name, row in rows if noise in name}


def _best(row: dict[str, dict[str, Any]], family: str) -> float:
    """Returns the lowest loss of the optimizers whose name contains `family`."""
    return min(found["loss"] for name, found in row.items() if family in name)


def _wins(family: str) -> str:
    """Returns in how many rows of the table of learning rates an optimizer has the lowest loss."""
    rows = _learning_rates().values()
    return str(sum(_best(row, family) == _best(row, "") for row in rows))


def _loss_gaps() -> dict[str, float]:
    """Returns the difference between the losses of Adam(W) and Adamax, in percent of the lower."""
    found = {}
    for name, row in _learning_rates().items():
        losses = _best(row, "optax.adam"), _best(row, "Adamax")
        found[name] = 100 * (max(losses) / min(losses) - 1)
    return found


def _largest_loss_gap() -> str:
    name, gap = max(_loss_gaps().items(), key=lambda item: item[1])
    return f"{gap:.0f} % ({name})"


def _rate_ratios(noise: str = "") -> list[float]:
    """Returns how many times the best rate of Adam the best rate of Adamax is, per row."""
    rows = _learning_rates(noise).values()
    return [row["Adamax, float32"]["rate"] / row["optax.adam"]["rate"] for row in rows]


def _good_rates(name: str) -> str:
    """Returns the mean number of good rates per row."""
    rows = _learning_rates().values()
    return f"{statistics.mean(len(row[name]['good_rates']) for row in rows):.1f}"


def _largest_update(family: str) -> float:
    """Returns the largest update of the tasks with b1 = 0.9, over the learning rate."""
    return max(
        found["largest_update"]
        for name, row in _learning_rates().items()
        for optimizer, found in row.items()
        if "b1 = 0.99" not in name and family in optimizer
    )


def _cycles(what: str, state: str, chip: str, dtype: str = "float32") -> dict[str, Any]:
    """Returns the estimates for one array with parameters and gradients of a dtype."""
    found = [
        row
        for row in reporting.read_json("accelerators")["rows"]
        if (row["what"], row["state"], row["target"]) == (what, state, chip)
        and row["dtypes"] == [dtype] * 2
    ]
    (row,) = found
    return row


def _cycles_of_two_passes() -> str:
    """Returns the cycles of steps that read the gradients twice, relative to the memory bound."""
    return _range(
        (
            _cycles(what, state, chip)["to_bound"]
            for what in ("nonfinite skip_step", "clip by global norm", "limit_spikes, clip")
            for state in ("float32, float32", "bfloat16, bfloat16", "int8, uint8")
            for chip in ("v5e", "v5p", "v6e")
        ),
        2,
    )


def _bfloat16_cycles(state: str) -> str:
    return f"{_cycles('plain', state, 'v5e', 'bfloat16')['to_bound']:.2f}"


def _compensated_cycles(chip: str) -> str:
    """Returns the cycles with 7 bytes per parameter, relative to float32 optax.adamax."""
    cycles = _cycles("compensation", "int8, uint8", chip, "bfloat16")["cycles"]
    return f"{cycles / _cycles('plain', 'optax.adamax', chip)['cycles']:.2f}"


def _leaves(chip: str, model: str) -> dict[str, Any]:
    """Returns the estimates for many arrays with 2-byte state."""
    rows = reporting.read_json("accelerators_leaves")["rows"]
    key = (chip, model, "2 bytes")
    return next(row for row in rows if (row["target"], row["model"], row["what"]) == key)


def _compile_time(chip: str, model: str) -> str:
    return f"{_leaves(chip, model)['to_optax']:.1f}"


def _largest_model(way: str) -> str:
    rows = reporting.read_json("model_size")["rows"]
    return next(f"{row['parameters'] / 1e9:.2f}" for row in rows if row["way"] == way)


VALUES: dict[str, Callable[[], str]] = {
    "adam_wins": lambda: _wins("optax.adam"),
    "adamax_wins": lambda: _wins("Adamax"),
    "adamax_largest_update": lambda: f"{_largest_update('Adamax'):.3f}",
    "adam_largest_update": lambda: f"{_largest_update('optax.adam'):.1f}",
    "bytes_compensated": lambda: _bytes("bfloat16, int8 residual, 2-byte state"),
    "bytes_compensated_int16": lambda: str(
        int(_bytes("bfloat16, int8 residual, 2-byte state")) + 1
    ),
    "bytes_float32": lambda: _bytes("float32, optax.adamax"),
    "compensation_time": _compensation_times,
    "full_precision_time": _full_precision_times,
    "gap_residuals": _gap_of_residuals,
    "gap_two_bytes": _gap_of_two_bytes,
    "good_rates_adam": lambda: _good_rates("optax.adam"),
    "good_rates_adamax": lambda: _good_rates("Adamax, float32"),
    "largest_loss_gap": _largest_loss_gap,
    "median_loss_gap": lambda: f"{statistics.median(_loss_gaps().values()):.1f}",
    "packed_150": lambda: _packed("150"),
    "packed_1000": lambda: _packed("1000"),
    "quantized_one_thread": lambda: _quantized_times(reporting.read_json("low_bit")["one_thread"]),
    "quantized_two_threads": lambda: _quantized_times(reporting.read_json("low_bit")),
    "rate_ratio": lambda: _range(_rate_ratios(), 0),
    "rate_ratio_noise": lambda: f"{statistics.median(_rate_ratios('noise added')):.0f}",
    "rate_ratio_own": lambda: f"{statistics.median(_rate_ratios('own gradients')):.0f}",
    "rate_rows": lambda: str(len(_learning_rates())),
    "to_limit": lambda: _to_bandwidth_bound("default"),
    "to_limit_switched": lambda: _to_bandwidth_bound("switched"),
    "uint8_shortened": _shortened,
    "v_exact": lambda: f"{reporting.read_json('dtypes')['exact_v']:.3f}",
    "v_here": lambda: _v("optax_adamax"),
    "v_others": lambda: _v("optax", "torch"),
    # Estimates by XLA's compilers.
    "bfloat16_cycles_optax": lambda: _bfloat16_cycles("optax.adamax"),
    "bfloat16_cycles_four_bytes": lambda: _bfloat16_cycles("bfloat16, bfloat16"),
    "bfloat16_cycles_two_bytes": lambda: _bfloat16_cycles("int8, uint8"),
    "compensated_cycles_v5e": lambda: _compensated_cycles("v5e"),
    "compensated_cycles_v6e": lambda: _compensated_cycles("v6e"),
    "compile_time_gpt2_gpu": lambda: _compile_time("H100", "GPT-2"),
    "compile_time_gpt2_tpu": lambda: _compile_time("v6e", "GPT-2"),
    "compile_time_small_gpu": lambda: _compile_time("H100", "1,000 of 64"),
    "compile_time_small_tpu": lambda: _compile_time("v6e", "1,000 of 64"),
    "kernels_small_gpu": lambda: str(_leaves("H100", "1,000 of 64")["kernels"]),
    "largest_model_compensated": lambda: _largest_model(SEVEN_BYTES),
    "largest_model_optax": lambda: _largest_model("optax.adamax, float32"),
    "largest_model_two_bytes": lambda: _largest_model("2 bytes of state, float32"),
    "tpu7x_two_bytes": lambda: f"{_cycles('plain', 'int8, uint8', '7x')['to_optax']:.2f}",
    "two_passes": _cycles_of_two_passes,
}


def fill_values(text: str) -> str:
    """Returns the page with its numbers."""

    def number(match: re.Match[str]) -> str:
        return f"<!-- value: {match[1]} -->{VALUES[match[1]]()}<!-- end -->"

    return re.sub(r"<!-- value: (\w+) -->.*?<!-- end -->", number, text)
