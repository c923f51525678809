"""Figures of the devices at work: each function takes the table of `nonn.report.deployment_table` and returns a figure.

What is calculated (badge *modelled*) is hollow and dashed, what was timed (*measured*, *emulated*) filled.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

from nonn.core.params import Architecture
from nonn.report.deployment_table import PAPER
from nonn.report.plots import METHODS, Look, legend_below, panels

#: How a layout of the devices appears; those that are methods of accuracy too keep their look.
LAYOUTS = {
    "teacher": METHODS["teacher"],
    "channels": Look("split by channels", "#0072B2", "s"),
    "rows": Look("split by rows", "#009E73", "D"),
    "kd": METHODS["kd"],
    "nonn": METHODS["nonn"],
}
REFERENCES = {"reference_channels": "channels", "reference_rows": "rows"}
LINK_NAMES = {
    "ieee802154": "802.15.4, 250 kbit/s",
    "wifi20": "Wi-Fi, 20 Mbit/s + 2 ms",
    "wifi50": "Wi-Fi, 50 Mbit/s + 2 ms",
    "wifi100": "Wi-Fi, 100 Mbit/s + 2 ms",
    "ethernet100": "Ethernet, 100 Mbit/s",
    "ethernet941": "Ethernet, 941 Mbit/s",
}
RATIO_NAMES = {
    "memory": "memory of a device",
    "performance": "time of a device",
    "energy_per_node": "energy of a device",
    "total_latency": "total latency\nagainst split by channels",
    "total_latency_rows": "total latency\nagainst split by rows",
}


def _count_devices(axis: Axes, counts: Sequence[int]) -> None:
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_locator(FixedLocator(list(counts)))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_xlabel("devices")


def _count_decades(axis: Axes) -> None:
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(base=10, numticks=12))
    axis.yaxis.set_minor_formatter(NullFormatter())


def _size(value: float, _: int = 0) -> str:
    for unit, factor in (("MB", 1e6), ("kB", 1e3)):
        if value >= factor:
            return f"{value / factor:g} {unit}"
    return f"{value:g} B"


def _time(value: float, _: int = 0) -> str:
    return f"{value / 1e3:g} s" if value >= 1e3 else f"{value:g} ms"


def draw_communication(rows: pd.DataFrame, reference: Architecture | None) -> Figure:
    """Draw what travels for one image against the number of devices: bytes and rounds; the paper's Fig. 3.

    Parameters
    ----------
    rows : DataFrame
        From `nonn.report.deployment_table.join_rows`.
    reference : Architecture or None
        That was split for reference.
    """
    chosen = rows[(rows["scenario"] == "sensor") & (rows["badge"] == "modelled") & (rows["network"] != "")]
    chosen = chosen.drop_duplicates(["method", "n_devices"])
    figure = Figure(figsize=(8.2, 3.6), layout="constrained")
    axes = figure.subplots(1, 2)
    handles = []
    for method in ("reference_channels", "reference_rows", "channels", "rows", "nonn"):
        line = chosen[chosen["method"] == method].sort_values("n_devices")
        if line.empty:
            continue
        look = LAYOUTS[REFERENCES.get(method, method)]
        style = {"color": look.colour, "marker": look.marker, "markersize": 5.5}
        if method in REFERENCES:
            style |= {"linestyle": (0, (4, 2)), "markerfacecolor": "none", "linewidth": 1.1}
        axes[0].plot(line["n_devices"], line["wire_bytes"], **style)
        # Asking and answering take a message each way, whatever happens between.
        axes[1].plot(line["n_devices"], line["rounds"] + 2, **style)
        label = f"{reference.name}, {look.label}" if method in REFERENCES else look.label
        handles.append(Line2D([], [], **style, label=label))
    _count_decades(axes[0])
    axes[0].yaxis.set_major_formatter(FuncFormatter(_size))
    axes[0].set_ylabel("bytes on the wire for one image")
    axes[1].set_ylabel("messages one after another")
    axes[1].set_ylim(bottom=0)
    for axis in axes:
        _count_devices(axis, sorted(chosen["n_devices"].unique()))
    legend_below(figure, handles[::-1], columns=3)
    return figure


def draw_latency(rows: pd.DataFrame) -> Figure:
    """Draw the total latency of one image against the number of devices, a panel for each link."""
    rows = rows[(rows["scenario"] == "sensor") & rows["method"].isin(list(LAYOUTS))]
    links = [link for link in LINK_NAMES if link in set(rows["link"])]
    counts = sorted(rows["n_devices"].unique())
    figure, axes = panels(len(links), 3.4, 3.5, sharey=True)
    for axis, link in zip(axes, links, strict=True):
        for method, look in LAYOUTS.items():
            for is_modelled, fill, line in ((True, "none", (0, (3, 2))), (False, look.colour, "-")):
                here = rows[(rows["link"] == link) & (rows["method"] == method)]
                here = here[(here["badge"] == "modelled") == is_modelled].sort_values("n_devices")
                style = {"color": look.colour, "marker": look.marker, "markerfacecolor": fill, "linestyle": line}
                axis.plot(
                    here["n_devices"],
                    here["total_ms"],
                    **style,
                    markersize=5.5,
                    linewidth=1.2,
                    zorder=4 if method == "nonn" else 3,
                )
        _count_decades(axis)
        axis.yaxis.set_major_formatter(FuncFormatter(_time))
        _count_devices(axis, counts)
        axis.set_title(LINK_NAMES[link])
    axes[0].set_ylabel("from the image to its class (median)")
    shown = [look for method, look in LAYOUTS.items() if method in set(rows["method"])]
    handles = [Line2D([], [], color=k.colour, marker=k.marker, markersize=5.5, label=k.label) for k in shown]
    neutral = {"color": "0.4", "marker": "o", "markersize": 5.5}
    handles += [
        Line2D([], [], **neutral, label="timed, all devices at once"),
        Line2D([], [], **neutral, markerfacecolor="none", linestyle=(0, (3, 2)), label="composed, each device alone"),
    ]
    legend_below(figure, handles, columns=4)
    return figure


def draw_scaling(rows: pd.DataFrame, comparisons: Sequence[Mapping], board: str) -> Figure:
    """Draw performance and energy against the number of devices; the paper's Fig. 7.

    Left, how many times sooner the slowest device has its features than the teacher its answer, on one
    core of this machine. Right, the energy of one image on a board: of one device, and of all.
    """
    rows = rows[(rows["scenario"] == "sensor") & (rows["badge"] == "modelled")]
    rows = rows[rows["link"] == rows["link"].iloc[0]]
    counts = rows[rows["network"] != ""].groupby("network")["n_devices"].first()
    figure = Figure(figsize=(8.2, 3.9), layout="constrained")
    speed, energy = figure.subplots(1, 2)
    look = LAYOUTS["nonn"]
    places = [counts[comparison["network"]] for comparison in comparisons]
    ratios = [comparison["performance_ratio"] for comparison in comparisons]
    speed.plot([1, *places], [1, *ratios], color=look.colour, marker=look.marker, markersize=6)
    for place, ratio in zip(places, ratios, strict=True):
        speed.annotate(
            f"{ratio:.1f}×", (place, ratio), xytext=(0, 7), textcoords="offset points", ha="center", color=look.colour
        )
    speed.plot(1, 1, color=LAYOUTS["teacher"].colour, marker=LAYOUTS["teacher"].marker, markersize=11)
    speed.set_ylim(0, 1.2 * max(ratios))
    speed.set_ylabel("times faster than the teacher")
    speed.set_title("performance of the slowest device (measured)")
    methods = [m for m in ("teacher", "channels", "rows", "nonn") if m in set(rows["method"])]
    for method in methods:
        line, look = rows[rows["method"] == method].sort_values("n_devices"), LAYOUTS[method]
        for key, fill, dash in (("node", look.colour, "-"), ("total", "none", (0, (3, 2)))):
            if method == "teacher" and key == "total":
                continue
            low, high = line[f"energy_{key}_mj_low"], line[f"energy_{key}_mj_high"]
            energy.errorbar(
                line["n_devices"],
                (low + high) / 2,
                yerr=[(high - low) / 2, (high - low) / 2],
                color=look.colour,
                marker=look.marker,
                markerfacecolor=fill,
                linestyle=dash,
                markersize=11 if method == "teacher" else 5.5,
                linewidth=1.2,
                elinewidth=1,
                capsize=2,
            )
    _count_decades(energy)
    energy.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    energy.set_ylabel("energy of one image (mJ)")
    energy.set_title(f"energy on {board.replace('_', '-')} (modelled)")
    everywhere = sorted({1, *map(int, counts)})
    for axis in (speed, energy):
        _count_devices(axis, everywhere)
    handles = [
        Line2D([], [], color=k.colour, marker=k.marker, markersize=5.5, label=k.label)
        for k in (LAYOUTS[method] for method in methods)
    ]
    neutral = {"color": "0.4", "marker": "o", "markersize": 5.5}
    handles += [
        Line2D([], [], **neutral, label="of the neediest device"),
        Line2D([], [], **neutral, markerfacecolor="none", linestyle=(0, (3, 2)), label="of all devices"),
    ]
    legend_below(figure, handles, columns=3)
    return figure


def draw_ratios(ratios: Mapping[str, Mapping | None]) -> Figure:
    """Draw how many times less NoNN needs, beside what the paper says."""
    names = [name for name in RATIO_NAMES if ratios.get(name)]
    figure = Figure(figsize=(7.6, 0.62 * len(names) + 1.1), layout="constrained")
    axis = figure.subplots()
    for place, name in enumerate(names):
        entry = ratios[name]
        axis.barh(place - 0.19, entry["ratio"], 0.36, color=METHODS["nonn"].colour)
        about = f"{entry['n']} devices" + (f", {LINK_NAMES.get(entry['link'], entry['link'])}" if entry["link"] else "")
        note = f" {entry['ratio']:.1f}×  {about} ({entry['badge']})"
        axis.annotate(
            note, (entry["ratio"], place - 0.19), va="center", xytext=(2, 0), textcoords="offset points", size=8
        )
        if name in PAPER:
            axis.barh(place + 0.19, PAPER[name], 0.36, color="0.75")
            note = f" {PAPER[name]:.0f}×  paper (cited)"
            axis.annotate(
                note, (PAPER[name], place + 0.19), va="center", xytext=(2, 0), textcoords="offset points", size=8
            )
    axis.set_yticks(range(len(names)), [RATIO_NAMES[name] for name in names])
    axis.set_ylim(len(names) - 0.4, -0.6)
    axis.set_xscale("log")
    found = [ratios[name]["ratio"] for name in names]
    largest = max(*found, *PAPER.values())
    axis.set_xlim(min(1, 0.8 * min(found)), largest**2.1)  # a wide right margin, for the notes
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×" if value <= 2 * largest else ""))
    axis.grid(axis="y", visible=False)
    axis.set_xlabel("times less than the baseline")
    return figure
