"""The tiny experiment: its parameters and its dataset."""

from copy import deepcopy
from pathlib import Path

import torch
from loads import CORE
from ruamel.yaml import YAML
from torch import Tensor

from nonn.commands.use import merge
from nonn.core.files import write_json
from nonn.core.params import Params
from nonn.core.paths import Paths
from nonn.data.dataset import Dataset, measure_channels
from nonn.data.tensors import write_tensors
from nonn.stages import assemble, design, distill, partition

REPOSITORY = Path(__file__).resolve().parents[1]
SHIPPED = YAML(typ="safe").load(REPOSITORY / "params.yaml")

#: What the tiny experiment changes in the shipped parameters.
TINY = {
    "experiment": "tiny",
    "numerics": "fast",  # as in the process of the tests, where torch is loaded before anything can be chosen
    "networks": {
        "2s": {
            "devices": ["small", "large"],
            "seeds": 1,
            "baselines": {"labels": 1, "kd": 2, "random": 1, "at_kd": 1},
        }
    },
    "devices": {"small": {"memory_kib": 40, "mmacs": 5}, "large": {"memory_kib": 60, "mmacs": 5}},
    "teacher": {
        "architecture": {"family": "fast", "widths": [8, 16, 32], "depth": 1},
        "epochs": 6,
        "batch_size": 10,
        "lr": 0.05,
        "threads": 1,
    },
    "signals": {"views": 2, "attention": True, "threads": 1},
    "graph": {"top_k": 8},
    "design": {"depths": [1], "min_width": 4, "max_width": 16, "step": 2},
    "distill": {"epochs": 5, "batch_size": 10, "lr": 0.03, "transfer_weight": 2.0},
    "assemble": {"epochs": 2},
    "evaluate": {"resamples": 200, "final_layer": "averaged", "threads": 1},
    "benchmark": {"warmup": 1, "runs": 10, "windows": 2, "pairs": 3, "core": CORE},
}


def tiny_params(changes: dict | None = None) -> dict:
    """Parameters of the tiny experiment, with further changes."""
    return merge(merge(deepcopy(SHIPPED), deepcopy(TINY)), deepcopy(changes or {}))


def make_dataset(channels: int = 1, size: int = 28) -> Dataset:
    """120 images of noise with horizontal stripes, vertical stripes or a chequerboard."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 100, (120, channels, size, size), generator=generator, dtype=torch.uint8)
    labels = torch.arange(120) % 3
    stripes = (torch.arange(size) // 2 % 2).byte().expand(size, size)
    patterns = torch.stack([stripes.T, stripes, stripes ^ stripes.T])
    images += 100 * patterns[labels][:, None]
    train, validation, test = torch.arange(120).split([60, 30, 30])
    return Dataset(
        images, labels, train, validation, test, *measure_channels(images[train]), ("across", "down", "chequered")
    )


def read_subset(data: Dataset, name: str) -> tuple[Tensor, Tensor]:
    """All images of ``train``, ``validation`` or ``test``, and their labels."""
    images, labels = data.subset(name)
    return images[:], labels


def write_dataset(data: Dataset, paths: Paths) -> None:
    names = ("images", "labels", "train", "validation", "test", "mean", "std")
    write_tensors(paths.dataset, {name: getattr(data, name) for name in names})
    write_tensors(paths.teacher_images, {"images": data.images[:0]})
    write_json(paths.dataset_info, {"classes": data.classes, "channels": data.channels, "size": data.size})


def train_network(params: Params, paths: Paths) -> None:
    """Run all stages from `design` to `assemble` of the network 2s."""
    design.run(params, paths, "2s")
    partition.run(params, paths, "2s")
    for student in range(2):
        distill.run(params, paths, "2s", student, seed=0)
    assemble.run(params, paths, "2s", seed=0)
