"""SplitNet, a rival: a network that is split by classes, one branch a device.

The classes are divided into as many groups as there are devices. All devices have the first stages in common, and each
goes on with a branch of its own, which answers for the classes of its group alone. As no device waits for another, each
runs the shared stages itself, and they count in its budget.

*Deviations* from [1]_: the groups are learned on the teacher's features, not while the network trains, and made equal
in size; the network starts at random, not as the split of a larger one, and learns by distillation as all others do.

References
----------
.. [1] J. Kim, Y. Park, G. Kim and S. J. Hwang, "SplitNet: Learning to Semantically Split Deep Networks for Parameter
   Reduction and Model Parallelization", 2017, https://proceedings.mlr.press/v70/kim17b.html
.. [2] The authors' code, https://github.com/dalgu90/splitnet-wrn
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from nonn.core.errors import UserError
from nonn.core.params import Params
from nonn.data.dataset import Dataset
from nonn.method.sizing import apportion, design_student, smallest_device
from nonn.training.networks import ConvNet, whiten

#: Stages that all devices have in common, after the stem.
N_SHARED = 1
#: Of the search for groups: steps of Adam, its learning rate, the images it looks at, and the weight of each term of
#: the regularisation, which are scaled to 1 for groups that share everything alike.
STEPS, LR, N_IMAGES = 400, 0.02, 4000
SPLIT, OVERLAP, BALANCE = 1.0, 1.0, 1.0


def learn_groups(pooled: Tensor, labels: Tensor, n_classes: int, n_groups: int, seed: int) -> list[list[int]]:
    """Divide the classes into groups of about one size that need the least of each other's filters.

    Of [1]_, section 3: a linear classifier W of the teacher's pooled activations (N, F) is fitted together with soft
    assignments of filters (P) and classes (Q) to groups. Weights between a filter and a class of different groups cost
    by a group lasso, assignments to several groups by their overlap, and groups of unequal size by their squares.
    """
    kept = torch.linspace(0, len(pooled) - 1, min(N_IMAGES, len(pooled))).long()
    features, labels = pooled[kept].float(), labels[kept]
    features = (features - features.mean(0)) / features.std(0).clamp(min=1e-6)
    generator = torch.Generator().manual_seed(seed)
    shapes = (features.shape[1], n_classes), (features.shape[1], n_groups), (n_classes, n_groups)
    weight, of_filters, of_classes = (0.1 * torch.randn(shape, generator=generator) for shape in shapes)
    optimizer = torch.optim.Adam([p.requires_grad_() for p in (weight, of_filters, of_classes)], lr=LR, fused=True)
    for _ in range(STEPS):
        p, q = of_filters.softmax(1), of_classes.softmax(1)
        loss = F.cross_entropy(features @ weight, labels) + regularisation(weight, p, q)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    sizes = apportion(n_classes, [1.0] * n_groups)
    slots = [group for group, size in enumerate(sizes) for _ in range(size)]
    wanted = of_classes.detach().log_softmax(1)[:, slots]
    classes, taken = linear_sum_assignment(wanted.numpy(), maximize=True)
    groups: list[list[int]] = [[] for _ in sizes]
    for class_, slot in zip(classes.tolist(), taken.tolist(), strict=True):
        groups[slots[slot]].append(class_)
    return groups


def regularisation(weight: Tensor, p: Tensor, q: Tensor) -> Tensor:
    """R_W, R_D and R_E of [1]_, weighted: of weights (F, C), and assignments of filters (F, G) and classes (C, G)."""
    squares, n_groups = weight.square(), p.shape[1]
    rows = ((1 - p) * (squares @ q.square() + 1e-12).sqrt()).sum() / (1 - 1 / n_groups)
    columns = ((1 - q) * (squares.T @ p.square() + 1e-12).sqrt()).sum() / (1 - 1 / n_groups)
    split = rows / (squares.sum(1) + 1e-12).sqrt().sum() + columns / (squares.sum(0) + 1e-12).sqrt().sum()
    overlap = sum((1 - of.square().sum(1)).mean() / (1 - 1 / n_groups) for of in (p, q))
    balance = sum(n_groups * of.mean(0).square().sum() for of in (p, q))
    return (SPLIT * split + OVERLAP * overlap + BALANCE * balance) / 2


class SplitNet(nn.Module):
    """The network while it is trained: the shared stages once, and all branches.

    `parts` are what the devices run: networks of equal shared stages, each with a head for its group of classes. They
    share the first one's from here on, so that what is trained here is what they have.
    """

    order: Tensor

    def __init__(self, parts: Sequence[ConvNet], groups: Sequence[Sequence[int]], n_shared: int = N_SHARED):
        super().__init__()
        first = parts[0]
        for part in parts[1:]:
            part.normalize, part.stem = first.normalize, first.stem
            part.stages[:n_shared] = first.stages[:n_shared]
        self.mirrors, self.groups = first.mirrors, groups
        self.trunk = nn.Sequential(first.normalize, first.stem, *first.stages[:n_shared])
        self.branches = nn.ModuleList(nn.Sequential(*part.stages[n_shared:]) for part in parts)
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
    params: Params, network: str, data: Dataset, info: dict[str, Any], groups: Sequence[Sequence[int]]
) -> tuple[SplitNet, list[ConvNet]]:
    """A network for the devices of `network`, before training, and what each of them runs.

    All devices run the same architecture, since they share weights: the largest that fits the smallest device.
    """
    if len(groups) > data.n_classes or min(map(len, groups)) < 1:
        raise UserError(f"networks.{network}: {len(groups)} devices cannot share {data.n_classes} classes for SplitNet")
    budget = smallest_device(params.design, params.budgets_of(network), info)
    most = max(map(len, groups))
    architecture, _ = design_student(params.design, budget, {**info, "classes": info["classes"][:most]}, None)
    if len(architecture.widths or [0] * 3) <= N_SHARED:
        raise UserError(f"SplitNet shares {N_SHARED} stages, and students of {architecture.name} have no more")
    parts = [ConvNet(architecture, data.channels, len(group), mean=data.mean, std=data.std) for group in groups]
    whiten(parts[0], data.part("train")[0])
    return SplitNet(parts, groups), parts


def join_logits(terms: Sequence[Tensor], groups: Sequence[Sequence[int]], missing: int | None = None) -> Tensor:
    """Logits (N, C) of all classes from those of each device (N, |C_g|); classes of a missing device get −∞."""
    logits = torch.full((len(terms[0]), sum(map(len, groups))), -torch.inf)
    for number, (term, group) in enumerate(zip(terms, groups, strict=True)):
        if number != missing:
            logits[:, group] = term
    return logits
