"""State of an unfinished training, from which a killed one is resumed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nonn.core.errors import UserError
from nonn.core.files import STATE, remove
from nonn.core.numerics import is_portable
from nonn.core.progress import log as say
from nonn.data.tensors import read_tensors, write_tensors

#: What decides how a training goes, apart from its settings and inputs.
CODE = sorted(Path(__file__).parent.glob("*.py"))
#: Name of the checksum of all other tensors of a checkpoint: resumed from damaged ones, a training would end elsewhere.
DIGEST = "digest"


def _digest(tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """SHA-256 of names and contents, uint8 of shape (32,)."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8)


@dataclass(frozen=True)
class Checkpoint:
    """State of an unfinished training, kept outside the outputs, which DVC and Snakemake delete.

    The file is named by a hash of everything that the training depends on, so a checkpoint of other settings, inputs or
    code is never resumed.
    """

    path: Path

    @classmethod
    def of(cls, settings: Any, inputs: Iterable[Path]) -> Checkpoint:
        """Checkpoint of a training with these settings (JSON) and input files, by the code of this package.

        Code elsewhere that decides how the training goes is one of the inputs.
        """
        key = hashlib.sha256(json.dumps([settings, torch.__version__, is_portable()], sort_keys=True).encode())
        for path in [*inputs, *CODE]:
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
        tensors["log"] = torch.tensor(log, dtype=torch.float64)
        write_tensors(self.path, {**tensors, DIGEST: _digest(tensors)})

    def load(self, model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> list[list[float]]:
        """Restore model and optimizers in place; return the log so far, empty if there is no sound checkpoint."""
        if not self.path.exists():
            return []
        try:
            tensors = read_tensors(self.path)
            sound = torch.equal(tensors.pop(DIGEST, torch.empty(0)), _digest(tensors))
        except UserError:
            sound = False
        if not sound:  # that costs time, and the outcome is the same
            say(f"{self.path}: damaged; the training begins anew")
            remove(self.path)
            return []
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
