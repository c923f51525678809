"""The key ``dataset.source`` of ``params.yaml``: the sources that it may name, and where their files lie."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator

from nonn.core.schema import did_you_mean

#: torchvision datasets with one label an image and a test split, and how each names its splits.
TORCHVISION: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    **dict.fromkeys(
        ("CIFAR10", "CIFAR100", "FashionMNIST", "KMNIST", "MNIST", "QMNIST", "USPS"),
        ({"train": True}, {"train": False}),
    ),
    **dict.fromkeys(("Food101", "STL10", "SVHN"), ({"split": "train"}, {"split": "test"})),
    "OxfordIIITPet": ({"split": "trainval"}, {"split": "test"}),
}


def _is_known(source: str) -> str:
    if len(f"{source}.".splitlines()) > 1:
        raise ValueError("has a line break; write it on one line")
    kind, _, name = source.partition(":")
    if kind == "torchvision" and name not in TORCHVISION:
        hint = did_you_mean(name, TORCHVISION)
        raise ValueError(f"torchvision:{name} is not known{hint}; name one of {', '.join(TORCHVISION)}")
    return source


#: See `nonn.data.sources.load_images`.
ImageSource = Annotated[str, AfterValidator(_is_known)]


def named_source(source: str) -> str | None:
    """Folder or archive that the pictures come from; None if a package brings or downloads them."""
    kind, _, name = source.partition(":")
    if kind == "hf":
        return str(path) if (path := hub_path(name)) else None
    return None if source == "mnist5k" or kind == "torchvision" else source


def hub_path(name: str) -> Path | None:
    """The folder or file on this machine that the source ``hf:NAME`` names; None if it names a dataset of the Hub."""
    path = Path(name)
    is_local = name.startswith((".", "/")) or name.count("/") > 1 or path.suffix == ".parquet" or path.exists()
    return path if is_local else None
