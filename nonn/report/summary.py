"""The tables as files: CSV for programs, LaTeX and the report for readers.

What the report says, in words, stands in the template ``summary.md.jinja``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined

from nonn.report.method_table import SIGNIFICANCE, format_interval, row_of
from nonn.report.plots import METHODS


def format_csv(table: pd.DataFrame, columns: Mapping[str, str]) -> str:
    """Format a table for programs: these columns, each in its own form, empty where there is no value."""
    text = {name: table[name].map(form.format, na_action="ignore") for name, form in columns.items()}
    return pd.DataFrame(text).to_csv(index=False, lineterminator="\n")


def format_methods(methods: pd.DataFrame) -> pd.DataFrame:
    """Format the table of methods for readers: units in the headings, ratios to the teacher beside the numbers."""
    teacher = row_of(methods, "", "teacher")

    memory = methods["memory_bytes_per_device"]
    less = methods["method"].map(lambda method: "" if method == "teacher" else " ({:.1f}×)")

    return pd.DataFrame(
        {
            "Network": methods["network"].replace("", "–"),
            "Method": [METHODS[method].label for method in methods["method"]],
            "Models": methods["n_students"].astype(str),
            "n": methods["n_seeds"].astype(str),
            "Accuracy": [format_accuracy(row) for row in methods.to_dict("records")],
            "p vs NoNN": methods["p_value_vs_nonn"].map(format_p_value),
            "Memory (KiB)": [
                f"{own / 1024:,.0f}" + ratio.format(teacher["memory_bytes_per_device"] / own)
                for own, ratio in zip(memory, less, strict=True)
            ],
            "Parameters": methods["params_per_device"].map("{:,}".format),
            "MMACs": (methods["macs_per_device"] / 1e6).map("{:.2f}".format),
            "Sent (bytes)": methods["feature_bytes"].map("{:,}".format),
            "Latency (ms)": [_format_latency(row) for row in methods.to_dict("records")],
        }
    )


def _format_latency(row: Mapping[str, Any]) -> str:
    if pd.isna(row["latency_p50_ms"]):
        return "–"
    ratio = "" if pd.isna(row["latency_ratio"]) else f" ({format_interval(row, 'latency_ratio')})"
    return f"{row['latency_p50_ms']:.3f}{ratio}"


def format_accuracy(row: Mapping[str, Any]) -> str:
    mean, deviation = 100 * row["accuracy_mean"], 100 * row["accuracy_sd"]
    return f"{mean:.2f} %" if pd.isna(deviation) else f"{mean:.2f} ± {deviation:.2f} %"


def format_p_value(p: float) -> str:
    if pd.isna(p):
        return "–"
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def format_tex(methods: pd.DataFrame) -> str:
    """Format the table for readers as LaTeX; needs the package booktabs."""
    table = format_methods(methods)
    return table.to_latex(index=False, escape=True, column_format="ll" + "r" * (len(table.columns) - 2))


def format_report(methods: pd.DataFrame, **facts: Any) -> str:
    """Fill in the report's template, which names at its head what `facts` it takes besides the table of methods."""
    environment = Environment(
        loader=PackageLoader("nonn.report", ""),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"accuracy": format_accuracy, "p_value": format_p_value, "interval": format_interval}
    return environment.get_template("summary.md.jinja").render(
        table=format_methods(methods),
        methods=methods.set_index(["network", "method"]).to_dict("index"),
        labels={method: look.label for method, look in METHODS.items()},
        seeds=sorted(set(methods.loc[methods["method"] == "nonn", "n_seeds"])),
        significance=SIGNIFICANCE,
        **facts,
    )
