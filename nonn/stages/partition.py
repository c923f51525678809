"""Stage `partition`: which filters each student imitates, see `nonn.method.partitioning`."""

from __future__ import annotations

from nonn.core.files import read_json, replacing, write_json
from nonn.core.params import Params
from nonn.core.paths import Paths
from nonn.method.partitioning import baseline_sets, partition_filters, summarise_partition
from nonn.method.store import load_graph


def run(params: Params, paths: Paths, network: str) -> None:
    """Write the filters of each student of a network and of its baselines, and a summary.

    Raises
    ------
    UserError
        The sizes do not match the graph; see `partition_filters`.
    """
    graph = load_graph(paths)
    sizes = read_json(paths.sizes(network))["sizes"]
    method, seed = params.partition.method, params.partition.seed
    partition = partition_filters(graph.weights, graph.live, sizes, method, seed, graph.class_activity)
    with replacing(paths.partition(network)) as folder:
        folder.mkdir()
        for student, filters in enumerate(partition.sets):
            write_json(folder / f"{student}.json", {"network": network, "student": student, "filters": filters})
        for baseline, sets in baseline_sets(graph, sizes, seed).items():
            write_json(folder / f"{baseline}.json", sets)
        write_json(folder / "partition.json", summarise_partition(graph, partition, sizes, method, seed))
