"""Folders and archives of pictures, and what the stage `dataset` reads of them."""

import contextlib
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from experiments import REPOSITORY
from PIL import Image

from nonn.core.images import squared, upright
from nonn.core.params import Params, load_params
from nonn.data import sources
from nonn.data.decoding import Decoder, SourcePicture
from nonn.data.image_store import ImageWriter
from nonn.data.packaged import DOWNLOADS

SIZE = 28
SPLIT_FOLDERS = ["train/cat", "train/dog", "test/cat", "test/dog"]


def make_params(source: str | Path, **changes) -> Params:
    section = {
        "source": str(source),
        "sha256": None,
        "size": SIZE,
        "validation": 0.25,
        "test": 0.25,
        "seed": 0,
    }
    params = load_params(REPOSITORY / "params.yaml")
    return params.model_copy(update={"dataset": params.dataset.model_copy(update=section | changes)})


def noise(seed: int, shape: tuple[int, ...] = (SIZE, SIZE, 3)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def write_folder(root: Path, folders: list[str], count: int = 8, channels: int = 3) -> Path:
    """Write `count` images of noise to each folder; the seed of each is its running number."""
    shape = (SIZE, SIZE, 3) if channels == 3 else (SIZE, SIZE)
    for i, folder in enumerate(folders):
        (root / folder).mkdir(parents=True)
        for j in range(count):
            Image.fromarray(noise(i * count + j, shape)).save(root / folder / f"{j}.png")
    return root


def pack(folder: Path, archive: Path) -> Path:
    """Pack a folder, files in an order that is not the alphabetical one."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    files.sort(key=lambda path: (path.name, str(path)), reverse=True)
    if archive.suffix == ".zip":
        with zipfile.ZipFile(archive, "w") as packed:
            for path in files:
                packed.write(path, path.relative_to(folder))
    else:
        with tarfile.open(archive, "w" if archive.suffix == ".tar" else "w:gz") as packed:
            for path in files:
                packed.add(path, f"./{path.relative_to(folder)}")
    return archive


def load_images(source: str | Path, size: int = SIZE, **changes) -> SimpleNamespace:
    """What is known of the images of a source, with the ``images`` themselves, uint8 of shape (N, C, size, size)."""
    section = make_params(source, size=size, **changes).dataset
    with contextlib.closing(ImageWriter(Path("writer"), size)) as writer:
        decoder = Decoder([writer], section.white)
        info, kept = sources.load_images(section, decoder)
        return SimpleNamespace(**vars(info), images=_read(writer, kept, decoder.channels), decoder=decoder)


def decode_images(pictures: Iterator[SourcePicture], count: int, size: int = SIZE) -> np.ndarray:
    with contextlib.closing(ImageWriter(Path("writer"), size)) as writer:
        decoder = Decoder([writer])
        decoder.decode(pictures, count)
        return _read(writer, np.arange(count), decoder.channels)


def _read(writer: ImageWriter, indices: np.ndarray, channels: int) -> np.ndarray:
    return torch.cat(list(writer.batches(indices, channels))).numpy()


def write_photos(folder: Path) -> None:
    """Six photographs of noise for each of two classes, wider than high."""
    generator = np.random.default_rng(0)
    for kind in ("cats", "dogs"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
        for number in range(6):
            picture = Image.fromarray(generator.integers(0, 256, (40, 50, 3), np.uint8))
            picture.save(folder / kind / f"{number}.png")


def save(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noise(seed)).save(path, "PNG")  # so that pixels stay as they are, whatever the suffix


def seeds_of(loaded) -> list[int]:
    """Which pictures these are, by the seeds of their pixels."""
    known = {noise(seed).transpose(2, 0, 1).tobytes(): seed for seed in range(100)}
    return [known[image.tobytes()] for image in loaded.images]


def fit_image(image: Image.Image, size: int) -> np.ndarray:
    """As the data set does it, with as many channels as the image has."""
    return squared(upright(image), size)


def write_fashion_mnist(train: int, test: int) -> list[np.ndarray]:
    """Write raw files as Zalando's, without the network."""
    folder = DOWNLOADS / "FashionMNIST/raw"
    folder.mkdir(parents=True)
    images = []
    for name, count in (("train", train), ("t10k", test)):
        images.append(noise(count, (count, 28, 28)))
        labels = (np.arange(count) % 10).astype(np.uint8)
        header = b"".join(n.to_bytes(4, "big") for n in (0x803, count, 28, 28))
        (folder / f"{name}-images-idx3-ubyte").write_bytes(header + images[-1].tobytes())
        header = b"".join(n.to_bytes(4, "big") for n in (0x801, count))
        (folder / f"{name}-labels-idx1-ubyte").write_bytes(header + labels.tobytes())
    return images
