"""Figures of accuracy: in training, against memory, and when devices go missing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
from matplotlib.transforms import ScaledTranslation
from scipy.optimize import isotonic_regression

from nonn.report.plots import METHODS, Look, label_rows, legend_below, legend_handle, panels, plural

#: If the memory of methods spans this many decades, only powers of ten are labelled.
CROWDED = 2.5
#: Budgets closer than this factor are labelled on opposite sides.
NEAR = 1.3


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
    teacher_accuracy = teacher["validation_accuracy"]
    dashed = {"color": METHODS["teacher"].colour, "linestyle": "--", "linewidth": 1.3}
    lines = {m: {"color": METHODS[m].colour, "linewidth": 2.2 if m == "nonn" else 1.3} for m in METHODS}
    lows, highs = [teacher_accuracy.iloc[-1]], [teacher_accuracy.max()]
    for axis, (network, by_method) in zip(axes, logs.items(), strict=True):
        if len(teacher) > 1:
            axis.plot(teacher["epoch"], teacher_accuracy, **dashed)
        else:
            axis.axhline(teacher_accuracy.iloc[0], **dashed)
        for method in sorted(by_method, key=list(METHODS).index, reverse=True):
            epochs = by_method[method][0]["epoch"]
            accuracies = np.stack([log["validation_accuracy"] for log in by_method[method]])  # (runs, epochs)
            axis.plot(epochs, accuracies.mean(0), zorder=4 if method == "nonn" else 3, **lines[method])
            if method == "nonn":
                band = accuracies.min(0), accuracies.max(0)
                axis.fill_between(epochs, *band, color=METHODS[method].colour, alpha=0.18, linewidth=0)
            lows.append(accuracies.mean(0)[len(epochs) // 3])
            highs.append(accuracies.max())
        axis.set(xlabel="epoch", title=f"{network}: NoNN, mean of {plural(len(by_method['nonn']), 'training')}")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.set_xlim(left=1 if len(epochs) > 1 else 0)
    # The first epochs are cut off at the bottom: all curves rise from chance, and only their ends differ.
    bottom, top = min(lows), max(highs)
    top = max(top, bottom + 0.001)  # if all are equally accurate
    axes[0].set_ylim(bottom - 0.15 * (top - bottom), min(1, top + 0.1 * (top - bottom)))
    label_rows(axes, "validation accuracy (%)")
    labels = {method: look.label for method, look in METHODS.items() if any(method in some for some in logs.values())}
    labels |= {"nonn": "NoNN students (band: all of them)"}
    handles = [Line2D([], [], label=METHODS["teacher"].label, **dashed)]
    handles += [Line2D([], [], label=label, **lines[method]) for method, label in labels.items()]
    legend_below(figure, handles, columns=4)
    return figure


def spread(values: Sequence[float], gap: float, low: float, high: float) -> np.ndarray:
    """Move sorted places apart until neighbours are at least `gap` apart, within `low` to `high`.

    As little as needed: places that are far apart stay. Where there is no room for all gaps, they
    shrink evenly.
    """
    if not len(values):
        return np.empty(0)
    gap = min(gap, (high - low) / max(len(values) - 1, 1))
    steps = gap * np.arange(len(values))
    # After subtracting multiples of the gap, "at least a gap apart" means "not falling".
    return np.clip(isotonic_regression(np.asarray(values) - steps).x, low, high - steps[-1]) + steps


def draw_accuracy_memory(methods: pd.DataFrame, budgets: Mapping[str, Sequence[float]], n_test: int) -> Figure:
    """Draw test accuracy against memory per device, a panel for each network.

    Parameters
    ----------
    methods : DataFrame
        One row a method and network: ``method``, ``network``, ``n_seeds``, ``accuracy_mean``,
        ``accuracy_sd`` and ``memory_bytes_per_device``. The teacher, network "", is in each panel.
    budgets : mapping
        Network to the memory of its kinds of devices, in KiB.
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
        # Names stand left of the points, in two fifths of the width.
        axis.set_xlim(memory.min() / 10 ** (0.9 * decades - 0.2), memory.max() * 10 ** (0.2 * decades))
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 3) if decades < CROWDED else (1,)))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.xaxis.set_major_formatter("{x:,g}")
        _mark_budgets(axis, budgets[network])
        _place_methods(axis, methods.assign(memory=memory)[methods["network"].isin(["", network])])
        n_seeds = methods.query("method == 'nonn' and network == @network")["n_seeds"].iloc[0]
        axis.set_title(f"{network}: NoNN n = {n_seeds}, {n_test:,} test images")
        axis.set_xlabel("weights and peak activations of one device (KiB)")
    label_rows(axes, "test accuracy (%), mean ± SD over seeds")
    return figure


def _mark_budgets(axis: Axes, budgets: Sequence[float]) -> None:
    ordered = sorted(budgets)
    for budget, larger in zip(ordered, [*ordered[1:], math.inf], strict=True):
        axis.axvline(budget, color="0.45", linewidth=1, linestyle=(0, (1, 2)), zorder=1)
        side = -1 if larger < NEAR * budget else 1  # the name of the next one takes the room at the right
        name = {"rotation": 90, "ha": "left" if side > 0 else "right", "va": "bottom", "size": 7, "color": "0.35"}
        place = {"xycoords": ("data", "axes fraction"), "xytext": (2 * side, 3), "textcoords": "offset points"}
        axis.annotate(f"budget {budget:,g} KiB", (budget, 0), **place, **name)


def _place_methods(axis: Axes, rows: pd.DataFrame) -> None:
    """Draw the methods of one panel at their places, and name each one.

    Markers are hollow, but for NoNN's, so that those at one place can be told apart. Methods of nearly the same memory
    are named in a column at the left; one that stands alone is named beside it.
    """
    rows = rows.sort_values(["memory", "accuracy_mean", "method"])
    group = (rows["memory"].pct_change() > 0.15).cumsum()
    crowded = group.map(group.value_counts()) > 1
    bottom, top = axis.get_ylim()
    heights = ((rows.loc[crowded, "accuracy_mean"] - bottom) / (top - bottom)).sort_values(kind="stable")
    label_heights = dict(zip(heights.index, spread(heights, 0.06, 0.03, 0.97), strict=True))
    for index, row in rows.iterrows():
        method, memory, accuracy, deviation = row[["method", "memory", "accuracy_mean", "accuracy_sd"]]
        look, colour, hero = METHODS[method], METHODS[method].colour, method == "nonn"
        # Bars of equal memory overlap, so the more accurate one has wider caps.
        rank = list(group.index[group == group[index]]).index(index)
        bar = {"yerr": None if pd.isna(deviation) else deviation, "elinewidth": 1, "capsize": 2 + rank}
        mark = {"markersize": {"*": 10, "o": 7}.get(look.marker, 6), "markeredgewidth": 1.2}
        mark |= {"fmt": look.marker, "color": colour, "markerfacecolor": colour if hero else "none"}
        axis.errorbar(memory, accuracy, zorder=3 if hero else 4, **bar, **mark)
        where = {"xytext": (9, 0), "va": "center"}
        if method in ("teacher", "teacher_int8"):
            where = {"xytext": (0, -9), "ha": "center", "va": "top"}
        elif crowded[index]:
            where |= {"textcoords": "axes fraction", "xytext": (0.31, label_heights[index]), "ha": "right"}
            line = {"arrowstyle": "-", "color": colour, "linewidth": 0.6, "shrinkA": 1, "shrinkB": 4}
            where["arrowprops"] = line
        elif method == "total" and memory > 0.1 * rows["memory"].max():  # close to the teacher's: the room is above
            accuracy += np.nan_to_num(deviation)
            where = {"xytext": (0, 5), "ha": "center", "va": "bottom"}
        where = {"textcoords": "offset points", "weight": "bold" if hero else "normal"} | where
        axis.annotate(look.label, (memory, accuracy), color=colour, **where)


def _shifted(axis: Axes, points: float) -> ScaledTranslation:
    """Data coordinates, some points to the right, so that marks do not cover each other."""
    return axis.transData + ScaledTranslation(points / 72, 0, axis.figure.dpi_scale_trans)


def draw_missing_devices(
    missing: pd.DataFrame, chosen: Mapping[str, str], n_seeds: Mapping[str, int], n_test: int
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
        Network to the number of NoNN's seeds.
    """
    missing = missing.astype({"mean_sd": float, "worst_sd": float})
    low = (missing["worst"] - missing["worst_sd"].fillna(0)).min()
    high = (missing["mean"] + missing["mean_sd"].fillna(0)).max()
    margin = 0.05 * max(high - low, 1e-3)
    dashes = (0, (4, 2))
    figure, axes = panels(missing["network"].nunique(), 4.3, 3.5, sharey=True)
    for axis, (network, own) in zip(axes, missing.groupby("network", sort=False), strict=True):
        methods = [method for method in METHODS if method in set(own["method"])]
        for position, method in enumerate(methods):
            rows, look = own[own["method"] == method], METHODS[method]
            place = _shifted(axis, 4 * (position - (len(methods) - 1) / 2))
            for key, line, fill in (("worst", dashes, axis.get_facecolor()), ("mean", "-", look.colour)):
                deviation = rows[f"{key}_sd"]
                bars = {"yerr": None if deviation.isna().all() else deviation, "elinewidth": 1}
                style = {"color": look.colour, "marker": look.marker, "markerfacecolor": fill, "linestyle": line}
                style |= {"linewidth": 1.4, "zorder": 4 if method == "nonn" else 3, "transform": place}
                axis.errorbar(rows["missing"], rows[key], **bars, **style)
        most = own["missing"].max()
        axis.set(xlim=(-0.12 * most, 1.12 * most), xlabel=f"missing devices\nNoNN: {chosen[network]}")
        axis.set_title(f"{network}: NoNN n = {n_seeds[network]}, {n_test:,} test images")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[0].set_ylim(low - margin, high + margin)
    label_rows(axes, "test accuracy (%), ± SD over seeds")
    handles = [legend_handle(look) for method, look in METHODS.items() if method in set(missing["method"])]
    handles.append(legend_handle(Look("mean of all subsets", "0.5", "o")))
    handles.append(legend_handle(Look("worst subset", "0.5", "o"), linestyle=dashes, markerfacecolor="none"))
    legend_below(figure, handles, columns=5)
    return figure
