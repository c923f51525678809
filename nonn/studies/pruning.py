"""The teacher itself, pruned to the budget of one device: a rival of the students designed for that device.

Filters of least L1 norm are taken out, the same share of each layer, at once [1]_; what is left is fine-tuned by the
caller. torch-pruning finds which filters depend on each other.

References
----------
.. [1] H. Li, A. Kadav, I. Durdanovic, H. Samet and H. P. Graf, "Pruning Filters for Efficient ConvNets", 2016,
   https://arxiv.org/abs/1608.08710
"""

from __future__ import annotations

import torch
from torch import nn

from nonn.core.budgets import Budget
from nonn.core.errors import UserError
from nonn.core.params import Precision
from nonn.data.dataset import Dataset
from nonn.deploy.traced_cost import measure_cost
from nonn.training.networks import ConvNet, single_pass

#: Shares of the filters that are tried: the finest step is below one filter of any layer here.
N_SHARES = 1000


def prunable(model: ConvNet) -> list[nn.Conv2d]:
    """Layers that filters can be taken from; not a first layer that whitens, whose filters are not trained."""
    return [layer for layer in model.modules() if isinstance(layer, nn.Conv2d) and layer.weight.requires_grad]


def prune(teacher: ConvNet, share: float, data: Dataset) -> ConvNet:
    """A copy of the teacher without the given share of the filters of each layer."""
    import torch_pruning

    model = single_pass(teacher).train(False)
    free = set(prunable(model))
    kept = [layer for layer in model.modules() if isinstance(layer, nn.Conv2d | nn.Linear) and layer not in free]
    importance = torch_pruning.importance.GroupMagnitudeImportance(
        p=1, group_reduction="first", target_types=[nn.Conv2d]
    )
    example = torch.zeros(1, data.channels, data.size, data.size)
    pruner = torch_pruning.pruner.BasePruner(model, example, importance, pruning_ratio=share, ignored_layers=kept)
    pruner.step()
    model.mirrors, model.n_features = teacher.mirrors, model.head.in_features
    return model


def prune_to_budget(teacher: ConvNet, budget: Budget, data: Dataset, precision: Precision) -> tuple[ConvNet, float]:
    """The teacher with the least share of its filters taken out that fits, and that share."""

    def fits(step: int) -> bool:
        model = prune(teacher, step / N_SHARES, data)
        return budget.fits(measure_cost(model, data.channels, data.size, precision))

    if teacher.family == "resnet":
        raise UserError("a teacher of family resnet cannot be pruned: its shortcuts pad by a fixed number of channels")
    # One filter of the narrowest layer is left at least: torch-pruning leaves a layer as it is that would lose all.
    narrowest = min(layer.out_channels for layer in prunable(teacher))
    few, many = 0, int((1 - 1 / narrowest) * N_SHARES)
    if not fits(many):
        raise UserError(
            f"device {budget.name!r}: not even a teacher with 1 of {narrowest} filters fits; give more memory"
        )
    while many - few > 1:
        middle = (few + many) // 2
        few, many = (few, middle) if fits(middle) else (middle, many)
    return prune(teacher, many / N_SHARES, data), many / N_SHARES
