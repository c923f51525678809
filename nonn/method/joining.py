"""Joining the students of a network by one final layer.

The layer starts as the mean of the students' own training heads, block by block, so the assembled network averages
their logits. It is fitted further on the training images' features, and the fitted layer is kept only if it is right on
more validation images. How it answers when students are missing is chosen here too: see `nonn.method.missing`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor

from nonn.core.params import AssembleParams, Precision
from nonn.core.progress import track
from nonn.data.dataset import Dataset
from nonn.data.image_store import Images
from nonn.deploy.onnx_files import student_content
from nonn.method.calibration import fit_temperatures
from nonn.method.final_layer import averaged_layer, fit_by_epoch, layer_tensors, logits_of, steps_of
from nonn.method.missing import fit_strategies
from nonn.runtime.final import FinalLayer
from nonn.runtime.session import run_onnx
from nonn.training.hardware import pick_device
from nonn.training.networks import ConvNet, accuracy, predict

#: Images at once: their activations stay in the processor's cache, a quarter less time than with 500, the same bytes.
BATCH = 100


@dataclass(frozen=True)
class NetworkOfNetworks:
    """The assembled network: students that exchange nothing with each other, and the final layer.

    Attributes
    ----------
    students : sequence of ConvNet
    final : FinalLayer
        Of the strategy chosen for missing students.
    others : mapping of str to FinalLayer
        Of the strategies not chosen, for comparison.
    temperatures : sequence of float
        Divisors of the logits before the softmax, with 1 to N students present.
    """

    students: Sequence[ConvNet]
    final: FinalLayer
    others: Mapping[str, FinalLayer] = field(default_factory=dict)
    temperatures: Sequence[float] = ()

    def __call__(self, images: Tensor) -> Tensor:
        """Logits (B, C), float64, of uint8 images."""
        return logits_of(self.final, features_of(self.students, images))

    def tensors(self) -> dict[str, Tensor]:
        """All that is stored of the network, by name."""
        layers = {"final": self.final} | {f"others.{name}": layer for name, layer in self.others.items()}
        tensors = {f"{key}.{name}": t for key, layer in layers.items() for name, t in layer_tensors(layer).items()}
        for position, student in enumerate(self.students):
            tensors |= {f"students.{position}.{name}": tensor for name, tensor in student.state_dict().items()}
        return tensors


def fit_layer(
    layer: FinalLayer,
    features: Sequence[Tensor],
    labels: Tensor,
    validation: tuple[Sequence[Tensor], Tensor],
    params: AssembleParams,
    seed: int,
) -> tuple[FinalLayer, list[float]]:
    """Fit a final layer further by cross-entropy, and keep what validation prefers.

    `features` (M, F_i) are N tensors, of the training images as they are. Returns the start, unless some epoch was
    right on more validation images: then the first best one; and the accuracies on validation, before the first epoch
    and after each. The start stays as it is.
    """
    best, accuracies = layer, [accuracy(logits_of(layer, validation[0]), validation[1])]
    epochs = (steps_of(len(labels), epoch, seed) for epoch in range(params.epochs))
    for fitted in fit_by_epoch(layer, features, labels, epochs, params.lr):
        score = accuracy(logits_of(fitted, validation[0]), validation[1])
        if score > max(accuracies):
            best = fitted
        accuracies.append(score)
    return best, accuracies


@torch.no_grad()
def features_of(students: Sequence[ConvNet], images: Tensor | Images) -> list[Tensor]:
    """Feature vectors (B, F_i) of all students for uint8 images, in float32."""
    return [predict(student, images, batch_size=BATCH)[0] for student in students]


class FeatureCache:
    """Feature vectors of students for whole splits of a dataset, each calculated once.

    They are those that devices calculate: in int8, by ONNX Runtime, if `precision` says so. Int8 students are
    calibrated on the training images of `training_data`; None stands for the dataset itself.
    """

    def __init__(self, data: Dataset, precision: Precision, training_data: Dataset | None = None):
        self.data, self.precision, self.training_data = data, precision, training_data or data
        self._known: dict[tuple[ConvNet, str], Tensor] = {}
        self._files: dict[ConvNet, bytes] = {}

    def __call__(self, students: Sequence[ConvNet], split: str) -> tuple[list[Tensor], Tensor]:
        """N tensors of shape (M, F_i), and the labels (M,), of ``train``, ``validation`` or ``test``."""
        images, labels = self.data.subset(split)
        for student in students:
            if (student, split) not in self._known:
                self._known[student, split] = self._calculate(student, images)
        return [self._known[student, split] for student in students], labels

    def _calculate(self, student: ConvNet, images: Images) -> Tensor:
        if self.precision == "float32":
            features, _ = predict(student, images, pick_device(), BATCH)
            student.cpu()
            return features
        if student not in self._files:
            self._files[student] = student_content(student, self.training_data, self.precision)
        n_chunks = min(torch.get_num_threads(), len(images))
        chunks = (chunk.each() for chunk in images.chunks(n_chunks))
        with ThreadPoolExecutor(n_chunks) as pool:  # ONNX Runtime lets other threads run meanwhile
            return torch.from_numpy(np.concatenate(list(pool.map(partial(run_onnx, self._files[student]), chunks))))


def join_students(
    students: Sequence[ConvNet], features: FeatureCache, params: AssembleParams, seed: int
) -> tuple[dict[str, FinalLayer], dict]:
    """Fit final layers to students of whatever kind: of a NoNN, of a baseline, of an ensemble.

    Returns the layers by strategy for missing students, which answer alike with all present, and a summary: the
    strategy ``chosen`` (under ``missing``: see `nonn.method.missing.fit_strategies`), and how the layer came about.
    """
    averaged = averaged_layer([student.head for student in students])
    train, validation = features(students, "train"), features(students, "validation")
    layer, accuracies = fit_layer(averaged, *train, validation, params, seed)
    layers, missing = fit_strategies(layer, averaged, train, validation, params, seed)
    summary = {
        "final_layer": "averaged" if layer is averaged else "fitted",
        "missing": missing,
        "validation_accuracy": max(accuracies),
        "validation_accuracy_averaged": accuracies[0],
        "validation_accuracy_by_epoch": accuracies,
    }
    return layers, summary


def assemble_network(
    students: Sequence[ConvNet], features: FeatureCache, params: AssembleParams, seed: int
) -> tuple[NetworkOfNetworks, dict]:
    """Join trained students; return the network and how its final layer and its temperatures came about."""
    for student in track(students, "features"):  # what takes long
        features([student], "train")
    layers, summary = join_students(students, features, params, seed)
    final = layers.pop(summary["missing"]["chosen"])
    validation, labels = features(students, "validation")
    temperatures = fit_temperatures(final, validation, labels)
    return NetworkOfNetworks(students, final, layers, temperatures), summary | {"temperatures": temperatures}
