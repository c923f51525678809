"""One picture file as a network takes it: what is transparent, and what a name may hold."""

from pathlib import Path

import numpy as np
import pytest
from pictures import SIZE, fit_image, noise
from PIL import Image

from nonn.core.errors import UserError
from nonn.core.images import read_image


@pytest.mark.parametrize("mode", ["LA", "RGBA", "PA", "P", "L"])
def test_transparent_parts_are_white_whatever_colour_they_hide(mode, tmp_path):
    ink = np.zeros((SIZE, SIZE), np.uint8)
    ink[2:5, 3:6] = 255
    picture = Image.merge("LA", [Image.new("L", (SIZE, SIZE)), Image.fromarray(ink)])  # black on black
    if mode == "RGBA":
        picture = picture.convert("RGBA")
    elif mode in ("P", "L"):  # one value stands for what is not there
        picture = Image.fromarray(np.where(ink, 0, 7).astype(np.uint8), "L").convert(mode)
        picture.info["transparency"] = 7
    elif mode == "PA":
        picture = picture.convert("RGBA").convert("PA")
    path = tmp_path / ("ink.tif" if mode == "PA" else "ink.png")
    picture.save(path)
    assert (read_image(path, 1, SIZE)[0] == 255 - ink).all()


def test_an_opaque_picture_is_as_without_its_opacity():
    picture = Image.fromarray(noise(3))
    assert (fit_image(picture.convert("RGBA"), SIZE) == fit_image(picture, SIZE)).all()


def test_a_name_that_would_break_the_line_is_escaped():
    with pytest.raises(UserError, match=r"^no\\npe\\x1b\.png: no such file"):
        read_image(Path("no\npe\x1b.png"), 1, SIZE)
