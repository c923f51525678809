"""What every source of images becomes: one array of square images, with labels and classes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from itertools import islice

import numpy as np
from PIL import Image, UnidentifiedImageError

from nonn.core.errors import UserError
from nonn.core.images import fit_image
from nonn.core.progress import track

KEY = "params.yaml: dataset.source"

#: Images that a thread decodes in one go (handing over small ones singly costs more than decoding
#: them), and how many such batches are in memory at once.
BATCH, BATCHES = 64, 16

#: Index of an image in the result, its name for the reader, and the image or its file's bytes.
Picture = tuple[int, str, Image.Image | bytes]


@dataclass(frozen=True, eq=False)
class RawImages:
    """All images of a source, of C = 3 channels if any of them has colour, otherwise 1."""

    images: np.ndarray  # (N, C, size, size), uint8
    labels: np.ndarray  # (N,), int64
    classes: tuple[str, ...]
    is_test: np.ndarray | None  # (N,), bool: the source's own test split, None if it has none
    sha256: str
    is_validation: np.ndarray | None = None  # (N,), bool: its own validation split, None if it has none


def decode_images(pictures: Iterator[Picture], count: int, size: int) -> np.ndarray:
    """Decode and resize images in parallel, to uint8 of shape (count, C, size, size); C is 3 if any has colour, else 1.

    `pictures` has every index below `count` once, in any order. What is not an image, is damaged, or has more than 8
    bits a channel is a UserError.
    """
    images = np.empty((count, 3, size, size), np.uint8)

    def decode(batch: list[Picture]) -> list[int]:
        channels = []
        for index, name, content in batch:
            try:
                image = Image.open(BytesIO(content)) if isinstance(content, bytes) else content
                pixels = fit_image(image, size)
            except Exception as error:  # on damaged data, Pillow's decoders raise almost anything
                reason = "not an image" if isinstance(error, UnidentifiedImageError) else error
                raise UserError(f"{KEY}: {name} cannot be read ({reason}). Replace or remove it.") from error
            images[index] = pixels  # greyscale broadcasts over the three channels
            channels.append(len(pixels))
        return channels

    def decoded() -> Iterator[int]:
        batches = iter(lambda: list(islice(pictures, BATCH)), [])
        while window := list(islice(batches, BATCHES)):
            for channels in pool.map(decode, window):
                yield from channels

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        channels = max(n for _, n in zip(track(range(count), "images"), decoded(), strict=True))
    return images if channels == 3 else images[:, :1].copy()


def check_sha256(source: str, found: str, expected: str | None) -> None:
    if expected not in (None, found):
        raise UserError(
            f"params.yaml: dataset.sha256: {source} has SHA-256 {found}, not {expected} as stated. "
            "Fetch the right content, or correct the key."
        )
