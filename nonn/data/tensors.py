"""Artifacts of tensors as safetensors files: without pickle, memory-mapped on reading, the same bytes each time."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from nonn.core.files import damaged, existing, replacing

if TYPE_CHECKING:
    from torch import Tensor


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with replacing(path) as temporary:
        try:
            save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, temporary)
        except SafetensorError as error:  # only its text has the number of the operating system's error
            if number := re.search(r"(?:os error|code:) (\d+)", str(error)):
                raise OSError(int(number[1]), "cannot be written") from error
            raise
        temporary.chmod(0o644)  # safetensors makes it private


def read_tensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(existing(path))
    except SafetensorError as error:
        raise damaged(path, error) from None
    if not tensors:
        raise damaged(path, "it holds no tensors")
    return tensors
