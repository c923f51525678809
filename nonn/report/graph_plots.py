"""Figures of the filter graph, and of the sets of filters that the students imitate.

References
----------
.. [1] A. Noack, "Modularity clustering is force-directed layout", 2009, https://arxiv.org/abs/0807.4052
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import networkx as nx
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import LinearSegmentedColormap, PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from nonn.report.plots import METHODS, STUDENT_COLOURS, panels

#: Number of the heaviest links of each filter that decide its place, and of those that are drawn.
LINKS_LAID_OUT, LINKS_DRAWN = 6, 3
LAYOUT_SEED = 0


def strongest_links(weights: np.ndarray, n_links: int) -> np.ndarray:
    """Select the heaviest links of each filter.

    Parameters
    ----------
    weights : array of shape (F, F)
        Symmetric, zero diagonal.
    n_links : int
        Links of each filter that are kept; the other end may have more.

    Returns
    -------
    array of shape (E, 2), int64
        Pairs i < j, each once, in ascending order.
    """
    heaviest = np.argsort(-weights, axis=1, kind="stable")[:, :n_links]
    pairs = np.stack([np.repeat(np.arange(len(weights)), heaviest.shape[1]), heaviest.ravel()], axis=1)
    pairs = pairs[weights[pairs[:, 0], pairs[:, 1]] > 0]
    return np.unique(np.sort(pairs, axis=1), axis=0)


def lay_out(weights: np.ndarray) -> np.ndarray:
    """Place filters by forces along their strongest links, within the unit square.

    ForceAtlas2 in its logarithmic mode, whose densest groups are those of high modularity [1]_.

    Parameters
    ----------
    weights : array of shape (F, F)

    Returns
    -------
    array of shape (F, 2)
        NaN for filters without a link.
    """
    graph = nx.Graph()
    graph.add_edges_from(strongest_links(weights, LINKS_LAID_OUT).tolist())
    with np.errstate(invalid="ignore"):  # networkx divides a filter's distance to itself by itself
        places = nx.forceatlas2_layout(
            graph, max_iter=300, linlog=True, strong_gravity=True, gravity=0.2, seed=LAYOUT_SEED
        )
    positions = np.full((len(weights), 2), np.nan)
    if places:
        positions[list(places)] = np.stack(list(places.values()))
        positions -= np.nanmin(positions, axis=0)
        positions /= np.maximum(np.nanmax(positions, axis=0), 1e-9)
    return positions


def draw_filter_graph(weights: np.ndarray, partitions: Mapping[str, Mapping]) -> Figure:
    """Draw the filter graph, a panel for each network, filters in the colour of their student.

    Parameters
    ----------
    weights : array of shape (F, F)
        Filter graph.
    partitions : mapping
        Network to ``sets``, the filters of each student, and ``modularity`` of the sets.
    """
    links, positions = strongest_links(weights, LINKS_DRAWN), lay_out(weights)
    strength = weights.sum(axis=1)
    area = 8 + 90 * strength / max(strength.max(), 1e-9)
    area *= min(1.0, 256 / len(weights))
    figure, axes = panels(len(partitions), 4.6, 4.7)
    for axis, (network, partition) in zip(axes, partitions.items(), strict=True):
        axis.set_axis_off()
        axis.set_aspect("equal", adjustable="datalim")
        axis.margins(0.04)
        owner = np.full(len(weights), -1)
        for student, filters in enumerate(partition["sets"]):
            owner[filters] = student
        inner = owner[links[:, 0]] == owner[links[:, 1]]
        colours = [STUDENT_COLOURS[owner[i]] if same else "0.6" for (i, _), same in zip(links, inner, strict=True)]
        widths, alphas = np.where(inner, 0.6, 0.4), np.where(inner, 0.4, 0.25)
        axis.add_collection(LineCollection(positions[links], colors=colours, linewidths=widths, alpha=alphas, zorder=1))
        for student, filters in enumerate(partition["sets"]):
            # Strong filters are drawn first, so that they do not hide weak ones.
            drawn = sorted((f for f in filters if not np.isnan(positions[f, 0])), key=lambda f: (-strength[f], f))
            style = {"color": STUDENT_COLOURS[student], "edgecolors": [axis.get_facecolor()], "linewidths": 0.5}
            label = f"student {student} ({len(filters)})"
            axis.scatter(*positions[drawn].T, s=area[drawn], label=label, zorder=2, **style)
        axis.set_title(f"{network}: modularity of the sets {partition['modularity']:.2f}")
        spacing = {"handletextpad": 0.1, "columnspacing": 0.8, "ncols": min(len(partition["sets"]), 4)}
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, 0.01), fontsize="small", **spacing)
        for handle in axis.get_legend().legend_handles:
            handle.set_sizes([36])
    return figure


def draw_top_k(info: Mapping) -> Figure:
    """Draw how much community structure there is for each `top_k`, and mark the chosen one.

    Parameters
    ----------
    info : mapping
        Summary of the graph: ``top_k``, ``n_filters``, ``modularity``, ``n_communities`` and
        ``top_k_curve``; where the curve is empty, the chosen point stands alone.
    """
    curve, n_filters = info["top_k_curve"] or [info], info["n_filters"]
    names = {point["top_k"] or n_filters: str(point["top_k"] or "all") for point in curve}
    where, orange = info["top_k"] or n_filters, METHODS["nonn"].colour
    figure = Figure(figsize=(6.6, 3.1), layout="constrained")
    labels = {"modularity": "modularity Q", "n_communities": "communities"}
    for axis, (key, label) in zip(figure.subplots(1, 2), labels.items(), strict=True):
        heights = [point[key] for point in curve]
        axis.axvline(where, color=orange, linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
        axis.plot(list(names), heights, marker="o", markersize=4, color=METHODS["ensemble"].colour)
        axis.plot(where, info[key], "o", markersize=9, markerfacecolor="none", markeredgewidth=1.8, color=orange)
        at = {"xy": (where, 1), "xycoords": ("data", "axes fraction"), "textcoords": "offset points"}
        at |= {"xytext": (5, -3), "ha": "left"} if where < n_filters else {"xytext": (-5, -3), "ha": "right"}
        axis.annotate(f"chosen: {info['top_k'] or 'all'}", va="top", color=orange, **at)
        axis.set_xscale("log")
        axis.set_xticks(list(names), names.values(), size="small")  # on the scale's right places are close
        axis.minorticks_off()
        axis.set(xlabel="filters of each image that take part (top k)", ylabel=label)
        axis.set_ylim(0, 1.25 * max(heights) or 1)  # head-room for the note
        axis.yaxis.set_major_locator(MaxNLocator(6, integer=key == "n_communities"))
    return figure


def order_filters(partition: Mapping) -> np.ndarray:
    """Order filters by student, then by community; filters without a student come last."""
    community = np.asarray(partition["communities"])
    community = np.where(community < 0, len(community), community)
    return np.concatenate([np.array(s)[np.argsort(community[s], kind="stable")] for s in partition["sets"]])


def draw_adjacency(weights: np.ndarray, partitions: Mapping[str, Mapping]) -> Figure:
    """Draw the filter graph as a matrix: as it is, and ordered by the students of each network.

    Parameters
    ----------
    weights : array of shape (F, F)
        Filter graph, largest weight 1.
    partitions : mapping
        Network to ``sets`` and ``communities``, the community of each filter.
    """
    colour_map = LinearSegmentedColormap.from_list("ink", ["#FFFFFF", "#9ECAE1", "#2171B5", "#08204B", "#000814"])
    # Few links are strong: the square root spreads the weak ones out.
    norm = PowerNorm(0.5, vmin=0, vmax=float(np.quantile(weights, 0.999)) or 1.0)
    figure, axes = panels(1 + len(partitions), 3.5, 3.3)
    orders = {"": np.arange(len(weights))} | {n: order_filters(p) for n, p in partitions.items()}
    for axis, (network, order) in zip(axes, orders.items(), strict=True):
        # Not smoothed: each pair of filters is a cell of one colour, and files stay small.
        image = axis.imshow(weights[np.ix_(order, order)], cmap=colour_map, norm=norm, interpolation="none")
        axis.grid(visible=False)
        axis.spines[:].set_visible(True)
        axis.set(xticks=[], yticks=[], xlabel=f"{len(order)} filters")
        axis.set_title(f"{network}: by student, then community" if network else "Teacher's order")
        if network:
            _mark_sets(axis, [len(filters) for filters in partitions[network]["sets"]])
        else:
            axis.set_ylabel("filter")
    # One bar without a step of its own scale: its ticks are weights.
    figure.colorbar(image, ax=axes, label="link weight", shrink=0.75, aspect=30, extend="max")
    return figure


def _mark_sets(axis: Axes, sizes: Sequence[int]) -> None:
    """Outline each student's block, and name it along the left side."""
    edges = np.concatenate([[0], np.cumsum(sizes)]) - 0.5
    total = edges[-1] - edges[0]
    for student, (start, end) in enumerate(itertools.pairwise(edges)):
        colour = STUDENT_COLOURS[student]
        corners = [start, end, end, start, start], [start, start, end, end, start]
        axis.plot(*corners, color=colour, linewidth=1.6, clip_on=False, zorder=3)
        axis.text(-0.02 * total, (start + end) / 2, str(student), color=colour, ha="right", va="center", weight="bold")
    axis.set(xlim=(edges[0], edges[-1]), ylim=(edges[-1], edges[0]))
    axis.set_ylabel("student", labelpad=16)
