"""Figures of the devices at work: each function takes rows of `nonn.report.deployment_table`, or its ratios.

What is calculated (badge *modelled*) is hollow and dashed, what was timed (*measured*, *emulated*) filled.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

from nonn.core.architecture import Architecture
from nonn.core.links import PRESETS
from nonn.report.deployment_table import PAPER, RATIO_LABELS
from nonn.report.method_table import format_interval
from nonn.report.plots import METHODS, Look, legend_below, legend_handle, panels

#: How a layout of the devices appears; those that are methods of accuracy too keep their look.
LAYOUTS = {
    "teacher": METHODS["teacher"],
    "channels": Look("split by channels", "#0072B2", "s"),
    "rows": Look("split by rows", "#009E73", "D"),
    "kd": METHODS["kd"],
    "nonn": METHODS["nonn"],
}
BARS = "bars: left, 95 % interval; right, range of the published constants"
HOLLOW = {"linestyle": (0, (3, 2)), "markerfacecolor": "none"}


def _count_devices(axis: Axes, counts: Sequence[int]) -> None:
    axis.set_xscale("log", base=2)
    axis.set_xticks(counts, [f"{count:g}" for count in counts])
    axis.xaxis.minorticks_off()
    axis.set_xlabel("devices")


def _count_decades(axis: Axes, few: float = 30) -> None:
    """Marks at 1, 2 and 5 of each decade where the values differ by less than ``few`` times; else at each decade."""
    axis.set_yscale("log")
    low, high = axis.get_ylim()
    axis.yaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5) if high < few * low else (1,), numticks=20))
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
        # Request and answer are one message each, whatever happens between them.
        messages.plot(line["n_devices"], line["rounds"] + 2, **style)
    _count_decades(size)
    size.yaxis.set_major_formatter(EngFormatter("B"))
    size.set_ylabel("bytes on the wire for one image")
    messages.set(ylabel="messages one after another", ylim=(0, None))
    for axis in axes:
        _count_devices(axis, chosen["n_devices"].unique())
    legend_below(figure, handles[::-1], columns=3)
    return figure


def _plain_decades(axis: Axes) -> None:
    _count_decades(axis, few=300)
    axis.yaxis.set_major_formatter("{x:,g}")


def board_name(board: str) -> str:
    """Usual name of a board: Cortex-M7, Raspberry Pi 3B+, Raspberry Pi Zero 2 W."""
    if re.match(r"pi[_\d]", board):
        words = re.sub(r"(?<=[a-z])(?=\d)|(?<=\d)(?=w)", " ", board.removeprefix("pi").strip("_"))
        return f"Raspberry Pi {words.replace('_plus', '+').title()}"
    return board.replace("_", "-").replace("cortex-m", "Cortex-M")


def link_name(name: str) -> str:
    """Usual name of a link with its rate and delay: Wi-Fi, 20 Mbit/s + 2 ms. Other names stay as they are."""
    if name not in PRESETS:
        return name
    link, kind = PRESETS[name], re.sub(r"\d+$", "", name)
    called = {"ieee": "802.15.4", "wifi": "Wi-Fi", "ethernet": "Ethernet"}[kind]
    rate = f"{link.rate_bps / 1e6:g} Mbit/s" if link.rate_bps >= 1e6 else f"{link.rate_bps / 1e3:g} kbit/s"
    return f"{called}, {rate}" + (f" + {1000 * link.delay_s:g} ms" if link.delay_s else "")


def draw_latency(rows: pd.DataFrame, board: str) -> Figure:
    """Draw the total latency of one image against the number of devices, a panel for each link."""
    rows = rows[(rows["scenario"] == "sensor") & rows["method"].isin(list(LAYOUTS))].sort_values("n_devices")
    layouts = {method: look for method, look in LAYOUTS.items() if method in set(rows["method"])}
    links = sorted(set(rows["link"]) & set(PRESETS), key=lambda name: PRESETS[name].rate_bps)
    figure, axes = panels(len(links), 3.4, 3.5, sharey=True)
    for axis, link in zip(axes, links, strict=True):
        for method, look in layouts.items():
            here = rows[(rows["link"] == link) & (rows["method"] == method)]
            modelled = here["badge"] == "modelled"
            style = {"color": look.colour, "marker": look.marker, "linewidth": 1.2, "elinewidth": 0.9}
            style["zorder"] = 4 if method == "nonn" else 3
            for line, more in ((here[modelled], HOLLOW), (here[~modelled], {})):
                median, p95 = line["total_ms"], line["p95_ms"].astype(float)
                above = np.maximum(p95 - median, 0).fillna(0)
                bars = None if more else np.stack([np.zeros(len(line)), above])
                axis.errorbar(line["n_devices"], median, yerr=bars, **style, **more)
        _count_decades(axis)
        axis.yaxis.set_major_formatter(lambda ms, _: f"{ms / 1e3:g} s" if ms >= 1e3 else f"{ms:g} ms")
        _count_devices(axis, rows["n_devices"].unique())
        axis.set_title(link_name(link))
    axes[0].set_ylabel("from the image to its class")
    handles = [legend_handle(look) for look in layouts.values()]
    handles.append(legend_handle(Look("timed on this machine: median, bar to the 95th percentile", "0.4", "o")))
    elsewhere = f", teacher{other}" if (other := _teacher_elsewhere(rows, board)) else ""
    composed = f"composed for another processor, {board_name(board)}{elsewhere}"
    handles.append(legend_handle(Look(composed, "0.4", "o"), **HOLLOW))
    legend_below(figure, handles, columns=4)
    return figure


def draw_scaling(rows: pd.DataFrame, comparisons: Sequence[Mapping], board: str) -> Figure:
    """Draw performance and energy against the number of devices; the paper's Fig. 7.

    Left, how many times faster the slowest device has its features than the teacher has its answer, on one
    core of this machine. Right, the energy of one image on a board, all that it draws while it computes: of one device,
    and of all. The teacher's is on the board that holds it.
    """
    rows = rows[(rows["scenario"] == "sensor") & (rows["badge"] == "modelled")]
    rows = rows[rows["link"] == rows["link"].iloc[0]].sort_values("n_devices")
    counts = rows[rows["network"] != ""].groupby("network")["n_devices"].first()
    figure = Figure(figsize=(8.2, 3.9), layout="constrained")
    speed, energy = figure.subplots(1, 2)
    teacher = LAYOUTS["teacher"]
    tops = [_draw_speed(speed, counts[comparison["network"]], comparison) for comparison in comparisons]
    speed.axhline(1, color=teacher.colour, linewidth=1.2, linestyle=(0, (4, 3)))
    speed.annotate("teacher", (0, 1), (3, 3), xycoords=("axes fraction", "data"), textcoords="offset points")
    speed.set(ylim=(0, 1.2 * max(tops)), ylabel="times faster than the teacher")
    speed.set_title("performance of the slowest device (measured)")
    layouts = {method: look for method, look in LAYOUTS.items() if method in set(rows["method"]) and method != "kd"}
    for method, look in layouts.items():
        line = rows[rows["method"] == method]
        style = {"color": look.colour, "marker": look.marker, "linewidth": 1.2, "elinewidth": 1}
        lines = {"node": {"markersize": 11}} if method == "teacher" else {"node": {}, "total": HOLLOW}
        for key, more in lines.items():
            low, high = (line[f"energy_{key}_computing_mj_{end}"] for end in ("low", "high"))
            energy.errorbar(line["n_devices"], (low + high) / 2, yerr=(high - low) / 2, **style, **more)
    _plain_decades(energy)
    energy.set(ylabel="energy of one image (mJ)", title=f"energy on {board_name(board)} (modelled)")
    _count_devices(speed, sorted(set(counts)))
    _count_devices(energy, sorted({1, *counts}))
    if rows["energy_node_computing_mj_low"].isna().all():
        energy.set(xticks=[], yticks=[])
        energy.minorticks_off()
        energy.text(0.5, 0.5, "not composed: no power is known", ha="center", transform=energy.transAxes)
    few = min(counts) / 1.5, max(counts) * 1.5
    speed.set_xlim(*few)
    elsewhere = _teacher_elsewhere(rows, board)
    handles = [
        legend_handle(look._replace(label=look.label + elsewhere) if method == "teacher" else look)
        for method, look in layouts.items()
    ]
    handles.append(legend_handle(Look("of the neediest device", "0.4", "o")))
    handles.append(legend_handle(Look("of all devices", "0.4", "o"), **HOLLOW))
    handles.append(Line2D([], [], color="0.4", marker="|", linestyle="", markersize=12, label=BARS))
    legend_below(figure, handles, columns=3)
    return figure


def _teacher_elsewhere(rows: pd.DataFrame, board: str) -> str:
    """The board of the teacher's composed rows, if it is not that of the students."""
    boards = rows.loc[(rows["method"] == "teacher") & (rows["badge"] == "modelled"), "boards"].dropna()
    return f" on {board_name(boards.iloc[0])}" if len(boards) and boards.iloc[0] not in ("", board) else ""


def _draw_speed(axis: Axes, n_devices: int, comparison: Mapping) -> float:
    """Draw the speed-up of a network's slowest device, with its interval; return the upper end."""
    ratio, look = comparison["performance_ratio"], LAYOUTS["nonn"]
    low, high = (comparison.get(f"performance_ratio_{end}") or ratio for end in ("low", "high"))
    bars = [[ratio - low], [high - ratio]]
    axis.errorbar(n_devices, ratio, yerr=bars, color=look.colour, fmt=look.marker, markersize=6, elinewidth=1.2)
    beside = {"xytext": (7, 0), "textcoords": "offset points", "ha": "left", "va": "center"}
    axis.annotate(f"{ratio:.1f}×", (n_devices, ratio), color=look.colour, **beside)
    return high


def draw_ratios(ratios: Mapping[str, Mapping | None], candidates: pd.DataFrame) -> Figure:
    """Draw how many times less NoNN needs, on every network and link, beside what the paper says.

    Parameters
    ----------
    ratios : mapping
        From `nonn.report.deployment_table.collect_ratios`: each is drawn filled, and written out.
    candidates : DataFrame
        From `nonn.report.deployment_table.list_ratios`: those among which these are the largest.
    """
    entries = {name: ratios[name] for name in RATIO_LABELS if ratios.get(name)}
    figure = Figure(figsize=(8.2, 0.62 * len(entries) + 1.5), layout="constrained")
    axis = figure.subplots()
    colour, places = METHODS["nonn"].colour, np.arange(len(entries))
    for place, (name, entry) in enumerate(entries.items()):
        others = candidates.loc[candidates["claim"] == name, "ratio"]
        axis.plot(others, [place] * len(others), "o", color=colour, markerfacecolor="none", markersize=6)
        low, high = (entry.get(f"ratio_{end}") or entry["ratio"] for end in ("low", "high"))
        bars = [[entry["ratio"] - low], [high - entry["ratio"]]]
        axis.errorbar(entry["ratio"], place, xerr=bars, color=colour, fmt="o", markersize=7, elinewidth=1.4)
        if name in PAPER:
            axis.plot(PAPER[name], place, "D", color="0.25", markersize=6, markerfacecolor="none", markeredgewidth=1.4)
    named = [RATIO_LABELS[name].lower().replace(", against a ", "\nagainst ") for name in entries]
    axis.set_yticks(places, named)
    notes = axis.secondary_yaxis("right")
    notes.set_yticks(places, [_describe_ratio(entry) for entry in entries.values()], size=8)
    notes.tick_params(length=0)
    notes.spines["right"].set_visible(False)
    axis.set_ylim(len(entries) - 0.5, -0.5)
    axis.set_xscale("log")
    found = [*candidates["ratio"], *(entry["ratio"] for entry in entries.values()), *PAPER.values()]
    axis.set_xlim(min(0.9, 0.8 * min(found)), 1.4 * max(found))
    axis.axvline(1, color="0.4", linewidth=0.8)
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=20))
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.xaxis.set_major_formatter("{x:g}×")
    axis.grid(axis="y", visible=False)
    axis.set_xlabel("times less than the baseline")
    marker = {"linestyle": "", "markersize": 6}
    hollow = marker | {"markerfacecolor": "none"}
    handles = [
        Line2D([], [], color=colour, marker="o", label="NoNN, the largest (written out)", **marker),
        Line2D([], [], color=colour, marker="o", label="other networks and links", **hollow),
        Line2D([], [], color="0.25", marker="D", label="the paper's, “up to” (cited)", **hollow),
    ]
    legend_below(figure, handles, columns=3)
    return figure


def _describe_ratio(entry: Mapping) -> str:
    link = f", {link_name(entry['link'])}" if entry["link"] else ""
    images = f", n = {entry['images']} images" if entry["images"] else ""
    return f"{format_interval(entry, 'ratio')}\n{entry['n']} devices{link} ({entry['badge']}{images})"
