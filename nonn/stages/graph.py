"""Stage `graph`: the weighted graph of the teacher's last filters, see `nonn.method.filter_graph`."""

from __future__ import annotations

import torch

from nonn.core.files import damaged, write_json
from nonn.core.params import Params
from nonn.core.paths import Paths
from nonn.data.dataset import load_dataset
from nonn.data.tensors import read_tensors, write_tensors
from nonn.method.filter_graph import RULES, live_filters, mean_class_activity, normalise_activity, summarise_graph


def run(params: Params, paths: Paths) -> None:
    rule, top_k = params.graph.rule, params.graph.top_k
    data = load_dataset(paths)
    pooled, labels = read_tensors(paths.signals).get("validation_pooled"), data.labels[data.validation]
    if pooled is None or pooled.dim() != 2 or len(pooled) != len(labels):
        raise damaged(paths.signals, "validation_pooled is not of the validation images of this dataset")
    params.check_filters(pooled.shape[1])
    live = live_filters(pooled)
    pooled = pooled * live  # a constant activation links no filters
    weights = RULES[rule](normalise_activity(pooled, top_k))
    write_tensors(
        paths.graph,
        {
            "weights": weights,
            "live": live.to(torch.uint8),
            "class_activity": mean_class_activity(normalise_activity(pooled), labels, data.n_classes),
        },
    )
    write_json(paths.graph_info, summarise_graph(pooled, weights, rule, top_k))
