"""Figures of the design: the candidates, the chosen students, and the architectures of all networks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import groupby

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import LogLocator, NullFormatter

from nonn.core.architecture import MOST_STAGES, Architecture
from nonn.core.budgets import Budget
from nonn.core.cost import memory_bytes
from nonn.report.plots import METHODS, STUDENT_COLOURS, legend_below, panels, plural

#: A budget beyond so many times the costliest candidate is not drawn, since it would push all else into a corner.
BEYOND = 10.0
#: Height of the block of most channels, in units of a row, and width of the deepest stage.
TALLEST, LAYER_WIDTH = 0.5, 0.5


def draw_student_selection(
    candidates: Mapping[str, Sequence[Mapping]],
    chosen: Mapping[str, Sequence[Mapping]],
    devices: Mapping[str, Sequence[Budget]],
) -> Figure:
    """Draw candidates for students by their cost, a panel for each network; the paper's Fig. 5.

    Parameters
    ----------
    candidates : mapping
        Network to candidates from narrow to wide, depth by depth, each ``{architecture, cost}``.
    chosen : mapping
        Network to its students, likewise.
    devices : mapping
        Network to the budgets of its devices, which are drawn.
    """
    figure, axes = panels(len(candidates), 4.6, 3.9, sharex=True, sharey=True)
    depths = sorted({c["architecture"]["depth"] for listed in candidates.values() for c in listed})
    colours = dict(zip(depths, (STUDENT_COLOURS[0], *STUDENT_COLOURS[2:]), strict=False))
    look = METHODS["nonn"]
    for axis, (network, listed) in zip(axes, candidates.items(), strict=True):
        for depth, line in groupby(listed, key=lambda candidate: candidate["architecture"]["depth"]):
            axis.plot(*_costs(line), color=colours[depth], marker=".", linewidth=1)
        taken = [student for i, student in enumerate(chosen[network]) if student not in chosen[network][:i]]
        axis.plot(*_costs(taken), linestyle="", color=look.colour, marker=look.marker, markersize=9, zorder=4)
        axis.set(xscale="log", yscale="log", xlabel="weights and peak activations (KiB)")
        axis.set_title(f"{network}: {plural(len(chosen[network]), 'student')}")
        _draw_budgets(axis, _near(devices[network], *_costs(listed)))
        if axis.get_subplotspec().is_first_col():
            axis.set_ylabel("multiply-accumulates of one image (millions)")
        for scale in (axis.xaxis, axis.yaxis):
            scale.set_major_locator(LogLocator(subs=(1, 3), numticks=20))
            scale.set_minor_formatter(NullFormatter())
            scale.set_major_formatter("{x:,g}")
    style = {"marker": ".", "linewidth": 1}
    handles = [Line2D([], [], color=colours[d], label=f"candidates of depth {d}", **style) for d in depths]
    handles.append(Line2D([], [], linestyle="", color=look.colour, marker=look.marker, markersize=9, label="chosen"))
    handles.append(Line2D([], [], color="0.35", linewidth=1, linestyle=(0, (1, 2)), label="budget of a device"))
    legend_below(figure, handles)
    return figure


def _costs(students: Sequence[Mapping]) -> tuple[list[float], list[float]]:
    """Memory (KiB) and multiply-accumulates (millions)."""
    costs = [student["cost"] for student in students]
    memory = [memory_bytes(cost) / 1024 for cost in costs]
    return memory, [cost["macs"] / 1e6 for cost in costs]


def _near(budgets: Sequence[Budget], memory: Sequence[float], mmacs: Sequence[float]) -> list[tuple[float, float]]:
    """Memory and compute of the devices, infinite where it is far beyond every candidate."""

    def near(value: float, costs: Sequence[float]) -> float:
        return value if value <= BEYOND * max(costs) else math.inf

    return sorted({(near(b.total_kib, memory), near(b.most_mmacs, mmacs)) for b in budgets})


def _draw_budgets(axis: Axes, budgets: Sequence[tuple[float, float]]) -> None:
    for memory, mmacs in budgets:
        style = {"color": "0.35", "linewidth": 1, "linestyle": (0, (1, 2))}
        text = {"textcoords": "offset points", "size": 7, "color": "0.3"}
        at_side, at_foot = ("axes fraction", "data"), ("data", "axes fraction")
        if memory < math.inf:
            axis.axvline(memory, **style)
            axis.annotate(f"{memory:,g} KiB", (memory, 0), (2, 3), xycoords=at_foot, rotation=90, va="bottom", **text)
        if mmacs < math.inf:
            axis.axhline(mmacs, **style)
            axis.annotate(f"{mmacs:,g} million", (0, mmacs), (3, 2), xycoords=at_side, va="bottom", **text)


def list_blocks(
    architecture: Architecture | str, channels: int, size: int, n_filters: int | None
) -> list[tuple[str, int, int, int]]:
    """Blocks of a network from its input to its features: name, channels, side of its map in pixels, and layers.

    A layer is a convolution, in the residual families a block. As `nonn.training.networks` builds them. Of a network
    that is known by its name alone, only the image is.
    """
    if isinstance(architecture, str):
        return [("image", channels, size, 0)]
    layers: list[int] | int
    if architecture.family == "mobilenet":
        stem, widths = 2 * architecture.widths[0], [*architecture.widths[:-1], architecture.n_features]
        layers = [1, *[architecture.depth] * (len(widths) - 2), architecture.depth + 1]
        sides = [math.ceil(size / 2**halvings) for halvings in range(1, len(widths) + 1)]
    elif architecture.family in ("fast", "airbench"):
        stem = max(4, architecture.widths[0] // 2) if architecture.family == "fast" else 8 * channels
        widths, layers = architecture.widths, architecture.depth
        sides = [size // 2**halvings for halvings in range(1, len(widths) + 1)]
        if architecture.strided:  # a stride rounds up where pooling rounds down
            half = math.ceil(size / 2)
            sides = [half, half // 2, half // 4]
    else:
        wide = architecture.family == "wrn"
        stem = 16 if wide else 16 * architecture.width
        widths = [16 * factor * architecture.width for factor in (1, 2, 4)]
        layers = (architecture.depth - (4 if wide else 2)) // 6
        sides = [size, math.ceil(size / 2), math.ceil(size / 4)]
    first = sides[0] if architecture.family == "mobilenet" else size
    blocks = [("image", channels, size, 0), ("stem", stem, first, 1)]
    stages = zip(widths, sides, layers if isinstance(layers, list) else [layers] * len(widths), strict=True)
    blocks += [(f"stage {i}", width, side, n) for i, (width, side, n) in enumerate(stages, start=1)]
    return blocks + ([("bridge", n_filters, sides[-1], 1)] if n_filters else [])


def draw_architectures(networks: Sequence[Mapping], channels: int, size: int) -> Figure:
    """Draw teacher, students and baselines as chains of blocks, one row each; the paper's Fig. 6.

    Parameters
    ----------
    networks : sequence of mapping
        ``title``, ``method``, ``architecture`` (a foreign teacher's is its source, text), ``n_filters`` (None without
        a bridge) and ``cost``; and ``size`` where it sees images of another one.
    channels, size : int
        Of an image, in pixels.
    """
    chains = [list_blocks(n["architecture"], channels, n.get("size", size), n["n_filters"]) for n in networks]
    most = max(width for chain in chains for _, width, _, _ in chain)
    columns = list(dict.fromkeys(name for chain in chains for name, *_ in chain))
    columns.sort(key=["image", "stem", *(f"stage {i}" for i in range(1, MOST_STAGES + 1)), "bridge"].index)
    figure = Figure(figsize=(10.4, 1.0 + 0.85 * len(chains)), layout="constrained")
    axis = figure.subplots()
    deepest = max(layers for chain in chains for *_, layers in chain)
    step = LAYER_WIDTH + 0.75
    for row, (network, chain) in enumerate(zip(networks, chains, strict=True)):
        colour, middle = METHODS[network["method"]].colour, row
        end = step * columns.index(chain[-1][0]) + LAYER_WIDTH
        axis.plot([0, end + 0.35], [middle, middle], color="0.4", linewidth=0.8, zorder=1)
        for name, width, side, layers in chain:
            # The area of a block is that of its channels: their numbers differ by orders of magnitude.
            tall, left = TALLEST * (width / most) ** 0.5, step * columns.index(name)
            one = LAYER_WIDTH / max(deepest, 1)
            for layer in range(max(layers, 1)):
                place = (left + layer * one, middle - tall / 2)
                face = "white" if layers == 0 else colour
                axis.add_patch(Rectangle(place, one, tall, facecolor=face, edgecolor=colour, linewidth=0.8, zorder=2))
                axis.patches[-1].set_edgecolor(colour if layers == 0 else "white")
            note = f"{width} × {side}²"
            axis.text(left, middle + 0.37, note, size=7.5, ha="left", va="center")
        cost = network["cost"]
        memory = memory_bytes(cost) / 1024
        ends = "features" if network["n_filters"] else "classes"
        axis.text(end + 0.4, middle, ends, size=8, va="center")
        built = network["architecture"]
        name = built if isinstance(built, str) else built.name
        about = f"{network['title']}\n{name}\n{memory:,.0f} KiB, {cost['macs'] / 1e6:,.1f} MMACs"
        axis.text(-0.15, middle, about, size=8, ha="right", va="center", color=colour)
    axis.set_xticks([step * i + LAYER_WIDTH / 2 for i in range(len(columns))], columns)
    axis.xaxis.tick_top()
    axis.tick_params(length=0)
    axis.set(yticks=[], xlim=(-2.4, step * (len(columns) - 1) + LAYER_WIDTH + 1.2), ylim=(len(chains) - 0.4, -0.5))
    axis.grid(visible=False)
    axis.spines[:].set_visible(False)
    axis.set_xlabel("channels × map (pixels); a block is a layer, its height the square root of its channels", size=8)
    return figure
