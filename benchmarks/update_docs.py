"""Writes tables and numbers of the documentation from the JSON files in `results`.

Tables are between `<!-- table: NAME -->` and `<!-- end -->`. Numbers in sentences are between
`<!-- value: NAME -->` and `<!-- end -->`. In Markdown, a comment at the beginning of a line would
end the paragraph.

python -m benchmarks.update_docs [--check]
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from benchmarks import timing
from benchmarks.learning_rate_summary import span, summary
from optax_adamax._v_formats import V_FORMATS

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md"]
PAGES += [ROOT / "docs" / f"{name}.md" for name in ("index", "benchmarks", "reliability")]
PAGES += [
    ROOT / "docs" / "guide" / f"{name}.md"
    for name in (
        "bfloat16_parameters",
        "formats",
        "low_precision",
        "nonfinite_and_outliers",
        "when_to_use",
    )
]
Row = Iterable[object]


def table(header: Row, rows: Iterable[Row]) -> str:
    """A table in Markdown."""
    lines = [list(header), ["---"] * len(list(header)), *map(list, rows)]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def storage_formats(results: dict[str, Any]) -> str:
    """Shows range, errors and step time of the formats of 8, 4, 3 and 2 bytes."""
    times = _results("low_bit")["rows"]
    errors = {"float32": "rounding", "bfloat16": "at most 2^-8", "uint8": "at most 1/8"}
    shown = [("float32", "float32"), ("bfloat16", "bfloat16")]
    shown += [("bfloat16", "uint8"), ("int8", "uint8")]
    rows = []
    for row in results["rows"]:
        m, v = row["m_dtype"], row["v_dtype"]
        if (m, v) not in shown:
            continue
        low, high = V_FORMATS[v].range
        constant = f"{row['constant_mean']:.3f}"
        random, time = (
            f"{100 * row['random_rms']:.1f} %",
            f"{times[f'{m}, {v}']['ratio']['median']:.2f}",
        )
        bounds = (
            "all"
            if v == "float32"
            else f"{low:.1e} to {high:.1e}".replace("e+0", "e").replace("e+", "e")
        )
        size = f"{times[f'{m}, {v}']['state_bytes']:g}"
        rows.append([f"{m}, {v}", size, bounds, errors[v], constant, random, time])
    header = ["m, v", "bytes per parameter", "range of v", "error of v"]
    header += ["update, constant gradients (exact: 1)", "update, random gradients", "step time"]
    return table(header, rows)


def bytes_by_part(results: dict[str, Any]) -> str:
    """Shows the bytes per parameter of weights, gradients, residual and state."""
    rows = [[name, *row.values(), sum(row.values())] for name, row in results["bytes"].items()]
    return table(["", *next(iter(results["bytes"].values())), "together"], rows)


def dtypes(results: dict[str, Any]) -> str:
    """v and the parameter in every dtype, a row a dtype."""
    who = {"ours": "optax_adamax", "optax": "optax", "torch": "PyTorch"}
    cells = {(row["dtype"], row["who"]): row for row in results["rows"]}
    rows = []
    for dtype in dict.fromkeys(row["dtype"] for row in results["rows"]):
        found = [cells[dtype, name] for name in who]
        v = [f"{row['v']:.4f}" for row in found]
        kept = ["NaN" if row["parameter"] != row["parameter"] else "unchanged" for row in found]
        rows.append([dtype, *v, *kept])
    header = ["parameters", *(f"v, {x}" for x in who.values())]
    return table([*header, *(f"g = 0, {x}" for x in who.values())], rows)


def low_bit(results: dict[str, Any]) -> str:
    """Bytes and step time of every format."""
    alone = results["one_thread"]["rows"]
    rows = [
        [
            name,
            f"{row['state_bytes']:g}",
            f"{row['predicted']['ratio']:.2f}",
            timing.text(row["ratio"]),
            timing.text(alone[name]["ratio"]),
            row["passes"],
        ]
        for name, row in results["rows"].items()
    ]
    threads = results["provenance"]["threads"]
    header = ["m, v", "bytes per parameter", "time of one pass", f"step time, {threads} threads"]
    return table([*header, "one thread", "passes over memory"], rows)


def peers(results: dict[str, Any]) -> str:
    """Every peer beside optax.adamax and the limit, and JAX with both switches."""
    plain, switched = results["default"], results["switched"] or {}
    names = dict.fromkeys([*plain["to_optax"], *plain["missing"]])
    rows = []
    for name in names:
        if name in plain["missing"]:
            rows.append([name, f"not measured: {plain['missing'][name]}", "", ""])
            continue
        found = [
            plain["to_optax"],
            plain.get("to_limit", {}),
            switched.get("to_limit", {}),
        ]
        rows.append([name, *(timing.text(x[name]) if name in x else "" for x in found)])
    return table(["", "to `optax.adamax`", "to the limit", "to the limit, both switches"], rows)


def scaling(results: dict[str, Any]) -> str:
    """Slopes."""
    names = list(results["slopes"]["step, leaves"])
    rows = [
        [what, *(f"{found[name]:.2f}" if name in found else "" for name in names)]
        for what, found in results["slopes"].items()
    ]
    return table(["slope of", *names], rows)


def packing(results: dict[str, Any]) -> str:
    """Steps and compilation of many small leaves."""
    counts = results["by_count"]
    header = [f"{what}, {n} leaves" for n in counts for what in ("step", "compilation")]
    rows = [
        [
            name,
            *(timing.text(rows[name][x]) for rows in counts.values() for x in ("step", "compile")),
        ]
        for name in next(iter(counts.values()))
    ]
    return table(["", *header], rows)


def overhead(results: dict[str, Any]) -> str:
    """Python time of an update, and time of a step on a small leaf."""
    names = list(next(iter(results["rows"].values())))
    rows = [
        [how, f"{1e3 * row[names[0]]['seconds']['median']:.2g} ms"]
        + [timing.text(row[name]["ratio"]) for name in names[1:]]
        for how, row in results["rows"].items()
    ]
    return table(["", *names], rows)


def quality(results: dict[str, Any]) -> str:
    """Final held-out losses: each format's paired gap to float32 state, in deviations of it."""
    shown = ["optax.adamax, float32", "4 bytes: bfloat16, bfloat16", "2 bytes: int8, uint8"]
    shown += ["naive bfloat16"]
    rows = []
    for name, task in results["tasks"].items():
        found = task["held_out_loss"]
        deviation = found["float32_deviation"]
        gaps = [f"{found['gap'][x] / deviation:+.2f}" for x in shown]
        rows.append([name, f"{found['float32_mean']:.4f}", f"{deviation:.4f}", *gaps])
    return table(["task", "float32 loss", "deviation", *shown], rows)


def compensation(results: dict[str, Any]) -> str:
    """Shows where training ends with each way to store parameters."""
    tasks = results["tasks"]
    rows = []
    for name, end in results["constant_gradient"]["ends"].items():
        found = [task["held_out_loss"] for task in tasks.values()]
        gaps = [f"{x['gap'].get(name, 0.0) / x['float32_deviation']:+.2f}" for x in found]
        rows.append([name, f"{end['true']:.2f}", *gaps])
    return table(["parameters", "100,000 steps of 0.001", *tasks], rows)


def bfloat16_costs(results: dict[str, Any]) -> str:
    """Shows bytes, temporary bytes and step time of each way to store parameters."""
    rows = [
        [name, f"{row['held']:.0f}", f"{row['temporary']:.0f}", timing.text(row["ratio"])]
        for name, row in results["step"]["rows"].items()
    ]
    return table(["parameters", "bytes per parameter", "temporary bytes", "step time"], rows)


def learning_rate(results: dict[str, Any]) -> str:
    """Shows the lowest loss of each optimizer, its rate, and the rates nearly as good."""
    rows = []
    for name, found in _summaries(results):
        best = min(row["loss"] for row in found.values())
        cells = []
        for row in found.values():
            loss = f"{row['loss']:.4g}"
            loss = f"**{loss}**" if row["loss"] == best else loss
            cells.append(f"{loss} at {row['rate']:g}<br>good: {span(row['good_rates'])}")
        rows.append([name, *cells])
    return table(["task, gradients", *found], rows)


def largest_update(results: dict[str, Any]) -> str:
    """Shows the largest update over the learning rate, in all runs of an optimizer and task."""
    rows = []
    for name, found in _summaries(results):
        shown = {k: row["largest_update"] for k, row in found.items() if "sgd" not in k}
        rows.append([name, *(f"{x:.3f}" for x in shown.values())])
    return table(["task, gradients", *shown], rows)


def _summaries(results: dict[str, Any]) -> list[tuple[str, dict[str, dict[str, Any]]]]:
    return [
        (f"{name}, {noise}", summary(task, noise))
        for name, task in results["tasks"].items()
        for noise in results["noises"]
    ]


def state_bytes(results: dict[str, Any]) -> str:
    """Gigabytes of state a device, like the parameters and with ZeRO-1."""
    rows: dict[tuple[str, int], list[str]] = {}
    formats = list(dict.fromkeys(row["format"] for row in results["rows"]))
    for row in results["rows"]:
        sizes = f"{row['like_parameters'] / 1e9:.3g} → {row['zero'] / 1e9:.3g}"
        rows.setdefault((row["model"], row["devices"]), []).append(sizes)
    return table(["model", "devices", *formats], [[*key, *cells] for key, cells in rows.items()])


def _formats(results: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of float32, of 4 bytes and of 2 bytes."""
    shown = [("float32", "float32"), ("bfloat16", "bfloat16"), ("int8", "uint8")]
    rows = [row for row in results["rows"] if (row["m_dtype"], row["v_dtype"]) in shown]
    return sorted(rows, key=lambda row: shown.index((row["m_dtype"], row["v_dtype"])))


def reliability(results: dict[str, Any]) -> str:
    """What becomes of v, m and the step in each scenario, beside float64."""
    rows = []
    for name in dict.fromkeys(row["scenario"] for row in results["rows"]):
        for row in _formats(results):
            if row["scenario"] == name:
                held = row["v_lowest"] is not None
                v = f"{row['v_lowest']:.3g} to {row['v_highest']:.3g}" if held else "treated as 0"
                m = f"{row['m_error']:.2g}" if held else "treated as 0"
                step = f"{row['largest_step']:.3f}"
                last = f"{row['step_error_last']:.2g}"
                rows.append([name, f"{row['m_dtype']}, {row['v_dtype']}", v, m, step, last])
    header = ["what happens", "m, v", "v / exact v", "error of m, in v", "largest step / bound"]
    return table([*header, "error of the last 200 steps"], rows)


def reliability_long(results: dict[str, Any]) -> str:
    """How far m and v are from float64 after a million steps."""
    rows = [
        [f"{r['m_dtype']}, {r['v_dtype']}", f"{r['v_error']:.2g}", f"{r['m_error']:.2g}"]
        for r in results["rows"]
    ]
    return table(["m, v", "largest relative error of v", "largest error of m, in v"], rows)


def nonfinite_costs(results: dict[str, Any]) -> str:
    """Shows step time and temporary bytes of each policy, a column per storage format."""
    cells: dict[str, dict[str, str]] = {}
    for row in _formats(results):
        extra = f"{row['temporary_bytes'] / results['parameters']:.1f}"
        name = f"{row['m_dtype']}, {row['v_dtype']}"
        cells.setdefault(row["policy"], {})[name] = f"{timing.text(row['ratio'])}; {extra}"
    header = next(iter(cells.values()))
    return table(["policy", *header], [[name, *row.values()] for name, row in cells.items()])


def fuzz(results: dict[str, Any]) -> str:
    """How much of the state machine was run."""
    seeds = results["provenance"]["seeds"]
    row = [f"{results['examples']:,}", f"{results['rules']:,}", f"{seeds[0]} to {seeds[-1]}"]
    return table(["examples", "rules", "seeds", "minutes"], [[*row, f"{results['minutes']:.0f}"]])


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "bytes_by_part": bytes_by_part,
    "storage_formats": storage_formats,
    "bfloat16_costs": bfloat16_costs,
    "compensation": compensation,
    "dtypes": dtypes,
    "largest_update": largest_update,
    "learning_rate": learning_rate,
    "low_bit": low_bit,
    "nonfinite_costs": nonfinite_costs,
    "overhead": overhead,
    "packing": packing,
    "peers": peers,
    "quality": quality,
    "scaling": scaling,
    "state_bytes": state_bytes,
    "fuzz": fuzz,
    "reliability": reliability,
    "reliability_long": reliability_long,
}
# The file of a table, if it has another name.
FILES = {
    "bytes_by_part": "readme_figure",
    "storage_formats": "update_error",
    "bfloat16_costs": "compensation",
    "largest_update": "learning_rate",
    "nonfinite_costs": "reliability_costs",
}


# Tables of sizes that follow from shapes and dtypes.
COMPUTED = ("bytes_by_part", "state_bytes")


def _results(name: str) -> dict[str, Any]:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text("utf-8"))


def _v(who: str) -> str:
    """Returns v after 2,000 small gradients with bfloat16 parameters."""
    rows = _results("dtypes")["rows"]
    return next(f"{x['v']:.3g}" for x in rows if (x["dtype"], x["who"]) == ("bfloat16", who))


def _bytes(name: str) -> str:
    return str(sum(_results("readme_figure")["bytes"][name].values()))


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
    rows = _results("compensation")["step"]["rows"]
    return f"{rows['bfloat16, int8 residual']['ratio']['median']:.1f}"


def _shortened() -> str:
    """Returns how much shorter updates with uint8 v are for constant gradients, in percent."""
    rows = [row for row in _results("update_error")["rows"] if row["v_dtype"] == "uint8"]
    return _range(100 * (1 - row["constant_mean"]) for row in rows)


def _to_limit(where: str) -> str:
    rows = _results("peers")[where]["to_limit"]
    names = ("optax.adamax", "optax_adamax", "optax.adam", "Keras on JAX")
    return _range(rows[name]["median"] for name in names)


def _packed(leaves: str) -> str:
    rows = _results("packing")["by_count"][leaves]
    return f"{rows['pack_small_leaves(adamax)']['step']['median']:.1f}"


def _wins(family: str) -> str:
    """Returns in how many rows of the table of learning rates an optimizer has the lowest loss."""
    found = [rows for _, rows in _summaries(_results("learning_rate"))]
    best = [min(rows, key=lambda name: rows[name]["loss"]) for rows in found]
    return str(sum(family in name for name in best))


def _rate_ratio() -> str:
    """Returns how many times the best rate of Adam the best rate of Adamax is."""
    found = [rows for _, rows in _summaries(_results("learning_rate"))]
    return _range((x["Adamax, float32"]["rate"] / x["optax.adam"]["rate"] for x in found), 0)


def _largest_updates(family: str, b1: str) -> str:
    """Returns the largest update of the tasks with this b1, over the learning rate."""
    rows = _summaries(_results("learning_rate"))
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
    "quantized_one_thread": lambda: _quantized_times(_results("low_bit")["one_thread"]),
    "quantized_two_threads": lambda: _quantized_times(_results("low_bit")),
    "rate_ratio": _rate_ratio,
    "rate_rows": lambda: str(len(_summaries(_results("learning_rate")))),
    "to_limit": lambda: _to_limit("default"),
    "to_limit_switched": lambda: _to_limit("switched"),
    "uint8_shortened": _shortened,
    "v_exact": lambda: f"{_results('dtypes')['exact_v']:.3f}",
    "v_here": lambda: _v("ours"),
}


def _load(made: dict[str, Any]) -> str:
    """Threads, and the load of the machine in the minute before, and in the last one."""
    if "load" not in made:
        return ", load not recorded"
    before, after = made["load"]["before"][0], made["load"]["after"][0]
    return f", {made['threads']} threads, load {before:.1f} before and {after:.1f} at the end"


def filled(text: str) -> str:
    """Returns a page with its numbers and tables, each table with its provenance below it."""

    def fill(match: re.Match[str]) -> str:
        name = match[1]
        results = _results(FILES.get(name, name))
        made = results["provenance"]
        versions = ", ".join(f"{k} {v}" for k, v in made["versions"].items())
        how = "Computed" if name in COMPUTED else "Measured"
        where = f"{made['machine']}{_load(made)}; {versions}"
        note = f"<sub>{how} by `{made['command']}` on {where}.</sub>"
        return f"<!-- table: {name} -->\n{TABLES[name](results)}\n\n{note}\n<!-- end -->"

    def number(match: re.Match[str]) -> str:
        return f"<!-- value: {match[1]} -->{VALUES[match[1]]()}<!-- end -->"

    text = re.sub(r"<!-- value: (\w+) -->.*?<!-- end -->", number, text)
    return re.sub(r"<!-- table: (\w+) -->.*?<!-- end -->", fill, text, flags=re.DOTALL)


def main() -> int:
    """Fills the tables in, or only says whether they are as the JSON files have them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    stale = [page for page in PAGES if page.read_text("utf-8") != filled(page.read_text("utf-8"))]
    if check:
        return int(bool(stale))
    for page in stale:
        page.write_text(filled(page.read_text("utf-8")), "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
