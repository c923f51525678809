"""The dataset stage: sources of every kind, and their pixels."""

import errno
import hashlib
import io
import os
import threading
from pathlib import Path

import numpy as np
import pytest
from foreign import section
from pictures import (
    SIZE,
    SPLIT_FOLDERS,
    decode_images,
    fit_image,
    load_images,
    make_params,
    noise,
    pack,
    write_fashion_mnist,
    write_folder,
)
from PIL import Image

from nonn.core.errors import UserError
from nonn.core.paths import Paths
from nonn.data.archives import list_names
from nonn.data.dataset import load_dataset
from nonn.data.folders import read_layout
from nonn.stages.dataset import run
from nonn.teachers.foreign import order_of

PATHS = Paths("test")


pytestmark = pytest.mark.usefixtures("folder", "without_network")


# Sources of files


def test_folder_gives_images_in_order_of_split_class_and_name(tmp_path):
    raw = load_images(str(write_folder(tmp_path / "pets", SPLIT_FOLDERS, count=2)), SIZE)
    expected = np.stack([noise(seed).transpose(2, 0, 1) for seed in range(8)])
    np.testing.assert_array_equal(raw.images, expected)
    assert raw.classes == ("cat", "dog")
    assert raw.labels.tolist() == [0, 0, 1, 1, 0, 0, 1, 1]
    assert raw.is_test.tolist() == [False] * 4 + [True] * 4


@pytest.mark.parametrize("name", ["a.zip", "a.tar", "a.tar.gz", "a.tgz"])
@pytest.mark.parametrize("folders", [SPLIT_FOLDERS, ["cat", "dog", "eel"]])
def test_archive_equals_its_folder(tmp_path, name, folders):
    folder = write_folder(tmp_path / "pets", folders, count=3)
    archive = pack(folder, tmp_path / name)
    packed, plain = load_images(str(archive), SIZE), load_images(str(folder), SIZE)
    np.testing.assert_array_equal(packed.images, plain.images)
    np.testing.assert_array_equal(packed.labels, plain.labels)
    np.testing.assert_equal(packed.is_test, plain.is_test)
    assert packed.classes == plain.classes
    assert packed.sha256 == hashlib.sha256(archive.read_bytes()).hexdigest()


def test_many_images_keep_their_places():
    """More than fit the batches in memory, given in reverse."""
    pictures = ((i, str(i), Image.new("L", (SIZE, SIZE), i % 251)) for i in reversed(range(1500)))
    images = decode_images(pictures, 1500, SIZE)
    assert images.shape == (1500, 1, SIZE, SIZE)
    np.testing.assert_array_equal(images[:, 0, 5, 7], np.arange(1500) % 251)


def test_as_many_images_are_decoded_at_once_as_cores_may_be_used(monkeypatch):
    monkeypatch.setattr("nonn.data.decoding.usable_cores", lambda: 20)
    monkeypatch.setattr("nonn.data.decoding.BATCH_IMAGES", 1)
    content = io.BytesIO()
    Image.new("L", (SIZE, SIZE)).save(content, "png")
    together = threading.Barrier(20, timeout=30)

    def read() -> bytes:
        together.wait()
        return content.getvalue()

    assert len(decode_images(((i, str(i), read) for i in range(40)), 40)) == 40
    assert not together.broken


def test_folder_sum_is_that_of_sha256sum_lines(tmp_path):
    folder = write_folder(tmp_path / "pets", ["cat", "dog"], count=1)
    (folder / "README").write_text("not an image")
    names = ["cat/0.png", "dog/0.png"]
    lines = "".join(f"{hashlib.sha256((folder / n).read_bytes()).hexdigest()}  {n}\n" for n in names)
    assert load_images(str(folder), SIZE).sha256 == hashlib.sha256(lines.encode()).hexdigest()


def test_sha256_is_checked(tmp_path):
    folder = write_folder(tmp_path / "pets", ["cat", "dog"], count=1)
    write_fashion_mnist(20, 10)
    for source in (folder, pack(folder, tmp_path / "a.zip"), "torchvision:FashionMNIST"):
        found = load_images(str(source), SIZE).sha256
        assert load_images(str(source), SIZE, sha256=found).sha256 == found
        with pytest.raises(UserError, match=rf"dataset\.sha256.*{found}.*{'0' * 64}"):
            load_images(str(source), SIZE, sha256="0" * 64)


# Layouts


@pytest.mark.parametrize("wrapping", ["", "cifar10/", "./cifar10/", "data/cifar10/"])
def test_layout_is_found_inside_other_folders(wrapping):
    names = [f"{wrapping}{split}/{name}/1.png" for split in ("test", "train") for name in ("dog", "cat")]
    clutter = [f"{wrapping}README.md", "__MACOSX/train/cat/._1.png", f"{wrapping}.DS_Store", ".git/config"]
    layout = read_layout(names + clutter + [f"{wrapping}train/.cache/1.png"], Path("a.zip"))
    assert layout.names == [f"{wrapping}{p}/1.png" for p in ("train/cat", "train/dog", "test/cat", "test/dog")]
    assert layout.is_test.tolist() == [False, False, True, True]


def test_train_alone_is_no_split():
    layout = read_layout(["a/train/cat/1.png", "a/train/dog/1.png"], Path("a.zip"))
    assert layout.is_test is None
    assert layout.classes == ("cat", "dog")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["1.png", "2.png"], "has 0 class folders"),
        (["cat/1.png"], "has 1 class folders"),
        (["cat/1.png", "dog/1.png", "eel/"], "class folder eel is empty"),
        (["cat/1.png", "dog/.hidden"], "class folder dog is empty"),
        (["train/cat/1.png", "train/dog/1.png", "test/cat/"], "class folder test/cat is empty"),
        (["train/cat/1.png", "train/dog/1.png", "test/"], "folder test has no class folders"),
        (["train/cat/1.png", "train/dog/1.png", "test/eel/1.png"], "class 'eel' is in test but not in train"),
        (["train/cat/1.png", "test/cat/1.png", "rest/cat/1.png"], "has rest beside test and train"),
        (["train/cat/1.png", "val/cat/1.png", "Valid/cat/1.png"], "Valid and val name the same split"),
        (["train/cat/1.png", "train/dog/1.png", "val/cat/1.png"], "class 'dog' is not in val"),
        (["Test/cat/1.png", "val/cat/1.png"], "has Test, val, but no train"),
        (["cat/1.png", "dog/1.png", "dog/small/1.png"], r"folder dog/small lies too deep: .*\. Move its images up\."),
        (
            [f"{split}_set/{kind}/1.png" for split in ("training", "test") for kind in ("cat", "dog")],
            r"folder test_set/cat lies too deep: .*\. Rename test_set to test and training_set to train\.",
        ),
        (
            [f"seg_{split}/seg_{split}/{kind}/1.png" for split in ("train", "test") for kind in ("cat", "dog")],
            r"folder seg_test/seg_test lies too deep: .*\. Rename seg_test to test and seg_train to train\.",
        ),
        (
            ["train/cat/1.png", "train/dog/1.png", "Test-Images/cat/1.png"],
            r"beside train\. Rename Test-Images to test\.",
        ),
        (["train/cat/1.png", "test/cat/1.png", "test-2/cat/1.png"], r"beside test and train\. Move its images or"),
        (
            [f"{split}/images/{kind}/1.png" for split in ("train", "test") for kind in ("cat", "dog")],
            r"folder test/images/cat lies too deep: .*\. Move it up if it is a class, else its images\.",
        ),
        (
            [f"{kind}/{split}/1.png" for split in ("train", "test") for kind in ("cat", "dog")],
            r"folder cat/test lies too deep: .*\. Splits have to stand above classes\.",
        ),
        (["cat/1.png", "dog/1.png", "./cat/1.png"], "holds ./cat/1.png twice"),
    ],
)
def test_layout_errors_name_the_folder(names, message):
    with pytest.raises(UserError, match=f"params.yaml: dataset.source: a.zip: .*{message}"):
        read_layout(names, Path("a.zip"))


# Damage


@pytest.mark.parametrize("name", ["a.zip", "a.tar", "a.tar.gz", "a.tgz"])
@pytest.mark.parametrize("keep", [0, 0.6])
def test_damaged_archive(tmp_path, name, keep):
    archive = pack(write_folder(tmp_path / "pets", ["cat", "dog"]), tmp_path / name)
    whole = archive.read_bytes()
    archive.write_bytes(whole[: int(keep * len(whole))])
    with pytest.raises(UserError, match=rf"dataset\.source: \S+{name} cannot be read"):
        load_images(str(archive), SIZE)


def test_flipped_byte_in_a_zip_names_the_image(tmp_path):
    archive = pack(write_folder(tmp_path / "pets", ["cat", "dog"], count=1), tmp_path / "a.zip")
    damaged = bytearray(archive.read_bytes())
    damaged[500] ^= 255  # in the first file
    archive.write_bytes(damaged)
    with pytest.raises(UserError, match=r"a\.zip: dog/0\.png cannot be read \(Bad CRC-32"):
        load_images(str(archive), SIZE)


@pytest.mark.parametrize(("keep", "reason"), [(0, "not an image"), (900, "truncated|broken|unrecognized")])
def test_damaged_image_is_named(tmp_path, keep, reason):
    folder = write_folder(tmp_path / "pets", ["cat", "dog"], count=3)
    image = folder / "dog/1.png"
    image.write_bytes(image.read_bytes()[:keep])
    for source in (folder, pack(folder, tmp_path / "a.tgz")):
        with pytest.raises(UserError, match=rf"dataset\.source: .*dog/1\.png cannot be read \(.*({reason})"):
            load_images(str(source), SIZE)


@pytest.mark.parametrize("name", ["pets", "a.tar", "a.zip"])
def test_files_too_large_for_a_picture_are_broken_ones_and_not_read(name, tmp_path, monkeypatch):
    monkeypatch.setattr("nonn.data.archives.MAX_FILE_BYTES", 5000)
    folder = write_folder(tmp_path / "pets", ["cat", "dog"], count=2)
    (folder / "dog/1.png").write_bytes(bytes(5001))
    source = folder if name == "pets" else pack(folder, tmp_path / name)
    with pytest.raises(UserError, match=r"dog/1\.png cannot be read \(0\.0 GiB, too large for a picture\)"):
        load_images(str(source), SIZE)


def test_unknown_sources(tmp_path):
    with pytest.raises(UserError, match=r"dataset\.source: nowhere\.zip does not exist"):
        load_images("nowhere.zip", SIZE)
    (tmp_path / "a.rar").touch()
    with pytest.raises(UserError, match=r"a\.rar is neither a folder nor a \.zip"):
        load_images("a.rar", SIZE)


# Pixels


def test_greyscale_has_one_channel_unless_any_image_has_colour(tmp_path):
    folder = write_folder(tmp_path / "digits", ["0", "1"], count=2, channels=1)
    raw = load_images(str(folder), SIZE)
    assert raw.images.shape == (4, 1, SIZE, SIZE)
    np.testing.assert_array_equal(raw.images[2, 0], noise(2, (SIZE, SIZE)))

    Image.fromarray(noise(9)).save(folder / "1/1.png")
    mixed = load_images(str(folder), SIZE)
    assert mixed.images.shape == (4, 3, SIZE, SIZE)
    np.testing.assert_array_equal(mixed.images[:3], np.repeat(raw.images[:3], 3, axis=1))
    np.testing.assert_array_equal(mixed.images[3], noise(9).transpose(2, 0, 1))


@pytest.mark.parametrize(("mode", "channels"), [("1", 1), ("LA", 1), ("P", 3), ("RGBA", 3), ("CMYK", 3)])
def test_other_modes_become_greyscale_or_colour(mode, channels):
    image = Image.new("RGB", (SIZE, SIZE), (255, 255, 255)).convert(mode)
    np.testing.assert_array_equal(fit_image(image, SIZE), np.full((channels, SIZE, SIZE), 255))


def test_wide_image_is_cropped_to_its_centre():
    pixels = noise(0, (SIZE, 2 * SIZE))
    np.testing.assert_array_equal(fit_image(Image.fromarray(pixels), SIZE)[0], pixels[:, 14:42])


def test_shrinking_is_antialiased():
    """Columns 1 and 2 of every 4 are white; a bilinear sample in between would be white too.

    The triangle filter spans 4 columns to either side: white gets 2 of the weights' sum of 4.
    """
    pixels = np.zeros((4 * SIZE, 4 * SIZE), np.uint8)
    pixels[:, 1::4] = pixels[:, 2::4] = 255
    shrunk = fit_image(Image.fromarray(pixels), SIZE)[0, 1:-1, 1:-1].astype(int)
    np.testing.assert_allclose(shrunk, 127.5, atol=1)


# Splits of the source's own, and what is no picture


@pytest.mark.parametrize("names", [("train", "val"), ("Train", "Valid", "Test"), ("training", "validation", "testing")])
def test_folders_of_validation_images_are_the_validation_split(names, tmp_path):
    folder = write_folder(tmp_path / "images", [f"{split}/{name}" for split in names for name in ("cat", "dog")])
    run(make_params(folder), PATHS)
    data, layout = load_dataset(PATHS), read_layout(list_names(folder), folder)
    of_split = {split: [i for i, name in enumerate(layout.names) if name.startswith(split)] for split in names}
    assert data.validation.tolist() == of_split[names[1]]
    if len(names) == 3:
        assert data.test.tolist() == of_split[names[2]]
        assert data.train.tolist() == of_split[names[0]]
    else:
        assert len(data.test) == 4, "a quarter of the training images"
        assert sorted([*data.train.tolist(), *data.test.tolist()]) == of_split["train"]


@pytest.mark.parametrize(
    ("call", "number", "told"),
    [
        ("open", errno.EACCES, r"^results/test/dataset\.safetensors: permission denied\. Change its owner"),
        ("pwrite", errno.ENOSPC, r"^results/test: no space left on device\. Free some space there"),
    ],
)
def test_results_that_cannot_be_written_are_no_fault_of_the_source(call, number, told, tmp_path, monkeypatch):
    folder, function = write_folder(tmp_path / "images", ["cat", "dog"]), getattr(os, call)

    def refuse(where, *rest):
        if call == "pwrite" or str(where).endswith(".safetensors"):
            raise OSError(number, os.strerror(number), *([str(where)] if call == "open" else []))
        return function(where, *rest)

    monkeypatch.setattr(os, call, refuse)
    with pytest.raises(UserError, match=told):
        run(make_params(folder), PATHS)


def test_a_class_has_one_name_however_its_accents_are_encoded(tmp_path):
    whole, apart = "caf\u00e9", "cafe\u0301"
    folder = write_folder(tmp_path / "images", [f"train/{whole}", "train/th\u00e9", f"test/{apart}", "test/th\u00e9"])
    raw = load_images(str(folder), SIZE)
    assert raw.classes == (whole, "th\u00e9")
    assert raw.is_test.sum() == 16
    params = section(classes=["th\u00e9", apart])
    assert order_of(params.classes, raw.classes, params) == [1, 0]


def test_heic_pictures_are_called_so(tmp_path):
    folder = write_folder(tmp_path / "pets", ["cat", "dog"], count=1)
    (folder / "dog/0.png").write_bytes(b"\0\0\0\x24ftypheic\0\0\0\0mif1MiHE" + bytes(100))
    with pytest.raises(
        UserError, match=r"dog/0\.png cannot be read \(a HEIC picture, which Pillow does not read; save"
    ):
        load_images(str(folder), SIZE)


def test_names_that_are_not_utf8_are_read(tmp_path):
    folder = write_folder(tmp_path / "images", ["cat", "dog"])
    (folder / "cat/0.png").rename(folder / "cat" / os.fsdecode(b"\xff\xfe.png"))
    assert len(load_images(str(folder), SIZE).labels) == 16
    (folder / "cat").joinpath(os.fsdecode(b"\xff\xfe.png")).write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"cat/\\udcff\\udcfe\.png cannot be read"):
        load_images(str(folder), SIZE)
