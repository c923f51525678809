"""Figure of the map: how far NoNN leads an ensemble as one factor changes at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator

from nonn.report.plots import STUDENT_COLOURS, legend_below, panels

#: Labels of the axes of the factors.
LABELS = {
    "epochs": "epochs of training, in parts of the experiment's",
    "budget": "memory and compute of a device, likewise",
    "images": "training images, likewise",
    "classes": "classes, likewise",
}


def draw_map(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw the rows of `nonn.studies.factor_map.rows_of`: a panel for each factor, a line for each network.

    What is drawn is NoNN's accuracy less that of the fitted ensemble, in points, with its interval of 95 %.
    """
    nonn = [row for row in rows if row["method"] == "nonn"]
    factors = [factor for factor in LABELS if any(row["factor"] == factor for row in nonn)]
    networks = list(dict.fromkeys(row["network"] for row in nonn))
    figure, axes = panels(len(factors), 3.6, 3.2, sharey=True)
    for axis, factor in zip(axes, factors, strict=True):
        for number, network in enumerate(networks):
            of_network = sorted(
                (r for r in nonn if r["factor"] == factor and r["network"] == network), key=lambda row: row["value"]
            )
            values = [row["value"] * 1.04**number for row in of_network]  # side by side
            lead = [100 * row["difference_vs_fitted_ensemble"] for row in of_network]
            error = [100 * (row["ci_high"] - row["difference_vs_fitted_ensemble"]) for row in of_network]
            axis.errorbar(values, lead, error, color=STUDENT_COLOURS[number], marker="o", label=network)
        axis.axhline(0, color="0.4", linewidth=1)
        axis.set(xscale="log", xlabel=LABELS[factor])
        ticks = sorted({row["value"] for row in nonn if row["factor"] == factor})
        axis.set_xticks(ticks, [f"{value:g}" for value in ticks])
        axis.xaxis.set_minor_locator(NullLocator())
        if axis.get_subplotspec().is_first_col():
            axis.set_ylabel("NoNN less fitted ensemble (points)")
    style = {"marker": "o"}
    legend_below(figure, [Line2D([], [], color=STUDENT_COLOURS[i], label=n, **style) for i, n in enumerate(networks)])
    return figure
