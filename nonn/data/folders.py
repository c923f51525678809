"""Images of a folder or an archive, laid out by split and class."""

from __future__ import annotations

import contextlib
import hashlib
import lzma
import os
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from nonn.core.errors import UserError, printable
from nonn.core.files import regular, sha256_of
from nonn.data.raw import KEY, RawImages, check_sha256, decode_images

ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz")
LAYOUT = "expected <class>/<image>, or train/<class>/<image> and test/<class>/<image>"
#: What folders of splits are called, in small letters, and which split each is.
SPLIT_NAMES = {"train": "train", "training": "train", "test": "test", "testing": "test"}
SPLIT_NAMES |= dict.fromkeys(("val", "valid", "validation", "dev"), "validation")


def load_files(path: Path, size: int, expected: str | None) -> RawImages:
    """Load a folder or an archive, which is read in place."""
    if not path.exists():
        raise UserError(f"{KEY}: {path} does not exist. Name a folder or archive, mnist5k, or a torchvision:NAME.")
    if not path.is_dir() and not path.name.endswith(ARCHIVES):
        raise UserError(f"{KEY}: {path} is neither a folder nor a {', '.join(ARCHIVES)}. Repack it as one.")
    if not path.is_dir():
        with _damage_explained(path):
            regular(path)
    with _damage_explained(path):
        layout = read_layout(_names(path), path)
        if path.is_dir():
            lines = (f"{sha256_of(path / name)}  {name}\n" for name in sorted(layout.names))
            sha256 = hashlib.sha256(os.fsencode("".join(lines))).hexdigest()
        else:
            sha256 = sha256_of(path)
        check_sha256(str(path), sha256, expected)
        index = {name: index for index, name in enumerate(layout.names)}
        pictures = ((index[name], printable(f"{path}: {name}"), data) for name, data in _contents(path, index))
        images = decode_images(pictures, len(index), size)
    return RawImages(images, layout.labels, layout.classes, layout.is_test, sha256, layout.is_validation)


def find_images(path: Path) -> FolderLayout:
    """What a folder or an archive holds, by the names of its files alone: no image is opened."""
    if not path.exists():
        raise UserError(f"{KEY}: {path} does not exist. Name a folder or archive, mnist5k, or a torchvision:NAME.")
    with _damage_explained(path):
        return read_layout(_names(path), path)


@dataclass(frozen=True, eq=False)
class FolderLayout:
    """Names of the images of a folder or archive, ordered by split, class and name; what each is."""

    names: list[str]
    labels: np.ndarray  # (N,), int64
    classes: tuple[str, ...]
    is_test: np.ndarray | None  # (N,), bool
    is_validation: np.ndarray | None = None  # (N,), bool


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
    splits = {name: SPLIT_NAMES[name.lower()] for name in tops if name.lower() in SPLIT_NAMES}
    meant = set(splits.values())
    # Classes may have any names, so a folder is a split only beside another one, and with class folders inside.
    is_deep = any(len(folder) > top + 1 for folder in folders)
    has_splits = "train" in meant and (len(meant) > 1 or is_deep)
    if has_splits and (others := sorted(tops - set(splits))):
        known = " and ".join(sorted(splits))
        raise UserError(f"{KEY}: {path}: has {', '.join(others)} beside {known}; move its images or remove it.")
    if has_splits and (twice := sorted(s for s in splits if list(splits.values()).count(splits[s]) > 1)):
        raise UserError(f"{KEY}: {path}: {' and '.join(twice)} name the same split; move one's images to the other.")
    if not has_splits and len(meant) > 1 and is_deep:
        known = ", ".join(sorted(splits))
        raise UserError(f"{KEY}: {path}: has {known}, but no train. Name the folder of the training images train.")

    def split_of(parts: tuple[str, ...]) -> str:
        return splits[parts[top]] if has_splits else "train"

    def in_test(parts: tuple[str, ...]) -> bool:
        return split_of(parts) == "test"

    level = top + 1 + has_splits  # depth of a class folder
    if deeper := sorted(folder for folder in folders if len(folder) > level):
        raise UserError(f"{KEY}: {path}: folder {'/'.join(deeper[0])} lies too deep: {LAYOUT}. Move its images up.")

    class_folders = {folder for folder in folders if len(folder) == level}
    images = [parts for parts in files if len(parts) == level + 1]
    if empty := sorted(class_folders - {parts[:level] for parts in images}):
        raise UserError(f"{KEY}: {path}: class folder {'/'.join(empty[0])} is empty. Fill it or remove it.")
    classes = sorted({folder[-1] for folder in class_folders if split_of(folder) == "train"})
    for split in ("test", "validation"):
        held = {folder[-1] for folder in class_folders if split_of(folder) == split}
        name = next((name for name, kind in splits.items() if kind == split), split)
        if unknown := sorted(held - set(classes)):
            raise UserError(
                f"{KEY}: {path}: class {unknown[0]!r} is in {name} but not in train. Add it there or remove it."
            )
        if has_splits and split in meant and not held:
            raise UserError(f"{KEY}: {path}: folder {name} has no class folders. Fill it or remove it.")
        if split == "validation" and held and (absent := sorted(set(classes) - held)):
            raise UserError(f"{KEY}: {path}: class {absent[0]!r} is not in {name}. Add images of it, or remove {name}.")
    if len(classes) < 2:
        raise UserError(f"{KEY}: {path}: has {len(classes)} class folders, needs two at least: {LAYOUT}.")
    images.sort(key=lambda parts: (in_test(parts), parts))  # as ever: sums and seeds go by this order
    position = {name: label for label, name in enumerate(classes)}
    return FolderLayout(
        names=[files[parts] for parts in images],
        labels=np.array([position[parts[-2]] for parts in images], np.int64),
        classes=tuple(classes),
        is_test=_mask(images, "test", split_of) if "test" in meant and has_splits else None,
        is_validation=_mask(images, "validation", split_of) if "validation" in meant and has_splits else None,
    )


def _mask(images: list[tuple[str, ...]], split: str, split_of: Callable[[tuple[str, ...]], str]) -> np.ndarray:
    return np.array([split_of(parts) == split for parts in images])


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
        yield from ((name, regular(path / name).read_bytes()) for name in wanted)
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
    except UserError as error:
        raise error if str(error).startswith(("params.yaml", KEY)) else UserError(f"{KEY}: {error}") from None
    except (*damage, OSError, EOFError, KeyError, RuntimeError) as error:
        raise UserError(f"{KEY}: {path} cannot be read ({printable(str(error))}). Fetch or pack it again.") from error
