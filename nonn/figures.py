"""Stage `figures`: the tables, the report and the figures of an experiment.

Nothing is computed or chosen here but ratios of numbers that other stages measured (`nonn.evaluate`,
`nonn.benchmark`) or counted (`nonn.design`). How figures look is left to `nonn.plots` and
`nonn.graph_plots`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from nonn import graph_plots, plots
from nonn.errors import UserError
from nonn.files import read_json, write_json, write_text
from nonn.graph import load_graph
from nonn.missing_tables import chosen_strategies, describe_missing, write_missing_csv
from nonn.params import PARTITION_METHODS, SINGLE_METHODS, Params
from nonn.paths import Paths
from nonn.plots import METHODS

#: Columns of ``summary.csv`` and how each is written; pandas' own formatting may change.
COLUMNS = {
    "method": "{}",
    "network": "{}",
    "n_students": "{:d}",
    "n_seeds": "{:d}",
    "accuracy_mean": "{:.6f}",
    "accuracy_sd": "{:.6f}",
    "params_per_device": "{:d}",
    "params_total": "{:d}",
    "weight_bytes_per_device": "{:d}",
    "macs_per_device": "{:d}",
    "feature_bytes": "{:d}",
    "latency_p50_ms": "{:.4f}",
    "p_value_vs_nonn": "{:.6f}",
}
#: p-values below are called significant.
SIGNIFICANCE = 0.05

Key = tuple[str, str]  # network and method


def summarise_methods(
    rows: Iterable[Mapping],
    designs: Mapping[Key, list[dict]],
    latencies: Mapping[Key, float],
    n_classes: int,
    bytes_per_value: int,
) -> pd.DataFrame:
    """Join what was measured and counted of each method on each network.

    Parameters
    ----------
    rows : iterable of mapping
        Of ``evaluation.json``.
    designs : mapping
        Network and method to the students, each ``{n_filters, cost}``; ``n_filters`` is None for a
        model that classifies alone. The teacher's network is "".
    latencies : mapping
        Network and method to the p50 latency of the slowest student (ms); without an entry where
        it was not measured.
    n_classes, bytes_per_value : int
        What a model that classifies alone sends.

    Returns
    -------
    DataFrame
        `COLUMNS` and ``memory_bytes_per_device``, ``weight_bytes`` plus peak activations. The
        teacher first, then each network's methods in the order of `METHODS`. *Per device* is the
        largest of the devices; ``feature_bytes`` is what one device sends for one image.
    """
    table = []
    for row in rows:
        key = row["network"], row["method"]
        costs = [student["cost"] for student in designs[key]]
        sent = [student["n_filters"] or n_classes for student in designs[key]]
        table.append(
            {
                **{name: row[name] for name in ("method", "network", "n_students", "n_seeds")},
                "accuracy_mean": row["accuracy_mean"],
                "accuracy_sd": row["accuracy_sd"],
                "params_per_device": max(cost["params"] for cost in costs),
                "params_total": sum(cost["params"] for cost in costs),
                "weight_bytes_per_device": max(cost["weight_bytes"] for cost in costs),
                "macs_per_device": max(cost["macs"] for cost in costs),
                "feature_bytes": max(sent) * bytes_per_value,
                "latency_p50_ms": latencies.get(key),
                "p_value_vs_nonn": row["p_value_vs_nonn"],
                "memory_bytes_per_device": max(cost["weight_bytes"] + cost["peak_activation_bytes"] for cost in costs),
            }
        )
    networks = list(dict.fromkeys(["", *(network for network, _ in designs)]))
    order = {key: (networks.index(key[0]), list(METHODS).index(key[1])) for key in designs}
    table.sort(key=lambda entry: order[entry["network"], entry["method"]])
    measured = ["accuracy_mean", "accuracy_sd", "latency_p50_ms", "p_value_vs_nonn"]
    return pd.DataFrame(table).astype(dict.fromkeys(measured, float))


def compare_network(methods: pd.DataFrame, network: str) -> dict[str, Any]:
    """Compare a network of networks with the teacher and with its best baseline.

    Parameters
    ----------
    methods : DataFrame
        From `summarise_methods`.
    network : str

    Returns
    -------
    dict
        Accuracies as fractions of 1, gap in percentage points. The ratios say how many times less
        memory a device needs and how many times sooner its slowest student answers than the
        teacher. The best baseline is the one of highest mean accuracy on this network, whatever it
        costs; None for all of its keys where there is no baseline. It counts as beaten where the
        network's mean accuracy is higher and the paired test's p-value is below `SIGNIFICANCE`.
    """
    teacher, nonn = _row(methods, "", "teacher"), _row(methods, network, "nonn")
    comparison = {
        "network": network,
        "accuracy": round(nonn["accuracy_mean"], 6),
        "teacher_accuracy": round(teacher["accuracy_mean"], 6),
        "accuracy_gap_points": round(100 * (teacher["accuracy_mean"] - nonn["accuracy_mean"]), 4),
        "memory_ratio": round(teacher["memory_bytes_per_device"] / nonn["memory_bytes_per_device"], 4),
        "performance_ratio": round(teacher["latency_p50_ms"] / nonn["latency_p50_ms"], 4),
    }
    baselines = methods[(methods["network"] == network) & (methods["method"] != "nonn")]
    if baselines.empty:
        keys = ("best_baseline", "best_baseline_accuracy", "best_baseline_beaten", "p_value")
        return comparison | dict.fromkeys(keys)
    best = baselines.loc[baselines["accuracy_mean"].idxmax()]
    return comparison | {
        "best_baseline": best["method"],
        "best_baseline_accuracy": round(best["accuracy_mean"], 6),
        "best_baseline_beaten": bool(
            nonn["accuracy_mean"] > best["accuracy_mean"] and best["p_value_vs_nonn"] < SIGNIFICANCE
        ),
        "p_value": round(best["p_value_vs_nonn"], 6),
    }


def _row(methods: pd.DataFrame, network: str, method: str) -> pd.Series | None:
    rows = methods[(methods["network"] == network) & (methods["method"] == method)]
    return None if rows.empty else rows.iloc[0]


def collect_claims(comparisons: list[dict]) -> dict[str, Any]:
    """Say what the experiment shows, of its most accurate network; the first of equals."""
    return max(comparisons, key=lambda comparison: comparison["accuracy"])


def collect_metrics(methods: pd.DataFrame, comparisons: list[dict]) -> dict[str, Any]:
    """Name the few numbers that ``dvc metrics`` compares between experiments."""
    metrics = {"teacher_accuracy": comparisons[0]["teacher_accuracy"]}
    for comparison in comparisons:
        network = comparison["network"]
        for key in ("accuracy", "memory_ratio", "performance_ratio", "best_baseline", "best_baseline_accuracy"):
            metrics[f"{network}_{key}"] = comparison[key]
        ensemble = _row(methods, network, "ensemble")
        if ensemble is not None:
            metrics[f"{network}_ensemble_accuracy"] = round(ensemble["accuracy_mean"], 6)
    return metrics


def write_summary_csv(methods: pd.DataFrame) -> str:
    """Format the table for programs: `COLUMNS`, empty where there is no value."""
    text = {
        name: [None if pd.isna(value) else form.format(value) for value in methods[name]]
        for name, form in COLUMNS.items()
    }
    return pd.DataFrame(text).to_csv(index=False, lineterminator="\n")


def format_table(methods: pd.DataFrame) -> pd.DataFrame:
    """Format the table for readers: units in the headings, ratios to the teacher beside the numbers."""
    teacher = _row(methods, "", "teacher")
    lines = []
    for row in methods.to_dict("records"):
        memory, latency = row["memory_bytes_per_device"], row["latency_p50_ms"]
        ratio = f" ({teacher['memory_bytes_per_device'] / memory:.1f}×)"
        speed = f" ({teacher['latency_p50_ms'] / latency:.1f}×)"
        is_teacher = row["method"] == "teacher"
        lines.append(
            {
                "Network": row["network"] or "–",
                "Method": METHODS[row["method"]].label,
                "Models": str(row["n_students"]),
                "n": str(row["n_seeds"]),
                "Accuracy": _percent(row["accuracy_mean"], row["accuracy_sd"]),
                "p vs NoNN": _p_value(row["p_value_vs_nonn"]),
                "Memory (KiB)": f"{memory / 1024:,.0f}" + ("" if is_teacher else ratio),
                "Parameters": f"{row['params_per_device']:,}",
                "MMACs": f"{row['macs_per_device'] / 1e6:.2f}",
                "Sent (bytes)": f"{row['feature_bytes']:,}",
                "Latency (ms)": "–" if pd.isna(latency) else f"{latency:.3f}" + ("" if is_teacher else speed),
            }
        )
    return pd.DataFrame(lines)


def _percent(mean: float, deviation: float) -> str:
    return f"{100 * mean:.2f} %" if pd.isna(deviation) else f"{100 * mean:.2f} ± {100 * deviation:.2f} %"


def _p_value(p: float) -> str:
    if pd.isna(p):
        return "–"
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def write_summary_tex(methods: pd.DataFrame) -> str:
    """Format the table for readers as LaTeX; needs the package booktabs."""
    table = format_table(methods)
    return table.to_latex(index=False, escape=True, column_format="ll" + "r" * (len(table.columns) - 2))


def write_summary_md(
    experiment: str,
    methods: pd.DataFrame,
    comparisons: list[dict],
    missing: Sequence[Mapping],
    n_test: int,
    system: Mapping,
    bytes_per_value: int,
) -> str:
    """Write the report: the table, what it says in words, missing devices, and how its numbers came about."""
    table = format_table(methods)
    rule = [":--", ":--"] + ["--:"] * (len(table.columns) - 2)
    cells = [list(table.columns), rule, *table.to_numpy().tolist()]
    lines = [
        f"# Results of {experiment}",
        "",
        *("| " + " | ".join(line) + " |" for line in cells),
        "",
        "Memory, parameters, multiply-accumulates (MMACs, millions), latency and bytes sent are those of one "
        "device for one image, the largest among the network's devices. In parentheses: how many times less "
        "memory, and how many times sooner an answer, than the teacher's.",
        "",
        "## In words",
        "",
    ]
    for comparison in comparisons:
        lines += [_describe_network(methods, comparison), ""]
    lines += describe_missing(missing)
    lines += ["## How the numbers came about", ""]
    lines += _describe_sources(methods, n_test, system, bytes_per_value)
    return "\n".join(lines) + "\n"


def _describe_network(methods: pd.DataFrame, comparison: Mapping) -> str:
    network = comparison["network"]
    nonn = _row(methods, network, "nonn")
    gap = comparison["accuracy_gap_points"]
    text = [
        f"**{network}**: {nonn['n_students']} students reach "
        f"{_percent(nonn['accuracy_mean'], nonn['accuracy_sd'])} (n = {nonn['n_seeds']}), "
        f"{abs(gap):.2f} percentage points {'below' if gap >= 0 else 'above'} the teacher, with "
        f"{comparison['memory_ratio']:.1f}× less memory on each device and an answer from the slowest student "
        f"{comparison['performance_ratio']:.1f}× sooner than the teacher's."
    ]
    if comparison["best_baseline"] is None:
        return " ".join([*text, "It has no baseline."])
    best = _row(methods, network, comparison["best_baseline"])
    text.append(
        f"The best baseline is *{METHODS[best['method']].label}* with "
        f"{_percent(best['accuracy_mean'], best['accuracy_sd'])} (n = {best['n_seeds']}"
        + (
            f"; one model of {best['memory_bytes_per_device'] / 1024:,.0f} KiB, which no device of the network holds)."
            if best["method"] == "total"
            else ")."
        )
    )
    text.append(_verdict(nonn, best))
    ensemble = _row(methods, network, "ensemble")
    if ensemble is not None and best["method"] != "ensemble":
        text.append(
            f"The ensemble of {ensemble['n_students']} KD students reaches "
            f"{_percent(ensemble['accuracy_mean'], ensemble['accuracy_sd'])} (n = {ensemble['n_seeds']})."
        )
        text.append(_verdict(nonn, ensemble))
    return " ".join(text)


def _verdict(nonn: pd.Series, other: pd.Series) -> str:
    """Say in plain words whether NoNN beats a baseline, and whether that is significant."""
    difference = 100 * (nonn["accuracy_mean"] - other["accuracy_mean"])
    p = other["p_value_vs_nonn"]
    name = "the ensemble" if other["method"] == "ensemble" else "it"
    evidence = f"by {abs(difference):.2f} points (p {_p_value(p) if p < 0.001 else '= ' + _p_value(p)})"
    if p >= SIGNIFICANCE:
        side = "ahead of" if difference >= 0 else "behind"
        return f"NoNN is {side} {name} {evidence}: the difference is not significant."
    if difference > 0:
        return f"NoNN beats {name} significantly, {evidence}."
    return f"NoNN is beaten significantly by {name}, {evidence}."


def _describe_sources(methods: pd.DataFrame, n_test: int, system: Mapping, bytes_per_value: int) -> list[str]:
    seeds = sorted({int(n) for n in methods.loc[methods["method"] == "nonn", "n_seeds"]})
    precision = {4: "float32", 2: "16-bit", 1: "8-bit"}[bytes_per_value]
    lines = [
        f"- *Accuracy* is measured on {n_test:,} test images, on which nothing was chosen. ± is the standard deviation "
        f"over n independent trainings ({', '.join(map(str, seeds))} seeds for NoNN; for ensembles, n disjoint "
        "groups of independently trained students). There is one teacher.",
        "- *p* is that of a two-sided paired permutation test over the test images, on the mean over seeds, against "
        f"NoNN on the same devices; below {SIGNIFICANCE} it is called significant. It is not corrected for the number "
        "of comparisons.",
        f"- *Memory*, parameters, multiply-accumulates and bytes sent are counted, not measured: memory is weights "
        f"and the largest set of activations alive at once, at {precision} precision.",
        "- *Latency* is measured: the median of single images in ONNX Runtime on one core, in the least disturbed "
        "window, of the slowest student. "
        "It leaves out the network and the final layer. Students on another partition have NoNN's architectures, "
        "so its latency stands for theirs.",
        f"- Measured on {system['cpu']} ({system['cores']} cores), {system['system']}, Python {system['python']}, "
        f"ONNX Runtime {system['onnxruntime']}, PyTorch {system['torch']}.",
    ]
    if bytes_per_value != 4:
        lines.append("- The teacher's memory is counted at float32: its ratio includes the change of precision.")
    return lines


def load_designs(params: Params, paths: Paths) -> dict[Key, list[dict]]:
    """Students of every method on every network, as `summarise_methods` takes them."""
    pool_network, pool_method = params.ensemble.pool.split("/")
    designs = {("", "teacher"): [{"n_filters": None, "cost": read_json(paths.teacher_info)["cost"]}]}
    for network, devices in params.networks.items():
        designs[network, "nonn"] = [read_json(paths.design(network, i))[0] for i in range(len(devices))]
        designs[network, "ensemble"] = read_json(paths.design(pool_network, pool_method)) * len(devices)
    for network, method, _ in params.baseline_jobs():
        designs[network, method] = read_json(paths.design(network, method))
    return designs


def load_latencies(params: Params, paths: Paths) -> dict[Key, float]:
    """p50 latency (ms) of the slowest student of every method that was benchmarked."""
    solo = {name: m["latency_p50_ms"] for name, m in read_json(paths.benchmark("solo"))["models"].items()}
    latencies = {("", "teacher"): solo["teacher"]}
    for network in params.networks:
        students = read_json(paths.benchmark(network))["models"].values()
        latencies[network, "nonn"] = max(student["latency_p50_ms"] for student in students)
        latencies[network, "ensemble"] = solo[params.ensemble.pool.replace("/", "-")]
    for network, method, _ in params.baseline_jobs():
        if method in SINGLE_METHODS:
            latencies[network, method] = solo[f"{network}-{method}"]
        elif method in PARTITION_METHODS and method != "full":
            latencies[network, method] = latencies[network, "nonn"]
    return latencies


def load_partition(params: Params, paths: Paths, network: str) -> dict[str, Any]:
    """Sets of a network's students, with the summary of its partition."""
    students = range(len(params.networks[network]))
    sets = [read_json(paths.partition(network, student))["filters"] for student in students]
    return read_json(paths.partition_info(network)) | {"sets": sets}


def load_logs(params: Params, paths: Paths) -> dict[str, dict[str, list[pd.DataFrame]]]:
    """Training logs of each network and method: one for each seed and student."""
    logs = {
        network: {
            "nonn": [
                read_log(paths.log(paths.student(network, student, seed)))
                for seed in params.seeds
                for student in range(len(devices))
            ]
        }
        for network, devices in params.networks.items()
    }
    for network, method, seeds in params.baseline_jobs():
        joint = [read_log(paths.log(paths.baseline(network, method, seed))) for seed in seeds]
        logs[network][method] = [log for one in joint for _, log in one.groupby("student")]
    return logs


def read_log(path: Path) -> pd.DataFrame:
    """Read a training log.

    Raises
    ------
    UserError
        There is none.
    """
    try:
        return pd.read_csv(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file. Run `dvc repro` or `snakemake --cores 2` first.") from None


def run(params: Params, paths: Paths) -> None:
    section, precision = params.figures, params.design.bytes_per_value
    evaluation, graph = read_json(paths.evaluation), load_graph(paths)
    n_test, n_classes = evaluation["n_test"], len(read_json(paths.dataset_info)["classes"])
    methods = summarise_methods(
        evaluation["rows"], load_designs(params, paths), load_latencies(params, paths), n_classes, precision
    )
    comparisons = [compare_network(methods, network) for network in params.networks]
    system = read_json(paths.benchmark("solo"))["system"]
    write_text(paths / "summary.csv", write_summary_csv(methods))
    write_text(paths / "summary.tex", write_summary_tex(methods))
    strategies = evaluation["missing_strategies"]
    report = write_summary_md(params.experiment, methods, comparisons, strategies, n_test, system, precision)
    write_text(paths / "summary.md", report)
    write_text(paths / "missing.csv", write_missing_csv(strategies))
    write_json(paths / "metrics.json", collect_metrics(methods, comparisons))
    write_json(paths / "claims.json", collect_claims(comparisons))

    partitions = {network: load_partition(params, paths, network) for network in params.networks}
    n_seeds = {(row["method"], row["network"]): row["n_seeds"] for row in evaluation["rows"]}
    missing = pd.DataFrame(evaluation["missing"])
    with plots.drawing_style(section.style):
        figures = {
            "filter_graph": graph_plots.draw_filter_graph(graph.weights, partitions),
            "adjacency": graph_plots.draw_adjacency(graph.weights, partitions),
            "top_k": plots.draw_top_k(read_json(paths.graph_info)),
            "training": plots.draw_training(read_log(paths.log(paths.teacher)), load_logs(params, paths)),
            "accuracy_memory": plots.draw_accuracy_memory(methods, n_test),
            "missing_devices": plots.draw_missing_devices(missing, chosen_strategies(strategies), n_seeds, n_test),
        }
        for name, figure in figures.items():
            plots.save_figure(figure, paths / f"figures/{name}.{section.format}", section)
