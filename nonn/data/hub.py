"""Images that the package ``datasets`` reads: of the Hugging Face Hub, or of Parquet files on this machine."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np

from nonn.core.errors import UserError, printable
from nonn.core.files import named, regular, scratch_folder
from nonn.core.image_source import hub_path
from nonn.core.progress import log
from nonn.data.archives import failing, list_names
from nonn.data.decoding import SOURCE_KEY, Decoder, SourceInfo, SourcePicture
from nonn.data.folders import SPLIT_NAMES, damage_explained
from nonn.data.packaged import DOWNLOADS

#: Names of label columns, the likeliest first, for data sets without a column of the type ClassLabel.
LABELS = ("label", "labels", "fine_label", "class", "class_label", "target", "category")


def load_hub(name: str, decoder: Decoder, image_column: str | None, label_column: str | None) -> SourceInfo:
    """Load a dataset of the Hub, ``NAME`` or ``NAME:CONFIG``, or a folder or file of Parquet or of images.

    The splits train, validation and test are used as such; others are left out.
    """
    # `datasets` takes a file that has kept its time and size for what it has in its cache.
    with scratch_folder(DOWNLOADS) if hub_path(name) else nullcontext(DOWNLOADS / "huggingface") as cache:
        return _load(name, _load_splits(name, cache), decoder, image_column, label_column)


def _load(
    name: str, parts: Mapping[str, Any], decoder: Decoder, image_column: str | None, label_column: str | None
) -> SourceInfo:
    features = next(iter(parts.values())).features
    image_column = image_column or _find_image_column(name, features)
    label_column = label_column or _find_label_column(name, features)
    for key, column in (("image_column", image_column), ("label_column", label_column)):
        if column not in features:
            raise UserError(
                f"params.yaml: dataset.{key}: hf:{name} has no column {column!r}; name one of {', '.join(features)}"
            )
    raw_labels = [value for part in parts.values() for value in part.with_format(None)[label_column][:]]
    # Where labels are missing, pandas makes a column of fractions, with NaN.
    if absent := sum(value in (None, "") or value != value for value in raw_labels):
        raise UserError(
            f"{SOURCE_KEY}: hf:{name}: {absent} of the images have no label. Take them out, or name another "
            "label_column."
        )
    if strange := [value for value in raw_labels if not isinstance(value, str | int | float | Decimal)]:
        raise _other_kind(name, "label_column", label_column, strange[0], "numbers or names of classes")
    labels, classes = _encode(name, np.array(raw_labels), getattr(features[label_column], "names", None))
    digest = hashlib.sha256()
    decoder.decode(_pictures(name, parts, image_column, labels, digest), len(labels))
    split = np.repeat(list(parts), [len(part) for part in parts.values()])
    is_test = split == "test" if "test" in parts else None
    return SourceInfo(
        labels, classes, is_test, digest.hexdigest(), split == "validation" if "validation" in parts else None
    )


def _load_splits(name: str, cache: Path) -> dict[str, Any]:
    """The splits, by the names that they have here."""
    try:
        import datasets
    except ImportError:
        raise UserError(
            f"{SOURCE_KEY}: hf:{name} needs the package datasets. Run `pip install datasets`, or name a folder or "
            "archive."
        ) from None
    datasets.disable_progress_bars()
    path = hub_path(name)
    if path and path.is_dir():
        with damage_explained(path):
            list(list_names(path))  # refuses what DVC would not watch
    try:
        if path is None:
            dataset, _, config = name.partition(":")
            splits = datasets.load_dataset(dataset, config or None, cache_dir=str(cache))
        elif path.is_file():
            splits = datasets.load_dataset("parquet", data_files=str(path), cache_dir=str(cache))
        else:
            splits = datasets.load_dataset(str(path), cache_dir=str(cache))
    except Exception as error:  # of the network, the Hub, and readers of many formats
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        reason = printable(next(iter(str(cause).splitlines()), type(cause).__name__))
        raise UserError(
            f"{SOURCE_KEY}: hf:{name} cannot be loaded ({reason}). Check the name and the network, or fetch the images "
            "by other means and name their folder or archive."
        ) from None
    usable = [split for split in splits if split.lower() in SPLIT_NAMES]
    kinds = [SPLIT_NAMES[split.lower()] for split in usable]
    if twice := [split for split, kind in zip(usable, kinds, strict=True) if kinds.count(kind) > 1]:
        raise UserError(f"{SOURCE_KEY}: hf:{name}: {' and '.join(twice)} name the same split. Name another dataset.")
    parts = {kind: splits[split] for split, kind in zip(usable, kinds, strict=True)}
    if "train" not in parts:
        raise UserError(f"{SOURCE_KEY}: hf:{name} has no split train, but {', '.join(splits)}. Name another dataset.")
    if others := [split for split in splits if split.lower() not in SPLIT_NAMES]:
        log(f"note: hf:{name}: left out {', '.join(others)}, which is neither train, validation nor test")
    return {split: parts[split] for split in ("train", "validation", "test") if split in parts}


def _find_image_column(name: str, features: Mapping[str, Any]) -> str:
    import datasets

    kinds = {c: isinstance(f, datasets.Image) for c, f in features.items()}
    if not any(kinds.values()):
        # What other programs write: bytes of files, alone or beside their path.
        kinds = {column: _holds_bytes(feature) for column, feature in features.items()}
    return _only(name, "image_column", [column for column, is_image in kinds.items() if is_image], features)


def _holds_bytes(feature: Any) -> bool:
    is_binary = getattr(feature, "dtype", None) in ("binary", "large_binary")
    return is_binary or (isinstance(feature, dict) and "bytes" in feature)


def _find_label_column(name: str, features: Mapping[str, Any]) -> str:
    import datasets

    kinds = [column for column, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    return _only(name, "label_column", kinds or [column for column in LABELS if column in features][:1], features)


def _only(name: str, key: str, columns: list[str], features: Mapping[str, Any]) -> str:
    if len(columns) == 1:
        return columns[0]
    kind = key.partition("_")[0]
    problem = f"has several columns of {kind}s" if columns else f"has no column known to hold {kind}s"
    raise UserError(f"{SOURCE_KEY}: hf:{name} {problem}. Set dataset.{key} to one of {', '.join(columns or features)}.")


def _encode(name: str, raw_labels: np.ndarray, names: list[str] | None) -> tuple[np.ndarray, tuple[str, ...]]:
    """Labels (N,) int64 and classes, from numbers or names of classes."""
    if names is None and raw_labels.dtype.kind in "iub":
        numbers = raw_labels.astype(np.int64)
        distinct, labels = np.unique(numbers, return_inverse=True)
        names, labels = list(map(str, distinct.tolist())), np.where(numbers < 0, -1, labels)
    elif names is None:
        distinct, labels = np.unique(raw_labels.astype(str), return_inverse=True)
        names = distinct.tolist()
    else:
        labels = raw_labels.astype(np.int64)
    if len(names) < 2 or (labels < 0).any():
        problem = "images without a label, of number −1" if len(names) > 1 else f"{len(names)} class"
        raise UserError(f"{SOURCE_KEY}: hf:{name} has {problem}. Name another dataset or dataset.label_column.")
    return labels, tuple(names)


def _pictures(
    name: str, parts: Mapping[str, Any], column: str, labels: np.ndarray, digest: Any
) -> Iterator[SourcePicture]:
    import datasets

    index = 0
    for split, part in parts.items():
        part = part.select_columns([column])
        if isinstance(part.features[column], datasets.Image):
            part = part.cast_column(column, datasets.Image(decode=False))  # threads decode
        for number, row in enumerate(part):
            problem: Exception | None = None
            try:
                content = _content_of(row[column])
            except (OSError, UserError) as error:
                content, problem = b"", error
            if content is None:
                raise _other_kind(name, "image_column", column, row[column], "files of pictures")
            digest.update(f"{labels[index]} {len(content)} ".encode())
            digest.update(content)
            yield index, f"hf:{name}: image {number} of {split}", failing(problem) if problem else content
            index += 1


def _content_of(value: Any) -> bytes | None:
    """The bytes of a picture: empty, and so broken, for a row without one, and None for anything else.

    A file that a row names but that cannot be read is an OSError or a UserError.
    """
    if isinstance(value, Mapping) and "bytes" in value:
        value, path = value["bytes"], value.get("path")
        if path and not value:
            with named(Path(path)):
                value = regular(Path(path)).read_bytes()
    return value or b"" if value is None or isinstance(value, bytes) else None


def _other_kind(name: str, key: str, column: str, value: Any, expected: str) -> UserError:
    return UserError(
        f"params.yaml: dataset.{key}: hf:{name}: column {column!r} holds values of type {type(value).__name__}, not "
        f"{expected}. Name another column, or convert it."
    )
