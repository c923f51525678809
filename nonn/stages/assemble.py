"""Stage `assemble`: join the students of a network by one final layer, see `nonn.method.joining`."""

from __future__ import annotations

import torch

from nonn.core.files import write_json
from nonn.core.params import Params
from nonn.core.paths import Paths
from nonn.data.dataset import load_dataset
from nonn.data.tensors import write_tensors
from nonn.method.joining import FeatureCache, assemble_network
from nonn.method.loading import load_students


def run(params: Params, paths: Paths, network: str, seed: int) -> None:
    torch.set_num_threads(1)
    data = load_dataset(paths)
    students, designs = load_students(params, paths, data, network, seed)
    features = FeatureCache(data, params.design.precision)
    model, summary = assemble_network(students, features, params.assemble, seed)
    target = paths.network(network, seed)
    write_tensors(target, model.tensors())
    write_json(target.with_suffix(".json"), summary | {"students": designs})
