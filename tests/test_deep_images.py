"""Images of more than 8 bits a channel."""

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from pictures import SIZE, load_images, make_params, write_folder
from PIL import Image

from nonn.core.errors import UserError
from nonn.core.files import read_json
from nonn.core.images import read_image
from nonn.core.paths import Paths
from nonn.data.dataset import load_dataset
from nonn.stages.dataset import run

PATHS = Paths("test")

pytestmark = pytest.mark.usefixtures("folder")


def save_deep(path: Path, pixels: np.ndarray) -> None:
    Image.fromarray(pixels).save(path)


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bits_are_scaled_to_8_by_their_full_range(suffix, tmp_path):
    levels = np.linspace(0, 65535, SIZE * SIZE).round().astype(np.uint16).reshape(SIZE, SIZE)
    save_deep(tmp_path / f"a.{suffix}", levels)
    expected = np.rint(levels / 257)
    np.testing.assert_array_equal(read_image(tmp_path / f"a.{suffix}", 1, SIZE)[0], expected)


@pytest.mark.parametrize(("dtype", "white"), [(np.int32, None), (np.float32, 65535.0), (np.float32, 1000.0)])
def test_whole_and_broken_numbers_of_32_bits_are_scaled_too(dtype, white, tmp_path):
    top = white or 65535
    levels = np.linspace(0, top, SIZE * SIZE).astype(dtype).reshape(SIZE, SIZE)
    save_deep(tmp_path / "a.tif", levels)
    expected = np.rint(levels.astype(np.float64) * 255 / top)
    np.testing.assert_allclose(read_image(tmp_path / "a.tif", 1, SIZE, white)[0], expected, atol=1)


def test_fractions_are_white_at_1(tmp_path):
    save_deep(tmp_path / "a.tif", np.full((SIZE, SIZE), 0.6, np.float32))
    assert (read_image(tmp_path / "a.tif", 3, SIZE) == 153).all()


@pytest.mark.parametrize(
    ("value", "reason"),
    [(-1.0, "a pixel of -1, below black"), (2.0, "above the white of 1; set dataset.white"), (np.nan, "no number")],
)
def test_values_that_no_picture_has_are_named(value, reason, tmp_path):
    pixels = np.full((SIZE, SIZE), 0.5, np.float32)
    pixels[3, 4] = value
    save_deep(tmp_path / "a.tif", pixels)
    with pytest.raises(UserError, match=f"a.tif: not a readable image .*{reason}"):
        read_image(tmp_path / "a.tif", 1, SIZE)


def write_deep_folder(root: Path, largest: int) -> Path:
    generator = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (root / name).mkdir(parents=True)
        for i in range(4):
            pixels = generator.integers(0, largest, (SIZE, SIZE), dtype=np.uint16)
            pixels[0, 0] = largest
            save_deep(root / name / f"{i}.png", pixels)
    return root


def test_12_bits_in_16_are_refused_until_white_is_named(tmp_path):
    root = write_deep_folder(tmp_path / "scans", 4095)
    with pytest.raises(UserError, match=r"8 pictures of more than 8 bits is at 6\.2% .*nearly black.*dataset\.white"):
        load_images(root)
    run(make_params(root, white=4095.0), PATHS)
    data = load_dataset(PATHS)
    assert data.channels == 1
    assert data.images.max() == 255
    assert data.images.float().mean() == pytest.approx(127.5, abs=4)
    assert data.white == 4095, "devices scale by it too"
    assert read_json(PATHS.dataset_info)["white"] == 4095


def test_white_scales_nothing_of_8_bits(tmp_path):
    root = write_folder(tmp_path / "pets", ["cat", "dog"], count=1)
    np.testing.assert_array_equal(load_images(root, white=4095.0).images, load_images(root).images)


def write_png_of_16_bits(path: Path, kind: int, pixels: np.ndarray) -> None:
    """Write a PNG of colour type `kind` by hand, since Pillow writes none of 16 bits but in grey."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", SIZE, SIZE, 16, kind, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + parts)


def test_16_bits_of_colour_keep_the_upper_8(tmp_path):
    """Pillow reads no more of them."""
    pixels = np.random.default_rng(0).integers(0, 65536, (SIZE, SIZE, 3), dtype=np.uint16)
    write_png_of_16_bits(tmp_path / "a.png", 2, pixels)
    for white in (None, 65535.0):
        np.testing.assert_array_equal(read_image(tmp_path / "a.png", 3, SIZE, white), (pixels >> 8).transpose(2, 0, 1))
    with pytest.raises(UserError, match=r"16 bits a channel, which dataset\.white does not scale; save it with 8"):
        read_image(tmp_path / "a.png", 3, SIZE, 4095.0)


def test_12_bits_of_colour_in_16_are_refused(tmp_path):
    for seed, name in enumerate(["cat/0.png", "cat/1.png", "cat/2.png", "dog/0.png", "dog/1.png", "dog/2.png"]):
        pixels = np.random.default_rng(seed).integers(0, 4096, (SIZE, SIZE, 4), dtype=np.uint16)
        pixels[..., 3] = 65535
        write_png_of_16_bits(tmp_path / "scans" / name, 6, pixels)
    with pytest.raises(UserError, match=r"6 pictures of more than 8 bits .*nearly black"):
        load_images(tmp_path / "scans")
    assert load_images(tmp_path / "scans", white=65535.0).images.max() == 15


def test_grey_of_16_bits_with_transparency_is_refused(tmp_path):
    """Pillow would read it as colour."""
    write_png_of_16_bits(tmp_path / "a.png", 4, np.zeros((SIZE, SIZE, 2), np.uint16))
    with pytest.raises(UserError, match=r"grey of 16 bits with transparency; save it without"):
        read_image(tmp_path / "a.png", 1, SIZE)


def test_16_bits_with_white_at_zero_are_turned_round(tmp_path):
    levels = np.linspace(0, 65535, SIZE * SIZE).round().astype(np.uint16).reshape(SIZE, SIZE)
    Image.fromarray(levels).save(tmp_path / "a.tif")
    content = (tmp_path / "a.tif").read_bytes()
    one, zero = (struct.pack("<HHII", 262, 3, 1, value) for value in (1, 0))
    (tmp_path / "a.tif").write_bytes(content.replace(one, zero))
    np.testing.assert_array_equal(read_image(tmp_path / "a.tif", 1, SIZE)[0], np.rint((65535 - levels) / 257))
