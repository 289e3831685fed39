"""Writes the results of each benchmark as a Markdown table.

Each function receives the contents of a JSON file in benchmarks/results and returns one table.
`benchmarks.update_docs` puts the tables into the pages.
"""

from collections.abc import Callable, Iterable
from typing import Any

from benchmarks import reporting, timing
from benchmarks.learning_rate_summary import format_rates, summary
from optax_adamax._v_formats import V_FORMATS

Row = Iterable[object]


def table(header: Row, rows: Iterable[Row]) -> str:
    """Formats a Markdown table."""
    lines = [list(header), ["---"] * len(list(header)), *map(list, rows)]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def storage_formats(results: dict[str, Any]) -> str:
    """Shows range, errors and step time of the storage formats with 8, 4, 3 and 2 bytes."""
    times = reporting.read_json("low_bit")["rows"]
    errors = {"float32": "rounding", "bfloat16": "at most 1/256", "uint8": "at most 1/8"}
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
    """Shows v and the parameter in each package, one row per dtype."""
    who = {"optax_adamax": "optax_adamax", "optax": "optax", "torch": "PyTorch"}
    cells = {(row["dtype"], row["who"]): row for row in results["rows"]}
    rows = []
    for dtype in dict.fromkeys(row["dtype"] for row in results["rows"]):
        found = [cells[dtype, name] for name in who]
        v = [f"{row['v']:.4f}" for row in found]
        unmoved = ["NaN" if row["parameter"] != row["parameter"] else "unchanged" for row in found]
        rows.append([dtype, *v, *unmoved])
    header = ["parameters", *(f"v, {x}" for x in who.values())]
    return table([*header, *(f"g = 0, {x}" for x in who.values())], rows)


def low_bit(results: dict[str, Any]) -> str:
    """Shows bytes, step time and passes over memory of each storage format."""
    alone = results["one_thread"]["rows"]
    rows = [
        [
            name,
            f"{row['state_bytes']:g}",
            f"{row['predicted']['ratio']:.2f}",
            timing.format_ratio(row["ratio"]),
            timing.format_ratio(alone[name]["ratio"]),
            row["passes"],
        ]
        for name, row in results["rows"].items()
    ]
    threads = results["provenance"]["threads"]
    header = ["m, v", "bytes per parameter", "time of one pass", f"step time, {threads} threads"]
    return table([*header, "one thread", "passes over memory"], rows)


def peers(results: dict[str, Any]) -> str:
    """Shows the step time of each framework relative to optax.adamax and to the memory bound."""
    plain, switched = results["default"], results["switched"] or {}
    names = dict.fromkeys([*plain["to_optax"], *plain["missing"]])
    rows = []
    for name in names:
        if name in plain["missing"]:
            rows.append([name, f"not measured: {plain['missing'][name]}", "", ""])
            continue
        found = [
            plain["to_optax"],
            plain.get("to_bound", {}),
            switched.get("to_bound", {}),
        ]
        rows.append([name, *(timing.format_ratio(x[name]) if name in x else "" for x in found)])
    bounds = "relative to the bound", "relative to the bound, both switches"
    return table(["", "relative to `optax.adamax`", *bounds], rows)


def scaling(results: dict[str, Any]) -> str:
    """Shows the log-log slopes of time and memory."""
    names = list(results["slopes"]["step, leaves"])
    rows = [
        [what, *(f"{found[name]:.2f}" if name in found else "" for name in names)]
        for what, found in results["slopes"].items()
    ]
    return table(["slope of", *names], rows)


def packing(results: dict[str, Any]) -> str:
    """Shows step and compile times for many small leaves."""
    counts = results["by_count"]
    header = [f"{what}, {n} leaves" for n in counts for what in ("step", "compilation")]
    rows = [
        [
            name,
            *(
                timing.format_ratio(rows[name][x])
                for rows in counts.values()
                for x in ("step", "compile")
            ),
        ]
        for name in next(iter(counts.values()))
    ]
    return table(["", *header], rows)


def overhead(results: dict[str, Any]) -> str:
    """Shows the time of an update in Python, and of a jitted step on a small leaf."""
    names = list(next(iter(results["rows"].values())))
    rows = [
        [how, f"{1e3 * row[names[0]]['seconds']['median']:.2g} ms"]
        + [timing.format_ratio(row[name]["ratio"]) for name in names[1:]]
        for how, row in results["rows"].items()
    ]
    return table(["", *names], rows)


def quality(results: dict[str, Any]) -> str:
    """Shows the gap of the held-out loss to float32 state, in its seed-to-seed deviations."""
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
        rows.append([name, f"{end['master']:.2f}", *gaps])
    return table(["parameters", "100,000 steps of 0.001", *tasks], rows)


def bfloat16_costs(results: dict[str, Any]) -> str:
    """Shows bytes per parameter and step time of each way to store parameters."""
    rows = [
        [
            name,
            f"{row['bytes_per_parameter']:.0f}",
            f"{row['temporary_bytes_per_parameter']:.0f}",
            timing.format_ratio(row["ratio"]),
        ]
        for name, row in results["step"]["rows"].items()
    ]
    return table(["parameters", "bytes per parameter", "temporary bytes", "step time"], rows)


def learning_rate(results: dict[str, Any]) -> str:
    """Shows the lowest loss of each optimizer, its rate, and the rates nearly as good."""
    rows = []
    for name, found in summaries(results):
        best = min(row["loss"] for row in found.values())
        cells = []
        for row in found.values():
            loss = f"{row['loss']:.4g}"
            loss = f"**{loss}**" if row["loss"] == best else loss
            cells.append(f"{loss} at {row['rate']:g}<br>good: {format_rates(row['good_rates'])}")
        rows.append([name, *cells])
    return table(["task, gradients", *found], rows)


def largest_update(results: dict[str, Any]) -> str:
    """Shows the largest |update| / learning rate over all runs of an optimizer and task."""
    rows = []
    for name, found in summaries(results):
        shown = {k: row["largest_update"] for k, row in found.items() if "sgd" not in k}
        rows.append([name, *(f"{x:.3f}" for x in shown.values())])
    return table(["task, gradients", *shown], rows)


def summaries(results: dict[str, Any]) -> list[tuple[str, dict[str, dict[str, Any]]]]:
    return [
        (f"{name}, {noise}", summary(task, noise))
        for name, task in results["tasks"].items()
        for noise in results["noises"]
    ]


def state_bytes(results: dict[str, Any]) -> str:
    """Shows gigabytes of state per device, sharded like the parameters and with ZeRO-1."""
    rows: dict[tuple[str, int], list[str]] = {}
    formats = list(dict.fromkeys(row["format"] for row in results["rows"]))
    for row in results["rows"]:
        sizes = f"{row['like_parameters'] / 1e9:.3g} → {row['zero'] / 1e9:.3g}"
        rows.setdefault((row["model"], row["devices"]), []).append(sizes)
    return table(["model", "devices", *formats], [[*key, *cells] for key, cells in rows.items()])


def _formats(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns the rows of the storage formats with 8, 4 and 2 bytes, in this order."""
    shown = [("float32", "float32"), ("bfloat16", "bfloat16"), ("int8", "uint8")]
    rows = [row for row in results["rows"] if (row["m_dtype"], row["v_dtype"]) in shown]
    return sorted(rows, key=lambda row: shown.index((row["m_dtype"], row["v_dtype"])))


def reliability(results: dict[str, Any]) -> str:
    """Shows the errors of v, m and the step in each scenario, compared with float64."""
    rows = []
    for name in dict.fromkeys(row["scenario"] for row in results["rows"]):
        for row in _formats(results):
            if row["scenario"] == name:
                stored = row["v_lowest"] is not None
                v = f"{row['v_lowest']:.3g} to {row['v_highest']:.3g}" if stored else "treated as 0"
                m = f"{row['m_error']:.2g}" if stored else "treated as 0"
                step = f"{row['largest_step']:.3f}"
                last = f"{row['step_error_last']:.2g}"
                rows.append([name, f"{row['m_dtype']}, {row['v_dtype']}", v, m, step, last])
    header = ["what happens", "m, v", "v / exact v", "error of m, in v", "largest step / bound"]
    return table([*header, "error of the last 200 steps"], rows)


def reliability_long(results: dict[str, Any]) -> str:
    """Shows the largest errors of m and v, compared with float64, in a million steps."""
    rows = [
        [f"{r['m_dtype']}, {r['v_dtype']}", f"{r['v_error']:.2g}", f"{r['m_error']:.2g}"]
        for r in results["rows"]
    ]
    return table(["m, v", "largest relative error of v", "largest error of m, in v"], rows)


def nonfinite_costs(results: dict[str, Any]) -> str:
    """Shows step time and temporary bytes of each policy, one column per storage format."""
    cells: dict[str, dict[str, str]] = {}
    for row in _formats(results):
        extra = f"{row['temporary_bytes'] / results['parameters']:.1f}"
        name = f"{row['m_dtype']}, {row['v_dtype']}"
        cells.setdefault(row["policy"], {})[name] = f"{timing.format_ratio(row['ratio'])}; {extra}"
    header = next(iter(cells.values()))
    return table(["policy", *header], [[name, *row.values()] for name, row in cells.items()])


def fuzz(results: dict[str, Any]) -> str:
    """Shows the number of examples and rules that the state machine has run."""
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
# The results file of each table whose file has another name.
FILES = {
    "bytes_by_part": "readme_figure",
    "storage_formats": "update_error",
    "bfloat16_costs": "compensation",
    "largest_update": "learning_rate",
    "nonfinite_costs": "reliability_costs",
}
