"""Images are turned upright as their EXIF says, and damaged EXIF costs nothing."""

import io
import os
import struct
import subprocess
import sys

import numpy as np
import pytest
from pictures import (
    SIZE,
    fit_image,
    noise,
)
from PIL import Image, ImageOps

from nonn.core.images import upright

pytestmark = pytest.mark.usefixtures("folder")


def test_photographs_are_turned_upright():
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: a quarter turn clockwise brings the top up
    file = io.BytesIO()
    Image.fromarray(noise(0)).save(file, "PNG", exif=exif)
    np.testing.assert_array_equal(fit_image(Image.open(file), SIZE), np.rot90(noise(0), k=-1).transpose(2, 0, 1))


@pytest.mark.parametrize("mode", ["RGB", "P", "LA", "I;16"])
def test_pictures_are_turned_as_pillow_turns_them_by_every_orientation(mode):
    for orientation in range(10):
        exif, file = Image.Exif(), io.BytesIO()
        exif[0x0112] = orientation
        picture = Image.fromarray(noise(0)[:20])
        picture = (
            Image.fromarray(257 * noise(0)[:20, :, 0].astype(np.uint16)) if mode == "I;16" else picture.convert(mode)
        )
        picture.save(file, "PNG", exif=exif)
        turned = upright(ImageOps.exif_transpose(Image.open(file)))
        np.testing.assert_array_equal(upright(Image.open(file)), turned)


@pytest.mark.parametrize(("kind", "turned"), [(b"MM", True), (b"??", False)])
def test_damaged_exif_leaves_a_picture_as_it_is(kind, turned):
    """A tag that cannot be written again, or nothing that can be read."""
    tags = [(0x0112, 3, 1, b"\0\6\0\0"), (0x0118, 2, 4, b"few\0")]  # the latter has to be a number
    exif = b"Exif\0\0" + kind + b"\0*\0\0\0\x08\0\2" + b"".join(struct.pack(">HHI4s", *tag) for tag in tags) + bytes(4)
    file = io.BytesIO()
    Image.fromarray(noise(0)).save(file, "PNG", exif=exif)
    expected = np.rot90(noise(0), k=-1) if turned else noise(0)
    np.testing.assert_array_equal(fit_image(Image.open(file), SIZE), expected.transpose(2, 0, 1))


def test_damaged_exif_is_no_warning_of_a_library(tmp_path):
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\x05\x01\x12\0\x03"  # five entries, and the file ends in the first
    Image.fromarray(noise(0)).save(tmp_path / "a.jpg", exif=exif)
    program = (
        "from PIL import Image, ImageOps\nimport nonn.data.decoding\nImageOps.exif_transpose(Image.open('a.jpg'))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=os.environ, capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
