"""Images of a folder or an archive, laid out by split and class."""

from __future__ import annotations

import contextlib
import hashlib
import lzma
import os
import tarfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from nonn.core.errors import UserError
from nonn.core.files import sha256_of
from nonn.data.raw import KEY, RawImages, check_sha256, decode_images

ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz")
LAYOUT = "expected <class>/<image>, or train/<class>/<image> and test/<class>/<image>"


def load_files(path: Path, size: int, expected: str | None) -> RawImages:
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
        check_sha256(str(path), sha256, expected)
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

    Names are relative, with slashes; those of folders end in one. Refused are fewer than two classes, an empty class, a
    class of ``test`` that ``train`` lacks, folders elsewhere than the layout has them, and two files of one name.
    """
    files: dict[tuple[str, ...], str] = {}
    folders: set[tuple[str, ...]] = set()
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


@contextlib.contextmanager
def _damage_explained(path: Path) -> Iterator[None]:
    """Turn what the archive readers raise on damaged or protected files into a UserError."""
    damage = (zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError)
    try:
        yield
    except (*damage, OSError, EOFError, KeyError, RuntimeError) as error:
        raise UserError(f"{KEY}: {path} cannot be read ({error}). Fetch or pack it again.") from error
