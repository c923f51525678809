"""A picture as a network takes it: upright, square, of the right size and channels, with 8 bits a channel."""

from __future__ import annotations

import warnings
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps

from nonn.core.errors import UserError, printable, refusal
from nonn.core.files import regular

#: What is read, as Pillow names it. Others are not: for EPS, Pillow starts another program. TGA comes last, since its
#: files do not begin with its name.
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "PPM", "JPEG2000", "AVIF", "TGA")
#: Pillow modes that are converted to greyscale or colour.
GREY_MODES = {"1", "L", "LA", "La"}
COLOUR_MODES = {"RGB", "RGBA", "RGBa", "RGBX", "P", "PA", "CMYK", "YCbCr", "LAB", "HSV"}
#: Modes of more than 8 bits a pixel, all of them grey: of Pillow's colours none has more.
DEEP_MODES = {"I", "F", "I;16", "I;16L", "I;16B", "I;16N"}
#: A JPEG is decoded at a half, a quarter or an eighth of its size where that leaves this many pixels for each that is
#: wanted: an eighth of a photograph takes a quarter of the time, and resizing still averages what is left.
SPARE = 2
BITS_PER_SAMPLE, PHOTOMETRIC, WHITE_IS_ZERO = 258, 262, 0  # two tags of TIFF, and a value of the second
#: The white of colours with 16 bits a channel: Pillow keeps their upper 8, so they cannot be scaled by another.
COLOUR_WHITE = 65535
#: What brings a picture upright, by the orientation in its EXIF; 1 is upright.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# Pillow refuses pictures of twice the size of which it warns, in an error; the warning tells a user nothing to do.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


def read_image(path: Path, channels: int, size: int, white: float | None = None) -> np.ndarray:
    """An image file as the network takes it: uint8 of shape (channels, size, size).

    `white` is that of `upright`. A file that is not an image is a UserError.
    """
    try:
        with open_image(regular(path), size) as image:
            return fit_network(image, channels, size, white)
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{printable(path)}: no such file. Give the path of an image.") from None
    except Exception as error:
        if isinstance(error, OSError) and (told := refusal(error, path)):
            raise told from None
        # On damaged data, Pillow's decoders raise almost anything.
        raise UserError(
            f"{printable(path)}: not a readable image ({error}). Give one of {', '.join(FORMATS)}."
        ) from None


def open_image(file: Path | bytes, size: int | None = None) -> Image.Image:
    """Open an image file, or its bytes, as it is, or to fit it to `size` pixels: see `SPARE`."""
    image = Image.open(BytesIO(file) if isinstance(file, bytes) else file, formats=FORMATS)
    if size and image.format == "JPEG":
        image.draft(None, (SPARE * size, SPARE * size))
    return image


def fit_network(image: Image.Image, channels: int, size: int, white: float | None = None) -> np.ndarray:
    """Fit an image to a network, in grey if that is what it takes: uint8 of shape (channels, size, size).

    Raises ValueError as `upright` does, and whatever Pillow raises on damaged data.
    """
    image = upright(image, white)
    if image.mode == "RGB" and channels == 1:
        image = image.convert("L")
    return np.ascontiguousarray(np.broadcast_to(squared(image, size), (channels, size, size)))


def upright(image: Image.Image, white: float | None = None) -> Image.Image:
    """Turn an image as it was taken, in place; return it in mode RGB, L, or F with grey levels from 0 to 255.

    Pixels of more than 8 bits are divided by `white`, the value that becomes grey level 255. None is what the file
    states: 2^b − 1 with its b bits a pixel, 65535 for whole numbers of no stated depth, and 1 for fractions. The range
    of the picture itself does not count: the same value is the same grey level in all pictures, at training and on
    devices. Of colours with 16 bits a channel, Pillow keeps the upper 8. Transparent parts show a white ground.
    `info["levels"]` has the largest grey level if the pixels have more than 8 bits, else None.

    Raises
    ------
    ValueError
        A pixel is negative, above `white` or no number; or the mode is none of a picture's; or it has 16 bits a
        channel, and is grey with transparency, or in colour and `white` is another than theirs.
    """
    stored = _stored_mode(image)
    if stored.startswith("LA;16"):
        raise ValueError("grey of 16 bits with transparency; save it without")
    _turn(image)
    if image.mode in DEEP_MODES:
        return _scaled(image, white)
    if image.mode not in GREY_MODES | COLOUR_MODES:
        raise ValueError(f"pixels of mode {image.mode}; save it in grey or RGB")
    mode = "L" if image.mode in GREY_MODES else "RGB"
    is_deep = stored.startswith(("RGB", "CMYK")) and ";16" in stored  # BGR;16 has 16 bits a pixel
    if is_deep and white not in (None, COLOUR_WHITE):
        raise ValueError("colours of 16 bits a channel, which dataset.white does not scale; save it with 8")
    if image.has_transparency_data:
        image = _on_white(image)
    image = image if image.mode == mode else image.convert(mode)
    image.info["levels"] = float(np.asarray(image).max()) if is_deep else None
    return image


def _stored_mode(image: Image.Image) -> str:
    """What Pillow calls the mode of the file, such as ``RGB;16B``, of an image that it has not decoded yet."""
    tiles = getattr(image, "tile", None)
    args = tiles[0].args if tiles else ""
    return args if isinstance(args, str) else str(args[0]) if args else ""


def _turn(image: Image.Image) -> None:
    """Turn an image by the orientation in its EXIF; the other tags, which may be damaged, are left as they are."""
    image.load()
    try:
        turn = TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # on damaged EXIF, Pillow raises almost anything; the pixels are sound
        return
    if turn is not None:
        image.im = image.im.transpose(turn)
        image._size = image.im.size


def _on_white(image: Image.Image) -> Image.Image:
    """A picture with transparent parts as viewers show it: below these, its own colour may be anything."""
    if image.mode == "La":
        image = image.convert("LA")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)


def squared(image: Image.Image, size: int) -> np.ndarray:
    """The central square of what `upright` returns, resized: uint8 of shape (1 or 3, size, size)."""
    if image.size != (size, size):
        image = ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR)
    pixels = np.asarray(image)
    pixels = np.rint(pixels).astype(np.uint8) if image.mode == "F" else pixels
    return pixels.reshape(size, size, -1).transpose(2, 0, 1)


def stated_white(image: Image.Image) -> float:
    """The largest value that a pixel of more than 8 bits can have, by what the file says."""
    if image.mode == "F":
        return 1.0
    bits = getattr(image, "tag_v2", {}).get(BITS_PER_SAMPLE, (16,))[0]
    return float(2 ** min(int(bits), 16) - 1)


def _scaled(image: Image.Image, white: float | None) -> Image.Image:
    pixels = np.asarray(image)
    low, high, white = float(pixels.min()), float(pixels.max()), white or stated_white(image)
    if not np.isfinite(pixels).all():
        raise ValueError("a pixel that is no number; save it again without")
    if low < 0:
        raise ValueError(f"a pixel of {low:g}, below black; add the same number to all pictures")
    if high > white:
        raise ValueError(f"a pixel of {high:g}, above the white of {white:g}; set dataset.white to the largest of all")
    if getattr(image, "tag_v2", {}).get(PHOTOMETRIC) == WHITE_IS_ZERO:
        pixels = white - pixels
    scaled = Image.fromarray(pixels.astype(np.float32) * np.float32(255 / white))
    scaled.info["levels"] = 255 * high / white
    return scaled
