"""Writing the images of a data set to a file, and reading them when they are asked for: never all are in memory.

An `ImageWriter` takes images in any order while they are decoded, and makes a safetensors file of them. `Images` reads
them back.
"""

from __future__ import annotations

import json
import math
import mmap
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nonn.core.errors import refusal
from nonn.core.files import damaged, existing

#: Bytes of images in memory at once where all images are processed.
CHUNK_BYTES = 1 << 26
#: Bytes read through a mapping after which its pages are released: they stay in the system's cache, but count as memory
#: of this process as long as it holds them.
MAX_MAPPED_BYTES = 1 << 28

#: Types of tensors as safetensors calls them, in the order in which it stores them.
TYPES = {torch.int64: "I64", torch.float32: "F32", torch.uint8: "U8"}


def spaced(count: int, most: int) -> slice:
    """`most` at most of `count` images, evenly spaced, for a source may list its images class by class."""
    return slice(None, None, max(1, math.ceil(count / most)))


class ImageWriter:
    """Writes a file of images of `size` pixels a side, in any order and from any thread.

    Until `finish`, every image has three channels and is stored after a gap large enough for all other tensors.
    `finish` moves the images forward, which needs no further space on the disk.
    """

    def __init__(self, path: Path, size: int):
        self.path, self.size, self.count = path, size, 0

    def begin(self, count: int) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        self.count, self.place = count, 16 * count + (1 << 14)  # two numbers of 8 bytes an image, and the header

    def write(self, index: int, pixels: np.ndarray) -> None:
        """Write image `index`, uint8 of shape (1 or 3, size, size): grey is written to all three channels."""
        image = np.ascontiguousarray(np.broadcast_to(pixels, (3, self.size, self.size)))
        try:
            _write(self.file, image.data, self.place + index * image.nbytes)
        except OSError as error:  # a full disk is no fault of the picture or of its source
            raise refusal(error, self.path.parent) or error from None

    def batches(self, indices: np.ndarray, channels: int) -> Iterator[Tensor]:
        """The images `indices`, ascending, in batches of uint8 of shape (B, channels, size, size)."""
        image = 3 * self.size**2
        for part in np.array_split(indices, -(-len(indices) * image // CHUNK_BYTES)):
            pixels = np.empty((len(part), 3, self.size, self.size), np.uint8)
            for run in np.split(np.arange(len(part)), np.flatnonzero(np.diff(part) != 1) + 1):
                _read(self.file, pixels[run[0] : run[-1] + 1].data, self.place + int(part[run[0]]) * image)
            yield torch.from_numpy(pixels[:, :channels])

    def finish(self, kept: np.ndarray, channels: int, others: Mapping[str, Tensor]) -> None:
        """Make the file a safetensors file of the images `kept`, ascending, as ``images``, and of small tensors.

        The bytes are those that safetensors itself would write.
        """
        shape = (len(kept), channels, self.size, self.size)
        tensors: dict[str, Tensor] = {"images": torch.empty(shape, dtype=torch.uint8, device="meta"), **others}
        order = sorted(tensors, key=lambda name: (list(TYPES).index(tensors[name].dtype), name))
        header, end = {}, 0
        for name in order:
            begin, end = end, end + tensors[name].numel() * tensors[name].element_size()
            entry = {"dtype": TYPES[tensors[name].dtype], "shape": list(tensors[name].shape)}
            header[name] = entry | {"data_offsets": [begin, end]}
        assert order[-1] == "images", "small tensors of bytes would lie behind the images"
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        head = len(text).to_bytes(8, "little") + text
        head += b"".join(tensors[name].contiguous().numpy().tobytes() for name in order[:-1])
        assert len(head) <= self.place, "the images would be overwritten"
        place = len(head)
        for batch in self.batches(kept, channels):  # what is read always lies behind what is written
            _write(self.file, np.ascontiguousarray(batch.numpy()).data, place)
            place += batch.numel()
        os.ftruncate(self.file, place)
        _write(self.file, memoryview(head), 0)

    def close(self) -> None:
        if self.count:
            os.close(self.file)
            self.path.chmod(0o644)


def _write(file: int, content: memoryview, place: int) -> None:
    content = content.cast("B") if content.nbytes else memoryview(b"")
    while content:  # a call writes 2 GB at most
        written = os.pwrite(file, content, place)
        content, place = content[written:], place + written


def _read(file: int, content: memoryview, place: int) -> None:
    content = content.cast("B")
    while content:
        if not (n_read := os.preadv(file, [content], place)):
            raise EOFError("an image was never written")
        content, place = content[n_read:], place + n_read


class Images:
    """Some images of a data set, in order: what is indexed is read, as uint8 of shape (B, channels, H, W)."""

    def __init__(self, source: Tensor, indices: Tensor, mapping: MappedImages | None = None):
        self.source, self.indices, self.mapping = source, indices, mapping

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.indices), *self.source.shape[1:])

    def __getitem__(self, index: Tensor | slice | Sequence[int]) -> Tensor:
        images = self.source[self.indices[index]]
        if self.mapping:
            self.mapping.count(images.numel())
        return images

    def split(self, batch_size: int) -> Iterator[Tensor]:
        """All images in batches, as tensors are split."""
        return (self[start : start + batch_size] for start in range(0, len(self), batch_size))

    def chunks(self, count: int) -> list[Images]:
        """The same images as so many runs of about equal length, none of them read yet."""
        return [Images(self.source, indices, self.mapping) for indices in self.indices.tensor_split(count)]

    def each(self) -> Iterator[np.ndarray]:
        """All images, one by one, (channels, H, W)."""
        return (image for batch in self.split(100) for image in batch.numpy())

    def numpy(self) -> np.ndarray:
        """All images at once."""
        return self[:].numpy()


class MappedImages:
    """The tensor ``images`` of a safetensors file, which stays on the disk."""

    def __init__(self, path: Path):
        self.read = 0
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            entry = json.loads(file.read(length))["images"]
            # Copied on writing, which nobody does: torch warns of memory that cannot be written.
            self.memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        begin, end = entry["data_offsets"]
        if end > begin:
            self.images = torch.frombuffer(self.memory, dtype=torch.uint8, count=end - begin, offset=8 + length + begin)
        else:
            self.images = torch.empty(0, dtype=torch.uint8)
        self.images = self.images.reshape(entry["shape"])

    def count(self, read: int) -> None:
        """Count bytes that were read, and release the pages after every `MAX_MAPPED_BYTES`."""
        self.read += read
        if self.read > MAX_MAPPED_BYTES and hasattr(mmap, "MADV_DONTNEED"):
            self.memory.madvise(mmap.MADV_DONTNEED)
            self.read = 0


def map_images(path: Path) -> tuple[MappedImages, dict[str, Tensor]]:
    """The images of a file that an `ImageWriter` has finished, and its other tensors; a UserError if it is damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(existing(path), "pt") as file:
            names = set(file.keys())
            if "images" not in names or file.get_slice("images").get_dtype() != "U8":
                raise damaged(path, "it holds no images")
            return MappedImages(path), {name: file.get_tensor(name) for name in sorted(names - {"images"})}
    except SafetensorError as error:
        raise damaged(path, error) from None
