"""What was measured and counted of every method, joined in one table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import pandas as pd

from nonn.report.plots import METHODS
from nonn.report.summary import SIGNIFICANCE, row_of

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
    "p_value_vs_nonn_seeds": "{:.6f}",
}

Key = tuple[str, str]  # network and method


def summarise_methods(
    rows: Iterable[Mapping],
    designs: Mapping[Key, list[dict]],
    latencies: Mapping[Key, float],
    n_classes: int,
) -> pd.DataFrame:
    """Join what was measured and counted of each method on each network.

    Parameters
    ----------
    rows : iterable of mapping
        Of ``evaluation.json``.
    designs : mapping
        Network and method to the students, each ``{n_filters, cost}``; ``n_filters``, the features that
        it sends, is None for a model that classifies by itself. The teacher's network is "".
    latencies : mapping
        Network and method to the p50 latency of the slowest student (ms); without an entry where
        it was not measured.
    n_classes : int
        What a model that classifies alone sends.

    Returns
    -------
    DataFrame
        `COLUMNS` and ``memory_bytes_per_device``, ``weight_bytes`` plus peak activations. The
        teacher first, then each network's methods in the order of `METHODS`. *Per device* is the
        largest of the devices; ``feature_bytes`` is what one device sends for one image, in float32 always.
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
                "feature_bytes": max(sent) * 4,
                "latency_p50_ms": latencies.get(key),
                "p_value_vs_nonn": row["p_value_vs_nonn"],
                "p_value_vs_nonn_seeds": row["p_value_vs_nonn_seeds"],
                "memory_bytes_per_device": max(cost["weight_bytes"] + cost["peak_activation_bytes"] for cost in costs),
            }
        )
    networks = list(dict.fromkeys(["", *(network for network, _ in designs)]))
    order = {key: (networks.index(key[0]), list(METHODS).index(key[1])) for key in designs}
    table.sort(key=lambda entry: order[entry["network"], entry["method"]])
    measured = ["accuracy_mean", "accuracy_sd", "latency_p50_ms", "p_value_vs_nonn", "p_value_vs_nonn_seeds"]
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
    teacher, nonn = row_of(methods, "", "teacher"), row_of(methods, network, "nonn")
    comparison = {
        "network": network,
        "accuracy": round(nonn["accuracy_mean"], 6),
        "teacher_accuracy": round(teacher["accuracy_mean"], 6),
        "accuracy_gap_points": round(100 * (teacher["accuracy_mean"] - nonn["accuracy_mean"]), 4),
        "memory_ratio": round(teacher["memory_bytes_per_device"] / nonn["memory_bytes_per_device"], 4),
        "performance_ratio": round(teacher["latency_p50_ms"] / nonn["latency_p50_ms"], 4),
    }
    own = methods["method"].str.startswith("nonn")  # NoNN's students, with another final layer or precision
    baselines = methods[(methods["network"] == network) & ~own]
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
        ensemble = row_of(methods, network, "ensemble")
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
