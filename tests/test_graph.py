"""The filter graph: hand-computed cases, the vectorised sum against plain loops, and what is written."""

from fractions import Fraction
from types import SimpleNamespace

import networkx as nx
import numpy as np
import pytest
import torch
from experiments import REPOSITORY
from safetensors.torch import load_file, save_file

from nonn.core.errors import UserError
from nonn.core.files import read_json
from nonn.core.params import load_params
from nonn.core.paths import Paths
from nonn.method import filter_graph as graph
from nonn.method.filter_graph import (
    activation_hub_graph,
    coactivation_graph,
    find_communities,
    mean_class_activity,
    modularity,
    normalise_activity,
    summarise_graph,
)
from nonn.method.partitioning import partition_filters
from nonn.stages import graph as graph_stage

PARAMS = REPOSITORY / "params.yaml"


def random_pooled(n_images=40, n_filters=23, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n_images, n_filters, generator=generator).relu()


def blocks(n_sets, size, within=1.0, between=0.05):
    """A planted graph: links of weight `within` inside equal sets and `between` across."""
    label = np.repeat(np.arange(n_sets), size)
    weights = np.where(label[:, None] == label, within, between)
    np.fill_diagonal(weights, 0)
    return weights


def test_activity_is_a_share_of_the_image_s_maximum():
    pooled = torch.tensor([[1.0, 4.0, 2.0], [0.0, 0.0, 0.0]], dtype=torch.float16)
    assert normalise_activity(pooled).tolist() == [[0.25, 1.0, 0.5], [0.0, 0.0, 0.0]]


def test_top_k_keeps_the_strongest_and_of_equal_ones_the_first():
    pooled = torch.tensor([[1.0, 4.0, 2.0, 1.0], [3.0, 3.0, 3.0, 3.0], [0.0, 0.0, 0.0, 0.0]])
    assert normalise_activity(pooled, 2).tolist() == [[0, 1, 0.5, 0], [1, 1, 0, 0], [0, 0, 0, 0]]
    assert torch.equal(normalise_activity(pooled, 4), normalise_activity(pooled))


# Two images of three filters: (1, 1/2, 1/4) and (0, 1/2, 1).
BY_HAND = torch.tensor([[1, 1 / 2, 1 / 4], [0, 1 / 2, 1]])


def test_activation_hubs_by_hand():
    # 01: 1·1/2·1/2 + 0 = 1/4;  02: 1·1/4·3/4 + 0 = 3/16;  12: 1/2·1/4·1/4 + 1/2·1·1/2 = 9/32, the largest
    hub = [[0, Fraction(8, 9), Fraction(2, 3)], [Fraction(8, 9), 0, 1], [Fraction(2, 3), 1, 0]]
    assert activation_hub_graph(BY_HAND).tolist() == [pytest.approx([float(w) for w in row]) for row in hub]


def test_coactivation_by_hand():
    # 01: 1/2 / (3/2) = 1/3;  02: 1/4 / (7/4) = 1/7;  12: 1/8 / (5/4) + 1/2 / (3/2) = 13/30, the largest
    first, second = Fraction(1, 3) / Fraction(13, 30), Fraction(1, 7) / Fraction(13, 30)
    expected = [[0, first, second], [first, 0, 1], [second, 1, 0]]
    assert coactivation_graph(BY_HAND).tolist() == [pytest.approx([float(w) for w in r]) for r in expected]


@pytest.mark.parametrize("top_k", [None, 5])
def test_vectorised_equals_naive(top_k, monkeypatch):
    monkeypatch.setattr(graph, "BLOCK_FILTERS", 7)
    monkeypatch.setattr(graph, "BLOCK_IMAGES", 9)
    activity = normalise_activity(random_pooled(), top_k)
    images, filters = activity.tolist(), range(activity.shape[1])
    sums = [[sum(a[i] * a[j] * abs(a[i] - a[j]) for a in images) for j in filters] for i in filters]
    naive = (torch.tensor(sums, dtype=torch.float64) / max(map(max, sums))).float()
    torch.testing.assert_close(activation_hub_graph(activity), naive, rtol=1e-6, atol=0)


@pytest.mark.parametrize("rule", graph.RULES.values(), ids=graph.RULES)
def test_graph_is_symmetric_without_loops_and_at_most_one(rule):
    weights = rule(normalise_activity(random_pooled(), 8))
    assert torch.equal(weights, weights.T)
    assert not weights.diagonal().any()
    assert weights.min() == 0
    assert weights.max() == 1


@pytest.mark.parametrize("rule", graph.RULES.values(), ids=graph.RULES)
def test_blocks_and_threads_do_not_change_the_graph(rule, monkeypatch):
    activity = normalise_activity(random_pooled(n_images=300, n_filters=70))
    by_threads = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            by_threads.append(rule(activity))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(by_threads[0], other) for other in by_threads[1:])
    for n_filters, n_images in ((70, 300), (11, 33), (70, 1)):
        monkeypatch.setattr(graph, "BLOCK_FILTERS", n_filters)
        monkeypatch.setattr(graph, "BLOCK_IMAGES", n_images)
        torch.testing.assert_close(rule(activity), by_threads[0], rtol=2e-7, atol=0)


@pytest.mark.parametrize("rule", graph.RULES.values(), ids=graph.RULES)
def test_graph_without_activity_is_empty(rule):
    assert not rule(torch.zeros(4, 5)).any()


def test_equally_active_filters_are_not_linked_by_hubs():
    assert not activation_hub_graph(torch.ones(4, 5)).any()


def test_class_activity_is_a_mean_over_images():
    activity = torch.tensor([[1.0, 0.0], [0.5, 1.0], [0.0, 1.0]])
    means = mean_class_activity(activity, torch.tensor([0, 0, 2]), n_classes=3)
    assert means.tolist() == [[0.75, 0.5], [0, 0], [0, 1]]


def test_modularity_by_hand():
    # Two separate links: each set holds half of the weight and half of the degrees, 2 (1/2 − 1/4).
    weights = np.zeros((4, 4))
    weights[[0, 1, 2, 3], [1, 0, 3, 2]] = 1
    assert modularity(weights, [[0, 1], [2, 3]]) == pytest.approx(1 / 2)
    assert modularity(weights, [[0, 2], [1, 3]]) == pytest.approx(-1 / 2)
    assert modularity(np.zeros((4, 4)), [[0, 1], [2, 3]]) == 0


def test_modularity_as_networkx():
    weights = activation_hub_graph(normalise_activity(random_pooled(), 6)).numpy()
    sets = [list(range(0, 10)), list(range(10, 12)), list(range(12, 23))]
    expected = nx.community.modularity(nx.from_numpy_array(weights.astype(float)), sets)
    assert modularity(weights, sets) == pytest.approx(expected, abs=1e-12)


def test_communities_of_a_planted_graph():
    weights = np.zeros((14, 14))
    weights[1:13, 1:13] = blocks(3, 4)  # the first and the last filter have no links
    assert find_communities(weights) == [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12]]
    assert find_communities(np.zeros((3, 3))) == []


def test_summary():
    pooled = random_pooled(n_images=60, n_filters=30)
    pooled[:, [4, 17]] = 0
    weights = activation_hub_graph(normalise_activity(pooled, 12))
    summary = summarise_graph(pooled, weights, "activation_hubs", 12)
    assert summary["dead_filters"] == [4, 17]
    assert summary["n_live"] == 28
    assert summary["density"] == pytest.approx(np.count_nonzero(weights) / (28 * 27), abs=1e-6)
    assert sum(summary["community_sizes"]) == 28
    assert len(summary["community_sizes"]) == summary["n_communities"]
    curve = {point["top_k"]: point for point in summary["top_k_curve"]}
    assert list(curve) == [10, 12, 15, 25, None]
    assert curve[12]["modularity"] == summary["modularity"]
    assert curve[10]["modularity"] > curve[None]["modularity"]


@pytest.fixture
def experiment(tmp_path, monkeypatch):
    """Signals of 60 validation images, 3 classes and 30 filters, two of them dead."""
    monkeypatch.chdir(tmp_path)
    paths = Paths("toy")
    paths.root.mkdir(parents=True)
    pooled = random_pooled(n_images=60, n_filters=30)
    pooled[:, [4, 17]] = 0
    save_file({"validation_pooled": pooled.half()}, paths.signals)
    data = SimpleNamespace(labels=torch.arange(80) % 3, validation=torch.arange(10, 70), n_classes=3)
    monkeypatch.setattr(graph_stage, "load_dataset", lambda _: data)
    return paths


def test_run_writes_the_graph_and_its_summary(experiment):
    graph_stage.run(load_params(PARAMS), experiment)
    first = experiment.graph.read_bytes(), experiment.graph_info.read_bytes()
    pooled = load_file(experiment.signals)["validation_pooled"]
    loaded = graph.load_graph(experiment)
    assert np.array_equal(loaded.weights, activation_hub_graph(normalise_activity(pooled, 25)).numpy())
    assert np.flatnonzero(~loaded.live).tolist() == [4, 17]
    assert np.allclose(loaded.class_activity[1], normalise_activity(pooled)[0::3].mean(dim=0))
    assert read_json(experiment.graph_info)["dead_filters"] == [4, 17]

    graph_stage.run(load_params(PARAMS), experiment)
    assert first == (experiment.graph.read_bytes(), experiment.graph_info.read_bytes())


def test_filters_of_one_value_are_linked_to_none(experiment):
    """Also where that value is positive, and among the strongest of each image."""
    pooled = load_file(experiment.signals)["validation_pooled"]
    pooled[:, [4, 17]] = 9.0
    save_file({"validation_pooled": pooled}, experiment.signals)
    graph_stage.run(load_params(PARAMS), experiment)
    loaded = graph.load_graph(experiment)
    assert np.flatnonzero(~loaded.live).tolist() == [4, 17]
    assert not loaded.weights[[4, 17]].any()
    assert read_json(experiment.graph_info)["density"] <= 1
    partition = partition_filters(loaded.weights, loaded.live, [14, 14], "communities", 0, loaded.class_activity)
    assert sorted(filter_ for filters in partition.sets for filter_ in filters) == np.flatnonzero(loaded.live).tolist()


def test_top_k_above_the_number_of_filters_is_refused(experiment):
    params = load_params(PARAMS)
    params = params.model_copy(update={"graph": params.graph.model_copy(update={"top_k": 31})})
    with pytest.raises(UserError, match=r"graph\.top_k: is 31, .* only 30 filters"):
        graph_stage.run(params, experiment)
