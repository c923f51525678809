"""Augmented views of images, in bulk, each a function of the image's index, the view and a seed.

The teacher's signals are computed once for a fixed number of views. Since a view can be drawn
again from its number, a student sees exactly the pixels that the teacher saw.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from nonn.params import Augment


@dataclass(frozen=True)
class View:
    """How each of N images is cropped and mirrored; all of shape (N,)."""

    top: Tensor
    left: Tensor
    flip: Tensor


def draw_view(n_images: int, view: int, augment: Augment, seed: int) -> View:
    """Draw view number `view` of `n_images` images.

    Mirroring alternates: an image that is mirrored in one view is not in the next, so any two
    consecutive views show both (https://github.com/KellerJordan/cifar10-airbench).
    """
    once = torch.Generator().manual_seed(seed)
    mirrored = torch.randint(2, (n_images,), generator=once).bool()
    flip = mirrored ^ bool(view % 2) if augment.flip else torch.zeros_like(mirrored)
    each = torch.Generator().manual_seed(seed * 1_000_003 + view + 1)
    top, left = torch.randint(2 * augment.pad + 1, (2, n_images), generator=each)
    return View(top, left, flip)


def apply_view(images: Tensor, view: View, index: Tensor, pad: int) -> Tensor:
    """Crop and mirror the images `index`.

    Parameters
    ----------
    images : Tensor of shape (N, channels, H, W), uint8
    view : View of N images
    index : Tensor of shape (B,), int64
    pad : int
        Pixels of reflected border around which the crop moves; the same as the view was drawn with.

    Returns
    -------
    Tensor of shape (B, channels, H, W), uint8
    """
    height, width = images.shape[2:]
    padded = F.pad(images[index], (pad, pad, pad, pad), mode="reflect") if pad else images[index]
    # Every possible crop as a strided window of the padded image: nothing is copied until one is picked.
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)
    cropped = windows[torch.arange(len(index)), :, view.top[index], view.left[index]]
    return torch.where(view.flip[index].reshape(-1, 1, 1, 1), cropped.flip(-1), cropped)
