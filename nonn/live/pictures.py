"""The pictures of the live page: the user's files, or the test images of the experiment."""

from __future__ import annotations

import base64
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError
from safetensors import SafetensorError, safe_open

from nonn.core.artifacts import DatasetInfo
from nonn.core.errors import UserError
from nonn.core.files import read_json
from nonn.core.images import DEEP_MODES, FORMATS, fit_network, open_image, read_image
from nonn.runtime.exported import Manifest

#: Most pixels of a picture that a viewer sends, and most bytes that it may take while it is decoded.
MAX_PIXELS, MAX_DECODED_BYTES = 50_000_000, 500_000_000
#: Most bytes of a pixel while decoding, measured with Pillow 13: of formats that are decoded as a whole; of pictures
#: that are transparent or of more than 8 bits; and of all others.
WHOLE, RICH, PLAIN = 26, 17, 10
WHOLE_FORMATS = {"AVIF", "JPEG2000", "WEBP"}
SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}


@dataclass(frozen=True)
class ShownPicture:
    """A picture that is read when its turn comes."""

    name: str  # that is shown
    truth: str | None  # its class, where that is known
    read: Callable[[], np.ndarray]  # uint8 of shape (channels, size, size)


def find_pictures(paths: Sequence[Path], manifest: Manifest) -> list[ShownPicture]:
    """Picture files, in the order given; those of a folder in a fixed random order.

    If a file's folder has the name of a class, that is the file's class.

    Raises
    ------
    UserError
        There are none.
    """
    image, found = manifest.image, []
    for path in paths:
        files = [path]
        if path.is_dir():
            files = sorted(file for file in _files_below(path) if file.suffix.lower() in SUFFIXES and file.is_file())
            files = [files[i] for i in _shuffled(len(files))]
        elif not path.is_file():
            raise UserError(f"--images: {path}: no such file or folder.")
        for file in files:
            truth = file.parent.name if file.parent.name in manifest.classes else None
            found.append(
                ShownPicture(file.name, truth, partial(read_image, file, image.channels, image.size, image.white))
            )
    if not found:
        raise UserError(f"--images: no pictures ({', '.join(sorted(SUFFIXES))}) in {', '.join(map(str, paths))}.")
    return found


def _files_below(folder: Path) -> Iterator[Path]:
    """Files below a folder; a folder that may not be read is an OSError."""

    def refuse(error: OSError) -> None:
        raise error

    for within, _, names in os.walk(folder, onerror=refuse):
        yield from (Path(within, name) for name in names)


def dataset_pictures(path: Path, manifest: Manifest) -> list[ShownPicture]:
    """Test images of the ``dataset.safetensors`` of an experiment, in a fixed random order.

    Raises
    ------
    UserError
        The file is missing or damaged, or its images or classes are not those of the network.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file, so there is nothing to classify. Give pictures with --images FOLDER.")
    try:
        file = safe_open(path, framework="numpy")
        images, indices, labels = file.get_slice("images"), file.get_tensor("test"), file.get_tensor("labels")
        shape = tuple(images.get_shape()[1:])
    except SafetensorError as error:
        raise UserError(f"{path}: damaged ({error}). Give pictures with --images FOLDER.") from None
    image = manifest.image
    info = path.with_suffix(".json")
    classes = tuple(read_json(info, DatasetInfo)["classes"]) if info.is_file() else tuple(manifest.classes)
    if shape != image.shape or classes != tuple(manifest.classes) or labels.max() >= len(classes):
        raise UserError(f"{path}: is not the dataset of this network. Give pictures with --images FOLDER.")
    return [
        ShownPicture(
            f"test image {i}", manifest.classes[labels[index]], partial(lambda k: images[k : k + 1][0], int(index))
        )
        for i, index in ((int(i), indices[i]) for i in _shuffled(len(indices)))
    ]


def sent_picture(name: str, content: bytes, invert: bool, manifest: Manifest) -> ShownPicture:
    """A picture that a viewer sent, from the bytes of its file, or its negative.

    Raises
    ------
    UserError
        It cannot be read, or is too large.
    """
    shape = manifest.image
    try:
        with open_image(content) as image:
            width, height = image.size
        with open_image(content, shape.size) as image:
            if width * height > MAX_PIXELS or decoded_bytes(image) > MAX_DECODED_BYTES:
                raise ValueError(f"{width} × {height} pixels are too many")
            pixels = fit_network(image, shape.channels, shape.size, shape.white)
    except Exception as error:  # on damaged data, Pillow's decoders raise almost anything
        reason = "not an image" if isinstance(error, UnidentifiedImageError) else error
        raise UserError(f"{name}: cannot be read ({reason}). Send one of {', '.join(FORMATS)}.") from None
    pixels = 255 - pixels if invert else pixels
    return ShownPicture(name, None, lambda: pixels)


def decoded_bytes(image: Image.Image) -> int:
    """Most bytes that an open image takes until it has the size of the network's images."""
    if image.format in WHOLE_FORMATS:
        weight = WHOLE
    else:
        weight = RICH if image.mode in DEEP_MODES or image.has_transparency_data else PLAIN
    return weight * image.width * image.height


def as_png(pixels: np.ndarray) -> str:
    """A picture, uint8 of shape (channels, size, size), as the text of a PNG in base64."""
    content = BytesIO()
    Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0)).save(content, "PNG")
    return base64.b64encode(content.getvalue()).decode()


def _shuffled(count: int) -> np.ndarray:
    """A random order, since datasets and folders are sorted by class: a viewer would long see one class."""
    return np.random.default_rng(0).permutation(count)
