"""Filter sets: planted communities, exact sizes, and properties of every method."""

import numpy as np
import pytest
import torch
from experiments import REPOSITORY
from hypothesis import given, settings
from hypothesis import strategies as st

from nonn.core.errors import UserError
from nonn.core.files import read_json, write_json
from nonn.core.params import PARTITION_METHODS, SINGLE_METHODS, load_params
from nonn.core.paths import Paths
from nonn.data.tensors import write_tensors
from nonn.method.filter_graph import find_communities, modularity
from nonn.method.partitioning import (
    RESOLUTION_STEP,
    fill_sets,
    modularity_matrix,
    partition_filters,
    random_starts,
    search_communities,
)
from nonn.stages import partition as partition_stage
from nonn.training.loading import load_baseline_sets

PARAMS = REPOSITORY / "params.yaml"
METHODS = ("communities", "contiguous", "classwise", "random")


def planted(sizes, seed=0, between=0.1):
    """Return a noisy graph with a community of each size, filters shuffled, and the communities."""
    generator = np.random.default_rng(seed)
    label = generator.permutation(np.repeat(np.arange(len(sizes)), sizes))
    noise = np.triu(generator.uniform(0.5, 1, (len(label), len(label))), 1)
    weights = np.where(label[:, None] == label, 1, between) * (noise + noise.T)
    return weights, [np.flatnonzero(label == c).tolist() for c in range(len(sizes))]


def divide(weights, sizes, method="communities", seed=0, live=None, class_activity=None):
    n_filters = len(weights)
    live = np.ones(n_filters, dtype=bool) if live is None else live
    class_activity = np.zeros((1, n_filters)) if class_activity is None else class_activity
    return partition_filters(weights, live, sizes, method, seed, class_activity)


@pytest.mark.parametrize("n_students", [2, 3, 5, 8])
def test_planted_communities_of_equal_sizes_stay_apart(n_students):
    weights, communities = planted([12] * n_students)
    found = divide(weights, [12] * n_students)
    assert sorted(found.sets) == sorted(communities)
    assert found.communities == sorted(communities)
    assert found.resolution == 1
    assert found.modularity == pytest.approx(found.modularity_louvain)


def test_planted_communities_go_to_the_device_of_their_size():
    weights, communities = planted([8, 24, 14, 18])
    assert divide(weights, [8, 24, 14, 18]).sets == communities
    weights, communities = planted([24, 14, 18, 8], seed=1)
    assert divide(weights, [24, 14, 18, 8]).sets == communities


def test_related_communities_share_a_student():
    weights, (a, b, c, d) = planted([10] * 4, between=0.05)
    for one, other in ((a, c), (b, d)):
        weights[np.ix_(one, other)] += 0.2
        weights[np.ix_(other, one)] += 0.2
    assert sorted(divide(weights, [20, 20]).sets) == sorted([sorted(a + c), sorted(b + d)])


def test_a_community_larger_than_any_device_is_split_and_others_are_not():
    weights, (large, *small) = planted([30, 10, 10])
    sets = divide(weights, [15, 15, 10, 10]).sets
    assert sorted(sets[2:]) == sorted(small)
    assert sorted(sets[0] + sets[1]) == large


def test_resolution_rises_until_there_is_a_community_for_each_student():
    weights, _ = planted([16, 16], between=0.2)
    communities, resolution = search_communities(weights, 6, seed=0)
    assert len(communities) >= 6
    assert resolution > 1
    assert len(find_communities(weights, resolution / RESOLUTION_STEP, seed=0)) < 6


def test_filters_without_links_fill_the_rest():
    weights = np.zeros((20, 20))
    weights[:12, :12], (a, b) = planted([6, 6])
    sets = divide(weights, [10, 10]).sets
    assert [set(s) >= set(a) or set(s) >= set(b) for s in sets] == [True, True]


def test_a_graph_without_links_is_still_shared_out():
    found = divide(np.zeros((6, 6)), [2, 4])
    assert [len(s) for s in found.sets] == [2, 4]
    assert found.modularity_louvain is None


def test_no_swap_of_two_filters_raises_the_modularity():
    generator = np.random.default_rng(0)
    noise = np.triu(generator.random((18, 18)) ** 4, 1)
    weights = noise + noise.T
    sets = divide(weights, [4, 6, 8]).sets
    best = modularity(weights, sets)
    for s, first in enumerate(sets):
        for t in range(s + 1, len(sets)):
            for i in first:
                for j in sets[t]:
                    swapped = [list(filters) for filters in sets]
                    swapped[s][first.index(i)], swapped[t][sets[t].index(j)] = j, i
                    assert modularity(weights, swapped) <= best + 1e-9


def test_random_starts_find_what_one_start_misses():
    """Noise has many partitions that no swap improves; which of them one search ends in is chance."""
    generator = np.random.default_rng(2)
    noise = np.triu(generator.random((40, 40)) ** 4, 1)
    weights, sizes = noise + noise.T, [10] * 4
    affinity = modularity_matrix(weights)
    found = divide(weights, sizes)
    starts = [modularity(weights, sets) for sets in random_starts(np.arange(40), sizes, affinity, seed=0)]
    communities, _ = search_communities(weights, 4, seed=0)
    alone = modularity(weights, fill_sets(communities, sizes, affinity))
    assert len(set(starts)) > 1
    assert found.modularity == pytest.approx(max([alone, *starts]))
    assert found.modularity > alone + 0.005
    assert found != divide(weights, sizes, seed=1), "the seed decides"
    assert found == divide(weights, sizes)


def test_modularity_matrix_counts_modularity():
    weights, _ = planted([5, 7])
    sets = [[0, 3, 4, 7, 9], [1, 2, 5, 6, 8, 10, 11]]
    matrix = modularity_matrix(weights)
    degrees = weights.sum(axis=1) / weights.sum()
    within = sum(matrix[np.ix_(s, s)].sum() for s in sets)
    assert within - (degrees**2).sum() == pytest.approx(modularity(weights, sets))


def test_classwise_keeps_classes_whole_where_sizes_allow():
    favourite = np.array([0, 1, 2, 0, 1, 2, 0, 1, 2, 3])  # classes of 3, 3, 3 and 1 filters
    class_activity = np.eye(4)[:, favourite]
    sets = divide(np.zeros((10, 10)), [4, 6], "classwise", class_activity=class_activity).sets
    classes = [set(favourite[s]) for s in sets]
    assert [len(c) for c in classes] == [2, 2]
    assert not classes[0] & classes[1]


def test_classwise_splits_no_more_than_it_must():
    favourite = np.array([0] * 6 + [1] * 4)
    sets = divide(np.zeros((10, 10)), [5, 5], "classwise", class_activity=np.eye(2)[:, favourite]).sets
    assert sorted(sorted(favourite[s].tolist()) for s in sets) == [[0] * 5, [0] + [1] * 4]


def test_contiguous_keeps_the_order_of_live_filters():
    live = np.array([1, 0, 1, 1, 0, 1, 1], dtype=bool)
    assert divide(np.zeros((7, 7)), [2, 3], "contiguous", live=live).sets == [[0, 2], [3, 5, 6]]


def test_random_depends_on_the_seed():
    sets = [divide(np.zeros((40, 40)), [20, 20], "random", seed).sets for seed in (0, 0, 1)]
    assert sets[0] == sets[1]
    assert sets[0] != sets[2]


@st.composite
def problems(draw):
    n_students = draw(st.integers(2, 16))
    sizes = draw(st.lists(st.integers(1, 6), min_size=n_students, max_size=n_students))
    n_dead = draw(st.integers(0, 4))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n_filters = sum(sizes) + n_dead
    live = generator.permutation(n_filters) >= n_dead
    noise = np.triu(generator.random((n_filters, n_filters)), 1)
    noise[noise < draw(st.sampled_from([0, 0.5, 0.95]))] = 0
    weights = (noise + noise.T) * live * live[:, None]
    return weights, live, sizes, generator.random((draw(st.integers(1, 5)), n_filters))


@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=25, deadline=None)
@given(problem=problems())
def test_every_live_filter_belongs_to_exactly_one_student(method, problem):
    weights, live, sizes, class_activity = problem
    found = partition_filters(weights, live, sizes, method, 0, class_activity)
    assert [len(s) for s in found.sets] == sizes
    assert all(s == sorted(s) for s in found.sets)
    assert sorted(np.concatenate(found.sets).tolist()) == np.flatnonzero(live).tolist()
    assert found.modularity == pytest.approx(modularity(weights, found.sets))
    assert found == partition_filters(weights, live, sizes, method, 0, class_activity)


def test_sets_do_not_depend_on_the_scale_of_the_weights():
    weights, _ = planted([9, 7, 5], between=0.6)
    assert divide(weights, [7, 7, 7]).sets == divide(weights * 8, [7, 7, 7]).sets


def test_groups_are_placed_without_loss_if_affinity_is_zero():
    assert fill_sets([[4, 2], [0], [1, 3]], [2, 3], np.zeros((5, 5))) == [[2, 4], [0, 1, 3]]


@pytest.mark.parametrize("sizes", [[3, 4], [0, 6], [5, 5]])
def test_sizes_that_do_not_match_the_filters_are_refused(sizes):
    with pytest.raises(UserError, match=r"6 live filters; run the stage `design` again"):
        divide(np.zeros((6, 6)), sizes)


def test_more_students_than_live_filters_are_refused():
    with pytest.raises(UserError, match="3 devices, but only 2"):
        divide(np.zeros((4, 4)), [1, 1, 1], live=np.array([True, False, True, False]))


@pytest.fixture
def experiment(tmp_path, monkeypatch):
    """A graph of 21 filters, the last of them dead, and sizes for two students."""
    monkeypatch.chdir(tmp_path)
    paths = Paths("toy")
    weights = np.zeros((21, 21), dtype=np.float32)
    weights[:20, :20], communities = planted([8, 12])
    write_tensors(
        paths.graph,
        {
            "weights": torch.from_numpy(weights),
            "live": torch.tensor([1] * 20 + [0], dtype=torch.uint8),
            "class_activity": torch.zeros(3, 21),
        },
    )
    write_json(paths.filter_counts("2s"), {"sizes": [8, 12]})
    return paths, communities


def test_run_writes_a_file_for_each_student_and_a_summary(experiment):
    paths, communities = experiment
    partition_stage.run(load_params(PARAMS), paths, "2s")
    folder = paths.partition_info("2s").parent
    first = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.json")}
    baselines = {f"baselines/{method}.json" for method in (*SINGLE_METHODS, *PARTITION_METHODS)}
    assert set(first) == {"students/0.json", "students/1.json", "summary.json"} | baselines
    for student, filters in enumerate(communities):
        expected = {"network": "2s", "student": student, "filters": filters}
        assert read_json(paths.partition("2s", student)) == expected
    summary = read_json(paths.partition_info("2s"))
    assert summary["method"] == "communities"
    assert summary["sizes"] == [8, 12]
    assert summary["community_sizes"] == [12, 8]
    assert summary["dead_filters"] == [20]
    assert np.flatnonzero(np.array(summary["communities"]) == 1).tolist() == communities[0]
    assert summary["communities"][20] == -1
    assert summary["modularity"] == summary["modularity_louvain"] > 0.1 > summary["modularity_random_mean"]

    partition_stage.run(load_params(PARAMS), paths, "2s")
    assert first == {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.json")}


def test_baselines_get_sets_of_the_same_sizes(experiment):
    paths, _ = experiment
    partition_stage.run(load_params(PARAMS), paths, "2s")

    def sets(method: str, seed: int = 0) -> list[list[int] | None]:
        return load_baseline_sets(paths.partition("2s", method), seed)

    everything = list(range(20))  # the last filter is dead
    for method in ("random", "contiguous", "classwise"):
        first, second = sets(method)
        assert (len(first), len(second)) == (8, 12)
        assert sorted(first + second) == everything
    assert sets("contiguous") == [everything[:8], everything[8:]]
    assert sets("full") == [everything, everything]
    assert sets("random", seed=1) != sets("random", seed=0) == sets("random", seed=0)
    assert all(sets(method) == [None] for method in SINGLE_METHODS)
