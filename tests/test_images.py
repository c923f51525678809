"""Pictures as people have them: broken, beside other files, in all kinds of archives, few of a class."""

import io
import re
import shutil
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import SIZE, fit_image, load_images, make_params, noise, pack, write_folder
from PIL import Image
from safetensors.torch import save_file

from nonn.core.errors import UserError
from nonn.core.files import read_json
from nonn.core.images import open_image
from nonn.core.paths import Paths
from nonn.data.clutter import sort_out
from nonn.data.dataset import load_dataset, load_teacher_dataset, measure_channels
from nonn.data.decoding import MAX_NAMED
from nonn.data.image_store import ImageWriter, map_images
from nonn.stages.dataset import run

PATHS = Paths("test")

pytestmark = pytest.mark.usefixtures("folder")


# Broken pictures


def break_pictures(root: Path, names: list[str]) -> None:
    for name in names:
        (root / name).write_bytes(b"no picture")


def test_all_broken_pictures_are_listed_at_once(tmp_path):
    root = write_folder(tmp_path / "pets", ["cat", "dog"])
    break_pictures(root, ["cat/1.png", "dog/7.png"])
    whole = (root / "dog/3.png").read_bytes()
    (root / "dog/3.png").write_bytes(whole[:900])
    with pytest.raises(UserError) as refusal:
        load_images(root)
    first, *rows = str(refusal.value).splitlines()
    assert first.startswith("params.yaml: dataset.source: 3 pictures cannot be read. Replace or remove them, or set ")
    assert [re.search(r"(\w+/\d\.png): ", row)[1] for row in rows] == ["cat/1.png", "dog/3.png", "dog/7.png"]
    assert rows[0].endswith(": not an image")


def test_a_long_list_of_broken_pictures_is_cut_short(tmp_path):
    root = write_folder(tmp_path / "pets", ["cat", "dog"], count=MAX_NAMED)
    break_pictures(root, [f"{name}/{i}.png" for name in ("cat", "dog") for i in range(MAX_NAMED)])
    with pytest.raises(UserError) as refusal:
        load_images(root)
    lines = str(refusal.value).splitlines()
    assert len(lines) == MAX_NAMED + 2
    assert lines[-1] == f"  and {MAX_NAMED} more"


@pytest.mark.parametrize("kind", ["pets", "a.zip", "a.tgz"])
def test_broken_pictures_are_skipped_if_that_is_asked_for(kind, tmp_path, capsys):
    root = write_folder(tmp_path / "pets", ["cat", "dog"])
    sound = load_images(root)
    break_pictures(root, ["cat/0.png", "dog/2.png"])
    source = root if kind == "pets" else pack(root, tmp_path / kind)
    run(make_params(source, broken="skip"), PATHS)
    data, kept = load_dataset(PATHS), np.setdiff1d(np.arange(16), [0, 10])
    np.testing.assert_array_equal(data.images, sound.images[kept])
    assert data.labels.tolist() == [0] * 7 + [1] * 7
    skipped = read_json(PATHS.dataset_info)["skipped"]
    assert skipped["count"] == 2
    assert [name[-9:] for name in skipped["first"]] == ["cat/0.png", "dog/2.png"]
    assert "2 pictures cannot be read and are left out" in capsys.readouterr().err


def test_a_class_of_broken_pictures_alone_is_named(tmp_path):
    root = write_folder(tmp_path / "pets", ["cat", "dog"], count=3)
    break_pictures(root, [f"dog/{i}.png" for i in range(3)])
    with pytest.raises(UserError, match="class 'dog' has 0 images"):
        run(make_params(root, broken="skip"), PATHS)
    assert not PATHS.dataset.exists()


def test_damage_in_a_zip_costs_its_pictures_alone(tmp_path):
    archive = pack(write_folder(tmp_path / "pets", ["cat", "dog"], count=3), tmp_path / "a.zip")
    content = bytearray(archive.read_bytes())
    content[500] ^= 255
    archive.write_bytes(content)
    loaded = load_images(archive, broken="skip")
    assert len(loaded.labels) == 5
    assert len(loaded.images) == 5


# Files beside pictures


def test_what_is_no_picture_is_passed_over(tmp_path, capsys):
    root = write_folder(tmp_path / "pets", ["cat", "dog"], count=2)
    plain = load_images(root)
    names = ["Thumbs.db", "desktop.ini", "a.json", "A.CSV", "notes.txt", "README.md", "README", "0.xml", ".DS_Store"]
    for name in names:
        (root / "cat" / name).write_text("no picture")
    (root / "labels.csv").write_text("no picture")
    (root / ".hidden").mkdir()
    (root / ".hidden/0.png").write_text("no picture")
    for folder in ("@eaDir", "System Volume Information"):  # of network drives and of Windows
        (root / "cat" / folder).mkdir()
        (root / "cat" / folder / "0.png").write_text("no picture")
    for source in (root, pack(root, tmp_path / "a.zip")):
        loaded = load_images(source)
        np.testing.assert_array_equal(loaded.images, plain.images)
        assert "passed over 10 files (1 in hidden folders, 2 .csv, " in capsys.readouterr().err
    assert load_images(root).sha256 == plain.sha256


@pytest.mark.parametrize("suffix", ["JPG", "Jpeg", "PNG", "webp", "TIFF", "BMP", "GIF", "ppm", "Tga", "jp2"])
def test_pictures_are_read_whatever_the_case_of_their_suffix(suffix, tmp_path):
    root = write_folder(tmp_path / "pets", ["cat", "dog"], count=1)
    kind = {"jpg": "jpeg", "tiff": "tiff", "jp2": "jpeg2000"}.get(suffix.lower(), suffix.lower())
    Image.fromarray(noise(7)).save(root / f"cat/1.{suffix}", kind)
    assert load_images(root).images.shape == (3, 3, SIZE, SIZE)


def test_a_file_of_no_known_suffix_is_a_picture_if_it_can_be_read(tmp_path):
    root = write_folder(tmp_path / "pets", ["cat", "dog"], count=1)
    (root / "cat/0.png").rename(root / "cat/picture")
    assert len(load_images(root).labels) == 2
    (root / "cat/other").write_text("no picture")
    with pytest.raises(UserError, match="cat/other cannot be read"):
        load_images(root)


def test_a_folder_of_other_files_alone_is_an_empty_class():
    kept, passed = sort_out(["cat/1.png", "dog/Thumbs.db"])
    assert kept == ["cat/1.png", "dog/"]
    assert passed == {".db": 1}


# Archives

PACKERS = {"gz": "w:gz", "bz2": "w:bz2", "xz": "w:xz", "tgz": "w:gz", "tbz2": "w:bz2", "txz": "w:xz", "tar": "w"}


@pytest.mark.parametrize("name", ["A.TAR.GZ", "a.tar.bz2", "a.tbz2", "a.tar.xz", "A.TXZ", "UPPER.ZIP", "Upper.Tar"])
def test_archives_of_all_kinds_and_cases_are_read(name, tmp_path):
    root = write_folder(tmp_path / "pets", ["cat", "dog"], count=2)
    plain, path = load_images(root), tmp_path / name
    if name.endswith("ZIP"):
        pack(root, tmp_path / "lower.zip").rename(path)
    else:
        with tarfile.open(path, PACKERS[name.lower().rpartition(".")[2]]) as archive:
            archive.add(root, "pets")
    np.testing.assert_array_equal(load_images(path).images, plain.images)


def test_a_zip_with_backslashes_is_read(tmp_path):
    root = write_folder(tmp_path / "pets", ["cat", "dog"], count=2)
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for path in sorted(root.rglob("*.png")):
            info = zipfile.ZipInfo("placeholder")
            info.filename = str(path.relative_to(root)).replace("/", "\\")
            archive.writestr(info, path.read_bytes())
        folder = zipfile.ZipInfo("placeholder")
        folder.filename = "cat\\"
        archive.writestr(folder, b"")
    np.testing.assert_array_equal(load_images(tmp_path / "a.zip").images, load_images(root).images)


@pytest.mark.skipif("zst" in tarfile.TarFile.OPEN_METH, reason="this Python reads Zstandard")
def test_zstandard_says_which_python_reads_it(tmp_path):
    (tmp_path / "a.tar.zst").write_bytes(b"\x28\xb5\x2f\xfd")
    with pytest.raises(UserError, match=r"a\.tar\.zst: Python reads Zstandard from 3\.14 on\. Unpack it"):
        load_images(tmp_path / "a.tar.zst")


# Few pictures of a class


@pytest.mark.parametrize(
    ("folders", "needed"),
    [(["cat", "dog"], 3), (["train/cat", "train/dog", "test/cat", "test/dog"], 2)],
)
def test_the_remedy_for_a_class_with_one_picture_works(folders, needed, tmp_path):
    root = write_folder(tmp_path / "pets", folders)
    few = root / folders[1]
    for path in list(few.iterdir())[1:]:
        path.unlink()
    with pytest.raises(UserError, match=f"class 'dog' has 1 image .*needs {needed} at least. Add images to each") as e:
        run(make_params(root), PATHS)
    assert "lower dataset" not in str(e.value).lower()
    for i in range(1, needed):
        shutil.copy(next(few.iterdir()), few / f"more{i}.png")
    run(make_params(root), PATHS)
    assert read_json(PATHS.dataset_info)["class_counts"]["train"]["dog"] == 1


def test_of_classes_with_enough_pictures_the_fractions_are_too_large(tmp_path):
    root = write_folder(tmp_path / "pets", ["cat", "dog"], count=6)
    params = make_params(root, validation=0.5, test=0.49)
    with pytest.raises(UserError, match=r"'cat' has 6 images, 'dog' has 6 images .* Lower dataset\.validation"):
        run(params, PATHS)
    run(make_params(root, validation=0.4, test=0.3), PATHS)


def test_unbalanced_classes_are_split_class_by_class(tmp_path):
    root = write_folder(tmp_path / "pets", ["cat"], count=60)
    for i in range(3):
        (root / "dog").mkdir(exist_ok=True)
        Image.fromarray(noise(100 + i)).save(root / f"dog/{i}.png")
    run(make_params(root), PATHS)
    counts = read_json(PATHS.dataset_info)["class_counts"]
    assert {split: row["dog"] for split, row in counts.items()} == {"train": 1, "validation": 1, "test": 1}
    assert {split: row["cat"] for split, row in counts.items()} == {"train": 30, "validation": 15, "test": 15}


# What is written, and how it is read


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("count", [1, 7, 300])
def test_a_canvas_becomes_the_file_that_safetensors_writes(channels, count, tmp_path, monkeypatch):
    monkeypatch.setattr("nonn.data.image_store.CHUNK_BYTES", 5000)
    images = torch.from_numpy(noise(0, (count, channels, 10, 10)))
    others = {"train": torch.arange(count // 2), "labels": torch.arange(count), "mean": torch.ones(channels)}
    writer = ImageWriter(tmp_path / "writer", 10)
    writer.begin(count)
    for index in np.random.default_rng(0).permutation(count):
        writer.write(index, images[index].numpy())
    kept = np.flatnonzero(np.arange(count) % 3 != 1)
    writer.finish(kept, channels, others)
    writer.close()
    save_file({"images": images[kept], **others}, tmp_path / "expected")
    assert (tmp_path / "writer").read_bytes() == (tmp_path / "expected").read_bytes()
    mapping, tensors = map_images(tmp_path / "writer")
    assert torch.equal(mapping.images, images[kept])
    assert torch.equal(tensors["labels"], others["labels"])


def test_channels_are_measured_alike_in_batches_and_at_once():
    images = torch.from_numpy(noise(0, (50, 3, 8, 8)))
    for one, other in zip(measure_channels(images), measure_channels(iter(images.split(7))), strict=True):
        assert torch.equal(one, other)


def test_images_are_the_same_after_pages_were_given_back(tmp_path, monkeypatch):
    monkeypatch.setattr("nonn.data.image_store.MAX_MAPPED_BYTES", 1000)
    run(make_params(write_folder(tmp_path / "pets", ["cat", "dog"])), PATHS)
    data = load_dataset(PATHS)
    images, labels = data.subset("train")
    expected = data.images[data.train].clone()
    index = torch.tensor([5, 0, 3])
    for _ in range(3):
        assert torch.equal(images[index], expected[index])
        assert torch.equal(torch.cat(list(images.split(4))), expected)
    assert images.shape == expected.shape == (len(labels), 3, SIZE, SIZE)


def test_large_jpegs_are_decoded_smaller_with_nearly_the_same_pixels():
    smooth = Image.fromarray(noise(0, (6, 6, 3))).resize((1200, 900), Image.Resampling.BICUBIC)
    content = io.BytesIO()
    smooth.save(content, "JPEG", quality=90)
    small = open_image(content.getvalue(), SIZE)
    assert small.size == (150, 113), "an eighth"
    whole = Image.open(io.BytesIO(content.getvalue()))
    difference = abs(fit_image(small, SIZE).astype(int) - fit_image(whole, SIZE))
    assert difference.mean() < 1.5
    assert difference.max() <= 8, "in the colours, which JPEG stores at half the size"
    assert open_image(content.getvalue(), 512).size == (1200, 900), "no fewer than twice the pixels wanted"


# Sizes


def test_teacher_and_students_see_the_same_pictures_at_their_sizes(tmp_path):
    root = write_folder(tmp_path / "pets", ["cat", "dog"])
    params = make_params(root)
    params = params.model_copy(update={"teacher": params.teacher.model_copy(update={"size": 56})})
    run(params, PATHS)
    students, teacher = load_dataset(PATHS), load_teacher_dataset(PATHS)
    assert (students.size, teacher.size) == (SIZE, 56)
    assert torch.equal(students.labels, teacher.labels)
    with Image.open(root / "cat/3.png") as image:
        np.testing.assert_array_equal(students.images[3], fit_image(image, SIZE))
        np.testing.assert_array_equal(teacher.images[3], fit_image(image, 56))
    mean, std = measure_channels(teacher.images[teacher.train])
    assert torch.equal(teacher.mean, mean)
    assert torch.equal(teacher.std, std)
    assert read_json(PATHS.dataset_info)["teacher_size"] == 56


def test_students_may_see_smaller_pictures_than_dataset_size(tmp_path):
    root = write_folder(tmp_path / "pets", ["cat", "dog"])
    params = make_params(root, size=64)
    design = params.design.model_copy(update={"input": 32})
    run(params.model_copy(update={"design": design}), PATHS)
    assert (load_dataset(PATHS).size, load_teacher_dataset(PATHS).size) == (32, 64)


def test_one_size_is_written_once(tmp_path):
    run(make_params(write_folder(tmp_path / "pets", ["cat", "dog"])), PATHS)
    assert PATHS.teacher_images.stat().st_size < 200
    assert torch.equal(load_teacher_dataset(PATHS).images, load_dataset(PATHS).images)
    assert "teacher_size" not in read_json(PATHS.dataset_info)
