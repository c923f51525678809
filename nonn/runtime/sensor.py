"""The images of a device's own sensor, in a test bed: a file stands in for its camera.

Where every device has its own sensor, the coordinator sends no image, only its index.
"""

from __future__ import annotations

from pathlib import Path
from tokenize import TokenError

import numpy as np

from nonn.core.errors import UserError
from nonn.core.files import regular


def load_sensor(path: Path | None, shape: tuple[int, ...]) -> np.ndarray | None:
    """The images of a device's sensor, see `open_images`; None without a file."""
    return None if path is None else open_images(path, shape)


def open_images(path: Path, shape: tuple[int, ...], least: int = 1) -> np.ndarray:
    """Images of a ``.npy`` file, uint8 of shape (n, channels, size, size), mapped into memory.

    Raises
    ------
    UserError
        The file cannot be read, has fewer than `least`, or its images are not of the shape (channels, size, size).
    """
    try:
        # numpy.load would also open archives of arrays (.npz), and has an error of its own for an empty file.
        images = np.lib.format.open_memmap(regular(path), mode="r")
    except (OSError, OverflowError, ValueError, TokenError) as error:  # the last where the header does not parse
        raise UserError(f"{path}: cannot be read ({error}). Save images of uint8 with numpy.save.") from None
    if images.dtype != np.uint8 or images.shape[1:] != shape or len(images) < least:
        wanted = f"uint8 of shape (n, {', '.join(map(str, shape))}), n from {least} on"
        raise UserError(f"{path}: holds {images.dtype} {images.shape}; give images of {wanted}")
    return images
