"""Where NoNN leads an ensemble, and by how much: the experiment with one factor changed at a time (``nonn map``).

A *point* is a value of one factor: the length of the training, the budget of a device, the share of the training
images, the share of the classes. At each point the students of a NoNN and as many KD students are trained on the same
teacher's signals, with the same schedule, for the same devices, and joined by a final layer in the same way. All are
scored in float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nonn.core.artifacts import DatasetInfo, ImageSpec
from nonn.core.budgets import Budget
from nonn.core.errors import UserError
from nonn.core.files import STATE, intact, read_json
from nonn.core.params import Params, SignalsParams
from nonn.core.paths import Paths
from nonn.data.dataset import SPLITS, Dataset, load_dataset
from nonn.data.tensors import read_tensors, write_tensors
from nonn.method.final_layer import averaged_layer, logits_of
from nonn.method.joining import fit_layer
from nonn.method.loading import load_baseline
from nonn.method.scoring import paired_difference, permutation_test, sd
from nonn.method.sizing import design_student, smallest_device
from nonn.runtime.final import FinalLayer
from nonn.training.checkpoint import Checkpoint
from nonn.training.distillation import VIEW_KEYS, StudentSpec, TransferSet, distill_student
from nonn.training.loading import cut, load_design, load_filters, load_signals
from nonn.training.networks import ConvNet, predict

#: Seeds of images and partitions that are drawn here.
DRAW_SEED = 0


@dataclass(frozen=True)
class Point:
    """One value of one factor, as a multiple of the experiment's; the other fields hold the resulting settings."""

    factor: str
    value: float
    epochs: int
    budget: float = 1.0
    images: float = 1.0
    classes: float = 1.0


def points_of(factors: Mapping[str, Sequence[float]], most_repeats: float, params: Params) -> list[Point]:
    """All points of a plan (``workflow/map.yaml``), the centre first: the experiment as it is."""
    epochs = params.distill.epochs
    points = [Point("centre", 1.0, epochs)]
    points += [Point("epochs", value, max(1, round(epochs * value))) for value in factors.get("epochs", [])]
    points += [Point("budget", value, epochs, budget=value) for value in factors.get("budget", [])]
    for factor in ("images", "classes"):
        for value in factors.get(factor, []):
            repeats = min(1 / value, most_repeats)
            points.append(Point(factor, value, round(epochs * repeats), **{factor: value}))
    return points


@dataclass(frozen=True)
class Training:
    """One student at a point: number `student` of `network` or, where that is None, a KD student for `device`.

    KD students are told apart by their seeds. With ``random`` the network's filters are shared out by chance, as the
    baseline of that name does.
    """

    point: Point
    network: str | None
    student: int
    seed: int
    random: bool = False
    device: Budget | None = None

    @property
    def same(self) -> Training:
        """The training whatever the point is called: points that agree in all else share it."""
        return replace(self, point=replace(self.point, factor="", value=0.0))


def transfer_set_of(params: Params, images: float = 1.0, classes: float = 1.0) -> TransferSet:
    """The experiment's images and signals, of a share of its classes and a share of the training images of each."""
    return _transfer_set(params.experiment, params.signals.model_dump_json(), images, classes)


@lru_cache(maxsize=2)
def _transfer_set(experiment: str, section: str, share: float, of_classes: float) -> TransferSet:
    paths = Paths(experiment)
    data = load_dataset(paths)
    signals, views = load_signals(paths, data), SignalsParams.model_validate_json(section)
    if share == of_classes == 1:
        return TransferSet(data, signals, views)
    kept = torch.arange(len(data.train))
    if of_classes < 1:
        data, signals["logits"], kept = _keep_classes(data, signals["logits"], of_classes)
    if share < 1:
        drawn = _draw_images(data.labels[data.train], share)
        data, kept = replace(data, train=data.train[drawn]), kept[drawn]
    return TransferSet(data, signals, views, kept)


def _keep_classes(data: Dataset, logits: Tensor, share: float) -> tuple[Dataset, Tensor, Tensor]:
    """The images of some classes, drawn at random and numbered anew; their logits; the positions of the images.

    `logits` are (K, n_train, C), and those returned are of fewer classes. Positions are among the training images.
    """
    n_classes = number_of_classes(data.n_classes, share)
    chosen = np.sort(np.random.default_rng(DRAW_SEED).permutation(data.n_classes)[:n_classes])
    number = torch.full((data.n_classes,), -1)
    number[chosen] = torch.arange(n_classes)
    labels = number[data.labels]
    parts = {name: indices[labels[indices] >= 0] for name in SPLITS for indices in [getattr(data, name)]}
    kept = (labels[data.train] >= 0).nonzero().squeeze(1)
    classes = tuple(data.classes[i] for i in chosen)
    return replace(data, labels=labels, classes=classes, **parts), logits[..., chosen], kept


def number_of_classes(total: int, share: float) -> int:
    """The number of classes in a share of them.

    Raises
    ------
    UserError
        Fewer than two: there is nothing to tell apart.
    """
    if (number := round(share * total)) < 2:
        raise UserError(
            f"workflow/map.yaml: factors.classes: {share:g} of {total} classes is {number}; give a larger part"
        )
    return number


def _draw_images(labels: Tensor, share: float) -> Tensor:
    """Sorted positions of the chosen training images, at least one of each class."""
    generator = np.random.default_rng(DRAW_SEED)
    chosen = []
    for label in labels.unique():
        members = np.flatnonzero((labels == label).numpy())
        chosen.append(generator.permutation(members)[: max(1, round(share * len(members)))])
    return torch.from_numpy(np.sort(np.concatenate(chosen)))


def spec_of(params: Params, training: Training) -> StudentSpec:
    """Architecture and losses of a student: the architecture is the largest for the point's budget."""
    paths, section = Paths(params.experiment), params.distill
    images = ImageSpec.of(read_json(paths.dataset_info, DatasetInfo))
    images = images._replace(n_classes=number_of_classes(images.n_classes, training.point.classes))
    filters = _filters(params, training) if training.network else None
    device = training.device or params.budgets_of(str(training.network))[training.student]
    budget = _scaled(device, training.point.budget)
    architecture, _ = design_student(params.design, budget, images, len(filters) if filters else None)
    return StudentSpec(
        architecture=architecture,
        filters=filters,
        kd_weight=section.kd_weight,
        transfer_weight=section.transfer_weight if filters else 0.0,
    )


def _scaled(budget: Budget, factor: float) -> Budget:
    sizes = {name: getattr(budget, name) for name in ("memory_kib", "flash_kib", "ram_kib", "mmacs", "latency_ms")}
    return replace(budget, **{name: size * factor for name, size in sizes.items() if size is not None})


def _filters(params: Params, training: Training) -> list[int]:
    paths, signals = Paths(params.experiment), transfer_set_of(params).signals
    n = len(params.networks[str(training.network)].devices)
    sets = [load_filters(paths.partition(str(training.network), i), signals) for i in range(n)]
    if training.random:
        live = np.sort(np.concatenate(sets))
        sets = cut(np.random.default_rng(training.seed).permutation(live), [len(s) for s in sets])
    return sets[training.student]


def of_pipeline(params: Params, training: Training) -> tuple[str, Path] | None:
    """The job of the pipeline that trains the same student, and the file of its weights; None if there is none."""
    paths, point, seed = Paths(params.experiment), training.point, training.seed
    if (point.epochs, point.budget, point.images, point.classes) != (params.distill.epochs, 1, 1, 1):
        return None
    architecture = spec_of(params, training).architecture
    for network in [training.network] if training.network else params.networks:
        if training.network and not training.random:
            stage, weights, position = "distill", paths.student(network, training.student, seed), 0
        else:  # of a baseline all students are in one file
            method, position = "random" if training.random else "kd", training.student
            stage, weights = "baseline", paths.baseline(network, method, seed)
        design = paths.design(network, weights.stem)
        if weights.is_file() and design.is_file() and load_design(design)[position][0] == architecture:
            return f"{stage}@seed{seed}/{network}/{weights.stem}", weights
    return None


def train(params: Params, training: Training, weights: Path | None = None) -> Path:
    """Train a student unless that was done before; its file holds its head, and its features of all images, float16.

    The features of training, validation and test images, without augmentation, are (M, F) each. Nothing is trained if
    `weights` names those that the pipeline has trained.
    """
    training = training.same
    paths, point = Paths(params.experiment), training.point
    spec = spec_of(params, training)
    schedule = params.distill.model_copy(update={"epochs": point.epochs})
    own_seed = training.seed * 1000 + training.student  # as in the pipeline
    settings: list[Any] = [repr(spec), schedule.model_dump(), params.signals.model_dump(include=VIEW_KEYS)]
    settings += [own_seed, point.images, point.classes]
    checkpoint = Checkpoint.of(["map", *settings], [paths.dataset, paths.signals, Path(__file__)])
    target = STATE / "map" / checkpoint.path.name
    if target.is_file():
        return target
    transfer_set = transfer_set_of(params, point.images, point.classes)
    name = f"{training.network or 'kd'}/{training.student} seed {training.seed}, {point.epochs} epochs"
    if weights:
        student = _trained(weights, training, spec, transfer_set.data)
    else:
        student, _ = distill_student(transfer_set, spec, schedule, seed=own_seed, checkpoint=checkpoint, label=name)
    tensors = {"weight": student.head.weight, "bias": student.head.bias}
    for part in ("train", "validation", "test"):
        tensors[part] = predict(student, transfer_set.data.subset(part)[0], transfer_set.device)[0].half()
    write_tensors(target, {name: tensor.detach().cpu() for name, tensor in tensors.items()})
    checkpoint.discard()
    return target


def _trained(weights: Path, training: Training, spec: StudentSpec, data: Dataset) -> ConvNet:
    if training.random or not spec.filters:
        return load_baseline(weights, data)[training.student]
    student = ConvNet(spec.architecture, data.channels, data.n_classes, len(spec.filters))
    with intact(weights):
        student.load_state_dict(read_tensors(weights))
    return student.eval()


@dataclass(frozen=True)
class Joined:
    """Trained students side by side: their heads, and their features of each part of the data set."""

    heads: Sequence[nn.Linear]
    features: Mapping[str, Sequence[Tensor]]

    @classmethod
    def of(cls, files: Sequence[Path]) -> Joined:
        stored = [read_tensors(file) for file in files]
        heads = []
        for tensors in stored:
            head = nn.Linear(tensors["weight"].shape[1], tensors["weight"].shape[0])
            head.load_state_dict({"weight": tensors["weight"], "bias": tensors["bias"]})
            heads.append(head)
        parts = ("train", "validation", "test")
        return cls(heads, {part: [tensors[part].float() for tensors in stored] for part in parts})

    def averaged(self) -> FinalLayer:
        return averaged_layer(self.heads)

    def fitted(self, params: Params, data: Dataset, seed: int) -> FinalLayer:
        """The final layer as the stage `assemble` fits it."""
        labels = {part: data.labels[getattr(data, part)] for part in ("train", "validation")}
        validation = self.features["validation"], labels["validation"]
        return fit_layer(self.averaged(), self.features["train"], labels["train"], validation, params.assemble, seed)[0]

    @torch.no_grad()
    def probabilities(self) -> Tensor:
        """Mean of the students' own probabilities for the test images, (n_test, C)."""
        terms = [head(f).softmax(1) for head, f in zip(self.heads, self.features["test"], strict=True)]
        return torch.stack(terms).mean(0)


def kd_trainings(params: Params, point: Point, network: str, seed: int, n_per_seed: int) -> list[Training]:
    """The KD students that a network is compared with: one for each of its devices.

    A seed has `n_per_seed` of them, as many as the largest network needs; smaller networks take the first.
    """
    images = ImageSpec.of(read_json(Paths(params.experiment).dataset_info, DatasetInfo))
    budgets = params.budgets_of(network)
    device = smallest_device(params.design, budgets, images)
    return [Training(point, None, 0, seed * n_per_seed + i, device=device) for i in range(len(budgets))]


def score(
    params: Params, point: Point, network: str, seed: int, n_per_seed: int, random: bool
) -> dict[str, np.ndarray]:
    """Which test images each method answers rightly, bool (n_test,), with one seed; trains missing students first.

    `n_per_seed` as in `kd_trainings`; with `random`, also the network on a random partition.
    """
    torch.set_num_threads(1)
    n = len(params.networks[network].devices)
    data = transfer_set_of(params, point.images, point.classes).data
    labels = data.labels[data.test]

    def right(logits: Tensor) -> np.ndarray:
        return (logits.argmax(1) == labels).numpy()

    def students(name: str, by_chance: bool = False) -> Joined:
        return Joined.of([train(params, Training(point, name, i, seed, by_chance)) for i in range(n)])

    nonn = students(network)
    pool = Joined.of([train(params, kd) for kd in kd_trainings(params, point, network, seed, n_per_seed)])
    by_method = {
        "nonn": right(logits_of(nonn.fitted(params, data, seed), nonn.features["test"])),
        "nonn_averaged": right(logits_of(nonn.averaged(), nonn.features["test"])),
        "ensemble": right(pool.probabilities()),
        "ensemble_fitted": right(logits_of(pool.fitted(params, data, seed), pool.features["test"])),
    }
    if random:
        by_chance = students(network, by_chance=True)
        by_method["random"] = right(logits_of(by_chance.fitted(params, data, seed), by_chance.features["test"]))
    for i in range(n):
        by_method[f"kd.{i}"] = right(pool.heads[i](pool.features["test"][i]).detach())
    return by_method


def rows_of(params: Params, point: Point, network: str, by_seed: Sequence[Mapping[str, np.ndarray]]) -> Iterator[dict]:
    """Rows of a table for one point and network: each method against the fitted ensemble; see `paired_difference`."""
    names = [name for name in by_seed[0] if "." not in name]
    correct = {name: np.stack([found[name] for found in by_seed]) for name in names}
    correct["kd"] = np.stack([found[name] for found in by_seed for name in found if name.startswith("kd.")])
    reference = correct["ensemble_fitted"]
    for name, right in correct.items():
        means = right.mean(1)
        difference, error = paired_difference(right, reference)
        is_reference = name == "ensemble_fitted"
        compared: dict[str, Any] = (
            {}
            if is_reference
            else {
                "difference_vs_fitted_ensemble": difference,
                "ci_low": difference - error,
                "ci_high": difference + error,
                "p": permutation_test(right, reference, params.evaluate.resamples, params.evaluate.seed),
            }
        )
        yield {
            "factor": point.factor,
            "value": point.value,
            "network": network,
            "method": name,
            "n_seeds": len(right),
            "accuracy_mean": means.mean(),
            "accuracy_sd": sd(means),
            **compared,
        }
