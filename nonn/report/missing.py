"""The table of strategies for missing devices: as a file for programs, and as a section of the report."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import pandas as pd

#: Columns of ``missing.csv`` and how each is written.
COLUMNS = {
    "network": "{}",
    "strategy": "{}",
    "chosen": "{:d}",
    "missing": "{:d}",
    "n_subsets": "{:d}",
    "n_seeds": "{:d}",
    "mean": "{:.6f}",
    "mean_sd": "{:.6f}",
    "worst": "{:.6f}",
}
#: How reports and figures call a strategy.
LABELS = {
    "rescale": "rescaled",
    "zero_fill": "zero-filled",
    "mean_fill": "mean-filled",
    "fail_out": "fail-out",
    "subset_layers": "a layer per subset",
}

HEADING = ["## When devices are missing", ""]
EXPLANATION = (
    "Test accuracy by how the final layer makes up for missing devices: the mean over all subsets of "
    "devices that are left and over seeds, in parentheses the worst subset. *Rescaled*: what the devices left say is "
    "scaled up to what all would; *zero-filled*, *mean-filled*: the others count as if they had sent zeros, or their "
    "mean; *fail-out*: one layer fitted with devices dropped at random; *a layer per subset*: each fitted on its own "
    "devices. *Chosen by* says for how many seeds a strategy was chosen, on validation images alone. With no device "
    "missing, all strategies give the same answer. More in `missing.csv`."
)


def chosen_strategies(rows: Iterable[Mapping]) -> dict[str, str]:
    """The strategies chosen for each network, in words: with their numbers of seeds where these disagree."""
    counts: dict[str, dict[str, int]] = {}
    for row in rows:
        if row["chosen"]:
            counts.setdefault(row["network"], {})[row["strategy"]] = row["chosen"]
    return {
        network: LABELS[next(iter(by_strategy))]
        if len(by_strategy) == 1
        else ", ".join(f"{LABELS[strategy]} ({count})" for strategy, count in by_strategy.items())
        for network, by_strategy in counts.items()
    }


def write_missing_csv(rows: Sequence[Mapping]) -> str:
    """Format the table for programs: `COLUMNS`, empty where there is no value."""
    text = {
        name: [None if row[name] is None else form.format(row[name]) for row in rows] for name, form in COLUMNS.items()
    }
    return pd.DataFrame(text).to_csv(index=False, lineterminator="\n")


def describe_missing(rows: Sequence[Mapping]) -> list[str]:
    """Lines of the report: one table a network, a row each strategy, a column each number of missing devices."""
    lines = [*HEADING, EXPLANATION, ""]
    for network in dict.fromkeys(row["network"] for row in rows):
        mine = [row for row in rows if row["network"] == network and row["missing"]]
        numbers = sorted({row["missing"] for row in mine})
        lines.append(f"| {network} | Chosen by | " + " | ".join(f"{n} missing" for n in numbers) + " |")
        lines.append("| :-- | --: |" + " --: |" * len(numbers))
        for strategy in dict.fromkeys(row["strategy"] for row in mine):
            cells = [row for row in mine if row["strategy"] == strategy]
            by = f"{cells[0]['chosen']} of {cells[0]['n_seeds']}"
            shown = [f"{100 * row['mean']:.2f} % ({100 * row['worst']:.2f} %)" for row in cells]
            lines.append(f"| {LABELS[strategy].capitalize()} | {by} | " + " | ".join(shown) + " |")
        lines.append("")
    return lines
