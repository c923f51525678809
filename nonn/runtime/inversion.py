"""Telling dark on light from light on dark: by the border of a picture, where its background usually lies."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from nonn.runtime.exported import ImageFormat

#: Share of the training images whose borders are within the range that is kept.
USUAL = 0.99
MIDDLE = 127.5


def border_brightness(images: np.ndarray) -> np.ndarray:
    """Mean grey level of the outermost pixels of images, uint8 of shape (..., channels, size, size); shape (...)."""
    inner = np.zeros(images.shape[-2:], bool)
    inner[1:-1, 1:-1] = True
    return images[..., ~inner].mean((-1, -2))


def usual_border(batches: Iterable[np.ndarray]) -> tuple[float, float]:
    """Grey levels between which the border lies in the share `USUAL` of images, uint8 (B, channels, size, size)."""
    levels = np.concatenate([border_brightness(batch) for batch in batches])
    low, high = np.quantile(levels, [(1 - USUAL) / 2, (1 + USUAL) / 2])
    return round(float(low), 2), round(float(high), 2)


def looks_inverted(pixels: np.ndarray, image: ImageFormat) -> bool:
    """Whether the negative of a picture, uint8 of shape (channels, size, size), is more like the training images.

    True if the border's grey level is outside the usual range and the negative's is less than half as far from it.
    False where dark and bright borders are both usual, or the export does not state the range.
    """
    if image.border is None or image.border[0] <= MIDDLE <= image.border[1]:
        return False
    low, high = image.border
    brightness = float(border_brightness(pixels))

    def distance(level: float) -> float:
        return max(low - level, level - high, 0)

    return distance(brightness) > 2 * distance(255 - brightness)


def describe_inversion(image: ImageFormat) -> str:
    """A hint about a picture that looks inverted."""
    assert image.border, "only a picture that was compared with it looks inverted"
    usual = "dark" if image.border[1] < MIDDLE else "bright"
    other = "bright" if usual == "dark" else "dark"
    return f"the picture looks inverted: its border is {other}, that of the training pictures {usual}"
