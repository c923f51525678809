"""The table of strategies for missing devices: which were chosen, and how accurate each is."""

from __future__ import annotations

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


def chosen_strategies(rows: pd.DataFrame) -> dict[str, str]:
    """The strategies chosen for each network, in words: with their numbers of seeds where these disagree."""
    chosen = rows[rows["chosen"] > 0].drop_duplicates(["network", "strategy"])
    words = chosen["strategy"].map(LABELS)
    disagree = chosen["network"].duplicated(keep=False)
    words = words.where(~disagree, words + " (" + chosen["chosen"].astype(str) + ")")
    return words.groupby(chosen["network"]).agg(", ".join).to_dict()


def format_missing(rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Each network's table for readers: a row each strategy, a column each number of missing devices."""
    rows = rows[rows["missing"] > 0]
    cells = pd.DataFrame(
        {
            "network": rows["network"],
            "strategy": rows["strategy"].map(LABELS).str.capitalize(),
            "Chosen by": [f"{row.chosen} of {row.n_seeds}" for row in rows.itertuples()],
            "missing": [f"{count} missing" for count in rows["missing"]],
            "cell": [f"{100 * row.mean:.2f} % ({100 * row.worst:.2f} %)" for row in rows.itertuples()],
        }
    )
    tables = {}
    for network, own in cells.groupby("network", sort=False):
        table = own.set_index(["strategy", "Chosen by", "missing"])["cell"].unstack(sort=False)
        tables[network] = table.reset_index().rename(columns={"strategy": network})
    return tables
