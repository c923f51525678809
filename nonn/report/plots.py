"""Drawing of the figures: each function takes numbers and returns a figure, and reads or writes nothing.

Here are the figures of training, and what all figures share; those of results are in `nonn.report.accuracy_plots`
and `nonn.report.deployment_plots`, those of the filter graph in `nonn.report.graph_plots`.

Colours are safe for colour-blind readers and mean the same in all figures: one of Okabe and Ito's [1]_
for each method, one of Paul Tol's [2]_ for each student. Equal numbers give equal bytes.

References
----------
.. [1] https://jfly.uni-koeln.de/color/
.. [2] https://sronpersonalpages.nl/~pault/
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.style
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator, PercentFormatter

from nonn.core.files import replacing
from nonn.core.params import Figures


class Look(NamedTuple):
    """How a method appears in every figure and table."""

    label: str
    colour: str
    marker: str


#: In the order in which tables and legends list them.
METHODS = {
    "teacher": Look("Teacher", "#666666", "*"),
    "teacher_int8": Look("Teacher, int8", "#B0B0B0", "*"),
    "nonn": Look("NoNN", "#D55E00", "o"),
    "nonn_averaged": Look("NoNN, averaged", "#F0A070", "o"),
    "nonn_float32": Look("NoNN, float32", "#A04000", "o"),
    "ensemble": Look("Ensemble of KD", "#0072B2", "s"),
    "ensemble_fitted": Look("Ensemble of KD, fitted", "#004D80", "d"),
    "total": Look("KD, total budget", "#009E73", "D"),
    "at_kd": Look("AT+KD", "#CC79A7", "^"),
    "kd": Look("KD", "#56B4E9", "v"),
    "labels": Look("Labels only", "#999999", "X"),
    "random": Look("Random partition", "#E69F00", "P"),
    "contiguous": Look("Contiguous partition", "#B8A900", "<"),
    "classwise": Look("Classwise partition", "#8C6D31", ">"),
    "full": Look("All filters each", "#7B5EA7", "h"),
}
#: As many as a network may have students, the best told apart first.
STUDENT_COLOURS = (
    *("#332288", "#CC6677", "#44AA99", "#DDCC77", "#88CCEE", "#117733", "#882255", "#999933"),
    *("#4477AA", "#AA4499", "#EE6677", "#228833", "#CCBB44", "#66CCEE", "#AA3377", "#BBBBBB"),
)
HOUSE_STYLE = {
    "axes.axisbelow": True,
    "axes.edgecolor": "0.4",
    "axes.grid": True,
    "axes.linewidth": 0.7,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 10,
    "font.size": 9,
    "grid.color": "0.9",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "lines.linewidth": 1.5,
    "xtick.color": "0.3",
    "ytick.color": "0.3",
}
#: What the formats would otherwise write about the moment of drawing.
NO_TIMESTAMP = {"png": {"Software": None}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}
PANEL_COLUMNS = 3


@contextlib.contextmanager
def drawing_style() -> Iterator[None]:
    """Draw and save in our own style, whatever the user's settings are."""
    # Element ids of SVG are hashed with this salt; they are random without one.
    with matplotlib.style.context(["default", HOUSE_STYLE, {"svg.hashsalt": "nonn"}]):
        yield


def save_figure(figure: Figure, path: Path, section: Figures, file_format: str | None = None) -> None:
    """Write a figure, with the same bytes each time."""
    file_format = file_format or section.format
    with replacing(path) as temporary:
        figure.savefig(temporary, format=file_format, dpi=section.dpi, metadata=NO_TIMESTAMP[file_format])


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


def legend_below(figure: Figure, handles: Sequence[Any], columns: int = 5) -> None:
    """Put a legend below the panels, in at most so many columns.

    In a figure too narrow for them it has fewer, and the figure grows by the rows that come with that.
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
    figure.set_size_inches(width, height + (heights[-1] - heights[0]) / figure.dpi)


def plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def draw_top_k(info: Mapping) -> Figure:
    """Draw how much community structure there is for each `top_k`, and mark the chosen one.

    Parameters
    ----------
    info : mapping
        Summary of the graph: ``top_k``, ``n_filters``, ``modularity``, ``n_communities`` and
        ``top_k_curve``; where the curve is empty, the chosen point stands alone.
    """
    chosen = {key: info[key] for key in ("top_k", "modularity", "n_communities")}
    curve = info["top_k_curve"] or [chosen]
    n_filters = info["n_filters"]
    places = [n_filters if point["top_k"] is None else point["top_k"] for point in curve]
    where = n_filters if chosen["top_k"] is None else chosen["top_k"]
    figure = Figure(figsize=(6.6, 3.1), layout="constrained")
    labels = {"modularity": "modularity Q", "n_communities": "communities"}
    for axis, (key, label) in zip(figure.subplots(1, 2), labels.items(), strict=True):
        axis.axvline(where, color=METHODS["nonn"].colour, linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
        colour = METHODS["ensemble"].colour
        axis.plot(places, [point[key] for point in curve], marker="o", markersize=4, color=colour)
        axis.plot(
            where,
            chosen[key],
            "o",
            markersize=9,
            markerfacecolor="none",
            markeredgewidth=1.8,
            color=METHODS["nonn"].colour,
        )
        axis.annotate(
            f"chosen: {'all' if chosen['top_k'] is None else chosen['top_k']}",
            (where, 1),
            xycoords=("data", "axes fraction"),
            xytext=(5, -3) if where < n_filters else (-5, -3),
            textcoords="offset points",
            ha="left" if where < n_filters else "right",
            va="top",
            color=METHODS["nonn"].colour,
        )
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(FixedLocator(places))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.tick_params(axis="x", labelsize="small")  # on the scale's right places are close
        names = {
            place: "all" if point["top_k"] is None else str(place) for place, point in zip(places, curve, strict=True)
        }
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _, names=names: names.get(round(value), "")))
        # Head-room for the note.
        axis.set_ylim(0, 1.25 * max(point[key] for point in curve) or 1)
        axis.yaxis.set_major_locator(MaxNLocator(6, integer=key == "n_communities"))
        axis.set_xlabel("filters of each image that take part (top k)")
        axis.set_ylabel(label)
    return figure


def draw_training(teacher: pd.DataFrame, logs: Mapping[str, Mapping[str, Sequence[pd.DataFrame]]]) -> Figure:
    """Draw validation accuracy against epoch, a panel for each network.

    Parameters
    ----------
    teacher : DataFrame
        Training log: ``epoch``, ``validation_accuracy``. One row for an imported teacher.
    logs : mapping
        Network to method to one log for each seed and student. Means over them are drawn, for
        ``nonn`` with a band from the smallest to the largest.
    """
    figure, axes = panels(len(logs), 4.3, 3.5, sharey=True)
    last = METHODS["teacher"]
    shown, lows, highs = {}, [], []
    for axis, (network, by_method) in zip(axes, logs.items(), strict=True):
        if len(teacher) > 1:
            axis.plot(
                teacher["epoch"], teacher["validation_accuracy"], color=last.colour, linestyle="--", linewidth=1.3
            )
        else:
            axis.axhline(teacher["validation_accuracy"].iloc[0], color=last.colour, linestyle="--", linewidth=1.3)
        for method in reversed([m for m in METHODS if m in by_method]):
            look, runs = METHODS[method], by_method[method]
            epochs = runs[0]["epoch"]
            accuracies = np.stack([log["validation_accuracy"] for log in runs])  # (runs, epochs)
            axis.plot(
                epochs,
                accuracies.mean(0),
                color=look.colour,
                zorder=4 if method == "nonn" else 3,
                linewidth=2.2 if method == "nonn" else 1.3,
            )
            if method == "nonn":
                axis.fill_between(
                    epochs, accuracies.min(0), accuracies.max(0), color=look.colour, alpha=0.18, linewidth=0
                )
            shown[method] = look
            lows.append(accuracies.mean(0)[len(epochs) // 3])
            highs.append(accuracies.max())
        n_trainings = len(by_method["nonn"])
        axis.set_title(f"{network}: NoNN, mean of {plural(n_trainings, 'training')}")
        axis.set_xlabel("epoch")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.set_xlim(left=1 if len(epochs) > 1 else 0)
    # The first epochs run off the bottom: all curves rise from chance, the ends are what differs.
    top = max(*highs, teacher["validation_accuracy"].max())
    bottom = min(*lows, teacher["validation_accuracy"].iloc[-1])
    axes[0].set_ylim(bottom - 0.15 * (top - bottom), min(1, top + 0.1 * (top - bottom)))
    label_rows(axes, "validation accuracy (%)")
    handles = [Line2D([], [], color=last.colour, linestyle="--", linewidth=1.3, label=last.label)]
    for method, look in METHODS.items():
        if method in shown:
            label = "NoNN students (band: all of them)" if method == "nonn" else look.label
            handles.append(Line2D([], [], color=look.colour, linewidth=2.2 if method == "nonn" else 1.3, label=label))
    legend_below(figure, handles, columns=4)
    return figure


def _ink_on(colour: str) -> str:
    """Black or white, whichever is read more easily on a colour."""
    return "white" if np.dot(to_rgb(colour), (0.299, 0.587, 0.114)) < 0.6 else "black"


def draw_timeline(jobs: pd.DataFrame, stages: Sequence[str]) -> Figure:
    """Draw one bar a job, in lanes of jobs that follow one another.

    Parameters
    ----------
    jobs : DataFrame
        ``stage``, ``item``, ``seed``, ``start_s``, ``end_s`` and ``lane``.
    stages : sequence of str
        All stages, in order: a stage has the same colour whichever others ran.
    """
    colours = dict(zip(stages, STUDENT_COLOURS, strict=False))
    n_lanes = int(jobs["lane"].max()) + 1
    figure = Figure(figsize=(10, 1.5 + 0.5 * n_lanes), layout="constrained")
    axis = figure.subplots()
    length = jobs["end_s"].max()
    for job in jobs.itertuples():
        axis.barh(
            job.lane,
            job.end_s - job.start_s,
            left=job.start_s,
            height=0.8,
            color=colours[job.stage],
            edgecolor=axis.get_facecolor(),
            linewidth=0.6,
        )
        name = job.stage if pd.isna(job.item) else job.item
        # About 190 characters of this size fill the width.
        if (job.end_s - job.start_s) / max(length, 1e-9) * 190 > len(name):
            middle, ink = (job.start_s + job.end_s) / 2, _ink_on(colours[job.stage])
            axis.text(middle, job.lane, name, ha="center", va="center", fontsize=6, color=ink)
    axis.set_xlim(0, max(length, 1e-9))
    axis.set_ylim(n_lanes - 0.4, -0.6)
    axis.set_yticks(range(n_lanes), [str(lane + 1) for lane in range(n_lanes)])
    axis.grid(axis="y", visible=False)
    axis.set_xlabel("time since the start (s)")
    axis.set_ylabel("jobs at once")
    axis.set_title(f"{plural(len(jobs), 'job')} in {length:.0f} s")
    ran = [stage for stage in colours if stage in set(jobs["stage"])]
    legend_below(figure, [Patch(color=colours[stage], label=stage) for stage in ran], columns=7)
    return figure
