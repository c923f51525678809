"""The images that a device sees for itself, in a test bed: a file stands for its camera.

Where every device has a sensor of its own, the coordinator sends no image, only which one is meant.
"""

from __future__ import annotations

from pathlib import Path
from tokenize import TokenError

import numpy as np

from nonn.core.errors import UserError
from nonn.core.files import regular


def load_sensor(path: Path | None, shape: tuple[int, ...]) -> np.ndarray | None:
    """Images of a ``.npy`` file, uint8 of shape (n, channels, size, size); None without a file.

    Raises
    ------
    UserError
        The file cannot be read, or its images are not of the shape (channels, size, size).
    """
    if path is None:
        return None
    try:
        # numpy.load would also open archives of arrays (.npz), and has an error of its own for an empty file.
        images = np.lib.format.open_memmap(regular(path), mode="r")
    except (OSError, ValueError, TokenError) as error:  # the last where the header does not parse
        raise UserError(f"{path}: cannot be read ({error}). Save a sensor's images with numpy.save.") from None
    if images.dtype != np.uint8 or images.shape[1:] != shape or len(images) == 0:
        wanted = ", ".join(map(str, shape))
        raise UserError(f"{path}: holds {images.dtype} {images.shape}; give a sensor uint8 of shape (n, {wanted})")
    return images
