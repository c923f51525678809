"""A picture as a network takes it: upright, square, of the right size and channels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from nonn.core.errors import UserError
from nonn.core.files import regular


def read_image(path: Path, channels: int, size: int) -> np.ndarray:
    """An image file as the network takes it: uint8 of shape (channels, size, size).

    A file that is not an image, or has more than 8 bits a channel, is a UserError.
    """
    try:
        with Image.open(regular(path)) as image:
            return fit_network(image, channels, size)
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{path}: no such file. Give the path of an image.") from None
    except Exception as error:  # on damaged data, Pillow's decoders raise almost anything
        raise UserError(f"{path}: not a readable image ({error}). Give a PNG, JPEG or the like.") from None


def fit_network(image: Image.Image, channels: int, size: int) -> np.ndarray:
    """Fit an image to a network, in grey if that is what it takes: uint8 of shape (channels, size, size).

    Raises ValueError as `fit_image` does, and whatever Pillow raises on damaged data.
    """
    pixels = fit_image(image, size)
    if len(pixels) > channels:
        pixels = fit_image(image.convert("L"), size)
    return np.ascontiguousarray(np.broadcast_to(pixels, (channels, size, size)))


#: Pillow modes that are converted to greyscale or colour. Deeper ones would be clipped to 8 bits.
GREY_MODES = {"1", "L", "LA"}
COLOUR_MODES = {"RGB", "RGBA", "P", "PA", "CMYK", "YCbCr"}


def fit_image(image: Image.Image, size: int) -> np.ndarray:
    """Turn an image upright, crop it to its central square, resize it: uint8 of shape (1 or 3, size, size).

    Raises ValueError if it has more than 8 bits a channel.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode not in GREY_MODES | COLOUR_MODES:
        raise ValueError(f"pixels of mode {image.mode}; save it with 8 bits a channel")
    image = image.convert("L" if image.mode in GREY_MODES else "RGB")
    if image.size != (size, size):
        image = ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR)
    return np.asarray(image).reshape(size, size, -1).transpose(2, 0, 1)
