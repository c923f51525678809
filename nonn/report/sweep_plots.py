"""The figure of a sweep: networks of all experiments, with the Pareto-optimal ones marked."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from nonn.report.plots import STUDENT_COLOURS, panels


def draw_sweep(table: pd.DataFrame, labels: Mapping[str, str]) -> Figure:
    """Draw accuracy against each cost; the markers of Pareto-optimal networks are filled.

    Parameters
    ----------
    table : DataFrame
        ``network``, ``efficient``, and a column for each of `labels`.
    labels : mapping of str to str
        Column to its label: accuracy, as a fraction of 1, and then the costs.
    """
    goal, *costs = labels
    networks = sorted(set(table["network"]))
    figure, axes = panels(len(costs), 3.4, 3.2, sharey=True)
    for axis, cost in zip(axes, costs, strict=True):
        for network, colour in zip(networks, STUDENT_COLOURS, strict=False):
            points = table[table["network"] == network].sort_values(cost)
            for efficient, group in points.groupby("efficient"):
                face = colour if efficient else "none"
                axis.scatter(group[cost], group[goal], 28, edgecolors=colour, facecolors=face, label=network)
        axis.set_xlabel(labels[cost])
    axes[0].set_ylabel(labels[goal])
    axes[0].yaxis.set_major_formatter(PercentFormatter(1, symbol=""))
    handles = [
        axes[0].scatter([], [], 28, color=colour, label=network)
        for network, colour in zip(networks, STUDENT_COLOURS, strict=False)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=5, title="filled: no other is as good in all")
    return figure
