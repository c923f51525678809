"""Artifacts of the stages, as objects: baselines, networks, students."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from nonn.core.architecture import Architecture
from nonn.core.artifacts import Designs, NetworkInfo
from nonn.core.files import intact, read_json
from nonn.core.params import Params
from nonn.core.paths import Paths
from nonn.data.dataset import Dataset
from nonn.data.tensors import read_tensors
from nonn.method.joining import NetworkOfNetworks
from nonn.runtime.final import FinalLayer
from nonn.training.loading import load_design
from nonn.training.networks import ConvNet


def load_baseline(path: Path, data: Dataset) -> list[ConvNet]:
    """The students of a baseline, ready to predict, from the file of its weights."""
    tensors, students = read_tensors(path), []
    for position, (architecture, n_filters) in enumerate(load_design(path.with_suffix(".json"))):
        student = ConvNet(architecture, data.channels, data.n_classes, n_filters)
        with intact(path):
            student.load_state_dict(_below(tensors, f"{position}."))
        students.append(student.eval())
    return students


def load_network(path: Path, data: Dataset) -> NetworkOfNetworks:
    """An assembled network, ready to predict, from the file of its weights."""
    tensors, info = read_tensors(path), read_json(path.with_suffix(".json"), NetworkInfo)
    students = [ConvNet(*_shape(design, data)).eval() for design in info["students"]]
    with intact(path):
        for position, student in enumerate(students):
            student.load_state_dict(_below(tensors, f"students.{position}."))
        others = {name: _layer(tensors, f"others.{name}.") for name in info["missing"]["not_chosen"]}
        return NetworkOfNetworks(students, _layer(tensors, "final."), others, info["temperatures"])


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
    for position in range(len(params.networks[network].devices)):
        design = read_json(paths.design(network, position), Designs)[0]
        student, path = ConvNet(*_shape(design, data)), paths.student(network, position, seed)
        with intact(path):
            student.load_state_dict(read_tensors(path))
        students.append(student.eval())
        designs.append(design)
    return students, designs
