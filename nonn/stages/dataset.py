"""Stage `dataset`: read the images of a source, split them, write tensors and a description."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import torch

from nonn.core.files import replacing, write_json
from nonn.core.params import Params
from nonn.core.paths import Paths
from nonn.core.progress import log
from nonn.data.dataset import measure_channels, split_dataset
from nonn.data.decoding import MAX_NAMED, Decoder, SourceInfo
from nonn.data.image_store import ImageWriter
from nonn.data.sources import load_images
from nonn.data.tensors import write_tensors


def run(params: Params, paths: Paths) -> None:
    section = params.dataset
    sizes = {paths.dataset: params.image_sizes.students, paths.teacher_images: params.image_sizes.teacher}
    if len(set(sizes.values())) == 1:
        del sizes[paths.teacher_images]
    with contextlib.ExitStack() as stack:
        writers = [
            stack.enter_context(contextlib.closing(ImageWriter(stack.enter_context(replacing(path)), size)))
            for path, size in sizes.items()
        ]
        decoder = Decoder(writers, section.white)
        source, kept = load_images(section, decoder)
        fractions = section.validation, section.test, section.seed
        splits = split_dataset(source.labels, source.classes, source.is_test, *fractions, source.is_validation)
        small = {name: torch.from_numpy(split) for name, split in splits.items()}
        small["labels"] = torch.from_numpy(source.labels)
        for writer, others in zip(writers, (small, {}), strict=False):
            mean, std = measure_channels(writer.batches(kept[splits["train"]], decoder.channels))
            writer.finish(kept, decoder.channels, others | {"mean": mean, "std": std})
    if paths.teacher_images not in sizes:  # DVC expects the file
        none = torch.empty((0, decoder.channels, writers[0].size, writers[0].size), dtype=torch.uint8)
        write_tensors(paths.teacher_images, {"images": none})
    info = describe(params, source, splits, decoder)
    if absent := [name for name, count in info["class_counts"]["test"].items() if not count]:
        some = ", ".join(map(repr, absent[:MAX_NAMED])) + " …" * (len(absent) > MAX_NAMED)
        log(f"note: {section.source}: the test images have none of {some}, so accuracies say nothing of that")
    write_json(paths.dataset_info, info)


def describe(params: Params, source: SourceInfo, splits: dict[str, np.ndarray], decoder: Decoder) -> dict[str, Any]:
    """Content of ``dataset.json``; keys for special cases are there only in such a case."""
    counts = {name: np.bincount(source.labels[split], minlength=len(source.classes)) for name, split in splits.items()}
    info = {
        "source": params.dataset.source,
        "sha256": source.sha256,
        "classes": source.classes,
        "channels": decoder.channels,
        "size": params.image_sizes.students,
        "counts": {name: len(split) for name, split in splits.items()},
        "class_counts": {
            name: dict(zip(source.classes, found.tolist(), strict=True)) for name, found in counts.items()
        },
    }
    if params.image_sizes.teacher != params.image_sizes.students:
        info["teacher_size"] = params.image_sizes.teacher
    if decoder.broken:
        names = [name for _, name in sorted(decoder.broken)]
        info["skipped"] = {"count": len(names), "first": names[:MAX_NAMED]}
    if decoder.n_deep and params.dataset.white:
        info["white"] = params.dataset.white
    return info
