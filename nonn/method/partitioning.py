"""Disjoint sets of the teacher's filters, one for each student.

The sets are made from the filter graph (`nonn.method.filter_graph`) and the number of filters of each student
(`nonn.method.sizing`). The default method makes sets of filters that work together: communities of the graph, merged
and cut to the given sizes at the least loss of modularity, or the best of some random starts if its modularity is
higher.

References
----------
.. [1] K. Bhardwaj et al., "Memory- and Communication-Aware Model Compression for Distributed Deep
   Learning Inference on IoT", 2019, https://arxiv.org/abs/1907.11804
.. [2] The authors' later code, https://github.com/SLDGroup/NoNN_framework
.. [3] M. E. J. Newman, "Modularity and community structure in networks", 2006,
   https://arxiv.org/abs/physics/0602124 (the modularity matrix)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nonn.core.errors import UserError
from nonn.core.params import SINGLE_METHODS
from nonn.method.filter_graph import FilterGraph, find_communities, modularity
from nonn.training.loading import cut

RESOLUTION_STEP = 1.1
MAX_RESOLUTION = 100.0
#: Number of random partitions of the same sizes whose mean modularity is the yardstick.
N_RANDOM = 20
#: Random starts of the search for sets, besides the start from communities. All together take about as long as
#: Louvain's method, and the best has up to 3 % more modularity: see docs/partitions.md.
N_STARTS = 20
#: Sweeps of improving swaps; a sweep without a swap ends the search long before.
MAX_SWEEPS = 200
#: Gains of modularity below this are rounding.
TOLERANCE = 1e-12


@dataclass(frozen=True)
class FilterPartition:
    """Filters of each student."""

    sets: list[list[int]]  # sorted, in the order of the network's devices
    modularity: float  # of the sets, at resolution 1
    communities: list[list[int]]  # Louvain's, largest first; empty for other methods than ``communities``
    modularity_louvain: float | None  # of the communities, at resolution 1
    resolution: float | None  # at which there were enough communities


def partition_filters(
    weights: np.ndarray, live: np.ndarray, sizes: Sequence[int], method: str, seed: int, class_activity: np.ndarray
) -> FilterPartition:
    """Give every live filter to exactly one student; `sizes` add up to the number of live filters.

    By ``communities``, filters that work together: the resolution of Louvain's method is raised until there are at
    least as many communities as students, which then fill the sets, see `fill_sets`. Of these sets and those that
    `random_starts` yields, the first of highest modularity are taken. A live filter without a link (never among an
    image's top k) takes whatever place is left. ``classwise`` does the same with classes, for each of
    which a filter has its mean activity in `class_activity` (C, F), in place of communities and counts pairs of filters
    of the same class. ``contiguous`` takes filters in their order, ``random`` by chance. `seed` is that of Louvain's
    method, of the random starts and of ``random``.

    *Deviations* from [2]_: it drops the largest community, merges communities of equal size, and so uses 97 of 256
    filters; here each live filter is used and sizes follow the budgets.
    """
    candidates = np.flatnonzero(live)
    _check_sizes(sizes, len(candidates))
    communities: list[list[int]] = []
    resolution = None
    if method == "communities":
        communities, resolution = search_communities(weights, len(sizes), seed)
        linked = {filter_ for community in communities for filter_ in community}
        alone = [[int(filter_)] for filter_ in candidates if filter_ not in linked]
        affinity = modularity_matrix(weights)
        sets = fill_sets(communities + alone, sizes, affinity)
        best = modularity(weights, sets)
        for other in random_starts(candidates, sizes, affinity, seed):
            if (found := modularity(weights, other)) > best + TOLERANCE:
                sets, best = other, found
    elif method == "classwise":
        favourite = class_activity.argmax(axis=0)
        classes = [candidates[favourite[candidates] == c].tolist() for c in range(len(class_activity))]
        same_class = (favourite[:, None] == favourite).astype(np.float64)
        sets = fill_sets(sorted(filter(None, classes), key=len, reverse=True), sizes, same_class)
    else:
        if method == "random":
            candidates = np.random.default_rng(seed).permutation(candidates)
        sets = cut(candidates, sizes)
    return FilterPartition(
        sets=sets,
        modularity=modularity(weights, sets),
        communities=communities,
        modularity_louvain=modularity(weights, communities) if communities else None,
        resolution=resolution,
    )


def _check_sizes(sizes: Sequence[int], n_live: int) -> None:
    if len(sizes) > n_live:
        raise UserError(
            f"params.yaml: networks: a network has {len(sizes)} devices, but only {n_live} of the teacher's "
            f"filters are alive; use fewer devices or a better teacher"
        )
    if sum(sizes) != n_live or min(sizes) < 1:
        raise UserError(
            f"partition: the students' sizes {list(sizes)} do not share out the teacher's {n_live} live "
            f"filters; run the stage `design` again"
        )


def search_communities(weights: np.ndarray, n_students: int, seed: int) -> tuple[list[list[int]], float]:
    """Raise the resolution from 1 until there are at least `n_students` communities; return them and the resolution.

    There are fewer only if there are fewer linked filters or `MAX_RESOLUTION` is met.
    """
    resolution = 1.0
    wanted = min(n_students, int(np.count_nonzero(weights.any(axis=1))))
    communities = find_communities(weights, resolution, seed)
    while len(communities) < wanted and resolution * RESOLUTION_STEP < MAX_RESOLUTION:
        resolution *= RESOLUTION_STEP
        communities = find_communities(weights, resolution, seed)
    return communities, resolution


def modularity_matrix(weights: np.ndarray) -> np.ndarray:
    """B = (A − k kᵀ / 2m) / 2m of [3]_, float64, with a zero diagonal.

    The sum of B_ij over the ordered pairs i ≠ j that share a set is their modularity, up to a constant.
    """
    weights = weights.astype(np.float64)
    degrees = weights.sum(axis=1)
    total = degrees.sum() or 1.0
    matrix = (weights - np.outer(degrees, degrees / total)) / total
    np.fill_diagonal(matrix, 0)
    return matrix


def fill_sets(groups: Sequence[Sequence[int]], sizes: Sequence[int], affinity: np.ndarray) -> list[list[int]]:
    """Merge groups of filters into sets of exact sizes that keep filters of high affinity together.

    1. Each group, in the given order, goes to the set where it fits and gains most affinity to what is there; the
       tightest of equally good ones. A group that fits nowhere goes where there is most room.
    2. While sets are over-full, the filter whose move costs least goes to an under-full set.
    3. Swaps of two filters between sets raise the affinity until none does.

    The groups are disjoint, with as many filters as the sizes add up to. Of the symmetric `affinity` (F, F), the sum
    over the pairs that share a set is kept large. Returns the sorted filters of each set.
    """
    filters = np.concatenate([np.asarray(group, dtype=np.int64) for group in groups])
    affinity = affinity[np.ix_(filters, filters)].astype(np.float64)
    np.fill_diagonal(affinity, 0)
    member = _place_groups([len(group) for group in groups], sizes, affinity)
    _repair_sizes(member, sizes, affinity)
    _swap_filters(member, len(sizes), affinity)
    return [np.sort(filters[member == s]).tolist() for s in range(len(sizes))]


def random_starts(
    filters: np.ndarray, sizes: Sequence[int], affinity: np.ndarray, seed: int
) -> Iterator[list[list[int]]]:
    """Yield `N_STARTS` times sets of `filters` that begin at random and that no swap of two filters improves."""
    affinity = affinity[np.ix_(filters, filters)]
    generator = np.random.default_rng([seed, 1])  # not the stream of the method `random`
    for _ in range(N_STARTS):
        member = generator.permutation(np.repeat(np.arange(len(sizes)), sizes))
        _swap_filters(member, len(sizes), affinity)
        yield [filters[member == s].tolist() for s in range(len(sizes))]


def _place_groups(lengths: Sequence[int], sizes: Sequence[int], affinity: np.ndarray) -> np.ndarray:
    """Assign whole groups, which lie one behind the other, to sets: the set of each filter, shape (n,)."""
    member = np.full(len(affinity), -1)
    room = np.array(sizes)
    start = 0
    for length in lengths:
        group = slice(start, start + length)
        gain = _affinity_to_sets(affinity[group], member, len(sizes)).sum(axis=0)
        preferred = np.lexsort((room, -gain))
        best = next((s for s in preferred if room[s] >= length), room.argmax())
        member[group] = best
        room[best] -= length
        start += length
    return member


def _repair_sizes(member: np.ndarray, sizes: Sequence[int], affinity: np.ndarray) -> None:
    """Move single filters, cheapest first, from over-full to under-full sets; changes `member`."""
    surplus = np.bincount(member, minlength=len(sizes)) - sizes
    to_sets = _affinity_to_sets(affinity, member, len(sizes))
    everyone = np.arange(len(member))
    while surplus.any():
        gain = to_sets - to_sets[everyone, member][:, None]
        gain[surplus[member] <= 0] = -np.inf
        gain[:, surplus >= 0] = -np.inf
        moved, target = np.unravel_index(gain.argmax(), gain.shape)
        source = member[moved]
        to_sets[:, source] -= affinity[moved]
        to_sets[:, target] += affinity[moved]
        surplus[source] -= 1
        surplus[target] += 1
        member[moved] = target


def _swap_filters(member: np.ndarray, n_sets: int, affinity: np.ndarray) -> None:
    """Swap filters between sets as long as that gains affinity; changes `member`.

    All swaps are scored at once, then each filter's best one is made, best first, if it still gains.
    """
    everyone = np.arange(len(member))
    to_sets = _affinity_to_sets(affinity, member, n_sets)

    for _ in range(MAX_SWEEPS):
        move = to_sets - to_sets[everyone, member][:, None]  # gain of moving filter i into set s
        toward = move[:, member]  # into the set of filter j
        gain = toward + toward.T - 2 * affinity
        gain[member[:, None] == member] = -np.inf
        partner = gain.argmax(axis=1)
        best = gain[everyone, partner]
        n_swaps = 0
        for i in np.argsort(-best, kind="stable"):
            if best[i] <= TOLERANCE:
                break
            j, s, t = partner[i], member[i], member[partner[i]]
            now = to_sets[i, t] - to_sets[i, s] + to_sets[j, s] - to_sets[j, t] - 2 * affinity[i, j]
            if s == t or now <= TOLERANCE:
                continue
            change = affinity[i] - affinity[j]
            to_sets[:, s] -= change
            to_sets[:, t] += change
            member[i], member[j] = t, s
            n_swaps += 1
        if n_swaps == 0:
            break


def _affinity_to_sets(affinity: np.ndarray, member: np.ndarray, n_sets: int) -> np.ndarray:
    """Sum each row's affinity to the members of each set, shape (rows, n_sets).

    Not a matrix product, whose rounding depends on the number of threads.
    """
    return np.stack([affinity[:, member == s].sum(axis=1) for s in range(n_sets)], axis=1)


def summarise_partition(
    graph: FilterGraph, partition: FilterPartition, sizes: Sequence[int], method: str, seed: int
) -> dict[str, Any]:
    """Describe a partition, ready for JSON.

    ``communities`` holds the community of each filter, −1 for those that are dead or have no link;
    ``modularity_random_mean`` is the mean over `N_RANDOM` random partitions of the same sizes.
    """
    candidates = np.flatnonzero(graph.live)
    membership = np.full(len(graph.live), -1)
    for number, community in enumerate(partition.communities):
        membership[community] = number
    generator = np.random.default_rng([seed, N_RANDOM])  # not the stream of the method `random`
    chance = [modularity(graph.weights, cut(generator.permutation(candidates), sizes)) for _ in range(N_RANDOM)]
    return {
        "method": method,
        "sizes": list(sizes),
        "n_communities": len(partition.communities),
        "community_sizes": [len(community) for community in partition.communities],
        "communities": membership.tolist(),
        "resolution": _rounded(partition.resolution),
        "modularity_louvain": _rounded(partition.modularity_louvain),
        "modularity": _rounded(partition.modularity),
        "modularity_random_mean": _rounded(float(np.mean(chance))),
        "dead_filters": np.flatnonzero(~graph.live).tolist(),
    }


def baseline_sets(graph: FilterGraph, sizes: Sequence[int], seed: int) -> dict[str, dict[str, Any]]:
    """Filter sets of every baseline of a network, by method, ready for JSON.

    ``sets`` has one entry a student, null for a student that imitates no filters. The method
    ``random`` draws for each seed anew: it has the filters and the sizes to draw from instead.
    """
    live = np.flatnonzero(graph.live).tolist()

    def sets_by(method: str) -> list[list[int]]:
        return partition_filters(graph.weights, graph.live, sizes, method, seed, graph.class_activity).sets

    methods: dict[str, dict[str, list]] = {method: {"sets": [None]} for method in SINGLE_METHODS}
    methods |= {method: {"sets": sets_by(method)} for method in ("contiguous", "classwise")}
    methods["full"] = {"sets": [live for _ in sizes]}
    methods["random"] = {"live": live, "sizes": list(sizes)}
    return methods


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 6)
