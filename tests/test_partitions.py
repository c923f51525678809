"""The comparison of partitioners: planted communities, the reference code's procedure by hand, and the command."""

import numpy as np
import pytest
import torch
from test_partition import planted

from nonn.cli import main
from nonn.commands import partitions
from nonn.commands.partitions import LEIDEN
from nonn.method.filter_graph import modularity
from nonn.studies.comparison import PARTITIONERS, Problem, compare, correlation_graph

pytest.importorskip("sklearn")


@pytest.fixture(scope="module")
def problem():
    """Three planted communities of 8 filters, each active on images of its own; one filter is dead."""
    weights, communities = planted([8, 8, 8], between=0.05)
    padded = np.zeros((25, 25), dtype=np.float32)
    padded[:24, :24] = weights
    activity = np.zeros((30, 25), dtype=np.float32)
    for number, filters in enumerate(communities):
        activity[np.ix_(range(10 * number, 10 * number + 10), filters)] = 1 - 0.02 * np.arange(8)
    live = np.arange(25) < 24
    class_activity = np.stack([activity[10 * c : 10 * c + 10].mean(0) for c in range(3)])
    return Problem(padded, live, activity, class_activity, [8, 8, 8]), communities


@pytest.mark.parametrize(
    "name", [name for name in PARTITIONERS if name not in ("contiguous", "random", "reference code")]
)
def test_planted_communities_are_found(name, problem):
    if name == LEIDEN:
        pytest.importorskip("igraph")
    graph, communities = problem
    assert sorted(sorted(filters) for filters in PARTITIONERS[name](graph, 0)) == sorted(communities)
    row = compare(graph, PARTITIONERS[name], n_seeds=2)
    assert row["modularity"] == pytest.approx(modularity(graph.weights, communities))
    assert (row["sets"], row["used"], row["balance"], row["agreement"]) == (3, 24, 1, 1)


@pytest.mark.parametrize("name", ["contiguous", "random"])
def test_partitions_that_do_not_look_at_the_graph_have_no_modularity(name, problem):
    row = compare(problem[0], PARTITIONERS[name], n_seeds=4)
    assert row["modularity"] < 0.2
    assert row["agreement"] == (1 if name == "contiguous" else pytest.approx(0, abs=0.2))


def test_the_reference_code_drops_weak_links_and_the_largest_set():
    """Two strong triangles, a strong pair, and filters with weak links: 1 % of the links is not even one of them."""
    weights = np.full((40, 40), 0.01)
    np.fill_diagonal(weights, 0)
    for filters, weight in (([0, 1, 2, 3], 0.9), ([4, 5, 6], 0.9), ([7, 8], 0.9)):
        weights[np.ix_(filters, filters)] = weight * (1 - np.eye(len(filters)))
    live, activity = np.ones(40, dtype=bool), np.zeros((2, 40))
    problem = Problem(weights, live, activity, activity, [20, 20])
    # 20 of 1,560 links are strong, so the 99th percentile is that of the strong ones. The filters without one, each a
    # community of its own, are merged, and as the largest set they are left out.
    sets = PARTITIONERS["reference code"](problem, 0)
    assert sorted(map(sorted, sets)) == [[0, 1, 2, 3], [4, 5, 6, 7, 8]]


def test_correlation_links_what_rises_and_falls_together():
    activity = torch.tensor([[0.0, 0.1, 1.0, 0.0], [1.0, 0.6, 0.0, 0.0], [0.5, 0.2, 0.5, 0.0]])
    weights = correlation_graph(activity).numpy()
    expected = np.corrcoef(activity[:, :3].numpy().T).clip(min=0) * (1 - np.eye(3))
    np.testing.assert_allclose(weights[:3, :3], expected, atol=1e-6)
    assert not weights[3].any()


@pytest.mark.usefixtures("experiment")
def test_the_command_writes_a_row_for_each_graph_and_partitioner(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(partitions, "find_spec", lambda module: None if module == "igraph" else module)
    main(["partitions", "2s", "--seeds", "2", "--output", str(tmp_path / "table.md")])
    text = (tmp_path / "table.md").read_text()
    shown = capsys.readouterr()
    assert text in shown.out
    assert "note: Leiden is left out; igraph is not installed" in shown.err
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")][2:]
    assert len(rows) == 3 * (len(PARTITIONERS) - 1)
    assert {row[0].lstrip("| ") for row in rows} == {"activation hubs", "coactivation", "correlation"}
    assert "for 2 students, with the seeds 0 to 1" in text
    with pytest.raises(SystemExit, match=r"nonn partitions: params\.yaml: networks: no '3s'; choose one of 2s"):
        main(["partitions", "3s"])
