"""The training loop that teacher, students and baselines share: deterministic and resumable."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nonn.core.errors import UserError
from nonn.core.files import write_text
from nonn.core.progress import track
from nonn.core.training_params import ScheduleParams
from nonn.data.image_store import Images
from nonn.training.checkpoint import Checkpoint
from nonn.training.networks import ConvNet, accuracy, predict
from nonn.training.optim import learning_rate, make_optimizers
from nonn.training.step import make_step, set_rate

#: Columns of a training log.
LOG_COLUMNS = ["epoch", "train_loss", "validation_loss", "validation_accuracy"]

#: Epochs from one checkpoint to the next on a GPU, where an epoch takes no longer than a checkpoint.
GPU_CHECKPOINT_EPOCHS = 10

#: A training log: one row an epoch, by column.
Log = list[dict[str, float]]


def epoch_order(n_images: int, epoch: int, seed: int) -> Tensor:
    """Order of the images in an epoch, a function of epoch and seed alone, so resuming needs no generator state."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(n_images, generator=generator)


def train(
    model: ConvNet,
    batch_of: Callable[[Tensor, int], tuple[Tensor, ...]],
    loss_of: Callable[..., Tensor],
    n_images: int,
    schedule: ScheduleParams,
    *,
    seed: int,
    validation: tuple[Tensor | Images, Tensor],
    checkpoint: Checkpoint,
    device: torch.device,
    label: str,
    section: Literal["teacher", "distill"],
    proxy: nn.Module | None = None,
    proxy_optimizers: Sequence[torch.optim.Optimizer] = (),
) -> Log:
    """Train `model` in place, resuming from `checkpoint` if it exists; return a log with one row an epoch.

    ``loss_of(*batch_of(index, epoch))`` is the loss of the training images `index`, int64 of shape (B,) on `device`;
    ``batch_of`` makes tensors of one shape, ``loss_of`` alone reaches the model's parameters. `seed` decides the order;
    a last batch that is not full is left out of its epoch. The images and labels of `validation` are scored after each
    epoch, for the log only: nothing is selected. `schedule` is that `section` of ``params.yaml``. The checkpoint is
    written after each epoch, on a GPU after every `GPU_CHECKPOINT_EPOCHS`-th; the caller discards it once the outputs
    are in place. A `proxy`, with which `batch_of` selects images, has the same schedule and checkpoint.
    """
    trained = nn.ModuleList([model, *([proxy] if proxy else [])]).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizers = make_optimizers(model, schedule)
    every_optimizer = [*optimizers, *proxy_optimizers]
    rows = checkpoint.load(trained, every_optimizer)
    groups = [group for optimizer in every_optimizer for group in optimizer.param_groups]
    peaks = [group["lr"] for group in groups]
    batch_size = min(schedule.batch_size, n_images)
    steps = n_images // batch_size
    every = GPU_CHECKPOINT_EPOCHS if device.type == "cuda" else 1
    step = make_step(model, loss_of, optimizers, device)
    for epoch in track(range(len(rows), schedule.epochs), label, done=len(rows)):
        model.train()
        losses = []
        order = epoch_order(n_images, epoch, seed).to(device)
        for batch, index in enumerate(order.split(batch_size)[:steps]):
            for group, peak in zip(groups, peaks, strict=True):
                set_rate(group, learning_rate(epoch * steps + batch, schedule.epochs * steps, peak, schedule.warmup))
            losses.append(step(*batch_of(index, epoch)))
        _, logits = predict(model, validation[0], device)
        scores = F.cross_entropy(logits, validation[1]).item(), accuracy(logits, validation[1])
        rows.append([epoch + 1, torch.stack(losses).mean().item(), *scores])
        if not all(map(math.isfinite, rows[-1])):
            raise UserError(
                f"{label}: its training has diverged: the loss of epoch {epoch + 1} is no number. Lower the learning "
                f"rate, {section}.lr in params.yaml."
            )
        if len(rows) % every == 0 or len(rows) == schedule.epochs:
            checkpoint.save(trained, every_optimizer, rows)
    model.cpu()
    return [dict(zip(LOG_COLUMNS, row, strict=True)) for row in rows]


def write_log(path: Path, log: Log) -> None:
    rows = [[f"{value:.6g}" for value in row.values()] for row in log]
    lines = [",".join(row) for row in [log[0], *rows]]
    write_text(path, "\n".join(lines) + "\n")
