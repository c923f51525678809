"""Weighted graph of the teacher's last filters: which of them work together, and how strongly.

Reads the pooled activations of the validation images (`nonn.teachers.signals`) and writes the graph, the
filters that are alive, what each class activates, and how much community structure there is for
several `top_k`. Which filters go to which student is left to `nonn.method.partitioning`.

References
----------
.. [1] K. Bhardwaj et al., "Memory- and Communication-Aware Model Compression for Distributed Deep
   Learning Inference on IoT", 2019, https://arxiv.org/abs/1907.11804
.. [2] The authors' later code, https://github.com/SLDGroup/NoNN_framework
.. [3] V. D. Blondel et al., "Fast unfolding of communities in large networks", 2008,
   https://arxiv.org/abs/0803.0476
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nonn.core.files import intact
from nonn.core.paths import Paths
from nonn.data.tensors import read_tensors

#: Points of the `top_k` curve; None: every filter takes part.
TOP_K_CURVE = (10, 15, 25, 35, 50, 75, 100, 150, None)
#: Largest graph for which the curve is drawn: one more graph and one more Louvain a point.
CURVE_MAX_FILTERS = 512
#: Filters and images of a block of work. They decide the speed alone: filters² · images float64 values should fit into
#: the second-level cache.
BLOCK_FILTERS, BLOCK_IMAGES = 32, 128
LOUVAIN_SEED = 0  # of the summary only; `partition.seed` decides about the partition


def normalise_activity(pooled: Tensor, top_k: int | None = None) -> Tensor:
    """Divide each image's activations by their maximum and keep the `top_k` strongest filters; float32 in [0, 1].

    `pooled` (N, F) are the spatial means of the final convolution after ReLU, at least 0. The other filters of an image
    become 0; of equal ones the lower index stays. None keeps all. An image without any activity stays 0.
    """
    pooled = pooled.float()
    largest = pooled.amax(dim=1, keepdim=True)
    activity = pooled / torch.where(largest > 0, largest, 1.0)
    if top_k is None or top_k >= activity.shape[1]:
        return activity
    kept = torch.sort(activity, dim=1, descending=True, stable=True).indices[:, :top_k]
    return torch.zeros_like(activity).scatter_(1, kept, activity.gather(1, kept))


def live_filters(pooled: Tensor) -> Tensor:
    """Which filters tell images apart: bool (F,), False for those of one value on all images of `pooled` (N, F)."""
    return (pooled != pooled[:1]).any(dim=0)


def activation_hub_graph(activity: Tensor) -> Tensor:
    """Link weak filters to strong ones, so that the strong become hubs.

    A_ij = Σ_x a_i a_j |a_i − a_j| of the normalised activity a (N, F), divided by its maximum: the rule of [1]_ and
    [2]_. The product wants both filters active, the difference wants them unequally so. The result, (F, F) float32, is
    symmetric, zero on the diagonal, and all zero if no two filters are linked.
    """
    return _sum_pairs(activity, lambda difference: difference)


def coactivation_graph(activity: Tensor) -> Tensor:
    """Link filters that are active together and equally: A_ij = Σ_x a_i a_j / (|a_i − a_j| + 1).

    Argument and result as for `activation_hub_graph`.
    """
    return _sum_pairs(activity, lambda difference: difference.add_(1).reciprocal_())


RULES = {"activation_hubs": activation_hub_graph, "coactivation": coactivation_graph}


def _sum_pairs(activity: Tensor, factor: Callable[[Tensor], Tensor]) -> Tensor:
    """Sum a_i a_j factor(|a_i − a_j|) over all images, for the upper triangle of blocks only.

    Elementwise steps and a sum along the innermost axis, no matrix product: the latter adds in an
    order that depends on the number of threads. For the same reason all of it is float64.
    """
    n_filters = activity.shape[1]
    total = torch.zeros(n_filters, n_filters, dtype=torch.float64)
    scratch = torch.empty(BLOCK_FILTERS**2 * BLOCK_IMAGES, dtype=torch.float64)
    for images in activity.split(BLOCK_IMAGES):
        blocks = images.T.double().contiguous().split(BLOCK_FILTERS)
        for i, a in enumerate(blocks):
            rows = slice(i * BLOCK_FILTERS, i * BLOCK_FILTERS + len(a))
            for j, b in enumerate(blocks[i:], start=i):
                columns = slice(j * BLOCK_FILTERS, j * BLOCK_FILTERS + len(b))
                shape = len(a), len(b), len(images)
                terms = scratch[: shape[0] * shape[1] * shape[2]].view(shape)
                torch.sub(a[:, None], b, out=terms)
                terms = factor(terms.abs_()).mul_(b).mul_(a[:, None])
                total[rows, columns] += terms.sum(dim=-1)
    upper = total.triu_(diagonal=1)
    weights = upper + upper.T
    largest = weights.max()
    return (weights / torch.where(largest > 0, largest, 1.0)).float()


def find_communities(weights: np.ndarray, resolution: float = 1.0, seed: int = 0) -> list[list[int]]:
    """Find communities of a symmetric graph (F, F) by Louvain's method [3]_.

    Returns the sorted filters of each, the largest community first, then by first filter; filters without a link belong
    to none. `resolution` is γ of the generalised modularity; above 1 communities become smaller and more.
    """
    import networkx as nx

    linked = np.flatnonzero(weights.any(axis=1))
    graph = nx.from_numpy_array(weights[np.ix_(linked, linked)].astype(np.float64))
    found = nx.community.louvain_communities(graph, resolution=resolution, seed=seed) if len(linked) else []
    communities = [sorted(int(filter_) for filter_ in linked[list(nodes)]) for nodes in found]
    return sorted(communities, key=lambda community: (-len(community), community[0]))


def modularity(weights: np.ndarray, sets: Iterable[Iterable[int]]) -> float:
    """Modularity Q = Σ_s [W_s / 2m − (k_s / 2m)²] of disjoint sets of filters, of a symmetric graph (F, F).

    W_s is the sum of A_ij over i and j in s, k_s the sum of their degrees, 2m the sum of all A_ij. Sets need not cover
    filters without links, and a graph without links has Q = 0: networkx would refuse both.
    """
    weights = np.asarray(weights, dtype=np.float64)
    degrees = weights.sum(axis=1)
    total = degrees.sum()
    if total == 0:
        return 0.0
    members = [np.fromiter(s, dtype=np.int64) for s in sets]
    return float(sum(weights[np.ix_(s, s)].sum() / total - (degrees[s].sum() / total) ** 2 for s in members))


def mean_class_activity(activity: Tensor, labels: Tensor, n_classes: int) -> Tensor:
    """Mean normalised activity of each filter over the images of each class, (n_classes, F); 0 without images."""
    labels = labels.long()
    total = torch.zeros(n_classes, activity.shape[1], dtype=torch.float64)
    total.index_add_(0, labels, activity.double())
    images = torch.bincount(labels, minlength=n_classes).clamp_(min=1)
    return (total / images[:, None]).float()


def summarise_graph(pooled: Tensor, weights: Tensor, rule: str, top_k: int | None) -> dict[str, Any]:
    """Describe the graph of `pooled` (N, F), and what its community structure would be for other `top_k`, for JSON.

    ``dead_filters`` are the same on every image; ``density`` is the share of pairs of live filters that are linked;
    ``top_k_curve`` is empty above `CURVE_MAX_FILTERS`.
    """
    n_filters = len(weights)
    live = live_filters(pooled)
    n_live = int(live.sum())
    links = int((weights > 0).sum()) // 2
    communities = find_communities(weights.numpy(), seed=LOUVAIN_SEED)
    curve = []
    if n_filters <= CURVE_MAX_FILTERS:
        points = {k for k in (*TOP_K_CURVE, top_k) if k is None or k < n_filters}
        for k in sorted(points, key=lambda k: n_filters if k is None else k):
            graph = RULES[rule](normalise_activity(pooled, k)).numpy()
            found = find_communities(graph, seed=LOUVAIN_SEED)
            curve.append({"top_k": k, "modularity": _rounded(graph, found), "n_communities": len(found)})
    return {
        "rule": rule,
        "top_k": top_k,
        "n_filters": n_filters,
        "n_live": n_live,
        "dead_filters": torch.nonzero(~live).flatten().tolist(),
        "density": round(links / max(n_live * (n_live - 1) // 2, 1), 6),
        "modularity": _rounded(weights.numpy(), communities),
        "n_communities": len(communities),
        "community_sizes": [len(community) for community in communities],
        "top_k_curve": curve,
    }


def _rounded(weights: np.ndarray, communities: list[list[int]]) -> float:
    return round(modularity(weights, communities), 6)


@dataclass(frozen=True)
class FilterGraph:
    """The graph as partitioning needs it."""

    weights: np.ndarray  # (F, F), float32
    live: np.ndarray  # (F,), bool: see `live_filters`, of the validation images
    class_activity: np.ndarray  # (C, F), float32: mean normalised activity, of all filters whatever `top_k`


def load_graph(paths: Paths) -> FilterGraph:
    tensors = {name: tensor.numpy() for name, tensor in read_tensors(paths.graph).items()}
    with intact(paths.graph):
        graph = FilterGraph(tensors["weights"], tensors["live"].astype(bool), tensors["class_activity"])
        n = len(graph.live)
        if graph.weights.shape != (n, n) or graph.class_activity.ndim != 2 or graph.class_activity.shape[1] != n:
            raise ValueError("its parts are not of the same filters")
        if not np.isfinite(graph.weights).all():
            raise ValueError("a weight is not finite")
    return graph
