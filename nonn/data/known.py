"""Well-known data sets as their authors pack them, with lists that say which picture is of which split and class.

=================== ====================================================================================================
MIT indoor scenes   ``Images/<class>/``, ``TrainImages.txt``, ``TestImages.txt``: the 80 and 20 pictures a class of
                    https://web.mit.edu/torralba/www/indoor.html; pictures on neither list are left out
CUB-200-2011        ``images/<class>/``, ``images.txt``, ``classes.txt``, ``image_class_labels.txt``,
                    ``train_test_split.txt`` (https://www.vision.caltech.edu/datasets/cub_200_2011/)
ImageNet            ``train/<wnid>/`` beside ``val/<wnid>/``, or beside a flat ``val/`` with ``LOC_val_solution.csv``
                    of Kaggle or with ``ILSVRC2012_validation_ground_truth.txt`` and ``meta.mat`` of the devkit. The
                    validation pictures are the test split, as in the literature: the labels of its own are not public
=================== ====================================================================================================
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path, PurePosixPath

import numpy as np

from nonn.core.errors import UserError, printable
from nonn.data.archives import read_file
from nonn.data.clutter import sort_out
from nonn.data.decoding import SOURCE_KEY

WNID = r"n\d{8}"
#: Pictures of a split by name, and the class of each.
Listed = Mapping[str, str]


@dataclass(frozen=True, eq=False)
class FolderLayout:
    """Names of the images of a folder or archive, ordered by split, class and name; what each is."""

    names: list[str]
    labels: np.ndarray  # (N,), int64
    classes: tuple[str, ...]
    is_test: np.ndarray | None  # (N,), bool
    is_validation: np.ndarray | None = None  # (N,), bool
    passed: Counter = field(default_factory=Counter)  # files that are no pictures, by suffix


def read_known_layout(names: Sequence[str], path: Path) -> FolderLayout | None:
    """The layout of a data set that is recognised by its lists; None for any other."""
    files = {name for name in names if not name.endswith("/")}
    for find in (_find_scenes, _find_birds, _find_imagenet):
        if found := find(files, path):
            train, test, classes = found
            return _arranged(train, test, classes or sorted(set(train.values())), files, path)
    return None


def _arranged(train: Listed, test: Listed, classes: Sequence[str], files: set[str], path: Path) -> FolderLayout:
    position = {name: label for label, name in enumerate(classes)}
    if absent := sorted(set(train) - files) + sorted(set(test) - files):
        raise UserError(
            f"{SOURCE_KEY}: {path}: its lists name {printable(absent[0])}, which is not there"
            f"{f', nor are {len(absent) - 1} others' * (len(absent) > 1)}. Unpack the pictures again."
        )
    if strange := sorted({*train.values(), *test.values()} - set(position)):
        raise UserError(
            f"{SOURCE_KEY}: {path}: class {strange[0]!r} of its lists has no training pictures. Fetch it again."
        )
    if twice := sorted(set(train) & set(test)):
        raise UserError(
            f"{SOURCE_KEY}: {path}: its lists name {printable(twice[0])} for training and for the test. Take it off "
            "one."
        )
    rows = [(split, position[kind], name) for split, part in enumerate((train, test)) for name, kind in part.items()]
    rows.sort()
    return FolderLayout(
        names=[name for _, _, name in rows],
        labels=np.array([label for _, label, _ in rows], np.int64),
        classes=tuple(classes),
        is_test=np.array([bool(split) for split, _, _ in rows]),
    )


def _folder_of(files: Iterable[str], *wanted: str) -> str | None:
    """The folder that holds all of these files, with a slash at the end."""
    files = set(files)
    folders = sorted(name[: -len(wanted[0])] for name in files if PurePosixPath(name).name == wanted[0])
    return next((folder for folder in folders if all(folder + name in files for name in wanted)), None)


def _rows(path: Path, name: str) -> Iterator[list[str]]:
    """The words of each line of a list."""
    text = read_file(path, name).decode("utf-8-sig", errors="replace")
    return (line.split() for line in text.splitlines() if line.strip())


def _pairs(path: Path, name: str) -> dict[str, str]:
    """A list of two columns."""
    rows = list(_rows(path, name))
    if wrong := next((number for number, row in enumerate(rows, 1) if len(row) != 2), 0):
        raise UserError(f"{SOURCE_KEY}: {path}: {name}: line {wrong} has not two columns. Fetch the list again.")
    return dict(rows)


def _find_scenes(files: set[str], path: Path) -> tuple[Listed, Listed, Sequence[str]] | None:
    lists = ("TrainImages.txt", "TestImages.txt")
    if (folder := _folder_of(files, *lists)) is None:
        return None
    train, test = (
        {
            f"{folder}Images/{name}": name.rpartition("/")[0]
            for name in (" ".join(row) for row in _rows(path, folder + n))
        }
        for n in lists
    )
    return train, test, ()


def _find_birds(files: set[str], path: Path) -> tuple[Listed, Listed, Sequence[str]] | None:
    lists = ("images.txt", "image_class_labels.txt", "train_test_split.txt", "classes.txt")
    if (folder := _folder_of(files, *lists)) is None:
        return None
    names, labels, in_train, classes = (_pairs(path, folder + name) for name in lists)
    for number in names:
        if labels.get(number) not in classes or in_train.get(number) not in ("0", "1"):
            raise UserError(f"{SOURCE_KEY}: {path}: its lists do not agree on image {number}. Fetch them again.")
    parts: tuple[dict[str, str], dict[str, str]] = ({}, {})
    for number, name in names.items():
        parts[in_train[number] == "0"][f"{folder}images/{name}"] = classes[labels[number]]
    return *parts, [classes[number] for number in sorted(classes, key=int)]


def _find_imagenet(files: set[str], path: Path) -> tuple[Listed, Listed, Sequence[str]] | None:
    train: dict[str, str] = {}
    sorted_: dict[str, str] = {}
    flat: dict[str, str] = {}  # by file name without suffix
    if any(re.fullmatch(rf"(?:.*/)?test/{WNID}/[^/]+", name, re.IGNORECASE) for name in files):
        return None  # ImageNet has no test split in classes
    for name in sort_out(files)[0]:
        if found := re.fullmatch(rf"(?:.*/)?(train|val)/(?:({WNID})/)?([^/]+)", name, re.IGNORECASE):
            split, wnid, file = found.groups()
            if wnid:
                (train if split.lower() == "train" else sorted_)[name] = wnid
            elif split.lower() == "val" and file.lower().endswith((".jpeg", ".jpg")):
                flat[PurePosixPath(file).stem] = name
    if not train or not (sorted_ or flat):
        return None
    if sorted_:
        return train, sorted_, ()
    solution = next((name for name in sorted(files) if name.endswith("LOC_val_solution.csv")), None)
    truth = next((name for name in sorted(files) if name.endswith("ILSVRC2012_validation_ground_truth.txt")), None)
    if solution:
        lines = read_file(path, solution).decode().splitlines()[1:]  # ImageId, "wnid x y x y wnid …"
        boxes = [line.partition(",") for line in lines if line.strip()]
        kinds = {image: (box.split() or [""])[0] for image, _, box in boxes}
    elif truth:
        kinds = _devkit_classes(path, truth, sorted(flat))
    else:
        raise UserError(
            f"{SOURCE_KEY}: {path}: nothing says of which class the pictures of val are. Put LOC_val_solution.csv "
            "there, or the devkit of ImageNet, or move them into folders val/<wnid>."
        )
    if unknown := sorted(set(flat) - set(kinds)):
        raise UserError(
            f"{SOURCE_KEY}: {path}: {unknown[0]} of val is not on its list of classes. Fetch the list again."
        )
    return train, {name: kinds[stem] for stem, name in flat.items()}, ()


def _devkit_classes(path: Path, truth: str, stems: Sequence[str]) -> dict[str, str]:
    """Class of each validation picture: line n of the devkit's list is the number of the class of picture n."""
    from scipy.io import loadmat

    numbers = [int(row[0]) for row in _rows(path, truth)]
    folder = truth.rpartition("/")[0]
    synsets = loadmat(BytesIO(read_file(path, f"{folder}/meta.mat".lstrip("/"))), squeeze_me=True)["synsets"]
    wnids = {int(number): str(wnid) for number, wnid in zip(synsets["ILSVRC2012_ID"], synsets["WNID"], strict=True)}
    return {stem: wnids[numbers[int(stem.rpartition("_")[2]) - 1]] for stem in stems}
