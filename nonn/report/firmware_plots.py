"""Figures of firmware: its memory, its energy for an image, and the accuracy lost to 8 bits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator

from nonn.report.plots import STUDENT_COLOURS

KIB = 1024
LIMIT = "0.15"
SOURCE = "¹ MLPerf Tiny v1.1: ResNet-8 in int8 on a NUCLEO of the same core. No board was measured with these students."
ENERGY_COLOUR = "#6E7B8B"
#: Kinds of buffers in the arena, by their names in ``firmware.json``.
KINDS = dict(zip(("image", "map", "scratch", "features"), STUDENT_COLOURS[6:], strict=False))


def draw_firmware(entries: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw flash, RAM and energy of each student; below, of each form of student, its layers and its arena.

    Parameters
    ----------
    entries
        Those of ``firmware.json``, see `nonn.firmware.build_and_run.firmware_entry`.
    """
    if not entries:
        figure = Figure(figsize=(9, 1), layout="constrained")
        figure.text(0.5, 0.5, "no student has layers that there are kernels for", ha="center", va="center")
        return figure
    forms = _forms(entries)
    heights = [1.4 + 0.28 * len(entries), *(1.2 + 0.16 * len(_layers(form)) for form in forms)]
    figure = Figure(figsize=(9, sum(heights) + 0.2), layout="constrained")
    figure.supxlabel(SOURCE, x=0.01, ha="left", size=7)
    grid = figure.add_gridspec(len(heights), 1, height_ratios=heights)
    whole, *rows = [figure.add_subfigure(grid[row]) for row in range(len(heights))]
    _draw_students(whole, entries)
    for row, form in zip(rows, forms, strict=True):
        layers, arena = row.subplots(1, 2, width_ratios=(2, 3))
        _draw_layers(layers, form)
        _draw_arena(arena, form)
        _legend(row, [Patch(color=colour, label=kind) for kind, colour in KINDS.items()])
    return figure


def _draw_students(figure: SubFigure, entries: Sequence[Mapping[str, Any]]) -> None:
    flash, ram, energy = figure.subplots(1, 3, sharey=True, width_ratios=(5, 5, 4))
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
    _draw_energy(energy, entries)
    names = [f"{entry['network']}/{entry['student']}, {entry['device']}" for entry in entries]
    flash.set_yticks(range(len(entries)), names)
    flash.invert_yaxis()
    colours = dict(zip([*parts, *memory], STUDENT_COLOURS, strict=False))
    handles: list[Any] = [Patch(color=colour, label=label) for label, colour in colours.items()]
    _legend(figure, [*handles, Line2D([], [], color=LIMIT, label="the device has")])


def _legend(part: SubFigure, handles: list[Any]) -> None:
    part.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=8, columnspacing=1.2)


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
        inside = end > 0.8 * max(limits) / KIB  # beside the bar there is no room
        _annotate(axis, f"{end:,.1f}", end, position, inside)
    axis.set(xlabel=label, xlim=(0, 1.04 * max(limits) / KIB))
    axis.grid(axis="y", visible=False)


def _draw_energy(axis: Axes, entries: Sequence[Mapping[str, Any]]) -> None:
    values = [entry["projected_mj"] or 0.0 for entry in entries]
    axis.barh(range(len(entries)), values, height=0.6, color=ENERGY_COLOUR)
    for position, (value, entry) in enumerate(zip(values, entries, strict=True)):
        shown = f"{value:,.1f}" if value >= 1 else f"{value:.2g}"
        _annotate(axis, "unknown" if entry["projected_mj"] is None else shown, value, position, inside=False)
    prices = sorted({entry["projected_nj_per_mac"] for entry in entries if entry["projected_nj_per_mac"]})
    each = ", ".join(f"{price:g}" for price in prices)
    axis.set(xlabel=f"Energy of an image (mJ),\nprojected: {each} nJ a MAC¹")
    axis.set_xlim(0, 1.3 * max(max(values), 1e-9))
    axis.grid(axis="y", visible=False)


def _annotate(axis: Axes, text: str, end: float, position: int, inside: bool) -> None:
    place: dict[str, Any] = {"xytext": (-3, 0), "ha": "right", "color": "white"} if inside else {"xytext": (3, 0)}
    axis.annotate(text, (end, position), textcoords="offset points", va="center", size=7, **place)


def _forms(entries: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The first student of each form: others of the same layers and the same arena have the same figures."""
    found: dict[tuple, Mapping[str, Any]] = {}
    for entry in entries:
        found.setdefault((*(layer["layer"] for layer in entry["layers"]), entry["arena_bytes"]), entry)
    return list(found.values())


def _layers(entry: Mapping[str, Any]) -> list[tuple[str, int]]:
    """Layers with weights; of a student that makes two passes with the same weights, those of one."""
    layers = [(layer["layer"], layer["weight_bytes"]) for layer in entry["layers"] if layer["weight_bytes"]]
    half = len(layers) // 2
    return layers[:half] if half and layers[:half] == layers[half:] else layers


def _draw_layers(axis: Axes, entry: Mapping[str, Any]) -> None:
    names, sizes = zip(*_layers(entry), strict=True)
    axis.barh(range(len(names)), [size / KIB for size in sizes], height=0.7, color=STUDENT_COLOURS[0])
    for position, size in enumerate(sizes):
        _annotate(axis, f"{size / KIB:,.1f}", size / KIB, position, inside=False)
    axis.set_yticks(range(len(names)), names, size=7)
    axis.invert_yaxis()
    axis.set(xlabel="Weights in flash (KiB)", xlim=(0, 1.2 * max(sizes) / KIB))
    axis.set_title(f"{entry['network']}/{entry['student']}: weights by layer")
    axis.grid(axis="y", visible=False)


def _draw_arena(axis: Axes, entry: Mapping[str, Any]) -> None:
    """Each buffer as a box: from step to step, and from byte to byte."""
    last = len(entry["layers"])
    for buffer in entry["buffers"]:
        corner = (buffer["first"], buffer["offset"] / KIB)
        width = min(buffer["last"] + 1, last) - buffer["first"]
        box = Rectangle(corner, width, buffer["bytes"] / KIB, facecolor=KINDS[buffer["kind"]], edgecolor="white")
        box.set_linewidth(0.5)
        axis.add_patch(box)
    axis.axhline(entry["arena_bytes"] / KIB, color=LIMIT, linewidth=1)
    axis.set(xlabel="Step", ylabel="RAM (KiB)", xlim=(0, last))
    axis.set_ylim(0, 1.08 * entry["arena_bytes"] / KIB)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_title(f"arena over time, {entry['arena_bytes'] / KIB:,.1f} KiB")
    axis.grid(visible=False)


def draw_accuracies(networks: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw the accuracy of each network in each form of its students, with its standard error.

    Parameters
    ----------
    networks
        Those of ``accuracy.json``, see `nonn.commands.litert`: name, number of images, and accuracies by form.
    """
    forms = list(networks[0]["accuracy"])
    figure = Figure(figsize=(5, 0.9 + 0.3 * len(networks) * len(forms)), layout="constrained")
    axis = figure.subplots()
    rows = [(network, form) for network in networks for form in forms]
    for position, (network, form) in enumerate(rows):
        share = network["accuracy"][form]
        error = (share * (1 - share) / network["images"]) ** 0.5
        axis.errorbar(100 * share, position, xerr=100 * error, fmt="o", color=STUDENT_COLOURS[forms.index(form)])
    axis.set_yticks(range(len(rows)), [f"{network['network']}, {form}" for network, form in rows])
    axis.set_ylim(len(rows) - 0.5, -0.5)
    counts = ", ".join(f"{n:,}" for n in sorted({network["images"] for network in networks}))
    axis.set_xlabel(f"Accuracy on {counts} test images (%), ± standard error")
    return figure
