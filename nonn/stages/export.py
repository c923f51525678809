"""Stage `export`: write what the devices run, and score the files again, see `nonn.method.exporting`."""

from __future__ import annotations

import torch

from nonn.core.files import replacing, write_json
from nonn.core.params import PARTITION_METHODS, SOLO, Params
from nonn.core.paths import Paths
from nonn.data.dataset import Dataset, load_dataset, load_teacher_dataset
from nonn.method.exporting import export_network, export_solo
from nonn.method.loading import load_baseline, load_network
from nonn.teachers.foreign import ForeignTeacher
from nonn.teachers.loading import load_teacher
from nonn.training.networks import ConvNet


def solo_models(params: Params, paths: Paths, data: Dataset) -> dict[str, ConvNet | ForeignTeacher]:
    """The teacher, also in int8 if the students are, and each single-model baseline of the first seed.

    A foreign teacher stays in float32: what quantising does to it is a matter of its own.
    """
    models: dict[str, ConvNet | ForeignTeacher] = {"teacher": load_teacher(paths)}
    if params.design.precision == "int8" and isinstance(models["teacher"], ConvNet):
        models["teacher_int8"] = models["teacher"]
    for network, method, _ in params.baselines():
        if method not in PARTITION_METHODS:
            models[f"{network}-{method}"] = load_baseline(paths.baseline(network, method, seed=0), data)[0]
    return models


def run(params: Params, paths: Paths, name: str) -> None:
    torch.set_num_threads(1)
    data, precision = load_dataset(paths), params.design.precision
    with replacing(paths.export(name)) as folder:
        folder.mkdir(parents=True)
        if name == SOLO:
            models, seen = solo_models(params, paths, data), load_teacher_dataset(paths)
            manifest = export_solo(models, data, folder, precision, seen)
        else:
            manifest = export_network(load_network(paths.network(name, seed=0), data), data, folder, precision)
        write_json(folder / "manifest.json", manifest)
