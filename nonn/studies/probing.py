"""Linear probes of the teacher's features: what a perfect student of a set of filters could know, without any training.

A linear classifier is fitted to the features of each set of a partition alone, and one to all sets side by side, as the
final layer of a NoNN is. For the latter, each set is scaled to unit length, image by image, since the activation
transfer compares directions and not lengths. Without that, all sets together would be all filters, whatever the
partition. All are fitted on training images and scored on others.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nonn.core.errors import UserError
from nonn.core.params import EvaluateParams, Params
from nonn.core.paths import Paths
from nonn.core.progress import track
from nonn.data.dataset import load_dataset, load_teacher_dataset
from nonn.method.filter_graph import FilterGraph, load_graph
from nonn.method.partitioning import partition_filters
from nonn.method.scoring import paired_difference, permutation_test
from nonn.method.sizing import apportion
from nonn.teachers.loading import load_teacher
from nonn.teachers.signals import BATCH_SIZE, signals_of
from nonn.training.loading import load_signals
from nonn.training.networks import accuracy, concatenated, scaled_batch_size

#: Ways to share out the filters; the others are compared with the first.
METHODS = ("random", "communities", "classwise", "contiguous")
#: Numbers of sets that the filters are divided into, from one student with all filters to sets of a few.
SETS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 48)
#: Random partitions of each size.
N_RANDOM = 3
#: Weight of ‖W‖² / 2 in the loss of a probe, of features of variance 1.
WEIGHT_DECAY = 1e-4
#: Of L-BFGS; more iterations change no accuracy by a tenth of a point.
ITERATIONS = 60
HISTORY = 10


class Probes(NamedTuple):
    """Linear classifiers of S independent problems."""

    weight: Tensor  # (S, F, C)
    bias: Tensor  # (S, 1, C)

    def right(self, features: Tensor, labels: Tensor) -> np.ndarray:
        """Which images each answers rightly, bool (S, N), of features (S, N, F) or (N, F)."""
        return ((features @ self.weight + self.bias).argmax(-1) == labels).numpy()


def fit_linear(features: Tensor, labels: Tensor, n_classes: int, weight_decay: float = WEIGHT_DECAY) -> Probes:
    """The linear classifiers of least cross-entropy on features (S, N, F), each problem on its own, by L-BFGS.

    `labels` are (N,) for all problems, or (S, N). Features are scaled to mean 0 and variance 1 inside; `weight_decay`
    is that of the weights of scaled ones. A feature of one value gets no weight.
    """
    mean, std = features.mean(1, keepdim=True), features.std(1, keepdim=True, correction=0)
    scale = torch.where(std > 0, std, 1.0).reciprocal()
    scaled = (features - mean) * scale
    n_sets, n_images, n_features = features.shape
    labels = labels.expand(n_sets, n_images).flatten()
    weight = torch.zeros(n_sets, n_features, n_classes, requires_grad=True)
    bias = torch.zeros(n_sets, 1, n_classes, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=ITERATIONS, history_size=HISTORY, line_search_fn="strong_wolfe"
    )

    def loss_of() -> Tensor:
        optimizer.zero_grad()
        logits = torch.baddbmm(bias, scaled, weight).flatten(0, 1)
        loss = n_sets * F.cross_entropy(logits, labels) + weight_decay / 2 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(loss_of)
    with torch.no_grad():
        weight = weight * scale.mT
        return Probes(weight, bias - mean @ weight)


def restricted(pooled: Tensor, sets: Sequence[Sequence[int]]) -> list[Tensor]:
    """Features (N, F_i) of each set of filters, of pooled activations (N, F)."""
    return [pooled[:, filters].float() for filters in sets]


def probe_partition(
    sets: Sequence[Sequence[int]], train: tuple[Tensor, Tensor], judged: tuple[Tensor, Tensor], n_classes: int
) -> tuple[np.ndarray, np.ndarray]:
    """Which images of `judged` the students of these sets answer rightly: alone, bool (n_sets, N), and joined, (N,).

    Both data sets are pooled activations of all filters, and labels.
    """
    features, others = restricted(train[0], sets), restricted(judged[0], sets)
    alone = fit_linear(_side_by_side(features), train[1], n_classes).right(_side_by_side(others), judged[1])
    joined, others_joined = (torch.cat([F.normalize(part, dim=1) for part in parts], 1) for parts in (features, others))
    return alone, fit_linear(joined[None], train[1], n_classes).right(others_joined, judged[1])[0]


def _side_by_side(features: Sequence[Tensor]) -> Tensor:
    """Features (N, F_i) of S students as one tensor (S, N, F), with zeros where a set has fewer filters."""
    most = max(f.shape[1] for f in features)
    return torch.stack([F.pad(f, (0, most - f.shape[1])) for f in features])


def draw_partition(graph: FilterGraph, n_sets: int, method: str, seed: int) -> list[list[int]]:
    """The live filters in so many sets, as alike in size as they can be."""
    sizes = apportion(int(graph.live.sum()), [1.0] * n_sets)
    return partition_filters(graph.weights, graph.live, sizes, method, seed, graph.class_activity).sets


def probe_all(
    graph: FilterGraph,
    train: tuple[Tensor, Tensor],
    judged: tuple[Tensor, Tensor],
    jobs: Sequence[tuple[int, str, int]],
) -> Iterator[tuple[tuple[int, str, int], tuple[np.ndarray, np.ndarray]]]:
    """Each job, of a number of sets, a method and a seed, with what `probe_partition` finds."""
    n_classes = len(graph.class_activity)
    for job in jobs:
        yield job, probe_partition(draw_partition(graph, *job), train, judged, n_classes)


def rows_of(
    found: Mapping[tuple[int, str, int], tuple[np.ndarray, np.ndarray]], n_live: int, params: EvaluateParams
) -> Iterator[dict[str, Any]]:
    """Rows of a table, one a number of sets and method: accuracies alone and joined, each against random sets.

    Differences as `paired_difference`, over sets and seeds.
    """
    for n_sets, method in dict.fromkeys((n, method) for n, method, _ in found):
        own, reference = (
            {name: _stacked(found, n_sets, which, number) for number, name in enumerate(("alone", "joined"))}
            for which in (method, METHODS[0])
        )
        row: dict[str, Any] = {"sets": n_sets, "filters": round(n_live / n_sets, 1), "method": method}
        row["seeds"] = len(own["joined"])
        for name, answers in own.items():
            accuracies = answers.mean(1)
            row |= {f"{name}_mean": accuracies.mean(), f"{name}_worst": accuracies.min()}
            if method != METHODS[0]:
                difference, error = paired_difference(answers, reference[name])
                row |= {f"{name}_vs_random": difference, f"{name}_error": error}
                row[f"{name}_p"] = permutation_test(answers, reference[name], params.resamples, params.seed)
        yield row


def _stacked(found: Mapping[tuple[int, str, int], Any], n_sets: int, method: str, number: int) -> np.ndarray:
    """Right answers of all seeds of a method, alone (0) or joined (1), (answers, N)."""
    return np.concatenate([np.atleast_2d(f[number]) for (n, m, _), f in found.items() if (n, m) == (n_sets, method)])


def measure_probes(
    params: Params, paths: Paths, sets: list[int] | None, n_images: int, on: str
) -> tuple[list[dict], int]:
    """Rows of the table, and the number of classes. None stands for all numbers of `SETS` that the filters allow."""
    torch.set_num_threads(1)
    data, graph = load_dataset(paths), load_graph(paths)
    signals = load_signals(paths, data)
    kept = torch.linspace(0, len(data.train) - 1, min(n_images, len(data.train))).long()
    train = signals["pooled"][0, kept], data.labels[data.train[kept]]
    judged, logits = _judged(paths, signals, on)
    labels = data.labels[getattr(data, on)]
    n_live = int(graph.live.sum())
    if sets and max(sets) > n_live:
        raise UserError(f"--sets {max(sets)}: the teacher has {n_live} live filters; give numbers up to that")
    jobs = [
        (n, method, seed)
        for n in dict.fromkeys(sets or [n for n in SETS if n <= n_live])
        for method in METHODS[: 1 if n == 1 else None]
        for seed in range(N_RANDOM if method == "random" and n > 1 else 1)
    ]
    probed = dict(track(probe_all(graph, train, (judged, labels), jobs), "probes", total=len(jobs)))
    shared = {"experiment": params.experiment, "judged_on": on, "images": len(labels), "training_images": len(kept)}
    shared["teacher"] = accuracy(logits, labels)
    return [shared | row for row in rows_of(probed, n_live, params.evaluate)], data.n_classes


def _judged(paths: Paths, signals: dict[str, Tensor], on: str) -> tuple[Tensor, Tensor]:
    """The teacher's pooled activations and logits of the images that probes are tested on."""
    if on == "validation":
        return signals["validation_pooled"], signals["validation_logits"].float()
    data = load_teacher_dataset(paths)
    teacher, images = load_teacher(paths), data.subset(on)[0]
    size = scaled_batch_size(BATCH_SIZE, data.size)
    batches = track(images.split(size), "teacher", total=-(-len(images) // size))
    answers = concatenated((signals_of(teacher, batch, attention=False) for batch in batches), len(images))
    return answers["pooled"], answers["logits"].float()
