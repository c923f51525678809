"""How a teacher sees images: the channels, their order, the scale of the pixels, and mean and deviation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from nonn.core.errors import UserError
from nonn.core.params import TeacherParams
from nonn.training.networks import Normalize

#: Mean and deviation, one a channel or one for all.
Moments = tuple[Sequence[float], Sequence[float]]
#: Those of the networks that torchvision and timm pretrain on ImageNet, unless they say otherwise.
IMAGENET: Moments = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Preprocessing:
    """How uint8 images in RGB become the input of the teacher's network."""

    channels: int  # of the network's input
    mean: Sequence[float]  # this and the next in grey levels, 0 to 255, one a channel or one for all
    std: Sequence[float]
    bgr: bool = False

    @classmethod
    def of(cls, params: TeacherParams, channels: int, images: int, usual: Moments | None = None) -> Self:
        """As the parameters say, for a network of `channels` input channels and for `images` of so many channels.

        `usual` are the mean and deviation of pixels from 0 to 1 if ``teacher.normalization`` is null. Without them, and
        for pixels from 0 to 255, nothing is subtracted.
        """
        if channels != images and images != 1:
            raise UserError(
                f"params.yaml: teacher.source: {params.source} takes images of {channels} channels, and those of the "
                f"data set have {images}. Take a teacher for colour images, or a data set of grey ones."
            )
        normal = params.normalization
        scale = 255 if params.pixels == "unit" else 1
        mean, std = (normal.mean, normal.std) if normal else (usual if scale > 1 and usual else ([0.0], [1.0]))
        for name, values in (("mean", mean), ("std", std)):
            if len(values) not in (1, channels):
                raise other_channels(name, len(values), channels)
        bgr = params.colour_order == "bgr" and channels == 3
        return cls(channels, [scale * value for value in mean], [scale * value for value in std], bgr)


def other_channels(name: str, n_values: int, channels: int) -> UserError:
    """``teacher.normalization`` does not have one number a channel."""
    return UserError(
        f"params.yaml: teacher.normalization.{name}: has {n_values} channels, the teacher's images have {channels}; "
        "give one number a channel."
    )


class Preprocess(Normalize):
    """Turns uint8 images (B, channels of the data set, H, W) into the network's input, float32 (B, channels, H, W)."""

    def __init__(self, settings: Preprocessing):
        super().__init__(torch.tensor(settings.mean), torch.tensor(settings.std))
        self.settings = settings

    def forward(self, images: Tensor) -> Tensor:
        if images.shape[1] != self.settings.channels:
            images = images.expand(-1, self.settings.channels, -1, -1)
        return super().forward(images.flip(1) if self.settings.bgr else images)
