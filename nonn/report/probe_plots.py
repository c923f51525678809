"""Figure of the probes: the accuracy of perfect students of sets of filters, by the size of the sets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator

from nonn.report.plots import METHODS, Look, label_rows, legend_below, legend_handle, panels

#: Communities are what NoNN takes.
LOOKS = METHODS | {"communities": Look("Communities", METHODS["nonn"].colour, METHODS["nonn"].marker)}
PANELS = {"alone": "one student alone", "joined": "all students, joined"}


def draw_probes(rows: Sequence[Mapping[str, Any]], teacher: float, n_classes: int) -> Figure:
    """Draw the rows of `nonn.studies.probing.rows_of`: a panel for students alone, and one for all of them.

    `teacher` is the teacher's own accuracy on the same images.
    """
    methods = list(dict.fromkeys(row["method"] for row in rows))
    figure, axes = panels(len(PANELS), 4.2, 3.4, sharey=True)
    for axis, (name, title) in zip(axes, PANELS.items(), strict=True):
        for method in methods:
            look = LOOKS[method]
            of_method = sorted((row for row in rows if row["method"] == method), key=lambda row: row["filters"])
            sizes, means = [row["filters"] for row in of_method], [row[f"{name}_mean"] for row in of_method]
            axis.plot(sizes, means, color=look.colour, marker=look.marker, label=look.label)
        axis.axhline(teacher, color=METHODS["teacher"].colour, linestyle="--", linewidth=1)
        axis.axvline(n_classes - 1, color="0.6", linestyle=":", linewidth=1)
        axis.set(xscale="log", xlabel="filters of a student", title=title)
        ticks = sorted({row["filters"] for row in rows})
        axis.set_xticks(ticks, [f"{value:.0f}" for value in ticks])
        axis.xaxis.set_minor_locator(NullLocator())
    label_rows(axes, "accuracy (%)")
    limits = [
        Line2D([], [], color=METHODS["teacher"].colour, linestyle="--", label="Teacher"),
        Line2D([], [], color="0.6", linestyle=":", label="classes − 1"),
    ]
    legend_below(figure, [legend_handle(LOOKS[method]) for method in methods] + limits)
    return figure
