"""The dataset of an experiment: all images of a source, and a fixed train/validation/test split.

Reading and resizing images is left to `nonn.data.sources`, augmentation to the stages that train. The
test split serves the final tables only; whatever is chosen is chosen on the validation split.

The pipeline cannot watch every kind of source for changes: ``dataset.sha256`` pins the content.
The sum that was found is recorded beside the dataset, so it can be copied from there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nonn.core.artifacts import DatasetInfo
from nonn.core.errors import UserError
from nonn.core.files import intact, read_json
from nonn.core.paths import Paths
from nonn.data.tensors import read_tensors

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True, eq=False)
class Dataset:
    """Images, labels and splits, memory-mapped.

    The splits hold sorted indices, int64; they are disjoint, and together all images. `mean` and `std` (C,) float32 are
    those of the training images in grey levels: a model sees ``(images - mean) / std``.
    """

    images: Tensor  # (N, C, H, W), uint8
    labels: Tensor  # (N,), int64
    train: Tensor
    validation: Tensor
    test: Tensor
    mean: Tensor
    std: Tensor
    classes: tuple[str, ...]

    @property
    def n_classes(self) -> int:
        return len(self.classes)

    @property
    def channels(self) -> int:
        return self.images.shape[1]

    @property
    def size(self) -> int:
        """Pixels a side."""
        return self.images.shape[-1]

    def split(self, name: str) -> tuple[Tensor, Tensor]:
        """Return images and labels of ``train``, ``validation`` or ``test``."""
        indices = getattr(self, name)
        return self.images[indices], self.labels[indices]


def load_dataset(paths: Paths) -> Dataset:
    classes = tuple(read_json(paths.dataset_info, DatasetInfo)["classes"])
    with intact(paths.dataset):
        data = Dataset(**read_tensors(paths.dataset), classes=classes)
        _check(data)
    return data


def _check(data: Dataset) -> None:
    """Raise ValueError for tensors that do not make a dataset."""
    if data.images.dim() != 4 or data.images.dtype != torch.uint8:
        raise ValueError("images are not uint8 of shape (N, C, H, W)")
    if data.labels.shape != data.images.shape[:1]:
        raise ValueError("labels are not one an image")
    limits = {"labels": data.n_classes, **dict.fromkeys(SPLITS, len(data.images))}
    for name, limit in limits.items():
        values = getattr(data, name)
        if values.dim() != 1 or values.dtype != torch.int64:
            raise ValueError(f"{name} is not a list of whole numbers")
        if ((values < 0) | (values >= limit)).any():
            raise ValueError(f"{name} has a number that is not from 0 to {limit - 1}")
    for name in ("mean", "std"):
        if getattr(data, name).shape != (data.channels,):
            raise ValueError(f"{name} is not one number a channel")


def split_dataset(
    labels: np.ndarray,
    classes: Sequence[str],
    is_test: np.ndarray | None,
    validation: float,
    test: float,
    seed: int,
    is_validation: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """Split images into train, validation and test, class by class; return the sorted indices of each, int64.

    Each class gives ``round(fraction * count)`` of its images, and one at least, where `count` is the number of its
    images that the source does not set aside for testing itself. `is_test` (N,) bool is the source's own test split,
    which is kept; None draws one of the fraction `test`. `is_validation` is its own
    validation split, in the same way. Test images do not depend on `validation`. A class with too few images to train
    with is a UserError.
    """
    shuffled = np.random.default_rng(seed).permutation(len(labels))
    parts: dict[str, list[np.ndarray]] = {name: [] for name in SPLITS}
    for label, name in enumerate(classes):
        members = shuffled[labels[shuffled] == label]
        own = np.empty(0, np.int64)
        if is_validation is not None:
            own, members = members[is_validation[members]], members[~is_validation[members]]
        if is_test is None:
            n_test = max(1, round(test * len(members)))
            held, rest = members[:n_test], members[n_test:]
            count = len(members)
        else:
            held, rest = members[is_test[members]], members[~is_test[members]]
            count = len(rest)
        n_validation = max(1, round(validation * count)) if is_validation is None else 0
        if len(rest) <= n_validation:
            raise UserError(
                f"params.yaml: dataset.source: class {name!r} has {count} images to split, which leaves none "
                "for training. Add images to it, or lower dataset.validation and dataset.test."
            )
        parts["validation"].append(own if is_validation is not None else rest[:n_validation])
        parts["train"].append(rest[n_validation:])
        parts["test"].append(held)
    return {name: np.sort(np.concatenate(indices)) for name, indices in parts.items()}


def measure_channels(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (C,) float32 of each channel of uint8 images (N, C, H, W), in grey levels.

    Counted in integers over the 256 grey levels: exact in whatever order threads work. The deviation of a blank channel
    is taken as one grey level, so that dividing by it is safe.
    """
    levels = torch.arange(256, dtype=torch.float64)
    counts = torch.stack([torch.bincount(channel.flatten(), minlength=256) for channel in images.unbind(1)])
    shares = counts.double() / counts.sum(1, keepdim=True)  # (C, 256)
    mean = shares @ levels
    variance = (shares * (levels - mean[:, None]) ** 2).sum(1)
    deviation = torch.tensor([max(math.sqrt(value), 1.0) for value in variance.tolist()])
    return mean.float(), deviation
