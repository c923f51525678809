"""SplitNet, a rival: a network that is split by classes, one branch a device.

The classes are divided into as many groups as there are devices. All devices share the first stages, and each has a
branch of its own, which answers for the classes of its group alone. As no device waits for another, each runs the
shared stages itself, and they count in its budget.

*Deviations* from [1]_: there, which classes and which weights share a group is learned while a larger network trains,
which is split afterwards. Here, groups are of classes that are alike to the teacher and of equal size, and the network
is trained from the start, by distillation as all others are.

References
----------
.. [1] J. Kim, Y. Park, G. Kim and S. J. Hwang, "SplitNet: Learning to Semantically Split Deep Networks for Parameter
   Reduction and Model Parallelization", 2017, https://proceedings.mlr.press/v70/kim17b.html
.. [2] The authors' code, https://github.com/dalgu90/splitnet-wrn
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from nonn.core.errors import UserError
from nonn.core.params import Params
from nonn.data.dataset import Dataset
from nonn.method.partitioning import fill_sets
from nonn.method.sizing import apportion, design_student, smallest_device
from nonn.training.networks import ConvNet, whiten

#: Stages that all devices have in common, after the stem.
N_SHARED = 1


def group_classes(pooled: Tensor, labels: Tensor, n_classes: int, n_groups: int) -> list[list[int]]:
    """Divide the classes into groups of about one size, each of classes that are alike to the teacher.

    Alike are classes whose mean pooled activations, of images (N, F), correlate over the filters.
    """
    means = torch.stack([pooled[labels == class_].float().mean(0) for class_ in range(n_classes)])
    alike = torch.corrcoef((means - means.mean(0)) / means.std(0).clamp(min=1e-6)).double().numpy()
    np.fill_diagonal(alike, 0)
    return fill_sets([[class_] for class_ in range(n_classes)], apportion(n_classes, [1.0] * n_groups), alike)


class SplitNet(nn.Module):
    """The network while it is trained: the shared stages once, and all branches.

    `parts` are what the devices run: networks of equal shared stages, each with a head for its group of classes. They
    share the first one's from here on, so that what is trained here is what they have.
    """

    order: Tensor

    def __init__(self, parts: Sequence[ConvNet], groups: Sequence[Sequence[int]]):
        super().__init__()
        first = parts[0]
        for part in parts[1:]:
            part.normalize, part.stem = first.normalize, first.stem
            for number in range(N_SHARED):
                part.stages[number] = first.stages[number]
        self.mirrors, self.groups = first.mirrors, groups
        self.trunk = nn.Sequential(first.normalize, first.stem, *first.stages[:N_SHARED])
        self.branches = nn.ModuleList(nn.Sequential(*part.stages[N_SHARED:]) for part in parts)
        self.heads = nn.ModuleList(part.head for part in parts)
        order = torch.tensor([class_ for group in groups for class_ in group])
        self.register_buffer("order", order.argsort())

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features of all branches side by side, and logits (B, C), of uint8 images (B, channels, H, W)."""
        features, logits = self.once(images)
        if self.mirrors and not self.training:
            mirrored = self.once(images.flip(-1))
            features, logits = (features + mirrored[0]) / 2, (logits + mirrored[1]) / 2
        return features, logits

    def once(self, images: Tensor) -> tuple[Tensor, Tensor]:
        shared = self.trunk(images)
        features = [branch(shared).mean((2, 3)) for branch in self.branches]
        terms = [head(f) for head, f in zip(self.heads, features, strict=True)]
        return torch.cat(features, 1), torch.cat(terms, 1)[:, self.order]


def build(
    params: Params, network: str, data: Dataset, groups: Sequence[Sequence[int]]
) -> tuple[SplitNet, list[ConvNet]]:
    """A network for the devices of `network`, before training, and what each of them runs.

    All devices run the same architecture, since they share weights: the largest that fits the smallest device.
    """
    if len(groups) > data.n_classes or min(map(len, groups)) < 1:
        raise UserError(f"networks.{network}: {len(groups)} devices cannot share {data.n_classes} classes for SplitNet")
    budget = smallest_device(params.design, params.budgets_of(network), data.spec)
    images = data.spec._replace(n_classes=max(map(len, groups)))
    architecture, _ = design_student(params.design, budget, images, None)
    if len(architecture.widths or [0] * 3) <= N_SHARED:
        raise UserError(f"SplitNet shares {N_SHARED} stages, and students of {architecture.name} have no more")
    parts = [ConvNet(architecture, data.channels, len(group), mean=data.mean, std=data.std) for group in groups]
    whiten(parts[0], data.subset("train")[0])
    return SplitNet(parts, groups), parts


def join_logits(terms: Sequence[Tensor], groups: Sequence[Sequence[int]], missing: int | None = None) -> Tensor:
    """Logits (N, C) of all classes from those of each device (N, |C_g|); classes of a missing device get −∞."""
    logits = torch.full((len(terms[0]), sum(map(len, groups))), -torch.inf)
    for number, (term, group) in enumerate(zip(terms, groups, strict=True)):
        if number != missing:
            logits[:, group] = term
    return logits
