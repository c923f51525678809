"""Selecting the images of a batch that a large network learns from: those that a small one finds hardest."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nonn.core.training_params import ScheduleParams
from nonn.training.hardware import mixed_precision
from nonn.training.networks import ConvNet
from nonn.training.optim import make_optimizers

#: The proxy learns from every fourth batch, and only judges the others: that takes a third of the time.
LEARNS_EVERY = 4


class Proxy(nn.Module):
    """A small network, trained beside a large one, that selects what the large one learns from.

    After airbench96_faster of https://github.com/KellerJordan/cifar10-airbench, where a network that learns from the
    hardest half of each batch reaches 96 % with 3.1 instead of 7.2 PFLOP. The schedule is that of the large network:
    `nonn.training.loop.train` sets the learning rates of both. `keep`, in (0, 1], is the share of a batch that is
    selected.
    """

    n_batches: Tensor

    def __init__(self, network: ConvNet, schedule: ScheduleParams, keep: float, label_smoothing: float):
        super().__init__()
        self.network, self.keep, self.label_smoothing = network, keep, label_smoothing
        self.optimizers = make_optimizers(network, schedule)
        # A buffer, so that a resumed training goes on with the same batch.
        self.register_buffer("n_batches", torch.zeros((), dtype=torch.int64))

    def hardest(self, images: Tensor, labels: Tensor) -> Tensor:
        """Judge a batch of uint8 images (B, channels, H, W), and now and then learn from what was selected.

        Returns the positions in the batch of the keep · B hardest, in order, int64.
        """
        learns = bool(self.n_batches % LEARNS_EVERY == 0)
        self.n_batches += 1
        self.network.train()
        with torch.set_grad_enabled(learns):
            with mixed_precision(images.device):
                _, logits = self.network(images)
            losses = F.cross_entropy(logits.float(), labels, label_smoothing=self.label_smoothing, reduction="none")
        hardest = losses.detach().topk(max(1, round(self.keep * len(losses)))).indices.sort().values
        if learns:
            self.network.zero_grad()
            losses[hardest].mean().backward()
            for optimizer in self.optimizers:
                optimizer.step()
        return hardest
