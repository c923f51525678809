"""What trainings read of earlier stages: the teacher's signals, designs, and sets of filters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from nonn.core.architecture import Architecture
from nonn.core.artifacts import BaselineSets, Designs, Filters
from nonn.core.errors import UserError
from nonn.core.files import damaged, intact, read_json
from nonn.core.paths import Paths
from nonn.data.dataset import Dataset
from nonn.data.tensors import read_tensors


def load_design(path: Path) -> list[tuple[Architecture, int | None]]:
    """Architecture and bridge outputs of each student in a file of the stage `design`; a UserError if it has none."""
    if not (designs := read_json(path, Designs)):
        raise UserError(
            f"{path}: the devices of `networks` fit no students of this baseline. Take it out of the network's "
            "`baselines`, or raise devices.*.memory_kib."
        )
    return [(Architecture(**design["architecture"]), design["n_filters"]) for design in designs]


def cut(filters: np.ndarray, sizes: Sequence[int]) -> list[list[int]]:
    """Cut a row of filters into sets of the given sizes, and sort each."""
    return [np.sort(part).tolist() for part in np.split(filters, np.cumsum(sizes)[:-1])]


def load_baseline_sets(path: Path, seed: int) -> Sequence[list[int] | None]:
    """Filters of each student of a baseline, from a file of the stage `partition`, with one of its seeds."""
    saved = read_json(path, BaselineSets)
    if "sets" in saved:
        return saved["sets"]
    with intact(path):
        return cut(np.random.default_rng(seed).permutation(saved["live"]), saved["sizes"])


def load_signals(paths: Paths, data: Dataset) -> dict[str, Tensor]:
    """What the stage `signals` wrote, as `nonn.teachers.signals.compute_signals` describes it."""
    signals = read_tensors(paths.signals)
    expected = {"logits": len(data.train), "pooled": len(data.train), "validation_pooled": len(data.validation)}
    for name, n_images in expected.items():
        if name not in signals:
            raise damaged(paths.signals, f"{name} is missing")
        if signals[name].dim() < 2 or signals[name].shape[-2] != n_images:
            raise damaged(paths.signals, f"{name} is not of the {n_images} images of this dataset")
    return signals


def load_filters(path: Path, signals: Mapping[str, Tensor]) -> list[int]:
    """Filters of a student, from a file of the stage `partition`."""
    filters, n_filters = read_json(path, Filters)["filters"], signals["pooled"].shape[-1]
    if max(filters, default=0) >= n_filters:
        raise damaged(path, f"filter {max(filters)} of a teacher that has {n_filters}")
    return filters
