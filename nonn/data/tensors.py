"""Artifacts that hold tensors, as safetensors: no pickle, memory-mapped on reading, the same bytes each time."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from nonn.core.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor
from nonn.core.files import existing, replacing


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    from safetensors.torch import save_file

    with replacing(path) as temporary:
        save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, temporary)
        temporary.chmod(0o644)  # safetensors makes it private


def read_tensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(existing(path))
    except SafetensorError as error:
        raise UserError(f"{path}: damaged ({error}). Delete it and run the pipeline again.") from None
