"""The table of methods: measurements and counts of each, and comparisons among them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import pandas as pd

from nonn.core.cost import memory_bytes
from nonn.report.plots import METHODS

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
    "latency_ratio": "{:.4f}",
    "latency_ratio_low": "{:.4f}",
    "latency_ratio_high": "{:.4f}",
    "p_value_vs_nonn": "{:.6f}",
    "p_value_vs_nonn_seeds": "{:.6f}",
}
#: Columns that the stage `benchmark` measured; the ratios are the teacher's latency over the model's.
LATENCIES = ("latency_p50_ms", "latency_ratio", "latency_ratio_low", "latency_ratio_high")
#: p-values below are called significant.
SIGNIFICANCE = 0.05

Key = tuple[str, str]  # network and method


def summarise_methods(
    rows: Iterable[Mapping], designs: Mapping[Key, list[dict]], latencies: Mapping[Key, Mapping], n_classes: int
) -> pd.DataFrame:
    """Join the measurements and counts of each method on each network.

    Parameters
    ----------
    rows : iterable of mapping
        Of ``evaluation.json``.
    designs : mapping
        Network and method to the students, each ``{n_filters, cost}``; ``n_filters``, the features that
        it sends, is None for a model that classifies by itself. The teacher's network is "".
    latencies : mapping
        Network and method to what the stage `benchmark` measured of the slowest student: `LATENCIES`; without an
        entry where it was not measured.
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
        students = designs[row["network"], row["method"]]
        costs = [student["cost"] for student in students]
        entry = {name: row[name] for name in COLUMNS if name in row}
        entry |= {f"{key}_per_device": max(cost[key] for cost in costs) for key in ("params", "weight_bytes", "macs")}
        entry["params_total"] = sum(cost["params"] for cost in costs)
        entry["feature_bytes"] = 4 * max(student["n_filters"] or n_classes for student in students)
        entry |= {key: latencies.get((row["network"], row["method"]), {}).get(key) for key in LATENCIES}
        entry["memory_bytes_per_device"] = max(map(memory_bytes, costs))
        table.append(entry)
    networks, methods = list(dict.fromkeys(["", *(network for network, _ in designs)])), list(METHODS)
    table.sort(key=lambda entry: (networks.index(entry["network"]), methods.index(entry["method"])))
    measured = [name for name, form in COLUMNS.items() if form.endswith("f}")]
    return pd.DataFrame(table, columns=[*COLUMNS, "memory_bytes_per_device"]).astype(dict.fromkeys(measured, float))


def row_of(methods: pd.DataFrame, network: str, method: str) -> pd.Series:
    """The row of a method on a network that has one."""
    return methods[(methods["network"] == network) & (methods["method"] == method)].iloc[0]


def compare_network(methods: pd.DataFrame, network: str) -> dict[str, Any]:
    """Compare a network of networks with the teacher and with its best baseline.

    Returns
    -------
    dict
        Accuracies as fractions of 1, gap in percentage points. The ratios say how many times less memory a device needs
        and how many times faster its slowest student answers than the teacher, the latter with the ends of its 95 %
        interval, None where there is none. The best baseline is the one of highest mean accuracy on this network,
        whatever it costs; the best fitting one is the best of those that fit on the network's devices, which ``total``
        does not. None for all keys of a baseline that there is not. One counts as beaten where the network's mean
        accuracy is higher and the paired test's p-value is below `SIGNIFICANCE`.

        ``p_value`` is paired by test image, with seeds averaged: of each test image it takes the share of the network's
        ``n_seeds`` trainings that classify it rightly, less that of the baseline's trainings, and permutes the signs of
        these differences (see `nonn.method.scoring.permutation_test`). So n is the number of test images, not of seeds:
        it says whether the difference would be found on other images with these trainings. Whether it would be found
        with other trainings, ``p_value_vs_nonn_seeds`` of ``summary.csv`` says.
    """
    teacher, nonn = row_of(methods, "", "teacher"), row_of(methods, network, "nonn")
    accuracy = nonn["accuracy_mean"]
    comparison = {
        "network": network,
        "n_seeds": int(nonn["n_seeds"]),
        "accuracy": round(accuracy, 6),
        "teacher_accuracy": round(teacher["accuracy_mean"], 6),
        "accuracy_gap_points": round(100 * (teacher["accuracy_mean"] - accuracy), 4),
        "memory_ratio": round(teacher["memory_bytes_per_device"] / nonn["memory_bytes_per_device"], 4),
        **{f"performance_{key}": _rounded(nonn[f"latency_{key}"]) for key in ("ratio", "ratio_low", "ratio_high")},
        **dict.fromkeys(("best_baseline", "best_baseline_accuracy", "best_baseline_beaten", "p_value")),
        **dict.fromkeys(("best_fitting_baseline", "best_fitting_baseline_accuracy", "best_fitting_baseline_beaten")),
        "p_value_fitting": None,
    }
    own = methods["method"].str.startswith("nonn")  # NoNN's students, with another final layer or precision
    baselines = methods[(methods["network"] == network) & ~own]
    fitting = baselines[baselines["method"] != "total"]
    for prefix, ending, table in (("best_baseline", "", baselines), ("best_fitting_baseline", "_fitting", fitting)):
        if not table.empty:
            best = table.loc[table["accuracy_mean"].idxmax()]
            p = best["p_value_vs_nonn"]
            comparison |= {
                prefix: best["method"],
                f"{prefix}_accuracy": round(best["accuracy_mean"], 6),
                f"{prefix}_beaten": bool(accuracy > best["accuracy_mean"] and p < SIGNIFICANCE),
                f"p_value{ending}": round(p, 6),
            }
    return comparison


def _rounded(value: float) -> float | None:
    return None if pd.isna(value) else round(float(value), 4)


def format_interval(row: Mapping[str, Any], key: str) -> str:
    """A ratio and its interval, if it has one, such as "20.3×, 19.8 to 20.9"."""
    low, high = row.get(f"{key}_low"), row.get(f"{key}_high")
    return f"{row[key]:.1f}×" + ("" if pd.isna(low) else f", {low:.1f} to {high:.1f}")


def collect_claims(comparisons: list[dict]) -> dict[str, Any]:
    """Comparison of the network that is most accurate on validation images, the first of equals.

    `nonn.report.deployment_table.claim_ratios` adds what its devices show.
    """
    return max(comparisons, key=lambda comparison: comparison["validation_accuracy"])


def collect_metrics(methods: pd.DataFrame, comparisons: list[dict]) -> dict[str, Any]:
    """The few numbers that ``dvc metrics`` compares between experiments."""
    metrics = {"teacher_accuracy": comparisons[0]["teacher_accuracy"]}
    for comparison in comparisons:
        network = comparison["network"]
        for key in ("validation_accuracy", "accuracy", "memory_ratio", "performance_ratio"):
            metrics[f"{network}_{key}"] = comparison[key]
        for key in ("best_baseline", "best_baseline_accuracy"):
            metrics[f"{network}_{key}"] = comparison[key]
        if "ensemble" in set(methods.loc[methods["network"] == network, "method"]):
            ensemble = row_of(methods, network, "ensemble")
            metrics[f"{network}_ensemble_accuracy"] = round(ensemble["accuracy_mean"], 6)
    return metrics


def calibration_metrics(evaluation: Mapping[str, Any]) -> dict[str, float]:
    """Expected calibration error of each network with all devices present, before and after calibration."""
    whole = [row for row in evaluation["calibration"] if row["missing"] == 0]
    return {
        f"{row['network']}_calibration_error{ending}": round(row[key], 6)
        for row in whole
        for key, ending in (("calibrated", ""), ("uncalibrated", "_uncalibrated"))
    }
