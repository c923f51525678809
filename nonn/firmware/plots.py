"""Figure of where the bytes of firmware go, in flash and in RAM."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from nonn.report.plots import STUDENT_COLOURS, legend_below

KIB = 1024
LIMIT = "0.15"


def draw_firmware(entries: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw a bar a student for flash and one for RAM, each beside the limit of its device.

    Parameters
    ----------
    entries
        Those of ``firmware.json``, see `nonn.firmware.making.figures`.
    """
    figure = Figure(figsize=(9, 1.6 + 0.28 * len(entries)), layout="constrained")
    flash, ram = figure.subplots(1, 2, sharey=True)
    parts = {
        "weights": [entry["weight_bytes"] for entry in entries],
        "scales, biases and tables": [entry["table_bytes"] for entry in entries],
        "code": [entry["flash_bytes"] - entry["weight_bytes"] - entry["table_bytes"] for entry in entries],
    }
    _draw(flash, "Flash (KiB)", parts, [entry["flash_limit_bytes"] for entry in entries], STUDENT_COLOURS)
    memory = {
        "activations": [entry["arena_bytes"] for entry in entries],
        "stack": [entry["stack_bytes"] for entry in entries],
        "variables": [entry["ram_bytes"] - entry["arena_bytes"] - entry["stack_bytes"] for entry in entries],
    }
    _draw(ram, "RAM (KiB)", memory, [entry["ram_limit_bytes"] for entry in entries], STUDENT_COLOURS[len(parts) :])
    names = [f"{entry['network']}/{entry['student']}, {entry['device']}" for entry in entries]
    flash.set_yticks(range(len(entries)), names)
    flash.invert_yaxis()
    colours = dict(zip([*parts, *memory], STUDENT_COLOURS, strict=False))
    handles: list[Any] = [Patch(color=colour, label=label) for label, colour in colours.items()]
    legend_below(figure, [*handles, Line2D([], [], color=LIMIT, label="the device has")], columns=7)
    return figure


def _draw(
    axis: Axes, label: str, parts: Mapping[str, Sequence[int]], limits: Sequence[int], colours: Sequence[str]
) -> None:
    ends = [0.0] * len(limits)
    for values, colour in zip(parts.values(), colours, strict=False):
        widths = [value / KIB for value in values]
        axis.barh(range(len(limits)), widths, left=ends, height=0.6, color=colour)
        ends = [end + width for end, width in zip(ends, widths, strict=True)]
    for position, (end, limit) in enumerate(zip(ends, limits, strict=True)):
        axis.vlines(limit / KIB, position - 0.4, position + 0.4, color=LIMIT)
        axis.annotate(f"{end:,.1f}", (end, position), (3, 0), textcoords="offset points", va="center", size=7)
    axis.set(xlabel=label, xlim=(0, 1.04 * max(limits) / KIB))
    axis.grid(axis="y", visible=False)
