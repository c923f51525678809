"""The key ``dataset.source`` of ``params.yaml``: what it may name beside folders and archives."""

from __future__ import annotations

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
    kind, _, name = source.partition(":")
    if kind == "torchvision" and name not in TORCHVISION:
        hint = did_you_mean(name, TORCHVISION)
        raise ValueError(f"torchvision:{name} is not known{hint}; name one of {', '.join(TORCHVISION)}")
    return source


#: See `nonn.data.sources.load_images`.
ImageSource = Annotated[str, AfterValidator(_is_known)]
