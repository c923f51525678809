"""Stage `partition`: which filters each student imitates, see `nonn.method.partitioning`."""

from __future__ import annotations

from nonn.core.artifacts import Sizes
from nonn.core.files import damaged, read_json, replacing, write_json
from nonn.core.params import Params
from nonn.core.paths import Paths
from nonn.method.filter_graph import load_graph
from nonn.method.partitioning import baseline_sets, partition_filters, summarise_partition


def run(params: Params, paths: Paths, network: str) -> None:
    graph = load_graph(paths)
    sizes, n_live = read_json(paths.filter_counts(network), Sizes)["sizes"], int(graph.live.sum())
    if sum(sizes) != n_live:
        raise damaged(
            paths.filter_counts(network), f"it shares out {sum(sizes)} filters, and the graph has {n_live} live ones"
        )
    method, seed = params.partition.method, params.partition.seed
    partition = partition_filters(graph.weights, graph.live, sizes, method, seed, graph.class_activity)
    target = paths.partition_info(network).parent
    files = {paths.partition_info(network): summarise_partition(graph, partition, sizes, method, seed)}
    for student, filters in enumerate(partition.sets):
        files[paths.partition(network, student)] = {"network": network, "student": student, "filters": filters}
    files |= {paths.partition(network, name): sets for name, sets in baseline_sets(graph, sizes, seed).items()}
    with replacing(target) as folder:
        for path, content in files.items():
            write_json(folder / path.relative_to(target), content)
