"""Looks, style, panels and legends that all figures share.

The functions that draw are in the modules ``*_plots``: each takes numbers and returns a figure, and reads or writes
nothing.

Colours mean the same in all figures: one after Okabe and Ito [1]_ for each method, one after Paul Tol [2]_ for each
student. Light ones are darkened until they stand out from white by 3 to 1, as WCAG 2 asks of graphics; methods have a
marker each besides. Equal numbers give equal bytes.

References
----------
.. [1] https://jfly.uni-koeln.de/color/
.. [2] https://sronpersonalpages.nl/~pault/
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import PercentFormatter

from nonn.core.files import replacing
from nonn.core.params import FiguresParams


class Look(NamedTuple):
    """Appearance of a method in all figures and tables."""

    label: str
    colour: str
    marker: str


#: In the order in which tables and legends list them.
METHODS = {
    "teacher": Look("Teacher", "#666666", "*"),
    "teacher_int8": Look("Teacher, int8", "#919191", "*"),
    "nonn": Look("NoNN", "#D55E00", "o"),
    "nonn_averaged": Look("NoNN, averaged", "#8A5A44", "o"),
    "nonn_float32": Look("NoNN, float32", "#A04000", "o"),
    "ensemble": Look("Ensemble of KD", "#0072B2", "s"),
    "ensemble_fitted": Look("Ensemble of KD, fitted", "#004D80", "d"),
    "total": Look("KD, total budget", "#009E73", "D"),
    "at_kd": Look("AT+KD", "#CC79A7", "^"),
    "kd": Look("KD", "#1D9AE1", "v"),
    "labels": Look("Labels only", "#6E7B8B", "X"),
    "random": Look("Random partition", "#C08500", "P"),
    "contiguous": Look("Contiguous partition", "#A19400", "<"),
    "classwise": Look("Classwise partition", "#8C6D31", ">"),
    "full": Look("All filters each", "#7B5EA7", "h"),
}
#: As many colours as a network may have students, those that are easiest to distinguish first.
STUDENT_COLOURS = (
    *("#332288", "#CC6677", "#40A090", "#C07A0A", "#1F9BDA", "#117733", "#882255", "#7A7A1F"),
    *("#4477AA", "#AA4499", "#EE6677", "#228833", "#A0922C", "#0F7F9C", "#AA3377", "#8C8C8C"),
)
HOUSE_STYLE = {
    "axes.axisbelow": True,
    "axes.edgecolor": "0.4",
    "axes.grid": True,
    "axes.linewidth": 0.7,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 10,
    "errorbar.capsize": 2,
    "font.size": 9,
    "grid.color": "0.9",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "lines.linewidth": 1.5,
    "lines.markersize": 5.5,
    "xtick.color": "0.3",
    "ytick.color": "0.3",
}
#: The formats of every figure, and the metadata that are left out of each, since they would differ between runs.
FORMATS = {"png": {"Software": None}, "svg": {"Date": None}}
PANEL_COLUMNS = 3


@contextlib.contextmanager
def drawing_style() -> Iterator[None]:
    """Draw and save in the style of this project, whatever the user's settings are."""
    # Element ids of SVG are hashed with this salt; they are random without one.
    with matplotlib.style.context(["default", HOUSE_STYLE, {"svg.hashsalt": "nonn"}]):
        yield


def save_figure(figure: Figure, path: Path, section: FiguresParams) -> None:
    """Write a figure beside `path` in each of the `FORMATS`, with the same bytes each time."""
    for suffix, metadata in FORMATS.items():
        with replacing(path.with_suffix(f".{suffix}")) as temporary:
            figure.savefig(temporary, format=suffix, dpi=section.dpi, metadata=metadata)


def panels(n_panels: int, width: float, height: float, **options: Any) -> tuple[Figure, list[Axes]]:
    """Figure of `n_panels` panels, each of a width and height in inches, in even rows."""
    rows = math.ceil(n_panels / PANEL_COLUMNS)
    columns = math.ceil(n_panels / rows)
    figure = Figure(figsize=(columns * width, rows * height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **options).flatten().tolist()
    for unused in axes[n_panels:]:
        unused.remove()
    return figure, axes[:n_panels]


def label_rows(axes: Sequence[Axes], label: str) -> None:
    """Name the accuracy axis that the panels of a row share, and count it in percent."""
    axes[0].yaxis.set_major_formatter(PercentFormatter(1, symbol=""))
    for axis in axes:
        if axis.get_subplotspec().is_first_col():
            axis.set_ylabel(label)


def legend_handle(look: Look, **style: Any) -> Line2D:
    return Line2D([], [], color=look.colour, marker=look.marker, label=look.label, **style)


def legend_below(figure: Figure, handles: Sequence[Any], columns: int = 5) -> None:
    """Put a legend below the panels, in at most so many columns.

    In a figure too narrow for them it has fewer, and the figure grows by the rows that come with that. One that is too
    narrow for a single column is made as wide.
    """
    heights = []
    for n_columns in range(min(len(handles), columns), 0, -1):
        legend = figure.legend(handles=handles, loc="outside lower center", ncols=n_columns)
        box = legend.get_window_extent()
        heights.append(box.height)
        if box.width <= figure.bbox.width or n_columns == 1:
            break
        legend.remove()
    width, height = figure.get_size_inches()
    figure.set_size_inches(max(width, box.width / figure.dpi), height + (heights[-1] - heights[0]) / figure.dpi)


def plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
