"""The dataset of an experiment: all images of a source, and a fixed train/validation/test split.

`nonn.data.sources` reads and resizes images, and the stages that train augment them. The test split serves the final
tables only; all choices are made on the validation split.

The pipeline cannot watch every kind of source for changes: ``dataset.sha256`` pins the content. The sum of the content
is recorded beside the dataset, and can be copied from there.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nonn.core.artifacts import DatasetInfo, ImageSpec
from nonn.core.errors import UserError, printable
from nonn.core.files import intact, read_json
from nonn.core.paths import Paths
from nonn.data.image_store import Images, MappedImages, map_images

SPLITS = ("train", "validation", "test")
#: Classes that a message names at most.
MAX_NAMED_CLASSES = 10


@dataclass(frozen=True, eq=False)
class Dataset:
    """Images, labels and splits.

    The images stay on the disk where they were loaded from there: what `subset` returns reads them when asked. The
    splits hold sorted indices, int64; they are disjoint, and together all images. `mean` and `std` (C,) float32 are
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
    mapping: MappedImages | None = None  # of the file that the images lie in
    white: float | None = None  # as `nonn.core.images.upright` takes it

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

    @property
    def spec(self) -> ImageSpec:
        return ImageSpec(self.channels, self.size, self.n_classes)

    def subset(self, name: str) -> tuple[Images, Tensor]:
        """Images of ``train``, ``validation`` or ``test``, read when they are asked for, and labels."""
        indices = getattr(self, name)
        return Images(self.images, indices, self.mapping), self.labels[indices]


def load_dataset(paths: Paths) -> Dataset:
    """The dataset as students see it."""
    info = read_json(paths.dataset_info, DatasetInfo)
    about: dict[str, Any] = {"classes": tuple(info["classes"]), "white": info.get("white")}
    with intact(paths.dataset):
        mapping, tensors = map_images(paths.dataset)
        data = Dataset(images=mapping.images, **tensors | about, mapping=mapping)
        _check(data)
    return data


def load_teacher_dataset(paths: Paths) -> Dataset:
    """The dataset as the teacher sees it: of images of another size if `teacher.size` differs from the students'."""
    data = load_dataset(paths)
    with intact(paths.teacher_images):
        mapping, tensors = map_images(paths.teacher_images)
        if not len(mapping.images):  # nothing of its own
            return data
        data = replace(data, images=mapping.images, mapping=mapping, mean=tensors["mean"], std=tensors["std"])
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

    Each class gives ``round(fraction * count)`` of its images to a split, and one at least, where `count` is the number
    of its images that the source itself does not set aside for testing. `is_test` (N,) bool is the source's own test
    split, which is kept; None draws one of the fraction `test`. `is_validation` is the source's own validation split,
    in the same way. Test images do not depend on `validation`. A class that would have no training image is a
    UserError, and so is an empty split of the source.
    """
    shuffled = np.random.default_rng(seed).permutation(len(labels))
    parts: dict[str, list[np.ndarray]] = {name: [] for name in SPLITS}
    too_few: dict[str, int] = {}
    needed = 1 + (is_validation is None) + (is_test is None)
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    starts = np.searchsorted(labels[by_class], np.arange(len(classes) + 1))
    for label, name in enumerate(classes):
        members = by_class[starts[label] : starts[label + 1]]
        own_validation = np.empty(0, np.int64)
        if is_validation is not None:
            own_validation, members = members[is_validation[members]], members[~is_validation[members]]
        if is_test is None:
            n_test = max(1, round(test * len(members)))
            held, rest = members[:n_test], members[n_test:]
            count = len(members)
        else:
            held, rest = members[is_test[members]], members[~is_test[members]]
            count = len(rest)
        n_validation = max(1, round(validation * count)) if is_validation is None else 0
        if len(rest) <= n_validation:
            too_few[name] = count
            continue
        parts["validation"].append(own_validation if is_validation is not None else rest[:n_validation])
        parts["train"].append(rest[n_validation:])
        parts["test"].append(held)
    if too_few:
        raise _too_few_images(too_few, needed)
    splits = {name: np.sort(np.concatenate(indices)) for name, indices in parts.items()}
    if empty := [name for name, indices in splits.items() if not len(indices)]:
        raise UserError(
            f"params.yaml: dataset.source: its {empty[0]} split has no image that can be read. Mend its pictures or "
            "lists, or take that split out of it."
        )
    return splits


def _too_few_images(counts: dict[str, int], needed: int) -> UserError:
    """The remedy depends on the number: no fraction leaves anything of a single image."""
    if hopeless := {name: count for name, count in counts.items() if count < needed}:
        problem, remedy = hopeless, f"A class needs {needed} at least. Add images to each, or take it out"
    else:
        problem, remedy = counts, "Lower dataset.validation and dataset.test, or add images to each"
    shown = [f"{printable(name)!r} has {count} image{'s' * (count != 1)}" for name, count in problem.items()]
    first = ", ".join(shown[:MAX_NAMED_CLASSES])
    more = f" and {len(shown) - MAX_NAMED_CLASSES} more classes" if len(shown) > MAX_NAMED_CLASSES else ""
    return UserError(
        f"params.yaml: dataset.source: class {first}{more} to split, which leaves none for training. {remedy}."
    )


def measure_channels(images: Tensor | Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (C,) float32 of each channel of uint8 images (N, C, H, W), in grey levels.

    `images` are all at once, or batches of them. Counted in integers over the 256 grey levels: exact in whatever order
    threads work. The deviation of a blank channel is taken as one grey level, so that dividing by it is safe.
    """
    levels = torch.arange(256, dtype=torch.float64)
    counts: Tensor | int = 0
    for batch in [images] if isinstance(images, Tensor) else images:
        pixels = batch.numpy()  # numpy counts bytes ten times as fast as torch
        found = [_count_levels(pixels[:, channel].ravel()) for channel in range(pixels.shape[1])]
        counts = counts + torch.from_numpy(np.stack(found))
    assert isinstance(counts, Tensor), "there are no images"
    shares = counts.double() / counts.sum(1, keepdim=True)  # (C, 256)
    mean = shares @ levels
    variance = (shares * (levels - mean[:, None]) ** 2).sum(1)
    deviation = torch.tensor([max(math.sqrt(value), 1.0) for value in variance.tolist()])
    return mean.float(), deviation


def _count_levels(pixels: np.ndarray) -> np.ndarray:
    """How often each grey level stands in a list of bytes; counting pairs takes less than half the time and memory."""
    end = len(pixels) // 2 * 2
    pairs = np.bincount(pixels[:end].view(np.uint16), minlength=1 << 16).reshape(256, 256)
    return pairs.sum(0) + pairs.sum(1) + np.bincount(pixels[end:], minlength=256)
