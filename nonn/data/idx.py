"""Images of a folder of idx files, the format of MNIST (http://yann.lecun.com/exdb/mnist/), packed by gzip or not."""

from __future__ import annotations

import gzip
import hashlib
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from nonn.core.errors import UserError
from nonn.core.files import regular
from nonn.data.decoding import SOURCE_KEY, Decoder, SourceInfo
from nonn.data.packaged import decode_pairs

#: SHA-256 of the training labels of Fashion-MNIST, whose files do not name the classes.
FASHION = "657fbd221bfc9f4198cc14b5619cc33ec57c58dd0e47af4d99d6650759e869a7"
SPLITS = {"train": "train", "test": "t10k"}


def find_idx(folder: Path) -> dict[str, Path]:
    """The four files of a folder, by ``train-images``, ``train-labels``, ``test-images`` and ``test-labels``.

    Raises
    ------
    UserError
        The folder has files of several sets, as that of EMNIST has.
    """
    by_name: dict[str, Path] = {}
    for split, name in SPLITS.items():
        for kind, dimensions in (("images", 3), ("labels", 1)):
            pattern = f"*{name}-{kind}[-.]idx{dimensions}-ubyte*"
            files = _find_files(folder, pattern)
            if split == "test" and not files:
                files = _find_files(folder, pattern.replace(name, "test"))
            if len(names := {file.name.removesuffix(".gz").replace(".idx", "-idx") for file in files}) > 1:
                raise UserError(
                    f"{SOURCE_KEY}: {folder}: has several sets of idx files ({', '.join(sorted(names))}). Give the one "
                    "you mean a folder of its own."
                )
            if files:  # packed or unpacked, the content is the same
                by_name[f"{split}-{kind}"] = files[0]
    return by_name


def _find_files(folder: Path, pattern: str) -> list[Path]:
    return sorted(f for f in folder.glob(pattern) if f.name.endswith(("ubyte", "ubyte.gz")) and not f.is_dir())


def load_idx(folder: Path, decoder: Decoder) -> SourceInfo:
    """Load the training and test images of a folder that has idx files."""
    files = find_idx(folder)
    if absent := sorted({f"{split}-{kind}" for split in SPLITS for kind in ("images", "labels")} - set(files)):
        raise UserError(f"{SOURCE_KEY}: {folder}: has idx files, but none of {', '.join(absent)}. Fetch all four.")
    arrays = {name: read_idx(path, 3 if name.endswith("images") else 1) for name, path in files.items()}
    for split in SPLITS:
        if (n := len(arrays[f"{split}-images"])) != (m := len(arrays[f"{split}-labels"])):
            raise UserError(f"{SOURCE_KEY}: {folder}: has {n} {split} images and {m} labels. Fetch its files again.")
    if not all(map(len, arrays.values())):
        raise UserError(f"{SOURCE_KEY}: {folder}: has idx files without images. Fetch them again.")
    labels = np.concatenate([arrays["train-labels"], arrays["test-labels"]])
    images = (image for split in SPLITS for image in arrays[f"{split}-images"])
    pairs = zip(map(Image.fromarray, images), labels.tolist(), strict=True)
    numbers, sha256 = decode_pairs(pairs, len(labels), decoder)
    distinct, class_numbers = np.unique(numbers, return_inverse=True)  # some begin at 1
    classes = tuple(map(str, distinct.tolist()))
    if hashlib.sha256(arrays["train-labels"].tobytes()).hexdigest() == FASHION:
        from torchvision.datasets import FashionMNIST

        classes = tuple(FashionMNIST.classes)
    return SourceInfo(class_numbers, classes, np.arange(len(labels)) >= len(arrays["train-labels"]), sha256)


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """The bytes of an idx file, uint8."""
    try:
        content = regular(path).read_bytes()
        content = gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
        kind, n_dimensions = content[2], content[3]
        shape = np.frombuffer(content, ">i4", dimensions, offset=4)
        if content[:2] != b"\0\0" or kind != 8 or n_dimensions != dimensions:
            raise ValueError(f"it does not begin as a file of bytes in {dimensions} dimensions does")
        if shape[0] < 0 or (shape[1:] < 1).any():
            raise ValueError(f"its header says {' × '.join(map(str, shape))}")
        return np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(shape)
    except (OSError, EOFError, zlib.error, ValueError, IndexError) as error:
        raise UserError(f"{SOURCE_KEY}: {path} cannot be read ({error}). Fetch it again.") from None
