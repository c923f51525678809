"""Sources beside plain folders: well-known data sets as they are downloaded, and idx files."""

import gzip
import io
import os
import tarfile
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.io
from experiments import REPOSITORY
from pictures import SIZE, load_images, make_params, noise, save, seeds_of, write_folder
from PIL import Image

from nonn.core.errors import UserError
from nonn.core.paths import Paths
from nonn.stages.dataset import run

pytestmark = pytest.mark.usefixtures("folder")


# MIT indoor scenes, CUB-200-2011


def write_scenes(root: Path) -> Path:
    for i, name in enumerate(["pub/a.jpg", "pub/b c.jpg", "pub/c.jpg", "attic/a.jpg", "attic/b.jpg"]):
        save(root / "Images" / name, i)
    (root / "TrainImages.txt").write_text("pub/a.jpg\nattic/b.jpg\n")
    (root / "TestImages.txt").write_text("attic/a.jpg\r\npub/b c.jpg\r\n")
    return root


@pytest.mark.parametrize("packed", [False, True])
def test_scenes_are_split_by_their_lists(packed, tmp_path):
    root = write_scenes(tmp_path / "indoorCVPR_09")
    if packed:
        with tarfile.open("indoor.tar", "w") as archive:
            archive.add(root, "indoorCVPR_09")
        root = Path("indoor.tar")
    loaded = load_images(root)
    assert loaded.classes == ("attic", "pub")
    assert seeds_of(loaded) == [4, 0, 3, 1], "that of pub/c.jpg is on no list"
    assert loaded.labels.tolist() == [0, 1, 0, 1]
    assert loaded.is_test.tolist() == [False, False, True, True]


def write_birds(root: Path) -> Path:
    names = ["002.Auk/b.jpg", "001.Wren/a.jpg", "002.Auk/c.jpg", "001.Wren/d.jpg"]
    for i, name in enumerate(names):
        save(root / "images" / name, i)
    (root / "images.txt").write_text("".join(f"{i + 1} {name}\n" for i, name in enumerate(names)))
    (root / "classes.txt").write_text("1 001.Wren\n2 002.Auk\n")
    (root / "image_class_labels.txt").write_text("1 2\n2 1\n3 2\n4 1\n")
    (root / "train_test_split.txt").write_text("1 1\n2 0\n3 0\n4 1\n")
    (root.parent / "attributes.txt").write_text("1 has_bill_shape::curved\n")
    return root.parent


def test_birds_are_split_by_their_lists(tmp_path):
    loaded = load_images(write_birds(tmp_path / "birds/CUB_200_2011"))
    assert loaded.classes == ("001.Wren", "002.Auk")
    assert seeds_of(loaded) == [3, 0, 1, 2]
    assert loaded.labels.tolist() == [0, 1, 0, 1]
    assert loaded.is_test.tolist() == [False, False, True, True]


def test_lists_that_do_not_fit_the_pictures_are_refused(tmp_path):
    scenes = write_scenes(tmp_path / "scenes")
    (scenes / "Images/pub/a.jpg").unlink()
    with pytest.raises(UserError, match=r"its lists name Images/pub/a\.jpg, which is not there\. Unpack"):
        load_images(scenes)
    scenes = write_scenes(tmp_path / "twice")
    (scenes / "TestImages.txt").write_text("attic/a.jpg\npub/a.jpg\n")
    with pytest.raises(UserError, match=r"its lists name Images/pub/a\.jpg for training and for the test\. Take it"):
        load_images(scenes)
    birds = write_birds(tmp_path / "birds/CUB_200_2011")
    (tmp_path / "birds/CUB_200_2011/image_class_labels.txt").write_text("1 2\n2 1\n3 7\n4 1\n")
    with pytest.raises(UserError, match="its lists do not agree on image 3"):
        load_images(birds)
    (tmp_path / "birds/CUB_200_2011/image_class_labels.txt").write_text("1 2\n2 1\n3 2\n4 1\n")
    (tmp_path / "birds/CUB_200_2011/images.txt").write_text("1 002.Auk/b.jpg\n2 001.Wren/a.jpg\n3 002.Auk/b.jpg\n")
    with pytest.raises(UserError, match=r"name CUB_200_2011/images/002\.Auk/b\.jpg for training and for the test"):
        load_images(birds)
    (tmp_path / "birds/CUB_200_2011/image_class_labels.txt").write_text("1\n")
    with pytest.raises(UserError, match=r"image_class_labels\.txt: line 1 has not two columns"):
        load_images(birds)


# ImageNet

WNIDS = ("n01440764", "n02123045")


def write_imagenet(root: Path, flat: bool) -> Path:
    top = root / "ILSVRC/Data/CLS-LOC"
    for i, wnid in enumerate(WNIDS):
        for j in range(2):
            save(top / f"train/{wnid}/{wnid}_{j}.JPEG", 2 * i + j)
    for i, wnid in enumerate([WNIDS[1], WNIDS[0]]):
        save(top / "val" / ("" if flat else wnid) / f"ILSVRC2012_val_0000000{i + 1}.JPEG", 10 + i)
    save(top / "test/ILSVRC2012_test_00000001.JPEG", 20)
    (root / "ILSVRC/ImageSets").mkdir()
    (root / "ILSVRC/ImageSets/train_cls.txt").write_text("a 1\n")
    (root / "ILSVRC/Annotations/CLS-LOC/val").mkdir(parents=True)
    return root


def describe_by_kaggle(root: Path) -> None:
    rows = [f"ILSVRC2012_val_0000000{i + 1},{WNIDS[1 - i]} 1 2 3 4 {WNIDS[1 - i]} 5 6 7 8 " for i in range(2)]
    (root / "LOC_val_solution.csv").write_text("\n".join(["ImageId,PredictionString", *rows]) + "\n")


def describe_by_devkit(root: Path) -> None:
    folder = root / "ILSVRC2012_devkit_t12/data"
    folder.mkdir(parents=True)
    (folder / "ILSVRC2012_validation_ground_truth.txt").write_text("7\n3\n")
    synsets = np.array([(3, WNIDS[0]), (7, WNIDS[1])], [("ILSVRC2012_ID", "O"), ("WNID", "O")])
    scipy.io.savemat(folder / "meta.mat", {"synsets": synsets})


@pytest.mark.parametrize("describe", [None, describe_by_kaggle, describe_by_devkit])
def test_validation_pictures_of_imagenet_are_the_test_split(describe, tmp_path):
    root = write_imagenet(tmp_path / "imagenet", flat=describe is not None)
    if describe:
        describe(root)
    loaded = load_images(root)
    assert loaded.classes == WNIDS
    assert seeds_of(loaded) == [0, 1, 2, 3, 11, 10]
    assert loaded.labels.tolist() == [0, 0, 1, 1, 0, 1]
    assert loaded.is_test.tolist() == [False] * 4 + [True] * 2
    assert loaded.is_validation is None


def test_flat_validation_pictures_without_classes_say_what_is_missing(tmp_path):
    with pytest.raises(UserError, match=r"of which class the pictures of val are\. Put LOC_val_solution\.csv there"):
        load_images(write_imagenet(tmp_path / "imagenet", flat=True))


def test_a_test_split_in_classes_is_no_imagenet(tmp_path):
    places = [f"{split}/{wnid}" for split in ("train", "val", "test") for wnid in WNIDS]
    write_folder(tmp_path / "pets", places, count=2)
    loaded = load_images(tmp_path / "pets")
    assert (loaded.is_test.sum(), loaded.is_validation.sum(), len(loaded.labels)) == (4, 4, 12)


def test_pictures_of_any_format_are_imagenet_s(tmp_path):
    root = write_imagenet(tmp_path / "imagenet", flat=False)
    save(root / f"ILSVRC/Data/CLS-LOC/train/{WNIDS[0]}/more.png", 30)
    (root / f"ILSVRC/Data/CLS-LOC/train/{WNIDS[0]}/boxes.xml").write_text("<a/>")
    assert len(load_images(root).labels) == 7


def test_a_damaged_list_of_classes_is_one_line(tmp_path):
    root = write_imagenet(tmp_path / "imagenet", flat=True)
    (root / "LOC_val_solution.csv").write_text("ImageId,PredictionString\nILSVRC2012_val_00000001,\n")
    with pytest.raises(UserError, match=r"00000002 of val is not on its list"):
        load_images(root)
    with tarfile.open(tmp_path / "imagenet.tar", "w") as archive:
        (root / "LOC_val_solution.csv").unlink()
        (root / "ILSVRC2012_validation_ground_truth.txt").write_text("1\n2\n")
        archive.add(root, "imagenet")
    with pytest.raises(UserError, match=r"holds no imagenet/meta\.mat"):
        load_images(tmp_path / "imagenet.tar")


# Files of MNIST's format


def write_idx(folder: Path, packed: bool = True, train: int = 12, test: int = 6) -> tuple[np.ndarray, np.ndarray]:
    folder.mkdir(exist_ok=True)
    images, labels = noise(0, (train + test, 28, 28)), (np.arange(train + test) % 3).astype(np.uint8)
    for name, part in (("train", slice(train)), ("t10k", slice(train, None))):
        for kind, array in (("images-idx3", images[part]), ("labels-idx1", labels[part])):
            header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()
            content, suffix = header + array.tobytes(), ".gz" if packed else ""
            (folder / f"{name}-{kind}-ubyte{suffix}").write_bytes(gzip.compress(content) if packed else content)
    return images, labels


@pytest.mark.parametrize("packed", [False, True])
def test_a_folder_of_idx_files_is_read(packed, tmp_path):
    images, labels = write_idx(tmp_path / "digits", packed)
    loaded = load_images(tmp_path / "digits")
    np.testing.assert_array_equal(loaded.images[:, 0], images)
    np.testing.assert_array_equal(loaded.labels, labels)
    assert loaded.is_test.tolist() == [False] * 12 + [True] * 6
    assert loaded.classes == ("0", "1", "2")


def test_one_of_several_sets_of_idx_files_is_asked_for(tmp_path):
    write_idx(tmp_path / "emnist")
    write_idx(tmp_path / "emnist", packed=False)
    assert len(load_images(tmp_path / "emnist").labels) == 18, "packed and unpacked, they are one set"
    for path in list((tmp_path / "emnist").iterdir()):
        path.rename(path.with_name(f"emnist-letters-{path.name}"))
    write_idx(tmp_path / "emnist")
    told = r"several sets of idx files \(emnist-letters-train-images-idx3-ubyte, train-images-idx3-ubyte\)\. Give"
    with pytest.raises(UserError, match=told):
        load_images(tmp_path / "emnist")


def test_labels_of_idx_files_may_begin_at_one(tmp_path):
    _, labels = write_idx(tmp_path / "letters", packed=False)
    for name, part in (("train", labels[:12]), ("t10k", labels[12:])):
        path = tmp_path / f"letters/{name}-labels-idx1-ubyte"
        path.write_bytes(path.read_bytes()[:8] + (part + 1).astype(np.uint8).tobytes())
    loaded = load_images(tmp_path / "letters")
    assert loaded.classes == ("1", "2", "3")
    np.testing.assert_array_equal(loaded.labels, labels)


def test_idx_files_that_are_cut_off_or_missing_are_named(tmp_path):
    write_idx(tmp_path / "digits", packed=False)
    path = tmp_path / "digits/train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"train-images-idx3-ubyte cannot be read .*Fetch it again"):
        load_images(tmp_path / "digits")
    path.unlink()
    with pytest.raises(UserError, match=r"has idx files, but none of train-images\. Fetch all four"):
        load_images(tmp_path / "digits")
    write_idx(tmp_path / "none", packed=False, train=0)
    with pytest.raises(UserError, match="has idx files without images"):
        load_images(tmp_path / "none")


def test_a_pipe_among_idx_files_is_refused(tmp_path):
    write_idx(tmp_path / "digits", packed=False)
    path = tmp_path / "digits/train-images-idx3-ubyte"
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(UserError, match="is a named pipe"):
        load_images(tmp_path / "digits")


@pytest.mark.parametrize("shape", [(-1, 28, 28), (12, 0, 28)])
def test_idx_files_of_no_pixels_are_refused(shape, tmp_path):
    write_idx(tmp_path / "digits", packed=False)
    header = bytes([0, 0, 8, 3]) + np.array(shape, ">i4").tobytes()
    (tmp_path / "digits/train-images-idx3-ubyte").write_bytes(header)
    with pytest.raises(UserError, match=r"train-images-idx3-ubyte cannot be read \(its header says"):
        load_images(tmp_path / "digits")


# Wrong data sets, each with its answer in docs/data-and-teacher.md


def wrong(root: Path, kind: str) -> str:
    """Write a wrong data set and return the source that names it."""
    if kind in ("flat", "one class", "nested"):
        places = {"flat": ["a.png", "b.png"], "one class": ["cat/a.png"], "nested": ["cat/a.png", "dog/big/a.png"]}
        for place in places[kind]:
            save(root / place, 0)
    elif kind == "no train":
        write_folder(root, ["test/cat", "test/dog", "val/cat", "val/dog"], count=1)
    elif kind == "unknown class":
        write_folder(root, ["train/cat", "train/dog", "test/cat", "test/eel"], count=1)
    elif kind == "other folder":
        write_folder(root, ["train/cat", "train/dog", "test/cat", "masks/cat"], count=1)
    elif kind == "empty class":
        (write_folder(root, ["cat", "dog"], count=1) / "eel").mkdir()
    elif kind == "one picture":
        (write_folder(root, ["cat", "dog"]) / "eel").mkdir()
        save(root / "eel/a.png", 0)
    elif kind == "broken":
        write_folder(root, ["cat", "dog"])
        for name in ("cat/1.png", "dog/2.png"):
            (root / name).write_bytes(b"")
    elif kind == "12 bits":
        write_folder(root, ["cat", "dog"], count=1)
        for name in ("cat", "dog"):
            Image.fromarray(np.full((SIZE, SIZE), 4095, np.uint16)).save(root / name / "0.png")
    elif kind == "cut archive":
        write_folder(root, ["cat", "dog"], count=1)
        with tarfile.open(root.with_suffix(".tgz"), "w:gz") as archive:
            archive.add(root, "pets")
        content = root.with_suffix(".tgz").read_bytes()
        root.with_suffix(".tgz").write_bytes(content[: len(content) // 2])
        return str(root.with_suffix(".tgz"))
    elif kind == "other archive":
        root.with_suffix(".rar").touch()
        return str(root.with_suffix(".rar"))
    return str(root)


def documented_answers() -> dict[str, str]:
    """The table of wrong data sets in the documentation: answer by kind."""
    lines = (REPOSITORY / "docs/data-and-teacher.md").read_text().splitlines()
    start = lines.index("| Data set | Answer |") + 2
    rows = []
    while lines[start].startswith("|"):
        rows.append([cell.strip() for cell in lines[start].strip("|").split("|")])
        start += 1
    return {what.partition(":")[0]: answer.strip("`") for what, answer in rows}


ANSWERS = documented_answers()


@pytest.mark.parametrize("kind", ANSWERS)
def test_a_wrong_data_set_gets_the_documented_answer(kind, tmp_path):
    source = wrong(tmp_path / "pets", kind)
    with pytest.raises(UserError) as refusal:
        run(make_params(source), Paths("test"))
    said = str(refusal.value).replace(f"{tmp_path}/", "").splitlines()
    answer = said[0].removeprefix("params.yaml: dataset.source: ")
    known, cut, _ = ANSWERS[kind].partition("…")
    assert answer.startswith(known)
    assert cut or answer == known


def test_a_dozen_wrong_data_sets_are_documented():
    assert len(ANSWERS) >= 12


def test_a_class_whose_name_is_no_text_is_refused(tmp_path):
    root = write_folder(tmp_path / "pets", ["cat", "f\udce9e"])
    with pytest.raises(UserError, match=r"the name of the folder f.*e is no UTF-8\. Rename it\."):
        load_images(root)


# Names and links


def test_names_that_lead_out_of_an_archive_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "pets.zip", "w") as archive:
        archive.writestr("../cat/a.png", b"")
    with pytest.raises(UserError, match=r"pets\.zip: holds \.\./cat/a\.png, which leads out of it"):
        load_images(tmp_path / "pets.zip")


def test_a_checksum_at_the_end_of_an_archive_counts(tmp_path):
    """Pixels of a format without a checksum of its own, in a gzip that stores them as they are."""
    with (
        gzip.open(tmp_path / "pets.tar.gz", "wb", compresslevel=0) as packed,
        tarfile.open(fileobj=packed, mode="w") as archive,
    ):
        for i, name in enumerate(["cat/0.bmp", "cat/1.bmp", "dog/0.bmp", "dog/1.bmp"]):
            Image.fromarray(noise(i)).save(tmp_path / "one.bmp")
            archive.add(tmp_path / "one.bmp", name)
    content = bytearray((tmp_path / "pets.tar.gz").read_bytes())
    place = content.index(noise(2)[::-1, :, ::-1].tobytes()[:30])
    content[place : place + 10] = bytes(10)
    (tmp_path / "pets.tar.gz").write_bytes(content)
    with pytest.raises(UserError, match=r"pets\.tar\.gz cannot be read \(.*CRC.*Fetch or pack it again"):
        load_images(tmp_path / "pets.tar.gz")


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz"])
@pytest.mark.parametrize("damage", ["cut at a header", "cut in a header", "header"])
def test_a_tar_is_read_to_its_end(suffix, damage, tmp_path):
    folder = write_folder(tmp_path / "pets", ["cat", "dog"], count=3)
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        archive.add(folder, "pets")
    with tarfile.open(fileobj=io.BytesIO(content.getvalue())) as archive:
        last = archive.getmembers()[-1].offset
    whole = content.getvalue()
    end = whole.rstrip(b"\0")
    end += bytes(-len(end) % 512)

    def load(content: bytes) -> SimpleNamespace:
        path = tmp_path / f"pets{suffix}"
        path.write_bytes(gzip.compress(content) if suffix == ".tar.gz" else content)
        return load_images(path)

    for complete in (whole, whole + b"padding", end + bytes(512)):
        assert len(load(complete).labels) == 6
    damaged = {"cut at a header": whole[:last], "cut in a header": whole[: last + 100]}
    damaged["header"] = whole[:last] + b"?" + whole[last + 1 :]
    with pytest.raises(UserError, match=r"cannot be read \(it is cut off or damaged\)\. Fetch or pack it again"):
        load(damaged[damage])


@pytest.mark.parametrize("target", [".", "../elsewhere"])
def test_a_link_to_a_folder_is_refused_since_dvc_does_not_watch_it(tmp_path, target):
    root = write_folder(tmp_path / "pets", ["cat", "dog"])
    write_folder(tmp_path / "elsewhere", ["a", "b"])
    (root / ".trash").symlink_to(target)
    assert load_images(root).classes == ("cat", "dog")
    (root / "eel").symlink_to(target)
    (tmp_path / "latest").symlink_to("pets")  # DVC follows the source itself
    for source in (root, tmp_path / "latest"):
        with pytest.raises(UserError, match=r"^params\.yaml: dataset\.source: .*/eel: is a link to a folder, whose"):
            load_images(source)
