"""Images that are read when they are asked for: as a whole, in batches, in chunks."""

import contextlib

import pytest
import torch

from nonn.data.image_store import Images, ImageWriter

SOURCE = torch.arange(10, dtype=torch.uint8).reshape(10, 1, 1, 1).expand(10, 3, 2, 2).contiguous()
CHOSEN = Images(SOURCE, torch.tensor([1, 2, 4, 5, 7, 9, 0]))


def first_pixels(images: Images) -> list[int]:
    return [int(image[0, 0, 0]) for image in images.each()]


def test_chunks_are_all_images_in_their_order():
    for count in (1, 3, 7):
        chunks = CHOSEN.chunks(count)
        assert [pixel for chunk in chunks for pixel in first_pixels(chunk)] == [1, 2, 4, 5, 7, 9, 0]
        assert max(map(len, chunks)) - min(map(len, chunks)) <= 1


def test_chunks_are_not_read_before_they_are_asked_for():
    images = Images(SOURCE.clone(), torch.arange(10))
    chunks = images.chunks(2)
    images.source[9] = 42
    assert first_pixels(chunks[1]) == [5, 6, 7, 8, 42]


def test_a_folder_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "images").mkdir()  # where the file would be: not even root can write there
    with pytest.raises(IsADirectoryError), contextlib.closing(ImageWriter(tmp_path / "images", 4)) as writer:
        writer.begin(3)
