"""The losses of distillation, each a plain function of a batch.

Shapes: B images, C classes, F features.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def kd_loss(logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """T² · KL(softmax(z_t/T) ‖ softmax(z/T)) of logits (B, C), mean over the batch; zero when student equals teacher.

    Hinton et al., *Distilling the Knowledge in a Neural Network*, https://arxiv.org/abs/1503.02531. *Deviation.* The
    reference code of NoNN averages the divergence over classes too, which divides the term by C.
    """
    target = F.log_softmax(teacher_logits / temperature, dim=1)
    student = F.log_softmax(logits / temperature, dim=1)
    return temperature**2 * F.kl_div(student, target, reduction="batchmean", log_target=True)


def transfer_loss(features: Tensor, activations: Tensor) -> Tensor:
    """‖f/‖f‖ − t/‖t‖‖², mean over the batch: the activation transfer of NoNN.

    f are the student's feature vectors, t the teacher's pooled activations on its filters, both of shape (B, F).
    """
    difference = F.normalize(features, dim=1) - F.normalize(activations, dim=1)
    return difference.square().sum(1).mean()


def attention_map(stage_map: Tensor) -> Tensor:
    """Spatial attention (B, H·W) of a stage's output (B, channels, H, W): mean of the squares, scaled to unit length.

    Zagoruyko and Komodakis, https://arxiv.org/abs/1612.03928; code https://github.com/szagoruyko/attention-transfer,
    function ``at``.
    """
    return F.normalize(stage_map.square().mean(1).flatten(1), dim=1)


def attention_loss(maps: Sequence[Tensor], teacher_attention: Sequence[Tensor]) -> Tensor:
    """Mean squared difference of attention maps, summed over the stages (``at_loss`` of the same code).

    Of each stage, the student's output (B, channels, H, W) and the teacher's attention (B, H·W).
    """
    losses = [(attention_map(m) - t).square().mean() for m, t in zip(maps, teacher_attention, strict=True)]
    return torch.stack(losses).sum()
