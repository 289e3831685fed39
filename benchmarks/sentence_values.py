"""Numbers in the sentences of the documentation, each from a JSON file in benchmarks/results."""

from collections.abc import Callable, Iterable
from typing import Any

from benchmarks import reporting
from benchmarks.tables import summaries


def _v(who: str) -> str:
    """Returns v after 2,000 small gradients with bfloat16 parameters."""
    rows = reporting.read_json("dtypes")["rows"]
    return next(f"{x['v']:.3g}" for x in rows if (x["dtype"], x["who"]) == ("bfloat16", who))


def _bytes(name: str) -> str:
    return str(sum(reporting.read_json("readme_figure")["bytes"][name].values()))


def _range(numbers: Iterable[float], digits: int = 1) -> str:
    """Returns the least and the largest number, or one number if they are written alike."""
    numbers = list(numbers)
    ends = dict.fromkeys(f"{x:.{digits}f}" for x in (min(numbers), max(numbers)))
    return " to ".join(ends)


def _quantized_times(results: dict[str, Any]) -> str:
    rows = results["rows"]
    full = ("optax.adamax", "float32, float32")
    return _range(row["ratio"]["median"] for name, row in rows.items() if name not in full)


def _compensation_times() -> str:
    rows = reporting.read_json("compensation")["step"]["rows"]
    return f"{rows['bfloat16, int8 residual']['ratio']['median']:.1f}"


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


def _wins(family: str) -> str:
    """Returns in how many rows of the table of learning rates an optimizer has the lowest loss."""
    found = [rows for _, rows in summaries(reporting.read_json("learning_rate"))]
    best = [min(rows, key=lambda name: rows[name]["loss"]) for rows in found]
    return str(sum(family in name for name in best))


def _rate_ratio() -> str:
    """Returns how many times the best rate of Adam the best rate of Adamax is."""
    found = [rows for _, rows in summaries(reporting.read_json("learning_rate"))]
    return _range((x["Adamax, float32"]["rate"] / x["optax.adam"]["rate"] for x in found), 0)


def _largest_updates(family: str, b1: str) -> str:
    """Returns the largest update of the tasks with this b1, over the learning rate."""
    rows = summaries(reporting.read_json("learning_rate"))
    found = [
        row["largest_update"]
        for name, row_of in rows
        if ("b1 = 0.99" in name) == (b1 == "0.99")
        for optimizer, row in row_of.items()
        if family in optimizer
    ]
    return f"{max(found):.3f}" if family == "Adamax" else f"{max(found):.1f}"


VALUES: dict[str, Callable[[], str]] = {
    "adam_wins": lambda: _wins("optax.adam"),
    "adamax_wins": lambda: _wins("Adamax"),
    "adamax_largest_update": lambda: _largest_updates("Adamax", "0.9"),
    "adam_largest_update": lambda: _largest_updates("optax.adam", "0.9"),
    "bytes_compensated": lambda: _bytes("bfloat16, int8 residual, 2-byte state"),
    "bytes_compensated_int16": lambda: str(
        int(_bytes("bfloat16, int8 residual, 2-byte state")) + 1
    ),
    "bytes_float32": lambda: _bytes("float32, optax.adamax"),
    "compensation_time": _compensation_times,
    "packed_150": lambda: _packed("150"),
    "packed_1000": lambda: _packed("1000"),
    "quantized_one_thread": lambda: _quantized_times(reporting.read_json("low_bit")["one_thread"]),
    "quantized_two_threads": lambda: _quantized_times(reporting.read_json("low_bit")),
    "rate_ratio": _rate_ratio,
    "rate_rows": lambda: str(len(summaries(reporting.read_json("learning_rate")))),
    "to_limit": lambda: _to_bandwidth_bound("default"),
    "to_limit_switched": lambda: _to_bandwidth_bound("switched"),
    "uint8_shortened": _shortened,
    "v_exact": lambda: f"{reporting.read_json('dtypes')['exact_v']:.3f}",
    "v_here": lambda: _v("optax_adamax"),
}
