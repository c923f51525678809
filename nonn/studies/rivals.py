"""Rivals of a NoNN on the same devices that are not made of students: SplitNet, and the pruned teacher.

Both learn by distillation from the same signals, for as many epochs, with the same schedule as the students, and are
scored in the precision of the devices.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nonn.core.errors import UserError
from nonn.core.files import STATE
from nonn.core.params import Params
from nonn.core.paths import Paths
from nonn.data.tensors import read_tensors, write_tensors
from nonn.deploy.traced_cost import measure_cost
from nonn.method.final_layer import logits_of
from nonn.method.joining import FeatureCache
from nonn.method.loading import load_network
from nonn.method.scoring import permutation_test, sd
from nonn.method.sizing import smallest_device
from nonn.studies import pruning, splitnet
from nonn.studies.factor_map import transfer_set_of
from nonn.studies.pruning import prune_to_budget
from nonn.studies.splitnet import build, group_classes, join_logits
from nonn.teachers.loading import load_teacher
from nonn.training.checkpoint import Checkpoint
from nonn.training.distillation import VIEW_KEYS, TransferSet
from nonn.training.hardware import mixed_precision
from nonn.training.loop import train
from nonn.training.losses import kd_loss
from nonn.training.networks import ConvNet


@dataclass(frozen=True)
class Rival:
    """A trained rival: what each device runs, the classes that each answers for, and a line on how it was made."""

    parts: Sequence[ConvNet]
    groups: Sequence[Sequence[int]]
    note: str


def train_rival(params: Params, network: str, method: str, seed: int) -> Rival:
    """Train a rival unless that was done before; its weights are kept under ``.nonn/rivals``."""
    paths = Paths(params.experiment)
    transfer_set = transfer_set_of(params)
    torch.manual_seed(seed)
    model, rival = (_splitnet if method == "splitnet" else _pruned)(params, network, transfer_set)
    settings = [method, network, seed, str(model), rival.note]
    settings += [params.distill.model_dump(), params.signals.model_dump(include=VIEW_KEYS)]
    code = [Path(file) for file in (__file__, pruning.__file__, splitnet.__file__)]
    checkpoint = Checkpoint.of(["rivals", *settings], [paths.dataset, paths.signals, paths.teacher, *code])
    target = STATE / "rivals" / checkpoint.path.name
    if target.is_file():
        model.load_state_dict(read_tensors(target))
    else:
        distill(model, params, transfer_set, seed, checkpoint, f"{network}/{method} seed {seed}")
        write_tensors(target, model.state_dict())
        checkpoint.discard()
    for part in rival.parts:
        part.eval()
    return rival


def _splitnet(params: Params, network: str, transfer_set: TransferSet) -> tuple[nn.Module, Rival]:
    data, n = transfer_set.data, len(params.networks[network].devices)
    if n > data.n_classes:
        raise UserError(
            f"networks.{network}: {n} devices cannot share {data.n_classes} classes; SplitNet needs one each"
        )
    labels = data.labels[data.train]
    groups = group_classes(transfer_set.signals["pooled"][0], labels, data.n_classes, n)
    model, parts = build(params, network, data, groups)
    named = " | ".join(" ".join(data.classes[class_] for class_ in group) for group in groups)
    return model, Rival(parts, groups, named)


def _pruned(params: Params, network: str, transfer_set: TransferSet) -> tuple[nn.Module, Rival]:
    data, teacher = transfer_set.data, load_teacher(Paths(params.experiment))
    if not isinstance(teacher, ConvNet) or params.image_sizes.teacher != data.size:
        raise UserError(
            "the teacher is not of a family of this project, or sees images of another size; leave out pruned"
        )
    budget = smallest_device(params.design, params.budgets_of(network), data.spec)
    model, share = prune_to_budget(teacher, budget, data, params.design.precision)
    return model, Rival([model], [range(data.n_classes)], f"{share:.1%} of the filters of each layer taken out")


def distill(
    model: nn.Module, params: Params, transfer_set: TransferSet, seed: int, checkpoint: Checkpoint, label: str
) -> None:
    """Train a network in place by the students' loss without transfer: cross-entropy, and KD from the signals."""
    section = params.distill
    signals = [transfer_set.signals["logits"].to(transfer_set.storage)]

    def batch_of(index: Tensor, epoch: int) -> tuple[Tensor, ...]:
        return transfer_set.batch(index, epoch, signals)

    def loss_of(images: Tensor, labels: Tensor, teacher_logits: Tensor) -> Tensor:
        with mixed_precision(transfer_set.device):
            _, logits = model(images)
        logits = logits.float()
        loss = (1 - section.kd_weight) * F.cross_entropy(logits, labels)
        return loss + section.kd_weight * kd_loss(logits, teacher_logits.float(), section.temperature)

    train(
        model,  # type: ignore[arg-type]  # the loop asks for no more than a module has
        batch_of,
        loss_of,
        len(transfer_set.images),
        section,
        seed=seed,
        validation=transfer_set.data.subset("validation"),
        checkpoint=checkpoint,
        device=transfer_set.device,
        label=label,
        section="distill",
    )


@torch.no_grad()
def score(rival: Rival, features: FeatureCache) -> dict[str, Any]:
    """Right answers on the test images, bool (N,), and the mean accuracy with one device missing, None for one."""
    outputs, labels = features(rival.parts, "test")
    terms = [part.head(f) for part, f in zip(rival.parts, outputs, strict=True)]
    right = (join_logits(terms, rival.groups).argmax(1) == labels).numpy()
    without = [
        (join_logits(terms, rival.groups, missing).argmax(1) == labels).double().mean().item()
        for missing in range(len(terms))
    ]
    return {"right": right, "one_missing": float(np.mean(without)) if len(terms) > 1 else None}


def nonn_right(params: Params, paths: Paths, network: str, features: FeatureCache) -> np.ndarray | None:
    """Right answers of the assembled NoNN, bool (n_seeds, N); None where the stage `assemble` has not run."""
    files = [paths.network(network, seed) for seed in range(params.networks[network].seeds)]
    if not all(file.is_file() for file in files):
        return None
    by_seed = []
    for file in files:
        model = load_network(file, features.data)
        outputs, labels = features(list(model.students), "test")
        by_seed.append((logits_of(model.final, outputs).argmax(1) == labels).numpy())
    return np.stack(by_seed)


def rows_of(params: Params, network: str, methods: Sequence[str], n_seeds: int) -> Iterator[Mapping[str, Any]]:
    """Rows of a table: NoNN where there is one, and each rival, with a paired permutation test against NoNN."""
    paths = Paths(params.experiment)
    data = transfer_set_of(params).data
    features = FeatureCache(data, params.design.precision)
    reference = nonn_right(params, paths, network, features)
    if reference is not None:
        yield {"network": network, "method": "nonn", **_accuracy(reference)}
    for method in methods:
        rivals = [train_rival(params, network, method, seed) for seed in range(n_seeds)]
        scores = [score(rival, features) for rival in rivals]
        right = np.stack([scored["right"] for scored in scores])
        parts, groups = rivals[0].parts, rivals[0].groups
        costs = [measure_cost(part, data.channels, data.size, params.design.precision) for part in parts]
        missing = [scored["one_missing"] for scored in scores if scored["one_missing"] is not None]
        p = None
        if reference is not None:
            p = permutation_test(right, reference, params.evaluate.resamples, params.evaluate.seed)
        yield {
            "network": network,
            "method": method,
            **_accuracy(right),
            "p_vs_nonn": p,
            "one_missing": float(np.mean(missing)) if missing else None,
            "memory_kib": max(cost.memory_bytes for cost in costs) / 1024,
            "params": max(cost.params for cost in costs),
            "mmacs": max(cost.macs for cost in costs) / 1e6,
            "bytes_sent": 4 * max(map(len, groups)),
            "note": rivals[0].note,
        }


def _accuracy(right: np.ndarray) -> dict[str, Any]:
    means = right.mean(1)
    return {"n_seeds": len(right), "accuracy_mean": float(means.mean()), "accuracy_sd": sd(means)}
