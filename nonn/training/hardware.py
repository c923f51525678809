"""What a training runs on: device, precision, memory."""

from __future__ import annotations

import ctypes
import math
import platform

import torch
from torch import Tensor

from nonn.core.numerics import is_portable
from nonn.data.image_store import Images

#: Options of glibc's mallopt, from malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def pick_device() -> torch.device:
    """The GPU if there is one and `numerics` is not ``portable``; otherwise the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() and not is_portable() else "cpu")


def resident(images: Images, device: torch.device) -> tuple[Tensor | Images, torch.device]:
    """The images and the device that holds them: the GPU if they fill at most a quarter of its free memory, or the CPU.

    Indices into the images have to be on the same device.
    """
    if device.type != "cuda" or math.prod(images.shape) > torch.cuda.mem_get_info(device)[0] / 4:
        return images, torch.device("cpu")
    return images[:].to(device), device


def keep_freed_memory() -> None:
    """Let the process keep the large blocks that it frees, for the next training step.

    By default glibc returns them to the kernel, which then clears every page of every activation again. That takes up
    to a fifth of the processor time of a step.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)


def mixed_precision(device: torch.device) -> torch.autocast:
    """Autocast to bfloat16 where the hardware has it and may be used, twice as fast as float32; otherwise a no-op."""
    has_bfloat16 = (
        torch.cuda.is_bf16_supported() if device.type == "cuda" else torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=has_bfloat16 and not is_portable())
