"""Augmented views of batches of images, each a function of the image's index, the view and a seed.

The teacher's signals are computed once for a fixed number of views. Since a view can be drawn again from its number, a
student sees exactly the pixels that the teacher saw.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from nonn.core.training_params import AugmentParams
from nonn.data.image_store import Images

#: The grey level that cutout paints.
MID_GREY = 128


@dataclass(frozen=True)
class View:
    """How each of N images is cropped and mirrored, tensors of shape (N,), and what is cut out of it.

    `hole`, of shape (N, 2), places the square that cutout hides: its top and left as shares, in [0, 1), of the possible
    places. It is None without cutout.
    """

    top: Tensor
    left: Tensor
    flip: Tensor
    hole: Tensor | None = None

    def to(self, device: torch.device) -> View:
        return self._each(lambda part: part.to(device))

    def of(self, index: Tensor) -> View:
        """The view of the images `index` alone."""
        return self._each(lambda part: part[index])

    def _each(self, change: Callable[[Tensor], Tensor]) -> View:
        hole = None if self.hole is None else change(self.hole)
        return View(change(self.top), change(self.left), change(self.flip), hole)


def draw_view(n_images: int, view: int, augment: AugmentParams, seed: int) -> View:
    """Draw view number `view` of `n_images` images.

    Mirroring alternates: an image that is mirrored in one view is not mirrored in the next, so any two consecutive
    views show both (https://github.com/KellerJordan/cifar10-airbench).
    """
    once = torch.Generator().manual_seed(seed)
    mirrored = torch.randint(2, (n_images,), generator=once).bool()
    flip = mirrored ^ bool(view % 2) if augment.flip else torch.zeros_like(mirrored)
    each = torch.Generator().manual_seed(seed * 1_000_003 + view + 1)
    top, left = torch.randint(2 * augment.pad + 1, (2, n_images), generator=each)
    hole = torch.rand((n_images, 2), generator=each) if augment.cutout else None
    return View(top, left, flip, hole)


def apply_view(
    images: Tensor | Images, view: View, index: Tensor, augment: AugmentParams, drawn_for: int | None = None
) -> Tensor:
    """Crop and mirror the images `index` (B,), and hide a square of each; uint8 of shape (B, channels, H, W).

    `images` are uint8 of shape (N, channels, H, W). `augment` is the one that the view was drawn with: ``pad`` pixels
    of reflected border, within which the crop moves, and ``cutout``, the side in pixels of a square that is painted
    mid-grey (https://arxiv.org/abs/1708.04552; here wholly inside the image, as airbench96 has it). Both count pixels
    of images of `drawn_for` pixels a side, by default of these ones: in larger images of the same pictures, distances
    are scaled and rounded to whole pixels. Images on a GPU become float16, which holds the same values, since PyTorch
    does not pad bytes there; the view and the index have to be on that GPU too.
    """
    height, width = images.shape[2:]
    scale = width / (drawn_for or width)
    pad = round(augment.pad * scale)
    top, left = (pad + _scaled(start[index] - augment.pad, scale) for start in (view.top, view.left))
    chosen = images[index].half() if index.is_cuda else images[index]
    padded = F.pad(chosen, (pad, pad, pad, pad), mode="reflect") if pad else chosen
    # Every possible crop as a strided window of the padded image: nothing is copied until one is picked.
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)
    cropped = windows[torch.arange(len(index), device=index.device), :, top, left]
    mirrored = torch.where(view.flip[index].reshape(-1, 1, 1, 1), cropped.flip(-1), cropped)
    return mirrored if view.hole is None else _cut_out(mirrored, view.hole[index], augment.cutout, scale)


def _scaled(pixels: Tensor, scale: float) -> Tensor:
    """Whole numbers of pixels, in an image that is `scale` times as large."""
    return pixels if scale == 1 else (pixels * scale).round().long()


def _cut_out(images: Tensor, places: Tensor, side: int, scale: float) -> Tensor:
    inside = []
    for length, place in zip(images.shape[2:], places.T, strict=True):
        start = (place * (max(round(length / scale) - side, 0) + 1)).long()[:, None]
        begin, end = _scaled(start, scale), _scaled(start + side, scale)
        pixels = torch.arange(length, device=images.device)
        inside.append((pixels >= begin) & (pixels < end))
    rows, columns = inside
    return images.masked_fill((rows[:, :, None] & columns[:, None, :])[:, None], MID_GREY)
