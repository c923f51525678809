"""Stage `dataset`: read the images of a source, split them, write tensors and a description."""

from __future__ import annotations

import torch

from nonn.core.files import write_json
from nonn.core.params import Params
from nonn.core.paths import Paths
from nonn.data.dataset import measure_channels, split_dataset
from nonn.data.sources import load_images
from nonn.data.tensors import write_tensors


def run(params: Params, paths: Paths) -> None:
    section = params.dataset
    raw = load_images(section.source, section.size, section.sha256)
    fractions = section.validation, section.test, section.seed
    splits = split_dataset(raw.labels, raw.classes, raw.is_test, *fractions, raw.is_validation)
    images, labels = torch.from_numpy(raw.images), torch.from_numpy(raw.labels)
    indices = {name: torch.from_numpy(split) for name, split in splits.items()}
    mean, std = measure_channels(images[indices["train"]])
    write_tensors(paths.dataset, {"images": images, "labels": labels, **indices, "mean": mean, "std": std})
    write_json(
        paths.dataset_info,
        {
            "source": section.source,
            "sha256": raw.sha256,
            "classes": raw.classes,
            "channels": images.shape[1],
            "size": section.size,
            "counts": {name: len(split) for name, split in splits.items()},
            "class_counts": {
                name: {c: int((raw.labels[split] == label).sum()) for label, c in enumerate(raw.classes)}
                for name, split in splits.items()
            },
        },
    )
