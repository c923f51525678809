"""Artifacts of the stages, as objects: teacher, signals, graph, designs, networks, baselines."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from torch import Tensor

from nonn.core.errors import UserError
from nonn.core.files import read_json
from nonn.core.params import Architecture, Params
from nonn.core.paths import Paths
from nonn.data.dataset import Dataset
from nonn.data.tensors import read_tensors
from nonn.method.filter_graph import FilterGraph
from nonn.method.joining import NetworkOfNetworks
from nonn.method.partitioning import cut
from nonn.runtime.final import FinalLayer
from nonn.training.networks import ConvNet


def load_teacher(paths: Paths, data: Dataset) -> ConvNet:
    """The teacher of the experiment, ready to predict."""
    info = read_json(paths.teacher_info)
    model = ConvNet(Architecture(**info["architecture"]), data.channels, data.n_classes)
    model.load_state_dict(read_tensors(paths.teacher))
    return model.eval()


def load_signals(paths: Paths) -> dict[str, Tensor]:
    """The signals as `compute_signals` returns them, memory-mapped."""
    return read_tensors(paths.signals)


def load_graph(paths: Paths) -> FilterGraph:
    """Read what `run` wrote.

    Raises
    ------
    UserError
        The graph is missing or damaged.
    """
    tensors = {name: tensor.numpy() for name, tensor in read_tensors(paths.graph).items()}
    return FilterGraph(tensors["weights"], tensors["live"].astype(bool), tensors["class_activity"])


def load_baseline_sets(path: Path, seed: int) -> list[list[int] | None]:
    """Filters of each student of a baseline, from a file of this stage, with one of its seeds."""
    saved = read_json(path)
    if "sets" in saved:
        return saved["sets"]
    return cut(np.random.default_rng(seed).permutation(saved["live"]), saved["sizes"])


def load_design(path: Path) -> list[tuple[Architecture, int | None]]:
    """Architecture and bridge outputs of each student in a file of this stage.

    Raises
    ------
    UserError
        It has none.
    """
    if not (designs := read_json(path)):
        raise UserError(
            f"{path}: the devices of `networks` fit no students of this baseline. Take it out of `baselines` and "
            "`baselines_once`, or raise devices.*.memory_kib."
        )
    return [(Architecture(**design["architecture"]), design["n_filters"]) for design in designs]


def load_baseline(path: Path, data: Dataset) -> list[ConvNet]:
    """The students of a baseline, ready to predict, from the file of its weights."""
    tensors, students = read_tensors(path), []
    for position, (architecture, n_filters) in enumerate(load_design(path.with_suffix(".json"))):
        student, prefix = ConvNet(architecture, data.channels, data.n_classes, n_filters), f"{position}."
        student.load_state_dict({n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)})
        students.append(student.eval())
    return students


def load_network(path: Path, data: Dataset) -> NetworkOfNetworks:
    """An assembled network, ready to predict, from the file of its weights."""
    tensors, info = read_tensors(path), read_json(path.with_suffix(".json"))
    students = [ConvNet(*_shape(design, data)).eval() for design in info["students"]]
    for position, student in enumerate(students):
        student.load_state_dict(_below(tensors, f"students.{position}."))
    others = {name: _layer(tensors, f"others.{name}.") for name in info["missing"]["not_chosen"]}
    return NetworkOfNetworks(students, _layer(tensors, "final."), others)


def _layer(tensors: Mapping[str, Tensor], prefix: str) -> FinalLayer:
    return FinalLayer.of({name: tensor.numpy() for name, tensor in _below(tensors, prefix).items()})


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _shape(design: dict, data: Dataset) -> tuple[Architecture, int, int, int]:
    return Architecture(**design["architecture"]), data.channels, data.n_classes, design["n_filters"]


def load_students(
    params: Params, paths: Paths, data: Dataset, network: str, seed: int
) -> tuple[list[ConvNet], list[dict]]:
    """The trained students of a network, ready to predict, and their designs."""
    students, designs = [], []
    for position in range(len(params.networks[network])):
        (design,) = read_json(paths.design(network, position))
        student = ConvNet(*_shape(design, data))
        student.load_state_dict(read_tensors(paths.student(network, position, seed)))
        students.append(student.eval())
        designs.append(design)
    return students, designs
