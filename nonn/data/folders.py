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
from pathlib import Path, PurePosixPath
from unicodedata import normalize

import numpy as np

from nonn.core.errors import UserError, printable
from nonn.core.files import regular, sha256_of
from nonn.core.progress import log
from nonn.data.archives import ARCHIVES, ZSTANDARD, Content, is_archive, list_names, read_contents
from nonn.data.clutter import HIDDEN, sort_out
from nonn.data.decoding import SOURCE_KEY, Decoder, SourceInfo, check_sha256
from nonn.data.known import FolderLayout, read_known_layout

LAYOUT = "expected <class>/<image>, or train/<class>/<image> and test/<class>/<image>"
#: What folders of splits are called, in small letters, and which split each is.
SPLIT_NAMES = {"train": "train", "training": "train", "test": "test", "testing": "test"}
SPLIT_NAMES |= dict.fromkeys(("val", "valid", "validation", "dev"), "validation")


def load_files(path: Path, decoder: Decoder, expected: str | None) -> SourceInfo:
    """Load a folder or an archive, which is read in place."""
    _check_kind(path)
    sums: dict[str, str] = {}

    def summed(name: str, content: Content) -> Content:
        """What notes the sum of a file of a folder when it is read, by a thread that decodes."""
        if not callable(content) or not path.is_dir():
            return content

        def read() -> bytes:
            sums[name] = hashlib.sha256(found := content()).hexdigest()
            return found

        return read

    with _damage_explained(path):
        if not path.is_dir():
            check_sha256(str(path), sha256 := sha256_of(path), expected)
        names = list(list_names(path))
        layout = read_known_layout(names, path) or read_layout(names, path)
        index = {name: index for index, name in enumerate(layout.names)}
        files = ((name, summed(name, content)) for name, content in read_contents(path, index))
        decoder.decode(((index[n], printable(f"{path}: {n}"), content) for n, content in files), len(index))
        if path.is_dir():
            lines = "".join(f"{sums[name]}  {name}\n" for name in sorted(sums))
            check_sha256(str(path), sha256 := hashlib.sha256(os.fsencode(lines)).hexdigest(), expected)
    if layout.passed:
        foremost = sorted(layout.passed.most_common(), key=lambda pair: pair[0] != HIDDEN)[:5]
        kinds = ", ".join(f"{count} {kind}" for kind, count in foremost)
        log(f"note: {path}: passed over {layout.passed.total()} files ({kinds})")
    return SourceInfo(layout.labels, layout.classes, layout.is_test, sha256, layout.is_validation)


def find_images(path: Path) -> FolderLayout:
    """What a folder or an archive holds, by the names of its files alone: no image is opened."""
    _check_kind(path)
    with _damage_explained(path):
        names = list(list_names(path))
        return read_known_layout(names, path) or read_layout(names, path)


def _check_kind(path: Path) -> None:
    if not path.exists():
        raise UserError(
            f"{SOURCE_KEY}: {path} does not exist. Name a folder or archive, mnist5k, a torchvision:NAME or an hf:NAME."
        )
    if path.is_dir():
        return
    with _damage_explained(path):
        regular(path)
    if path.name.lower().endswith(ZSTANDARD) and not is_archive(path):
        raise UserError(
            f"{SOURCE_KEY}: {path}: Python reads Zstandard from 3.14 on. Unpack it, or repack it as .tar.xz."
        )
    if not is_archive(path):
        raise UserError(f"{SOURCE_KEY}: {path} is neither a folder nor a {', '.join(ARCHIVES)}. Repack it as one.")


def read_layout(names: Iterable[str], path: Path) -> FolderLayout:
    """Find the images, classes and splits among the names of a folder or archive.

    Names are relative, with slashes; those of folders end in one. Refused are fewer than two classes, an empty class, a
    class of ``test`` that ``train`` lacks, folders elsewhere than the layout has them, and two files of one name.
    """
    files: dict[tuple[str, ...], str] = {}
    folders: set[tuple[str, ...]] = set()
    encodings: dict[tuple[str, ...], tuple[str, ...]] = {}
    names = list(names)
    if outside := [name for name in names if ".." in PurePosixPath(name).parts]:
        raise UserError(f"{SOURCE_KEY}: {path}: holds {printable(outside[0])}, which leads out of it. Pack it again.")
    names, passed = sort_out(names)
    for name in names:
        parts = PurePosixPath(name).parts
        # A class has one name, whichever way its accents are encoded: macOS writes them as characters of their own.
        folder = tuple(normalize("NFC", part) for part in (parts if name.endswith("/") else parts[:-1]))
        encoded = encodings.setdefault(folder, parts[: len(folder)])
        if encoded != parts[: len(folder)]:
            raise UserError(
                f"{SOURCE_KEY}: {path}: two folders are called {printable('/'.join(folder))}, with accents encoded in "
                "two ways. Move the files of one to the other."
            )
        parts = (*folder, *parts[len(folder) :])
        within = "/".join(folder)
        if any("\ud800" <= letter <= "\udfff" for letter in within):  # of bytes that are no text
            raise UserError(f"{SOURCE_KEY}: {path}: the name of the folder {printable(within)} is no UTF-8. Rename it.")
        folders.update(folder[:depth] for depth in range(1, len(folder) + 1))
        if name.endswith("/"):
            continue
        if parts in files:
            raise UserError(f"{SOURCE_KEY}: {path}: holds {name} twice. Pack it again.")
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
        raise UserError(f"{SOURCE_KEY}: {path}: has {', '.join(others)} beside {known}; move its images or remove it.")
    if has_splits and (twice := sorted(s for s in splits if list(splits.values()).count(splits[s]) > 1)):
        raise UserError(
            f"{SOURCE_KEY}: {path}: {' and '.join(twice)} name the same split; move one's images to the other."
        )
    if not has_splits and len(meant) > 1 and is_deep:
        known = ", ".join(sorted(splits))
        raise UserError(
            f"{SOURCE_KEY}: {path}: has {known}, but no train. Name the folder of the training images train."
        )

    def split_of(parts: tuple[str, ...]) -> str:
        return splits[parts[top]] if has_splits else "train"

    def in_test(parts: tuple[str, ...]) -> bool:
        return split_of(parts) == "test"

    level = top + 1 + has_splits  # depth of a class folder
    if deeper := sorted(folder for folder in folders if len(folder) > level):
        raise UserError(
            f"{SOURCE_KEY}: {path}: folder {'/'.join(deeper[0])} lies too deep: {LAYOUT}. Move its images up."
        )

    class_folders = {folder for folder in folders if len(folder) == level}
    images = [parts for parts in files if len(parts) == level + 1]
    if empty := sorted(class_folders - {parts[:level] for parts in images}):
        raise UserError(f"{SOURCE_KEY}: {path}: class folder {'/'.join(empty[0])} is empty. Fill it or remove it.")
    classes = sorted({folder[-1] for folder in class_folders if split_of(folder) == "train"})
    for split in ("test", "validation"):
        held = {folder[-1] for folder in class_folders if split_of(folder) == split}
        name = next((name for name, kind in splits.items() if kind == split), split)
        if unknown := sorted(held - set(classes)):
            raise UserError(
                f"{SOURCE_KEY}: {path}: class {unknown[0]!r} is in {name} but not in train. Add it there or remove it."
            )
        if has_splits and split in meant and not held:
            raise UserError(f"{SOURCE_KEY}: {path}: folder {name} has no class folders. Fill it or remove it.")
        if split == "validation" and held and (absent := sorted(set(classes) - held)):
            raise UserError(
                f"{SOURCE_KEY}: {path}: class {absent[0]!r} is not in {name}. Add images of it, or remove {name}."
            )
    if len(classes) < 2:
        raise UserError(f"{SOURCE_KEY}: {path}: has {len(classes)} class folders, needs two at least: {LAYOUT}.")
    images.sort(key=lambda parts: (in_test(parts), parts))  # as ever: sums and seeds go by this order
    position = {name: label for label, name in enumerate(classes)}
    return FolderLayout(
        names=[files[parts] for parts in images],
        labels=np.array([position[parts[-2]] for parts in images], np.int64),
        classes=tuple(classes),
        is_test=_mask(images, "test", split_of) if "test" in meant and has_splits else None,
        is_validation=_mask(images, "validation", split_of) if "validation" in meant and has_splits else None,
        passed=passed,
    )


def _mask(images: list[tuple[str, ...]], split: str, split_of: Callable[[tuple[str, ...]], str]) -> np.ndarray:
    return np.array([split_of(parts) == split for parts in images])


@contextlib.contextmanager
def _damage_explained(path: Path) -> Iterator[None]:
    """Turn what the archive readers raise on damaged or protected files into a UserError."""
    damage = (zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError)
    try:
        yield
    except UserError as error:
        raise error if str(error).startswith("params.yaml") else UserError(f"{SOURCE_KEY}: {error}") from None
    except (*damage, OSError, EOFError, IndexError, KeyError, RuntimeError, ValueError) as error:
        raise UserError(
            f"{SOURCE_KEY}: {path} cannot be read ({printable(str(error))}). Fetch or pack it again."
        ) from error
