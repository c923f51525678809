"""Other ways to link filters and to divide them, compared with those of the pipeline; nothing is trained on them.

A *partitioner* takes a `Problem` and a seed, and returns disjoint sets of filters. If its method takes a number
of sets, it makes one for each student. Only the partitioners of `nonn.method.partitioning` keep to the sizes that the
devices ask for.

References
----------
.. [1] The authors' later code, https://github.com/SLDGroup/NoNN_framework,
   ``filter_activation_network/activation_network.py``
.. [2] V. A. Traag et al., "From Louvain to Leiden", 2019, https://arxiv.org/abs/1810.08473
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nonn.method.filter_graph import RULES, find_communities, modularity, normalise_activity
from nonn.method.partitioning import partition_filters

Sets = list[list[int]]

#: Of the authors' code: links below this percentile are dropped; the time scale of Louvain's method.
REFERENCE_PERCENTILE, REFERENCE_RESOLUTION = 99, 0.7


@dataclass(frozen=True)
class Problem:
    """The input of a partitioner."""

    weights: np.ndarray  # (F, F), float32
    live: np.ndarray  # (F,), bool
    activity: np.ndarray  # (images, F): normalised activations
    class_activity: np.ndarray  # (C, F)
    sizes: Sequence[int]  # filters of each student

    @property
    def linked(self) -> np.ndarray:
        return np.flatnonzero(self.weights.any(axis=1))


def correlation_graph(activity: Tensor) -> Tensor:
    """Link filters whose activations (N, F) rise and fall together: their correlation where it is positive, else 0."""
    centred = activity.double() - activity.double().mean(0)
    lengths = centred.norm(dim=0)
    unit = centred / torch.where(lengths > 0, lengths, 1.0)
    return (unit.T @ unit).clamp_(min=0).fill_diagonal_(0).float()


def graphs(pooled: Tensor, top_k: int | None) -> dict[str, np.ndarray]:
    """Weights of the graph by each rule, of pooled activations (N, F); correlation is that over all images."""
    found = {rule: link(normalise_activity(pooled, top_k)).numpy() for rule, link in RULES.items()}
    return {**found, "correlation": correlation_graph(normalise_activity(pooled)).numpy()}


def _pipeline(method: str) -> Callable[[Problem, int], Sets]:
    def divide(problem: Problem, seed: int) -> Sets:
        found = partition_filters(problem.weights, problem.live, problem.sizes, method, seed, problem.class_activity)
        return found.sets

    return divide


def _louvain(problem: Problem, seed: int) -> Sets:
    return find_communities(problem.weights, seed=seed)


def _leiden(problem: Problem, seed: int) -> Sets:
    import igraph

    linked = problem.linked
    graph = igraph.Graph.Weighted_Adjacency(problem.weights[np.ix_(linked, linked)].astype(float), mode="undirected")
    igraph.set_random_number_generator(random.Random(seed))
    found = graph.community_leiden("modularity", weights="weight", n_iterations=-1)
    return [linked[members].tolist() for members in found]


def _greedy(problem: Problem, _: int) -> Sets:
    import networkx as nx

    linked, n_sets = problem.linked, len(problem.sizes)
    graph = nx.from_numpy_array(problem.weights[np.ix_(linked, linked)].astype(float))
    n_parts = nx.number_connected_components(graph)
    found = nx.community.greedy_modularity_communities(
        graph, weight="weight", cutoff=max(n_sets, n_parts), best_n=max(n_sets, n_parts)
    )
    return [linked[list(members)].tolist() for members in found]


def _spectral(problem: Problem, seed: int) -> Sets:
    from sklearn.cluster import SpectralClustering

    linked = problem.linked
    clustering = SpectralClustering(len(problem.sizes), affinity="precomputed", random_state=seed)
    labels = clustering.fit_predict(problem.weights[np.ix_(linked, linked)].astype(float))
    return _by_label(linked, labels)


def _k_means(problem: Problem, seed: int) -> Sets:
    """Of activations over the images, each filter's scaled to unit length."""
    from sklearn.cluster import KMeans

    candidates = np.flatnonzero(problem.live)
    rows = problem.activity[:, candidates].T
    rows = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    return _by_label(candidates, KMeans(len(problem.sizes), n_init=10, random_state=seed).fit_predict(rows))


def _reference(problem: Problem, seed: int) -> Sets:
    """The procedure of [1]_: the strongest links alone, communities of equal size merged, the largest left out.

    Its Louvain package takes a resolution that is the inverse of γ. Where there are fewer communities than students,
    there are fewer sets, as there.
    """
    weights = problem.weights
    strongest = np.where(weights < np.percentile(weights[weights > 0], REFERENCE_PERCENTILE), 0, weights)
    communities = find_communities(strongest, 1 / REFERENCE_RESOLUTION, seed)
    linked = {filter_ for community in communities for filter_ in community}
    communities += [[filter_] for filter_ in range(len(weights)) if filter_ not in linked]
    by_size: dict[int, list[int]] = {}
    for community in communities:
        by_size.setdefault(len(community), []).extend(community)
    _, *merged = sorted(by_size.values(), key=len, reverse=True)
    n_sets = len(problem.sizes)
    sets = [list(filters) for filters in merged[:n_sets]]
    for filters in merged[n_sets:]:
        min(sets, key=len).extend(filters)
    return sets


#: By the name in the table. What is not in the pipeline goes by the name of its method.
PARTITIONERS: Mapping[str, Callable[[Problem, int], Sets]] = {
    "communities (ours)": _pipeline("communities"),
    "Louvain": _louvain,
    "Leiden": _leiden,
    "greedy modularity": _greedy,
    "spectral": _spectral,
    "k-means on activations": _k_means,
    "reference code": _reference,
    "classwise": _pipeline("classwise"),
    "contiguous": _pipeline("contiguous"),
    "random": _pipeline("random"),
}


def compare(problem: Problem, partitioner: Callable[[Problem, int], Sets], n_seeds: int) -> dict[str, Any]:
    """Measure a partitioner with the seeds 0, 1, 2 and so on.

    ``balance`` is the size of the smallest set in parts of the largest; ``agreement`` the mean adjusted Rand index of
    all pairs of seeds, in which filters that are left out count as one more set; ``seconds`` the median of processor
    time. Others are means over seeds, ``modularity_sd`` their standard deviation.
    """
    from sklearn.metrics import adjusted_rand_score

    results, seconds = [], []
    for seed in range(n_seeds):
        begin = time.process_time()
        results.append(partitioner(problem, seed))
        seconds.append(time.process_time() - begin)
    modularities = [modularity(problem.weights, sets) for sets in results]
    sizes = [[len(filters) for filters in sets] or [0] for sets in results]
    labels = [_labels(sets, len(problem.live)) for sets in results]
    return {
        "sets": float(np.mean([len(of_seed) for of_seed in sizes])),
        "used": float(np.mean([sum(of_seed) for of_seed in sizes])),
        "modularity": float(np.mean(modularities)),
        "modularity_sd": float(np.std(modularities, ddof=1)) if n_seeds > 1 else 0.0,
        "balance": float(np.mean([min(of_seed) / max(max(of_seed), 1) for of_seed in sizes])),
        "agreement": float(np.mean([adjusted_rand_score(a, b) for a, b in combinations(labels, 2)])),
        "seconds": float(np.median(seconds)),
    }


def _by_label(filters: np.ndarray, labels: np.ndarray) -> Sets:
    return [filters[labels == label].tolist() for label in np.unique(labels)]


def _labels(sets: Sets, n_filters: int) -> np.ndarray:
    labels = np.full(n_filters, -1)
    for number, filters in enumerate(sets):
        labels[filters] = number
    return labels
