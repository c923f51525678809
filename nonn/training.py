"""The training loop that teacher, students and baselines share: deterministic and resumable."""

from __future__ import annotations

import ctypes
import hashlib
import json
import platform
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nonn.files import STATE, read_tensors, remove, write_tensors, write_text
from nonn.models import Network, accuracy, predict
from nonn.muon import Muon
from nonn.params import Schedule
from nonn.progress import track

if TYPE_CHECKING:
    from nonn.selection import Proxy

#: Columns of a training log.
LOG_COLUMNS = ["epoch", "train_loss", "validation_loss", "validation_accuracy"]

#: Options of glibc's mallopt, from malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4

BatchLoss = Callable[[Tensor, int], Tensor]


def pick_device() -> torch.device:
    """The GPU where there is one, otherwise the processor."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def keep_freed_memory() -> None:
    """Let the process keep large blocks that it frees, for the next step of a training.

    By default glibc hands them back to the kernel, which then clears every page of every activation
    again: up to a fifth of the processor time of a step.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)


def mixed_precision(device: torch.device) -> torch.autocast:
    """Autocast to bfloat16 where the hardware has it, twice as fast as float32; otherwise a no-op."""
    fast = torch.cuda.is_bf16_supported() if device.type == "cuda" else torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=fast)


@dataclass(frozen=True)
class Checkpoint:
    """State of an unfinished training, kept outside the outputs, which DVC and Snakemake delete.

    The file is named by a hash of everything the training depends on, so that a checkpoint of
    other settings, inputs or code is never resumed.
    """

    path: Path

    @classmethod
    def of(cls, settings: Any, inputs: Iterable[Path], code: Iterable[str]) -> Checkpoint:
        """Checkpoint of a training with these settings (JSON) and input files, by these modules of `nonn`."""
        key = hashlib.sha256(json.dumps([settings, torch.__version__], sort_keys=True).encode())
        for path in [*inputs, *(Path(__file__).with_name(f"{name}.py") for name in code)]:
            with path.open("rb") as file:
                key.update(hashlib.file_digest(file, "sha256").digest())
        return cls(STATE / "checkpoints" / f"{key.hexdigest()[:32]}.safetensors")

    def part(self, name: str | int) -> Checkpoint:
        """Checkpoint of one of several trainings in the same job."""
        return Checkpoint(self.path.with_stem(f"{self.path.stem}-{name}"))

    def save(self, model: nn.Module, optimizers: list[torch.optim.Optimizer], log: list[list[float]]) -> None:
        tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
        for number, optimizer in enumerate(optimizers):
            for index, state in optimizer.state_dict()["state"].items():
                if state.get("momentum_buffer") is not None:
                    tensors[f"momentum.{number}.{index}"] = state["momentum_buffer"]
        write_tensors(self.path, {**tensors, "log": torch.tensor(log, dtype=torch.float64)})

    def load(self, model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> list[list[float]]:
        """Restore model and optimizers in place; return the log so far, empty if there is no checkpoint."""
        if not self.path.exists():
            return []
        tensors = read_tensors(self.path)
        model.load_state_dict({name[6:]: t for name, t in tensors.items() if name.startswith("model.")})
        for number, optimizer in enumerate(optimizers):
            state, prefix = optimizer.state_dict(), f"momentum.{number}."
            state["state"] = {
                int(name.removeprefix(prefix)): {"momentum_buffer": t.clone()}
                for name, t in tensors.items()
                if name.startswith(prefix)
            }
            optimizer.load_state_dict(state)
        return tensors["log"].tolist()

    def discard(self) -> None:
        """Delete the checkpoint and its parts: the training's outputs are in place."""
        for path in self.path.parent.glob(f"{self.path.stem}*"):
            remove(path)


def learning_rate(step: int, n_steps: int, peak: float, warmup: float) -> float:
    """Triangular: rises linearly to `peak` for the share `warmup` of the steps, then falls to zero."""
    rise = warmup * n_steps
    if step < rise:
        return peak * (step + 1) / (rise + 1)
    return peak * (n_steps - step) / (n_steps - rise)


def epoch_order(n_images: int, epoch: int, seed: int) -> Tensor:
    """Order of the images in an epoch, a function of epoch and seed alone: resuming needs no generator state."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(n_images, generator=generator)


def make_optimizers(model: nn.Module, schedule: Schedule) -> list[torch.optim.Optimizer]:
    """SGD with Nesterov momentum, and Muon for the filters of convolutions if the schedule has it.

    Biases and batch norm are not decayed.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    by_muon = [p for p in trained if p.ndim == 4 and schedule.muon]
    decayed = [p for p in trained if p.ndim == 2 or (p.ndim == 4 and not schedule.muon)]
    plain = [p for p in trained if p.ndim <= 1]
    sgd = torch.optim.SGD(
        [{"params": decayed, "weight_decay": schedule.weight_decay}, {"params": plain, "weight_decay": 0.0}],
        lr=schedule.lr,
        momentum=schedule.momentum,
        nesterov=schedule.momentum > 0,
    )
    return [sgd, Muon(by_muon, schedule.muon.lr, schedule.muon.momentum)] if schedule.muon else [sgd]


def train(
    model: Network,
    batch_loss: BatchLoss,
    n_images: int,
    schedule: Schedule,
    *,
    seed: int,
    validation: tuple[Tensor, Tensor],
    checkpoint: Checkpoint,
    device: torch.device,
    label: str,
    proxy: Proxy | None = None,
) -> pd.DataFrame:
    """Train `model` in place, resuming from `checkpoint` if it exists.

    Parameters
    ----------
    model : Network
    batch_loss : callable
        ``batch_loss(index, epoch)``: the loss of the training images `index`, int64 of shape (B,).
    n_images : int
        Training images; a last batch that is not full is left out of its epoch.
    schedule : Schedule
    seed : int
        Decides the order of the images.
    validation : (images, labels)
        Scored after each epoch, for the log only: nothing is selected.
    checkpoint : Checkpoint
        Written after each epoch. The caller discards it once the outputs are in place.
    device : torch.device
    label : str
        Shown with the progress.
    proxy : Proxy, optional
        That `batch_loss` selects images with: it is on the same schedule and in the same checkpoint.

    Returns
    -------
    DataFrame
        One row an epoch, columns `LOG_COLUMNS`.
    """
    trained = nn.ModuleList([model, *([proxy] if proxy else [])]).to(device, memory_format=torch.channels_last)
    optimizers = make_optimizers(model, schedule)
    every_optimizer = [*optimizers, *(proxy.optimizers if proxy else [])]
    rows = checkpoint.load(trained, every_optimizer)
    groups = [group for optimizer in every_optimizer for group in optimizer.param_groups]
    peaks = [group["lr"] for group in groups]
    batch_size = min(schedule.batch_size, n_images)
    steps = n_images // batch_size
    for epoch in track(range(len(rows), schedule.epochs), label, done=len(rows)):
        model.train()
        losses = []
        for batch, index in enumerate(epoch_order(n_images, epoch, seed).split(batch_size)[:steps]):
            for group, peak in zip(groups, peaks, strict=True):
                group["lr"] = learning_rate(epoch * steps + batch, schedule.epochs * steps, peak, schedule.warmup)
            loss = batch_loss(index, epoch)
            model.zero_grad()
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
            losses.append(loss.detach())
        _, logits = predict(model, validation[0], device)
        rows.append(
            [
                epoch + 1,
                torch.stack(losses).mean().item(),
                F.cross_entropy(logits, validation[1]).item(),
                accuracy(logits, validation[1]),
            ]
        )
        checkpoint.save(trained, every_optimizer, rows)
    model.cpu()
    return pd.DataFrame(rows, columns=LOG_COLUMNS).astype({"epoch": int})


def write_log(path: Path, log: pd.DataFrame) -> None:
    """Write a training log as CSV."""
    write_text(path, log.to_csv(index=False, float_format="%.6g"))
