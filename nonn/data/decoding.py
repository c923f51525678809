"""Decoding the images of a source in parallel to squares of one size, and what is known of them beside the pixels."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import numpy as np
from PIL import Image, UnidentifiedImageError

from nonn.core.errors import UserError, printable
from nonn.core.images import open_image, squared, upright
from nonn.core.progress import log, track
from nonn.core.system import usable_cores
from nonn.data.image_store import ImageWriter

SOURCE_KEY = "params.yaml: dataset.source"

#: A thread decodes so many images in one go, or fewer once their files have so many bytes: handing over small images
#: one by one costs more than decoding them. So many batches wait at once, or two for each thread if that is more.
BATCH_IMAGES, BATCH_BYTES, WAITING_BATCHES = 64, 1 << 23, 16
#: Broken pictures, or classes, that a message names at most.
MAX_NAMED = 20
#: A data set of images with more than 8 bits counts as nearly black if its brightest pixel is below this (a quarter of
#: 255).
NEARLY_BLACK = 64

#: What HEIC pictures, which iPhones take, have from their fifth byte on.
HEIC = (b"ftyphei", b"ftyphev", b"ftypmif1", b"ftypmsf1")

# Pillow warns of damage beside the pixels, such as in EXIF. It names no file, and the picture is read all the same.
warnings.filterwarnings("ignore", module=r"PIL\.")

#: Index of an image in the result, its name in messages, and the image, the bytes of its file, or what reads these.
SourcePicture = tuple[int, str, Image.Image | bytes | Callable[[], bytes]]


@dataclass(frozen=True, eq=False)
class SourceInfo:
    """Labels, classes and splits of a source; its images are in the files of the decoder's writers."""

    labels: np.ndarray  # (N,), int64
    classes: tuple[str, ...]
    is_test: np.ndarray | None  # (N,), bool: the source's own test split, None if it has none
    sha256: str
    is_validation: np.ndarray | None = None  # (N,), bool: its own validation split, None if it has none

    def only(self, kept: np.ndarray) -> SourceInfo:
        """The same of the images `kept` alone, given by index."""
        is_test, is_validation = (m if m is None else m[kept] for m in (self.is_test, self.is_validation))
        return replace(self, labels=self.labels[kept], is_test=is_test, is_validation=is_validation)


@dataclass
class Decoder:
    """Decodes and resizes pictures in parallel, into the files of one writer or more, each of one size.

    `channels` are 3 if any image has colour, else 1; `broken` has the reason for each picture that cannot be read, by
    index and name; `white` is that of `nonn.core.images.upright`.
    """

    writers: Sequence[ImageWriter]
    white: float | None = None
    channels: int = 1
    broken: dict[tuple[int, str], str] = field(default_factory=dict)
    deepest: float = 0.0  # largest grey level of pictures of more than 8 bits
    n_deep: int = 0

    def decode(self, pictures: Iterable[SourcePicture], count: int) -> None:
        """Decode and write `count` pictures. `pictures` has every index below `count` once, in any order."""
        for writer in self.writers:
            writer.begin(count)
        n_threads = usable_cores()
        with ThreadPoolExecutor(n_threads) as pool:
            waiting: deque[Future[list]] = deque()

            def done() -> Iterator[tuple]:
                for batch in _batches(pictures):
                    waiting.append(pool.submit(self._decode_batch, batch))
                    if len(waiting) >= max(WAITING_BATCHES, 2 * n_threads):
                        yield from waiting.popleft().result()
                while waiting:
                    yield from waiting.popleft().result()

            try:
                for _, outcome in zip(track(range(count), "images"), done(), strict=True):
                    self._note(*outcome)
            finally:
                pool.shutdown(cancel_futures=True)

    def _decode_batch(self, batch: list[SourcePicture]) -> list[tuple]:
        """For each picture: index, name, channels, largest grey level if it has over 8 bits, and why it is broken."""
        outcomes: list[tuple] = []
        for index, name, content in batch:
            try:
                with self._open(content) as image:
                    image = upright(image, self.white)
                    squares = [squared(image, writer.size) for writer in self.writers]
            except Exception as error:  # on damaged data, Pillow's decoders raise almost anything
                outcomes.append((index, name, 0, None, _reason(error)))
                continue
            for writer, pixels in zip(self.writers, squares, strict=True):
                writer.write(index, pixels)
            outcomes.append((index, name, len(squares[0]), image.info["levels"], None))
        return outcomes

    def _open(self, content: Image.Image | bytes | Callable[[], bytes]) -> Image.Image:
        if isinstance(content, Image.Image):
            return content
        data = content() if callable(content) else content
        try:
            return open_image(data, max(writer.size for writer in self.writers))
        except UnidentifiedImageError:
            if data[4:12].startswith(HEIC):
                raise ValueError("a HEIC picture, which Pillow does not read; save it as JPEG") from None
            raise

    def _note(self, index: int, name: str, channels: int, levels: float | None, reason: str | None) -> None:
        self.channels = max(self.channels, channels)
        if levels is not None:
            self.deepest, self.n_deep = max(self.deepest, levels), self.n_deep + 1
        if reason is not None:
            self.broken[index, name] = reason

    def check(self, skip: bool) -> None:
        """Refuse broken pictures in one message, unless they are to be skipped, and deep ones that are nearly black."""
        if self.broken and not skip:
            raise UserError(self._list_broken())
        if self.broken:
            log(f"note: {len(self.broken)} pictures cannot be read and are left out, as dataset.broken says")
        if self.n_deep and self.deepest < NEARLY_BLACK and self.white is None:
            share = self.deepest / 255
            raise UserError(
                f"{SOURCE_KEY}: the brightest pixel of the {self.n_deep} pictures of more than 8 bits is at "
                f"{share:.1%} of their range, so all of them would be nearly black. Set dataset.white to the value "
                "that is white, such as 4095 for 12 bits; to 65535 if they are meant so."
            )

    def _list_broken(self) -> str:
        remedy = "Replace or remove {}, or set dataset.broken to skip."
        rows = [(printable(name), printable(reason)) for (_, name), reason in sorted(self.broken.items())]
        if len(rows) == 1:
            name, reason = rows[0]
            return f"{SOURCE_KEY}: {name} cannot be read ({reason}). {remedy.format('it')}"
        lines = [f"{SOURCE_KEY}: {len(rows)} pictures cannot be read. {remedy.format('them')}"]
        lines += [f"  {name}: {reason}" for name, reason in rows[:MAX_NAMED]]
        return "\n".join([*lines, *([f"  and {len(rows) - MAX_NAMED} more"] if len(rows) > MAX_NAMED else [])])


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "not an image"
    text = str(error.strerror).lower() if isinstance(error, OSError) and error.strerror else str(error)
    return text or type(error).__name__


def _batches(pictures: Iterable[SourcePicture]) -> Iterator[list[SourcePicture]]:
    batch: list[SourcePicture] = []
    n_bytes = 0
    for picture in pictures:
        batch.append(picture)
        n_bytes += len(picture[2]) if isinstance(picture[2], bytes) else 0
        if len(batch) == BATCH_IMAGES or n_bytes >= BATCH_BYTES:
            yield batch
            batch, n_bytes = [], 0
    if batch:
        yield batch


def check_sha256(source: str, found: str, expected: str | None) -> None:
    if expected not in (None, found):
        raise UserError(
            f"params.yaml: dataset.sha256: {source} has SHA-256 {found}, not {expected} as stated. "
            "Fetch the right content, or correct the key."
        )
