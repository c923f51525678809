"""The table of missing devices: accuracy of each strategy of NoNN and of the baselines, and the chosen strategies."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import pandas as pd

from nonn.report.plots import METHODS

#: Columns of ``missing.csv`` and how each is written. A row without a strategy is of a method as it is deployed: with
#: the strategy that validation images chose for each seed, where there are several.
COLUMNS = {
    "network": "{}",
    "method": "{}",
    "strategy": "{}",
    "chosen": "{:.0f}",
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


def join_rows(evaluation: Mapping[str, Any], networks: Iterable[str]) -> pd.DataFrame:
    """Rows of ``evaluation.json``, as `COLUMNS`: of each network NoNN's strategies, then each method as deployed."""
    n_seeds = {(row["network"], row["method"]): row["n_seeds"] for row in evaluation["rows"]}
    rows = [{"method": "nonn"} | row for row in evaluation["missing_strategies"]]
    rows += [row | {"n_seeds": n_seeds[row["network"], row["method"]]} for row in evaluation["missing"]]
    table = pd.DataFrame(rows, columns=list(COLUMNS)).astype({"mean_sd": float})
    order = {network: position for position, network in enumerate(networks)}
    return table.sort_values("network", key=lambda column: column.map(order), kind="stable", ignore_index=True)


def chosen_strategies(rows: pd.DataFrame) -> dict[str, str]:
    """The strategies chosen for each network, in words, with numbers of seeds if the seeds disagree."""
    chosen = rows[rows["chosen"] > 0].drop_duplicates(["network", "strategy"])
    words = chosen["strategy"].map(LABELS)
    disagree = chosen["network"].duplicated(keep=False)
    words = words.where(~disagree, words + " (" + chosen["chosen"].map("{:.0f}".format) + ")")
    return words.groupby(chosen["network"]).agg(", ".join).to_dict()


def format_missing(rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Each network's table for readers: a row per strategy or method, a column per number of missing devices."""
    rows = rows[rows["missing"] > 0]
    deployed = rows["method"].map({method: look.label for method, look in METHODS.items()})
    cells = pd.DataFrame(
        {
            "network": rows["network"],
            "strategy": rows["strategy"].map(LABELS).str.capitalize().fillna(deployed),
            "Chosen by": [
                "–" if pd.isna(row.chosen) else f"{row.chosen:.0f} of {row.n_seeds}" for row in rows.itertuples()
            ],
            "missing": [f"{count} missing" for count in rows["missing"]],
            "cell": [f"{100 * row.mean:.2f} % ({100 * row.worst:.2f} %)" for row in rows.itertuples()],
        }
    )
    tables = {}
    for network, own in cells.groupby("network", sort=False):
        table = own.set_index(["strategy", "Chosen by", "missing"])["cell"].unstack(sort=False)
        tables[network] = table.reset_index().rename(columns={"strategy": network})
    return tables
