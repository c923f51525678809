"""Drawing of the figures: each function takes numbers and returns a figure, and reads or writes nothing.

The figures of the filter graph are in `nonn.graph_plots`.

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
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator, PercentFormatter
from matplotlib.transforms import ScaledTranslation

from nonn.files import replacing
from nonn.params import Figures


class Look(NamedTuple):
    """How a method appears in every figure and table."""

    label: str
    colour: str
    marker: str


#: In the order in which tables and legends list them.
METHODS = {
    "teacher": Look("Teacher", "#666666", "*"),
    "nonn": Look("NoNN", "#D55E00", "o"),
    "nonn_averaged": Look("NoNN, averaged", "#F0A070", "o"),
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
def drawing_style(style: str) -> Iterator[None]:
    """Draw and save in a matplotlib style, whatever the user's own settings are.

    ``default`` is our own look; any other style changes what it names.
    """
    styles = ["default", HOUSE_STYLE, *([style] if style != "default" else [])]
    # Element ids of SVG are hashed with this salt; they are random without one.
    with matplotlib.style.context([*styles, {"svg.hashsalt": "nonn"}]):
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


def _label_rows(axes: Sequence[Axes], label: str) -> None:
    """Name the accuracy axis that the panels of a row share, and count it in percent."""
    axes[0].yaxis.set_major_formatter(PercentFormatter(1, symbol=""))
    for axis in axes:
        if axis.get_subplotspec().is_first_col():
            axis.set_ylabel(label)


def _legend_below(figure: Figure, handles: Sequence[Any], columns: int = 5) -> None:
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), columns))


def _plural(count: int, noun: str) -> str:
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
        axis.set_title(f"{network}: NoNN, mean of {_plural(n_trainings, 'training')}")
        axis.set_xlabel("epoch")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.set_xlim(left=1 if len(epochs) > 1 else 0)
    # The first epochs run off the bottom: all curves rise from chance, the ends are what differs.
    top = max(*highs, teacher["validation_accuracy"].max())
    bottom = min(*lows, teacher["validation_accuracy"].iloc[-1])
    axes[0].set_ylim(bottom - 0.15 * (top - bottom), min(1, top + 0.1 * (top - bottom)))
    _label_rows(axes, "validation accuracy (%)")
    handles = [Line2D([], [], color=last.colour, linestyle="--", linewidth=1.3, label=last.label)]
    for method, look in METHODS.items():
        if method in shown:
            label = "NoNN students (band: all of them)" if method == "nonn" else look.label
            handles.append(Line2D([], [], color=look.colour, linewidth=2.2 if method == "nonn" else 1.3, label=label))
    _legend_below(figure, handles, columns=4)
    return figure


def spread(values: Sequence[float], gap: float, low: float, high: float) -> np.ndarray:
    """Move sorted places apart until neighbours are at least `gap` apart, within `low` to `high`.

    As little as needed: places that are far apart stay. Where there is no room for all gaps, they
    shrink evenly.
    """
    gap = min(gap, (high - low) / max(len(values) - 1, 1))
    steps = gap * np.arange(len(values))
    # With the steps taken off, "at least a gap apart" means "not falling", which pooling averages.
    blocks: list[list[float]] = []
    for value in np.asarray(values, dtype=float) - steps:
        blocks.append([value])
        while len(blocks) > 1 and np.mean(blocks[-2]) > np.mean(blocks[-1]):
            block = blocks.pop()
            blocks[-1] += block
    pooled = np.array([np.mean(block) for block in blocks for _ in block])
    return np.clip(pooled, low, high - steps[-1:].sum()) + steps


def draw_accuracy_memory(methods: pd.DataFrame, n_test: int) -> Figure:
    """Draw test accuracy against memory per device, a panel for each network.

    Parameters
    ----------
    methods : DataFrame
        One row a method and network: ``method``, ``network``, ``n_seeds``, ``accuracy_mean``,
        ``accuracy_sd`` and ``memory_bytes_per_device``. The teacher, network "", is in each panel.
    n_test : int
        Test images.
    """
    networks = [network for network in methods["network"].unique() if network]
    memory = methods["memory_bytes_per_device"] / 1024
    deviation = methods["accuracy_sd"].astype(float).fillna(0)
    low, high = (methods["accuracy_mean"] - deviation).min(), (methods["accuracy_mean"] + deviation).max()
    margin = 0.08 * max(high - low, 1e-3)
    figure, axes = panels(len(networks), 5.2, 3.9, sharey=True)
    axes[0].set_ylim(low - margin, high + margin)
    decades = np.log10(memory.max() / memory.min()) + 0.3
    for axis, network in zip(axes, networks, strict=True):
        axis.set_xscale("log")
        # Names stand left of the points: two fifths of the width are for them.
        axis.set_xlim(memory.min() / 10 ** (0.8 * decades - 0.2), memory.max() * 10 ** (0.12 * decades))
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
        axis.xaxis.set_minor_locator(NullLocator())
        _place_methods(figure, axis, methods.assign(memory=memory)[methods["network"].isin(["", network])])
        n_seeds = methods.query("method == 'nonn' and network == @network")["n_seeds"].iloc[0]
        axis.set_title(f"{network}: NoNN n = {n_seeds}, {n_test:,} test images")
        axis.set_xlabel("weights and peak activations of one device (KiB)")
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    _label_rows(axes, "test accuracy (%), mean ± SD over seeds")
    return figure


def _place_methods(figure: Figure, axis: Axes, rows: pd.DataFrame) -> None:
    """Draw the methods of one panel and name each one.

    Methods of nearly the same memory stand side by side, a few points apart, and are named in a
    column at the left; one that stands alone is named beside it. Ticks on the axis are exact.
    """
    rows = rows.sort_values(["memory", "accuracy_mean", "method"])
    group = (rows["memory"].pct_change() > 0.15).cumsum()
    crowded = group.map(group.value_counts()) > 1
    bottom, top = axis.get_ylim()
    heights = ((rows.loc[crowded, "accuracy_mean"] - bottom) / (top - bottom)).sort_values(kind="stable")
    label_heights = dict(zip(heights.index, spread(heights, 0.06, 0.03, 0.97), strict=True))
    for index, row in rows.iterrows():
        look, hero = METHODS[row["method"]], row["method"] == "nonn"
        peers = group.index[group == group[index]]
        shift = 5 * (peers.get_loc(index) - (len(peers) - 1) / 2)
        place = axis.transData + ScaledTranslation(shift / 72, 0, figure.dpi_scale_trans)
        axis.plot(
            row["memory"], 0, "|", color=look.colour, markersize=9, transform=axis.get_xaxis_transform(), clip_on=False
        )
        axis.errorbar(
            row["memory"],
            row["accuracy_mean"],
            yerr=None if pd.isna(row["accuracy_sd"]) else row["accuracy_sd"],
            fmt=look.marker,
            color=look.colour,
            markersize={"*": 11, "o": 7.5}.get(look.marker, 6),
            markeredgecolor=axis.get_facecolor(),
            markeredgewidth=0.6,
            elinewidth=1.2,
            capsize=2,
            transform=place,
            zorder=4 if hero else 3,
        )
        where = {"textcoords": "offset points", "xytext": (9, 0), "va": "center"}
        if row["method"] == "teacher":
            where = {"textcoords": "offset points", "xytext": (0, -9), "ha": "center", "va": "top"}
        elif row["method"] == "total":  # between the crowd and the teacher: the room is above and to the right
            top = row["accuracy_mean"] + np.nan_to_num(row["accuracy_sd"])
            above = ScaledTranslation(0, 5 / 72, axis.figure.dpi_scale_trans)
            axis.text(
                row["memory"], top, look.label, color=look.colour, ha="left", va="bottom", transform=place + above
            )
            continue
        elif crowded[index]:
            line = {
                "arrowstyle": "-",
                "color": look.colour,
                "alpha": 0.45,
                "linewidth": 0.7,
                "shrinkA": 1,
                "shrinkB": 4,
            }
            where = {
                "textcoords": "axes fraction",
                "xytext": (0.3, label_heights[index]),
                "ha": "right",
                "va": "center",
                "arrowprops": line,
            }
        axis.annotate(
            look.label,
            (row["memory"], row["accuracy_mean"]),
            xycoords=place,
            color=look.colour,
            weight="bold" if hero else "normal",
            **where,
        )


def draw_missing_devices(
    missing: pd.DataFrame, chosen: Mapping[str, str], n_seeds: Mapping[tuple[str, str], int], n_test: int
) -> Figure:
    """Draw test accuracy against the number of missing devices, a panel for each network.

    Parameters
    ----------
    missing : DataFrame
        ``method``, ``network``, ``missing``; ``mean`` and ``worst`` accuracy over the subsets of
        devices, each with its ``_sd`` over seeds.
    chosen : mapping
        Network to how its final layer makes up for missing devices, in words.
    n_seeds : mapping
        Method and network to the number of seeds.
    n_test : int
        Test images.
    """
    networks = list(missing["network"].unique())
    deviations = missing[["mean_sd", "worst_sd"]].astype(float).fillna(0)
    low = (missing["worst"] - deviations["worst_sd"]).min()
    high = (missing["mean"] + deviations["mean_sd"]).max()
    margin = 0.05 * max(high - low, 1e-3)
    present = [method for method in METHODS if method in set(missing["method"])]
    figure, axes = panels(len(networks), 4.3, 3.5, sharey=True)
    for axis, network in zip(axes, networks, strict=True):
        methods = [m for m in present if ((missing["method"] == m) & (missing["network"] == network)).any()]
        for position, method in enumerate(methods):
            rows = missing[(missing["method"] == method) & (missing["network"] == network)]
            # A few points apart, so that error bars do not cover each other.
            shift = 4 * (position - (len(methods) - 1) / 2)
            place = axis.transData + ScaledTranslation(shift / 72, 0, figure.dpi_scale_trans)
            for key, line, fill in (("worst", (0, (4, 2)), False), ("mean", "-", True)):
                look = METHODS[method]
                deviation = rows[f"{key}_sd"].astype(float)
                axis.errorbar(
                    rows["missing"],
                    rows[key],
                    transform=place,
                    yerr=None if deviation.isna().all() else deviation,
                    color=look.colour,
                    linestyle=line,
                    marker=look.marker,
                    markersize=5.5,
                    markerfacecolor=look.colour if fill else axis.get_facecolor(),
                    linewidth=1.4,
                    elinewidth=1,
                    capsize=2,
                    zorder=4 if method == "nonn" else 3,
                )
        axis.set_title(f"{network}: NoNN n = {n_seeds['nonn', network]}, {n_test:,} test images")
        axis.set_xlabel(f"missing devices\nNoNN: {chosen[network]}")
        most = missing.loc[missing["network"] == network, "missing"].max()
        axis.set_xlim(-0.12 * most, 1.12 * most)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[0].set_ylim(low - margin, high + margin)
    _label_rows(axes, "test accuracy (%), ± SD over seeds")
    looks = [METHODS[method] for method in present]
    handles = [Line2D([], [], color=k.colour, marker=k.marker, markersize=5.5, label=k.label) for k in looks]
    neutral = {"color": "0.5", "marker": "o", "markersize": 5.5}
    handles.append(Line2D([], [], label="mean of all subsets", **neutral))
    handles.append(Line2D([], [], label="worst subset", linestyle=(0, (4, 2)), markerfacecolor="none", **neutral))
    _legend_below(figure, handles, columns=5)
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
    axis.set_title(f"{_plural(len(jobs), 'job')} in {length:.0f} s")
    ran = [stage for stage in colours if stage in set(jobs["stage"])]
    _legend_below(figure, [Patch(color=colours[stage], label=stage) for stage in ran], columns=7)
    return figure
