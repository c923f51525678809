"""A new final layer for new labels, from few labelled images, on features that stay as they are.

Devices go on sending the same features, and only the layer that joins them is fitted anew. A NoNN is compared with
students on other partitions, if any were trained, and with as many KD students, which send their features or logits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from unicodedata import normalize

import numpy as np
import torch
from torch import Tensor

from nonn.core.errors import UserError
from nonn.core.params import PARTITION_METHODS, Params
from nonn.core.paths import Paths
from nonn.data.dataset import Dataset
from nonn.method.joining import FeatureCache
from nonn.method.loading import load_baseline, load_students
from nonn.studies.probing import Probes, fit_linear
from nonn.training.networks import ConvNet, predict

#: Weights of ‖W‖² / 2, of which cross-validation on the labelled images chooses one, the strongest of equals.
WEIGHT_DECAYS = (1.0, 0.1, 0.01)
FOLDS = 3


@dataclass(frozen=True)
class Sent:
    """What the devices of a method send for each image, side by side, with each seed of its students."""

    method: str
    train: Sequence[Tensor]  # of each seed (M, F)
    test: Sequence[Tensor]
    bytes_sent: int  # by the device that sends most, float32


def new_labels(data: Dataset, groups: Mapping[str, Sequence[str]] | None) -> tuple[Dataset, tuple[str, ...]]:
    """The images with new labels, and the names of these; images of classes in no group are left out.

    Raises
    ------
    UserError
        A group names no class of the data set, or one that another group has, or there is only one group.
    """
    if groups is None:
        return data, data.classes
    classes = [normalize("NFC", name) for name in data.classes]
    of = torch.full((data.n_classes,), -1)
    for number, (name, members) in enumerate(groups.items()):
        for member in (normalize("NFC", str(member)) for member in members):
            if member not in classes:
                raise UserError(f"{name}: no class {member!r}; the images have {', '.join(data.classes[:10])} …")
            place = classes.index(member)
            if of[place] == number:
                raise UserError(f"{name}: class {member!r} is listed twice; take one out")
            if of[place] >= 0:
                raise UserError(f"{name}: class {member!r} is in two groups; take it out of one")
            of[place] = number
    if len(groups) < 2:
        raise UserError("one group leaves nothing to tell apart; give two or more")
    labels = of[data.labels]
    train, validation, test = (_where(indices, labels) for indices in (data.train, data.validation, data.test))
    return replace(data, labels=labels, train=train, validation=validation, test=test), tuple(groups)


def _where(indices: Tensor, labels: Tensor) -> Tensor:
    return indices[labels[indices] >= 0]


def draw(data: Dataset, n_classes: int, most: int, draws: int, n_test: int) -> tuple[Dataset, Tensor]:
    """The data set reduced to the images needed, and which of its training images each draw has, (draws, C, most).

    Each draw has `most` training images of each class in random order; a smaller number takes the first of them. Test
    images are evenly spaced.
    """
    order = np.random.default_rng(0)
    chosen = torch.empty(draws, n_classes, most, dtype=torch.int64)
    for label in range(n_classes):
        members = data.train[data.labels[data.train] == label].numpy()
        if len(members) < most:
            raise UserError(f"--per-class {most}: a label has {len(members)} training images; give fewer")
        for number in range(draws):
            chosen[number, label] = torch.from_numpy(order.permutation(members)[:most])
    train, positions = chosen.unique(return_inverse=True)
    test = data.test[torch.linspace(0, len(data.test) - 1, min(n_test, len(data.test))).long()]
    return replace(data, train=train, test=test), positions


def other_partitions(params: Params, paths: Paths, network: str) -> dict[str, list[Path]]:
    """The files of a network's baselines on other partitions, by method, if all seeds are there."""
    counts = {name: n for name, n in params.networks[network].baselines.items() if name in PARTITION_METHODS}
    files = {name: [paths.baseline(network, name, seed) for seed in range(n)] for name, n in counts.items()}
    return {name: found for name, found in files.items() if all(file.is_file() for file in found)}


def what_is_sent(
    params: Params, paths: Paths, network: str, training_data: Dataset, data: Dataset, teacher: torch.nn.Module | None
) -> Iterator[Sent]:
    """What the devices of each method send of `data`; their students were trained on `training_data`."""
    features = FeatureCache(data, params.design.precision, training_data)
    n = len(params.networks[network].devices)
    pool_name = params.pool_of(network)
    if pool_name is None or params.networks[pool_name[0]].baselines["kd"] < n:
        raise UserError(
            f"params.yaml: networks.{network}.baselines.kd: an ensemble takes {n} of them or more, there or at a "
            "network of the same devices"
        )
    seeds = range(params.networks[network].seeds)
    by_seed = [load_students(params, paths, training_data, network, seed)[0] for seed in seeds]
    yield _sent("nonn", [_joined(students, features) for students in by_seed], max(s.n_features for s in by_seed[0]))
    for method, files in other_partitions(params, paths, network).items():
        others = [load_baseline(file, training_data) for file in files]
        width = max(student.n_features for student in others[0])
        yield _sent(method, [_joined(students, features) for students in others], width)
    where, method = pool_name
    files = [paths.baseline(where, method, seed) for seed in range(params.networks[where].baselines["kd"])]
    pool = [student for file in files for student in load_baseline(file, training_data)]
    groups = [pool[start : start + n] for start in range(0, len(pool) - n + 1, n)]
    width = max(student.n_features for student in pool)
    yield _sent("ensemble", [_joined(group, features) for group in groups], width)
    logits = [_joined(group, features, logits=True) for group in groups]
    yield _sent("ensemble_logits", logits, training_data.n_classes)
    yield _sent("kd", [_joined(group[:1], features) for group in groups], width)
    if teacher is not None:
        train, test = (predict(teacher, data.subset(name)[0])[0] for name in ("train", "test"))
        yield _sent("teacher", [(train, test)], train.shape[1])


def _sent(method: str, by_seed: Sequence[tuple[Tensor, Tensor]], n_values: int) -> Sent:
    train, test = zip(*by_seed, strict=True)
    return Sent(method, train, test, 4 * n_values)


@torch.no_grad()
def _joined(students: Sequence[ConvNet], features: FeatureCache, logits: bool = False) -> tuple[Tensor, Tensor]:
    """Features or logits of students side by side, of the training and the test images."""
    parts = []
    for part in ("train", "test"):
        outputs, _ = features(students, part)
        terms = [student.head(f) if logits else f for student, f in zip(students, outputs, strict=True)]
        parts.append(torch.cat(terms, 1))
    return parts[0], parts[1]


def fit_few(features: Tensor, n_classes: int, per_class: int) -> tuple[list[Probes], np.ndarray]:
    """Classifiers fitted to few images, (draws, C · per_class, F), class by class, of each weight decay, and the best.

    Returns the classifiers of each weight decay, then for each draw which of these to take: the one that is right on
    most of the images that it was not fitted to, over `FOLDS` folds.
    """
    labels = torch.arange(n_classes).repeat_interleave(per_class)
    fold = torch.arange(per_class).remainder(FOLDS).repeat(n_classes)
    folds = range(min(FOLDS, per_class))
    scores = np.zeros((len(WEIGHT_DECAYS), len(features)))
    for number, decay in enumerate(WEIGHT_DECAYS):
        for held in folds:
            is_held = fold == held
            probes = fit_linear(features[:, ~is_held], labels[~is_held], n_classes, decay)
            scores[number] += probes.right(features[:, is_held], labels[is_held]).sum(1)
    fitted = [fit_linear(features, labels, n_classes, decay) for decay in WEIGHT_DECAYS]
    return fitted, scores.argmax(0)


def score(sent: Sent, positions: Tensor, per_class: int, labels: Tensor) -> np.ndarray:
    """Accuracy on the test images, (seeds, draws)."""
    draws, n_classes, _ = positions.shape
    chosen = positions[:, :, :per_class].reshape(draws, -1)
    accuracies_by_draw = np.empty((len(sent.train), draws))
    for seed, (train, test) in enumerate(zip(sent.train, sent.test, strict=True)):
        fitted, best = fit_few(train[chosen], n_classes, per_class)
        accuracies = np.stack([probes.right(test, labels).mean(1) for probes in fitted])
        accuracies_by_draw[seed] = accuracies[best, np.arange(draws)]
    return accuracies_by_draw
