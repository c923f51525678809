"""The report of an experiment, for readers: the table of methods, and in words what it says.

What the numbers are, and how they were joined, is the business of `nonn.report.methods`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd

from nonn.report.plots import METHODS

#: p-values below are called significant.
SIGNIFICANCE = 0.05


def row_of(methods: pd.DataFrame, network: str, method: str) -> pd.Series | None:
    """The row of a method on a network, None if there is none."""
    rows = methods[(methods["network"] == network) & (methods["method"] == method)]
    return None if rows.empty else rows.iloc[0]


def format_table(methods: pd.DataFrame) -> pd.DataFrame:
    """Format the table for readers: units in the headings, ratios to the teacher beside the numbers."""
    teacher = row_of(methods, "", "teacher")
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
    sections: Sequence[str],
    n_test: int,
    system: Mapping,
    bytes_per_value: int,
) -> str:
    """Write the report: the table, what it says in words, further sections, and how its numbers came about."""
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
    lines += sections
    lines += ["## How the numbers came about", ""]
    lines += _describe_sources(methods, n_test, system, bytes_per_value)
    return "\n".join(lines) + "\n"


def _describe_network(methods: pd.DataFrame, comparison: Mapping) -> str:
    network = comparison["network"]
    nonn = row_of(methods, network, "nonn")
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
    best = row_of(methods, network, comparison["best_baseline"])
    text.append(
        f"The best baseline is *{METHODS[best['method']].label}* with "
        f"{_percent(best['accuracy_mean'], best['accuracy_sd'])} (n = {best['n_seeds']}"
        + (
            f"; one model of {best['memory_bytes_per_device'] / 1024:,.0f} KiB, for the budgets of all devices)."
            if best["method"] == "total"
            else ")."
        )
    )
    text.append(_verdict(nonn, best))
    ensemble = row_of(methods, network, "ensemble")
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
    precision = {4: "float32", 1: "int8"}[bytes_per_value]
    lines = [
        f"- *Accuracy* is measured on {n_test:,} test images, on which nothing was chosen. ± is the standard deviation "
        f"over n independent trainings ({', '.join(map(str, seeds))} {'seed' if seeds == [1] else 'seeds'} for NoNN; "
        "for ensembles, n disjoint groups of independently trained students). There is one teacher.",
        "- *p* is that of a two-sided paired permutation test over the test images, on the mean over seeds, against "
        f"NoNN on the same devices; below {SIGNIFICANCE} it is called significant. It is not corrected for the number "
        "of comparisons. `summary.csv` has Welch's test over seeds too, where both methods have several.",
        f"- *Memory*, parameters, multiply-accumulates and bytes sent are counted, not measured: memory is weights "
        f"and the largest set of activations alive at once, at {precision} precision.",
        "- *Latency* is measured: the median of single images in ONNX Runtime on one core, in the least disturbed "
        "window, of the slowest student. "
        "It leaves out the network and the final layer. Students on another partition have NoNN's architectures, "
        "so its latency stands for theirs.",
        f"- Measured on {system['cpu']} ({system['cores']} cores), {system['system']}, Python {system['python']}, "
        f"ONNX Runtime {system['onnxruntime']}, PyTorch {system['torch']}.",
    ]
    if "nonn_averaged" in set(methods["method"]):
        lines.append(
            "- The *final layer* of baselines with several students is fitted further as NoNN's is, kept if "
            "validation gains, and makes up for missing devices by the strategy that is best on validation images; of "
            "ensembles, both that and the mean of the members' probabilities are listed; of NoNN, also the mean of "
            "its students' heads, which is no baseline, and shows what fitting gives."
        )
    if bytes_per_value == 1:
        lines.append(
            "- *int8*: students of all methods are quantised after training and scored as such. The teacher is "
            "float32, so ratios to it include the change of precision; *Teacher, int8* shows what quantising does for "
            "the teacher, and *NoNN, float32* NoNN's students before they were quantised. Feature vectors are sent in "
            "float32."
        )
    return lines
