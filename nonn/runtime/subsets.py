"""The subsets of a network's students: those that are present, and how files name them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import numpy as np

#: Subsets scored for each number of missing students; all of them up to 10 students.
MAX_SUBSETS = 252

Subset = tuple[int, ...]  # positions of the students present, ascending


def subset_name(present: Iterable[int]) -> str:
    """Name of a subset among tensors: ``0-2`` for the first and the third student."""
    return "-".join(map(str, sorted(present)))


def subset_of(name: str) -> Subset:
    """The subset of a name; a `ValueError` if it is none."""
    return tuple(map(int, name.split("-")))


def subsets_missing(n_students: int, n_missing: int, seed: int = 0) -> list[Subset]:
    """Subsets that lack `n_missing` students; where there are more than `MAX_SUBSETS`, that many drawn by `seed`."""
    subsets = list(itertools.combinations(range(n_students), n_students - n_missing))
    if len(subsets) > MAX_SUBSETS:
        picked = np.random.default_rng(seed).choice(len(subsets), MAX_SUBSETS, replace=False)
        subsets = [subsets[i] for i in sorted(picked)]
    return subsets


def proper_subsets(n_students: int) -> list[Subset]:
    """Subsets that lack some students and not all, those that lack fewer first; see `subsets_missing`."""
    return [subset for missing in range(1, n_students) for subset in subsets_missing(n_students, missing)]
