"""Knowledge distillation: training one student of a network, with one seed, against the teacher's signals.

Each job is independent of all others: it knows its architecture, its filters and its seed. The student's head serves in
training and as the start of the final layer; only the feature vector leaves the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from nonn.core.architecture import Architecture
from nonn.core.errors import UserError
from nonn.core.params import DistillParams, SignalsParams
from nonn.data.dataset import Dataset
from nonn.training.augment import View, apply_view, draw_view
from nonn.training.checkpoint import Checkpoint
from nonn.training.hardware import mixed_precision, pick_device, resident
from nonn.training.loop import Log, train
from nonn.training.losses import attention_loss, kd_loss, transfer_loss
from nonn.training.networks import ConvNet, whiten

#: Of the parameters `signals`, those that decide how a training sees its images; ``dvc.yaml`` names the same.
VIEW_KEYS = {"augment", "seed", "views"}


@dataclass(frozen=True)
class StudentSpec:
    """What a student is and learns: its architecture, its filters, and the weight of each term of its loss."""

    architecture: Architecture
    filters: list[int] | None  # the teacher's P_i to imitate through a bridge; None for no bridge
    kd_weight: float  # w: share of the KD term; cross-entropy with the labels has the rest
    transfer_weight: float = 0.0  # β: of the activation transfer
    attention_weight: float = 0.0  # of attention transfer (a baseline)


class TransferSet:
    """Training images and the teacher's signals, view by view, shared by the students of a job.

    The term is from https://arxiv.org/abs/1503.02531. `signals` are those of all images that the teacher saw. If `data`
    has only some of these for training, `kept` holds their positions, since students have to see each image as the
    teacher did.
    """

    def __init__(self, data: Dataset, signals: dict[str, Tensor], params: SignalsParams, kept: Tensor | None = None):
        self.data, self.params, self.kept, self.device = data, params, kept, pick_device()
        stored, labels = data.subset("train")
        self.images, self.storage = resident(stored, self.device)
        self.labels = labels.to(self.storage)
        self.signals = signals
        self.stages = [name for name in sorted(signals) if name.startswith("attention.")]
        self._view = lru_cache(maxsize=1)(self.view)  # an epoch sees one view

    def view(self, epoch: int) -> tuple[int, View]:
        """Number and crops of the view that an epoch sees: the K views take turns."""
        number = epoch % self.params.views
        n_drawn = len(self.images) if self.kept is None else self.signals["logits"].shape[1]
        view = draw_view(n_drawn, number, self.params.augment, self.params.seed)
        return number, (view if self.kept is None else view.of(self.kept)).to(self.storage)

    def signals_for(self, spec: StudentSpec) -> dict[str, Tensor]:
        """The signals in a student's loss, by name; of the pooled activations, only those of its filters."""
        signals = {}
        if spec.kd_weight:
            signals["logits"] = self.signals["logits"]
        if spec.transfer_weight:
            signals["pooled"] = self.signals["pooled"][..., spec.filters]
        if spec.attention_weight:
            signals |= {name: self.signals[name] for name in self.stages}
        if self.kept is not None:
            signals = {name: signal[:, self.kept] for name, signal in signals.items()}
        return {name: signal.to(self.storage) for name, signal in signals.items()}

    def batch(self, index: Tensor, epoch: int, signals: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Images (B, channels, H, W) as an epoch sees them, and their labels (B,) and `signals` (K, N, …)."""
        number, view = self._view(epoch)
        index = index.to(self.storage)
        images = apply_view(self.images, view, index, self.params.augment)
        parts = (images, self.labels[index], *(signal[number][index] for signal in signals))
        return tuple(part.to(self.device) for part in parts)


def distill_student(
    transfer_set: TransferSet,
    spec: StudentSpec,
    schedule: DistillParams,
    *,
    seed: int,
    checkpoint: Checkpoint,
    label: str,
) -> tuple[ConvNet, Log]:
    """Train one student; return it with its log, one row an epoch.

    The loss of a batch is, with z the logits, f the feature vector, t the teacher's pooled activations on the student's
    filters and T the temperature,

        L = (1−w)·CE(z, y) + w·T²·KL(softmax(z_t/T) ‖ softmax(z/T)) + β·‖f/‖f‖ − t/‖t‖‖².

    After the loss of https://arxiv.org/abs/1907.11804, section 4. *Deviations* from the authors' later code,
    https://github.com/SLDGroup/NoNN_framework: each student is trained alone and has a head of its own, where theirs
    are trained together by the logits of one layer over all features; so the transfer normalises each student's
    vector, not that of all side by side. Students share no layers, the divergence is a sum over classes, and the last
    epoch is kept, not the one that is best on test images. `seed` decides the initial weights and the order of the
    images.
    """
    torch.manual_seed(seed)
    data, device = transfer_set.data, transfer_set.device
    n_filters = len(spec.filters) if spec.filters else None
    student = ConvNet(spec.architecture, data.channels, data.n_classes, n_filters, mean=data.mean, std=data.std)
    whiten(student, data.subset("train")[0])
    student_signals = transfer_set.signals_for(spec)

    def batch_of(index: Tensor, epoch: int) -> tuple[Tensor, ...]:
        return transfer_set.batch(index, epoch, list(student_signals.values()))

    def loss_of(images: Tensor, labels: Tensor, *signals: Tensor) -> Tensor:
        teacher_signals = dict(zip(student_signals, (signal.float() for signal in signals), strict=True))
        with mixed_precision(device):
            maps = student.stage_maps(images)
            features, logits = student.read_out(maps[-1])
        logits = logits.float()
        loss = (1 - spec.kd_weight) * F.cross_entropy(logits, labels)
        if spec.kd_weight:
            loss = loss + spec.kd_weight * kd_loss(logits, teacher_signals["logits"], schedule.temperature)
        if spec.transfer_weight:
            loss = loss + spec.transfer_weight * transfer_loss(features.float(), teacher_signals["pooled"])
        if spec.attention_weight:
            # Stages that differ in size cannot be compared; those that both have are.
            attention = {teacher_signals[name].shape[1]: teacher_signals[name] for name in transfer_set.stages}
            shared = [(m.float(), attention[m[0, 0].numel()]) for m in maps if m[0, 0].numel() in attention]
            if not shared:
                raise UserError(
                    "params.yaml: the baseline at_kd: no stage of the student has the size of one of the teacher's; "
                    "set dataset.size to a multiple of 4, or remove at_kd."
                )
            loss = loss + spec.attention_weight * attention_loss(*zip(*shared, strict=True))
        return loss

    log = train(
        student,
        batch_of,
        loss_of,
        len(transfer_set.images),
        schedule,
        seed=seed,
        validation=data.subset("validation"),
        checkpoint=checkpoint,
        device=device,
        label=label,
        section="distill",
    )
    return student, log
