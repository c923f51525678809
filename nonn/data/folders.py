"""Images of a folder or an archive, laid out by split and class."""

from __future__ import annotations

import contextlib
import hashlib
import lzma
import os
import re
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from unicodedata import normalize

import numpy as np

from nonn.core.errors import UserError, printable, refusal
from nonn.core.files import regular, sha256_of
from nonn.core.progress import log
from nonn.data.archives import ARCHIVES, ZSTANDARD, Content, is_archive, list_names, read_contents
from nonn.data.clutter import HIDDEN, sort_out
from nonn.data.decoding import SOURCE_KEY, Decoder, SourceInfo, SourcePicture, check_sha256
from nonn.data.known import FolderLayout, read_known_layout

LAYOUT = "expected <class>/<image>, or train/<class>/<image> and test/<class>/<image>"
#: Names of the folders of splits, in small letters, and the split of each.
SPLIT_NAMES = {"train": "train", "training": "train", "test": "test", "testing": "test"}
SPLIT_NAMES |= dict.fromkeys(("val", "valid", "validation", "dev"), "validation")

#: Path of a file or a folder.
PathParts = tuple[str, ...]


def load_files(path: Path, decoder: Decoder, expected: str | None) -> SourceInfo:
    """Load a folder or an archive, which is read in place."""
    _check_kind(path)
    sums: dict[str, str] = {}

    def summed(name: str, content: Content) -> Content:
        """Content whose sum is noted when a decoding thread reads it; that of archives as it is."""
        if not callable(content) or not path.is_dir():
            return content

        def read() -> bytes:
            sums[name] = hashlib.sha256(found := content()).hexdigest()
            return found

        return read

    with damage_explained(path):
        if not path.is_dir():
            check_sha256(str(path), sha256 := sha256_of(path), expected)
        names = list(list_names(path))
        layout = read_known_layout(names, path) or read_layout(names, path)
    index = {name: index for index, name in enumerate(layout.names)}

    def pictures() -> Iterator[SourcePicture]:
        with damage_explained(path):  # of reading: what the writers cannot write is no fault of the source
            for name, content in read_contents(path, index):
                yield index[name], printable(f"{path}: {name}"), summed(name, content)

    decoder.decode(pictures(), len(index))
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
    with damage_explained(path):
        names = list(list_names(path))
        return read_known_layout(names, path) or read_layout(names, path)


def _check_kind(path: Path) -> None:
    if not path.exists():
        raise UserError(
            f"{SOURCE_KEY}: {path} does not exist. Name a folder or archive, mnist5k, a torchvision:NAME or an hf:NAME."
        )
    if path.is_dir():
        return
    with damage_explained(path):
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
    names = list(names)
    if outside := [name for name in names if ".." in PurePosixPath(name).parts]:
        raise UserError(f"{SOURCE_KEY}: {path}: holds {printable(outside[0])}, which leads out of it. Pack it again.")
    names, passed = sort_out(names)
    files, folders = _normalised_files(names, path)
    n_around, splits = _find_splits(folders, path)

    def split_of(parts: PathParts) -> str:
        return splits[parts[n_around]] if splits else "train"

    level = n_around + 1 + bool(splits)  # depth of a class folder
    if deeper := sorted(folder for folder in folders if len(folder) > level):
        remedy = _renamings({folder[n_around] for folder in deeper})
        if not remedy and _split_like(deeper[0][-1]):
            remedy = "Splits have to stand above classes."
        elif not remedy:  # moved up, the images of several folders would mix, and each may be a class
            is_alone = sum(folder[:-1] == deeper[0][:-1] for folder in deeper) == 1
            remedy = "Move its images up." if is_alone else "Move it up if it is a class, else its images."
        raise UserError(f"{SOURCE_KEY}: {path}: folder {'/'.join(deeper[0])} lies too deep: {LAYOUT}. {remedy}")
    class_folders = {folder for folder in folders if len(folder) == level}
    images = [parts for parts in files if len(parts) == level + 1]
    if empty := sorted(class_folders - {parts[:level] for parts in images}):
        raise UserError(f"{SOURCE_KEY}: {path}: class folder {'/'.join(empty[0])} is empty. Fill it or remove it.")
    classes_of: dict[str, set[str]] = {"train": set(), "validation": set(), "test": set()}
    for folder in class_folders:
        classes_of[split_of(folder)].add(folder[-1])
    _check_classes(classes_of, splits, path)
    images.sort(key=lambda parts: (split_of(parts) == "test", parts))  # as ever: sums and seeds go by this order

    def mask(split: str) -> np.ndarray | None:
        return np.array([split_of(parts) == split for parts in images]) if split in splits.values() else None

    classes = sorted(classes_of["train"])
    position = {name: label for label, name in enumerate(classes)}
    return FolderLayout(
        names=[files[parts] for parts in images],
        labels=np.array([position[parts[-2]] for parts in images], np.int64),
        classes=tuple(classes),
        is_test=mask("test"),
        is_validation=mask("validation"),
        passed=passed,
    )


def _normalised_files(names: Iterable[str], path: Path) -> tuple[dict[PathParts, str], set[PathParts]]:
    """The files by the parts of their paths, and all folders; the names of folders in one encoding."""
    files: dict[PathParts, str] = {}
    folders: set[PathParts] = set()
    encodings: dict[PathParts, PathParts] = {}
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
    return files, folders


def _find_splits(folders: set[PathParts], path: Path) -> tuple[int, dict[str, str]]:
    """How many folders lie around everything, and the splits by the names of their folders; none if there are none."""
    n_around = 0
    while len(tops := {folder[n_around] for folder in folders if len(folder) > n_around}) == 1 and any(
        len(folder) > n_around + 1 for folder in folders
    ):
        n_around += 1
    splits = {name: SPLIT_NAMES[name.lower()] for name in tops if name.lower() in SPLIT_NAMES}
    kinds = list(splits.values())
    # Classes may have any names, so a folder is a split only beside another one, and with class folders inside.
    is_deep = any(len(folder) > n_around + 1 for folder in folders)
    if "train" not in kinds or not (len(set(kinds)) > 1 or is_deep):
        if len(set(kinds)) > 1 and is_deep:
            raise UserError(
                f"{SOURCE_KEY}: {path}: has {', '.join(sorted(splits))}, but no train. Name the folder of the training "
                "images train."
            )
        return n_around, {}
    if others := sorted(tops - set(splits)):
        remedy = _renamings(tops) or "Move its images or remove it."
        raise UserError(
            f"{SOURCE_KEY}: {path}: has {', '.join(others)} beside {' and '.join(sorted(splits))}. {remedy}"
        )
    if twice := sorted(name for name, kind in splits.items() if kinds.count(kind) > 1):
        raise UserError(
            f"{SOURCE_KEY}: {path}: {' and '.join(twice)} name the same split; move one's images to the other."
        )
    return n_around, splits


def _split_like(name: str) -> str | None:
    """The split that a folder may be meant as, by a word in its name, such as ``training_set``."""
    return next((SPLIT_NAMES[word] for word in re.split(r"[-_. ]", name.lower()) if word in SPLIT_NAMES), None)


def _renamings(tops: Iterable[str]) -> str:
    """What to rename folders to that may be meant as splits; empty if none is a train, or two may mean the same."""
    kinds = {name: kind for name in sorted(tops) if (kind := _split_like(name))}
    counts = Counter(kinds.values())
    wrong = [f"{name} to {kind}" for name, kind in kinds.items() if name.lower() not in SPLIT_NAMES]
    return f"Rename {' and '.join(wrong)}." if wrong and set(counts.values()) == {1} and "train" in counts else ""


def _check_classes(classes_of: dict[str, set[str]], splits: dict[str, str], path: Path) -> None:
    """Refuse splits whose classes are not those of the training split, and fewer than two classes."""
    classes = classes_of["train"]
    for split in ("test", "validation"):
        name = next((name for name, kind in splits.items() if kind == split), split)
        if unknown := sorted(classes_of[split] - classes):
            raise UserError(
                f"{SOURCE_KEY}: {path}: class {unknown[0]!r} is in {name} but not in train. Add it there or remove it."
            )
        if split in splits.values() and not classes_of[split]:
            raise UserError(f"{SOURCE_KEY}: {path}: folder {name} has no class folders. Fill it or remove it.")
        if split == "validation" and classes_of[split] and (absent := sorted(classes - classes_of[split])):
            raise UserError(
                f"{SOURCE_KEY}: {path}: class {absent[0]!r} is not in {name}. Add images of it, or remove {name}."
            )
    if len(classes) < 2:
        raise UserError(f"{SOURCE_KEY}: {path}: has {len(classes)} class folders, needs two at least: {LAYOUT}.")


@contextlib.contextmanager
def damage_explained(path: Path) -> Iterator[None]:
    """Turn what the archive readers raise on damaged or protected files into a UserError."""
    damage = (zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError)
    try:
        yield
    except UserError as error:
        raise error if str(error).startswith("params.yaml") else UserError(f"{SOURCE_KEY}: {error}") from None
    except (*damage, OSError, EOFError, IndexError, KeyError, RuntimeError, ValueError) as error:
        if isinstance(error, OSError) and (told := refusal(error, path)):
            raise UserError(f"{SOURCE_KEY}: {told}") from None
        raise UserError(
            f"{SOURCE_KEY}: {path} cannot be read ({printable(str(error))}). Fetch or pack it again."
        ) from error
