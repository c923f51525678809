"""The teacher's answers for every training image, computed once.

For K augmented views of each training image, and for the validation images as they are, this stage keeps the teacher's
logits, the pooled activations of its final convolution, and its attention maps. All later trainings use these; no
training step runs the teacher again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nonn.core.errors import UserError
from nonn.core.params import SignalsParams
from nonn.core.progress import track
from nonn.data.dataset import Dataset
from nonn.teachers.foreign import ForeignTeacher
from nonn.training.augment import apply_view, draw_view
from nonn.training.hardware import mixed_precision, pick_device, resident
from nonn.training.losses import attention_map
from nonn.training.networks import ConvNet, concatenated, scaled_batch_size

BATCH_SIZE = 500


def as_activity(features: Tensor) -> Tensor:
    """How active each filter is, at least 0: its feature where that is positive, otherwise 0.

    Features after ReLU stay as they are. Those of any sign (GELU, SiLU, layer norm) are clamped, since the graph takes
    nothing below 0 and the students' features are rectified. Of three rules this one makes the most modular graph,
    keeps what a linear probe reads, and teaches best: see ``docs/what-was-tried.md``, *Features of any sign*.
    """
    return features.clamp(min=0)


def compute_signals(
    teacher: ConvNet | ForeignTeacher, data: Dataset, params: SignalsParams, student_size: int | None = None
) -> dict[str, Tensor]:
    """Run the teacher over the K views of the N training images and over the M validation images as they are.

    `data` are the images as the teacher sees them, `student_size` is the side of those that students see, whose views
    these are; None for the same. Returns ``logits`` (K, N, C), ``pooled`` (K, N, F) and ``attention.<stage>``
    (K, N, H·W) of the views; ``validation_logits`` (M, C) and ``validation_pooled`` (M, F); all float16. The pooled
    activation of a filter is the spatial mean of the final convolution's output after ReLU, a_i(x) of the paper.
    """
    images, place = resident(data.subset("train")[0], pick_device())
    batch_size = scaled_batch_size(BATCH_SIZE, data.size)
    views = [draw_view(len(images), view, params.augment, params.seed).to(place) for view in range(params.views)]
    indices = torch.arange(len(images), device=place)
    jobs = [(view, index) for view in views for index in indices.split(batch_size)]
    augmented = (apply_view(images, *job, params.augment, student_size) for job in track(jobs, "signals"))
    by_batch = (signals_of(teacher, batch, params.attention) for batch in augmented)
    signals = concatenated(by_batch, params.views * len(images))
    signals = {name: tensor.unflatten(0, (params.views, len(images))) for name, tensor in signals.items()}
    validation, _ = data.subset("validation")
    batches = (signals_of(teacher, batch, attention=False) for batch in validation.split(batch_size))
    return signals | {f"validation_{name}": tensor for name, tensor in concatenated(batches, len(validation)).items()}


@torch.inference_mode()
def signals_of(teacher: ConvNet | ForeignTeacher, images: Tensor, attention: bool) -> dict[str, Tensor]:
    """The teacher's signals for a batch of uint8 images, float16, by the names of `compute_signals`."""
    device = pick_device()
    teacher = teacher.to(device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
    maps: list[Tensor] = []
    with mixed_precision(device):
        if isinstance(teacher, ConvNet):  # once, whether or not it mirrors
            maps = teacher.stage_maps(images.to(device))
            features, logits = teacher.read_out(maps[-1])
        else:
            features, logits = teacher(images.to(device))
    signals = {"logits": logits, "pooled": as_activity(features)}
    if attention:
        signals |= {f"attention.{stage}": attention_map(m.float()) for stage, m in enumerate(maps)}
    halves = {name: tensor.half().cpu() for name, tensor in signals.items()}
    if beyond := [name for name, tensor in halves.items() if not tensor.isfinite().all()]:
        raise UserError(
            f"params.yaml: teacher: its signal {beyond[0]} has values beyond {torch.finfo(torch.float16).max:,.0f}, "
            "the largest of 16-bit floating point, or no numbers. Take a teacher whose last features are smaller."
        )
    return halves
