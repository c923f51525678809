"""Figures of accuracy: against memory, and when devices go missing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from matplotlib.transforms import ScaledTranslation

from nonn.report.plots import METHODS, label_rows, legend_below, panels


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
    label_rows(axes, "test accuracy (%), mean ± SD over seeds")
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
        if row["method"] in ("teacher", "teacher_int8"):
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
    label_rows(axes, "test accuracy (%), ± SD over seeds")
    looks = [METHODS[method] for method in present]
    handles = [Line2D([], [], color=k.colour, marker=k.marker, markersize=5.5, label=k.label) for k in looks]
    neutral = {"color": "0.5", "marker": "o", "markersize": 5.5}
    handles.append(Line2D([], [], label="mean of all subsets", **neutral))
    handles.append(Line2D([], [], label="worst subset", linestyle=(0, (4, 2)), markerfacecolor="none", **neutral))
    legend_below(figure, handles, columns=5)
    return figure
