"""Figures of the devices at work: each function takes rows of `nonn.report.deployment_table`, or its ratios.

What is calculated (badge *modelled*) is hollow and dashed, what was timed (*measured*, *emulated*) filled.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

from nonn.core.params import Architecture
from nonn.report.deployment_table import PAPER, RATIO_LABELS
from nonn.report.plots import METHODS, Look, legend_below, legend_handle, panels

#: How a layout of the devices appears; those that are methods of accuracy too keep their look.
LAYOUTS = {
    "teacher": METHODS["teacher"],
    "channels": Look("split by channels", "#0072B2", "s"),
    "rows": Look("split by rows", "#009E73", "D"),
    "kd": METHODS["kd"],
    "nonn": METHODS["nonn"],
}
LINK_NAMES = {
    "ieee802154": "802.15.4, 250 kbit/s",
    "wifi20": "Wi-Fi, 20 Mbit/s + 2 ms",
    "wifi50": "Wi-Fi, 50 Mbit/s + 2 ms",
    "wifi100": "Wi-Fi, 100 Mbit/s + 2 ms",
    "ethernet100": "Ethernet, 100 Mbit/s",
    "ethernet941": "Ethernet, 941 Mbit/s",
}
HOLLOW = {"linestyle": (0, (3, 2)), "markerfacecolor": "none"}


def _count_devices(axis: Axes, counts: Sequence[int]) -> None:
    axis.set_xscale("log", base=2)
    axis.set_xticks(counts, [f"{count:g}" for count in counts])
    axis.xaxis.minorticks_off()
    axis.set_xlabel("devices")


def _count_decades(axis: Axes) -> None:
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(base=10, numticks=12))
    axis.yaxis.set_minor_formatter(NullFormatter())


def draw_communication(rows: pd.DataFrame, reference: Architecture | None) -> Figure:
    """Draw what travels for one image against the number of devices: bytes and rounds; the paper's Fig. 3.

    Parameters
    ----------
    reference : Architecture or None
        Of the network that was split for reference.
    """
    chosen = rows[(rows["scenario"] == "sensor") & (rows["badge"] == "modelled") & (rows["network"] != "")]
    chosen = chosen.drop_duplicates(["method", "n_devices"]).sort_values("n_devices")
    figure = Figure(figsize=(8.2, 3.6), layout="constrained")
    size, messages = axes = figure.subplots(1, 2)
    handles = []
    for method in ("reference_channels", "reference_rows", "channels", "rows", "nonn"):
        line = chosen[chosen["method"] == method]
        if line.empty:
            continue
        look, style = LAYOUTS[method.removeprefix("reference_")], {}
        if method not in LAYOUTS:
            look = look._replace(label=f"{reference.name}, {look.label}")
            style = {"linestyle": (0, (4, 2)), "markerfacecolor": "none", "linewidth": 1.1}
        handles.append(legend_handle(look, **style))
        style |= {"color": look.colour, "marker": look.marker}
        size.plot(line["n_devices"], line["wire_bytes"], **style)
        # Asking and answering take a message each way, whatever happens between.
        messages.plot(line["n_devices"], line["rounds"] + 2, **style)
    _count_decades(size)
    size.yaxis.set_major_formatter(EngFormatter("B"))
    size.set_ylabel("bytes on the wire for one image")
    messages.set(ylabel="messages one after another", ylim=(0, None))
    for axis in axes:
        _count_devices(axis, chosen["n_devices"].unique())
    legend_below(figure, handles[::-1], columns=3)
    return figure


def draw_latency(rows: pd.DataFrame) -> Figure:
    """Draw the total latency of one image against the number of devices, a panel for each link."""
    rows = rows[(rows["scenario"] == "sensor") & rows["method"].isin(list(LAYOUTS))].sort_values("n_devices")
    layouts = {method: look for method, look in LAYOUTS.items() if method in set(rows["method"])}
    links = [link for link in LINK_NAMES if link in set(rows["link"])]
    figure, axes = panels(len(links), 3.4, 3.5, sharey=True)
    for axis, link in zip(axes, links, strict=True):
        for method, look in layouts.items():
            here = rows[(rows["link"] == link) & (rows["method"] == method)]
            modelled = here["badge"] == "modelled"
            style = {"color": look.colour, "marker": look.marker, "linewidth": 1.2}
            style["zorder"] = 4 if method == "nonn" else 3
            for line, more in ((here[modelled], HOLLOW), (here[~modelled], {})):
                axis.plot(line["n_devices"], line["total_ms"], **style, **more)
        _count_decades(axis)
        axis.yaxis.set_major_formatter(lambda ms, _: f"{ms / 1e3:g} s" if ms >= 1e3 else f"{ms:g} ms")
        _count_devices(axis, rows["n_devices"].unique())
        axis.set_title(LINK_NAMES[link])
    axes[0].set_ylabel("from the image to its class (median)")
    handles = [legend_handle(look) for look in layouts.values()]
    handles.append(legend_handle(Look("timed, all devices at once", "0.4", "o")))
    handles.append(legend_handle(Look("composed, each device alone", "0.4", "o"), **HOLLOW))
    legend_below(figure, handles, columns=4)
    return figure


def draw_scaling(rows: pd.DataFrame, comparisons: Sequence[Mapping], board: str) -> Figure:
    """Draw performance and energy against the number of devices; the paper's Fig. 7.

    Left, how many times sooner the slowest device has its features than the teacher its answer, on one
    core of this machine. Right, the energy of one image on a board: of one device, and of all.
    """
    rows = rows[(rows["scenario"] == "sensor") & (rows["badge"] == "modelled")]
    rows = rows[rows["link"] == rows["link"].iloc[0]].sort_values("n_devices")
    counts = rows[rows["network"] != ""].groupby("network")["n_devices"].first()
    figure = Figure(figsize=(8.2, 3.9), layout="constrained")
    speed, energy = figure.subplots(1, 2)
    nonn, teacher = LAYOUTS["nonn"], LAYOUTS["teacher"]
    places = [1, *(counts[comparison["network"]] for comparison in comparisons)]
    ratios = [1, *(comparison["performance_ratio"] for comparison in comparisons)]
    speed.plot(places, ratios, color=nonn.colour, marker=nonn.marker, markersize=6)
    above = {"xytext": (0, 7), "textcoords": "offset points", "ha": "center"}
    for point in list(zip(places, ratios, strict=True))[1:]:
        speed.annotate(f"{point[1]:.1f}×", point, color=nonn.colour, **above)
    speed.plot(1, 1, color=teacher.colour, marker=teacher.marker, markersize=11)
    speed.set(ylim=(0, 1.2 * max(ratios[1:])), ylabel="times faster than the teacher")
    speed.set_title("performance of the slowest device (measured)")
    layouts = {method: look for method, look in LAYOUTS.items() if method in set(rows["method"]) and method != "kd"}
    for method, look in layouts.items():
        line = rows[rows["method"] == method]
        style = {"color": look.colour, "marker": look.marker, "linewidth": 1.2, "elinewidth": 1}
        lines = {"node": {"markersize": 11}} if method == "teacher" else {"node": {}, "total": HOLLOW}
        for key, more in lines.items():
            low, high = line[f"energy_{key}_mj_low"], line[f"energy_{key}_mj_high"]
            energy.errorbar(line["n_devices"], (low + high) / 2, yerr=(high - low) / 2, **style, **more)
    _count_decades(energy)
    energy.yaxis.set_major_formatter("{x:g}")
    energy.set(ylabel="energy of one image (mJ)", title=f"energy on {board.replace('_', '-')} (modelled)")
    for axis in (speed, energy):
        _count_devices(axis, sorted({1, *counts}))
    handles = [legend_handle(look) for look in layouts.values()]
    handles.append(legend_handle(Look("of the neediest device", "0.4", "o")))
    handles.append(legend_handle(Look("of all devices", "0.4", "o"), **HOLLOW))
    legend_below(figure, handles, columns=3)
    return figure


def draw_ratios(ratios: Mapping[str, Mapping | None]) -> Figure:
    """Draw how many times less NoNN needs, beside what the paper says."""
    entries = {name: ratios[name] for name in RATIO_LABELS if ratios.get(name)}
    figure = Figure(figsize=(7.6, 0.62 * len(entries) + 1.1), layout="constrained")
    axis = figure.subplots()
    found, places = [entry["ratio"] for entry in entries.values()], np.arange(len(entries))
    bars = axis.barh(places - 0.19, found, 0.36, color=METHODS["nonn"].colour)
    links = [f", {LINK_NAMES.get(e['link'], e['link'])}" if e["link"] else "" for e in entries.values()]
    notes = [
        f" {entry['ratio']:.1f}×  {entry['n']} devices{link} ({entry['badge']})"
        for entry, link in zip(entries.values(), links, strict=True)
    ]
    axis.bar_label(bars, notes, padding=2, size=8)
    cited = {place: PAPER[name] for place, name in enumerate(entries) if name in PAPER}
    bars = axis.barh([place + 0.19 for place in cited], list(cited.values()), 0.36, color="0.75")
    axis.bar_label(bars, [f" {ratio:.0f}×  paper (cited)" for ratio in cited.values()], padding=2, size=8)
    axis.set_yticks(places, [RATIO_LABELS[name].lower().replace(", against a ", "\nagainst ") for name in entries])
    axis.set_ylim(len(entries) - 0.4, -0.6)
    axis.set_xscale("log")
    largest = max(*found, *PAPER.values())
    axis.set_xlim(min(1, 0.8 * min(found)), largest**2.1)  # a wide right margin, for the notes
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}×" if value <= 2 * largest else "")
    axis.grid(axis="y", visible=False)
    axis.set_xlabel("times less than the baseline")
    return figure
