"""The dataset stage: the split into training, validation and test images, and what the stage writes."""

import numpy as np
import pytest
import torch
from experiments import REPOSITORY, read_subset
from pictures import SIZE, SPLIT_FOLDERS, decode_images, load_images, make_params, pack, write_folder

from nonn.core.errors import UserError
from nonn.core.files import read_json
from nonn.core.paths import Paths
from nonn.data.archives import list_names, read_contents
from nonn.data.dataset import load_dataset, measure_channels, split_dataset
from nonn.data.folders import read_layout
from nonn.stages.dataset import run

CIFAR10_ZIP = REPOSITORY.parent / "shared/data/cifar10.zip"
PATHS = Paths("test")


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


# The split


def make_labels(counts: list[int]) -> np.ndarray:
    return np.random.default_rng(0).permutation(np.repeat(np.arange(len(counts)), counts))


@pytest.mark.parametrize("own_test", [False, True])
@pytest.mark.parametrize(("validation", "test"), [(0.1, 0.2), (0.3, 0.05), (0.01, 0.01)])
def test_split_is_disjoint_covering_and_stratified(own_test, validation, test):
    counts = [500, 37, 10, 3]
    labels = make_labels(counts)
    is_test = None
    if own_test:
        is_test = np.zeros(len(labels), bool)
        is_test[::3] = True
        is_test[np.flatnonzero(labels == 3)] = [True, False, False]
    split = split_dataset(labels, "abcd", is_test, validation, test, seed=0)

    together = np.concatenate(list(split.values()))
    assert sorted(together) == list(range(len(labels)))
    for indices in split.values():
        assert (np.diff(indices) > 0).all()
    if own_test:
        np.testing.assert_array_equal(split["test"], np.flatnonzero(is_test))
    for label in range(4):
        members = labels == label if is_test is None else (labels == label) & ~is_test
        assert (labels[split["validation"]] == label).sum() == max(1, round(validation * members.sum()))
        assert (labels[split["train"]] == label).sum() >= 1
        if is_test is None:
            assert (labels[split["test"]] == label).sum() == max(1, round(test * members.sum()))


@pytest.mark.parametrize("name", ["validation", "test"])
def test_a_split_of_the_source_s_own_without_images_is_refused(name, tmp_path):
    """As `broken: skip` leaves it where none of its pictures can be read, and lists that name none."""
    folder = write_folder(tmp_path / "pets", ["train/cat", "train/dog", f"{name}/cat", f"{name}/dog"])
    for path in folder.glob(f"{name}/*/*.png"):
        path.write_bytes(b"no picture")
    with pytest.raises(UserError, match=rf"dataset\.source: its {name} split has no image that can be read\. Mend its"):
        run(make_params(folder, broken="skip"), PATHS)


def test_split_depends_on_the_seed_only():
    labels = make_labels([50, 50])
    first, again, other = (split_dataset(labels, "ab", None, 0.2, 0.2, seed) for seed in (0, 0, 1))
    for name in first:
        np.testing.assert_array_equal(first[name], again[name])
        assert not np.array_equal(first[name], other[name])


def test_test_images_do_not_depend_on_the_validation_fraction():
    labels = make_labels([50, 50])
    few, many = (split_dataset(labels, "ab", None, validation, 0.2, 0) for validation in (0.1, 0.5))
    np.testing.assert_array_equal(few["test"], many["test"])
    assert set(few["validation"]) < set(many["validation"])


@pytest.mark.parametrize(("count", "own_test"), [(2, False), (1, True)])
def test_class_too_small_to_split_is_named(count, own_test):
    labels = make_labels([20, count])
    is_test = np.zeros(len(labels), bool) if own_test else None
    with pytest.raises(UserError, match=rf"class 'eel' has {count} image.*needs {count + 1} at least"):
        split_dataset(labels, ("cat", "eel"), is_test, 0.2, 0.2, 0)


def test_measure_channels_by_hand():
    images = torch.tensor([[[[0, 255]], [[7, 7]]], [[[0, 255]], [[7, 7]]]], dtype=torch.uint8)
    mean, std = measure_channels(images)
    assert mean.tolist() == [127.5, 7]
    assert std.tolist() == [127.5, 1]  # a blank channel counts as one grey level


@pytest.mark.parametrize("side", [1, 3, 4])  # levels are counted in pairs, and an odd number leaves one over
def test_measure_channels_as_numpy_does(side):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 3, side, side), dtype=np.uint8)
    mean, std = measure_channels(torch.from_numpy(pixels))
    np.testing.assert_allclose(mean, pixels.mean((0, 2, 3)), rtol=1e-6)
    np.testing.assert_allclose(std, pixels.std((0, 2, 3)), rtol=1e-6)


# The stage


def test_run_writes_what_load_dataset_reads(tmp_path):
    folder = write_folder(tmp_path / "pets", SPLIT_FOLDERS)
    run(make_params("pets"), PATHS)
    dataset = load_dataset(PATHS)
    raw = load_images(str(folder), SIZE)
    assert (dataset.n_classes, dataset.channels, dataset.size) == (2, 3, SIZE)
    assert dataset.classes == ("cat", "dog")
    assert dataset.images.dtype == torch.uint8
    assert dataset.labels.dtype == dataset.train.dtype == torch.int64
    np.testing.assert_array_equal(dataset.images, raw.images)
    assert dataset.test.tolist() == list(range(16, 32))

    images, labels = read_subset(dataset, "train")
    assert labels.tolist() == [0] * 6 + [1] * 6
    np.testing.assert_array_equal(images, raw.images[dataset.train])
    np.testing.assert_allclose(dataset.mean, images.numpy().mean((0, 2, 3)), rtol=1e-6)
    np.testing.assert_allclose(dataset.std, images.numpy().std((0, 2, 3)), rtol=1e-6)

    assert read_json(PATHS.dataset_info) == {
        "source": "pets",
        "sha256": raw.sha256,
        "classes": ["cat", "dog"],
        "channels": 3,
        "size": SIZE,
        "counts": {"train": 12, "validation": 4, "test": 16},
        "class_counts": {
            "train": {"cat": 6, "dog": 6},
            "validation": {"cat": 2, "dog": 2},
            "test": {"cat": 8, "dog": 8},
        },
    }


def test_class_without_test_images_is_counted_as_such(tmp_path, capsys):
    write_folder(tmp_path / "pets", ["train/cat", "train/dog", "test/cat"], count=4)
    run(make_params("pets"), PATHS)
    assert read_json(PATHS.dataset_info)["class_counts"]["test"] == {"cat": 4, "dog": 0}
    assert "the test images have none of 'dog', so accuracies say nothing of that" in capsys.readouterr().err


def test_same_bytes_twice_and_from_folder_or_archive(tmp_path):
    folder = write_folder(tmp_path / "pets", ["cat", "dog"])
    written = []
    for source in (folder, folder, pack(folder, tmp_path / "a.zip"), pack(folder, tmp_path / "a.tgz")):
        run(make_params(source), PATHS)
        written.append((PATHS.dataset.read_bytes(), PATHS.dataset_info.read_bytes()))
    assert written[0] == written[1]
    assert len({tensors for tensors, _ in written}) == 1


def test_mnist5k():
    run(make_params("mnist5k", validation=0.1, test=0.2), PATHS)
    dataset = load_dataset(PATHS)
    assert dataset.images.shape == (5000, 1, 28, 28)
    assert dataset.classes == tuple("0123456789")
    for name, count in (("train", 350), ("validation", 50), ("test", 100)):
        assert read_subset(dataset, name)[1].bincount().tolist() == [count] * 10
    assert dataset.images.min() == 0
    assert dataset.images.max() == 255


@pytest.mark.skipif(not CIFAR10_ZIP.exists(), reason="needs ../shared/data/cifar10.zip")
def test_cifar10_archive():
    layout = read_layout(list_names(CIFAR10_ZIP), CIFAR10_ZIP)
    assert len(layout.names) == 60000
    assert layout.is_test.sum() == 10000
    assert layout.classes[:3] == ("airplane", "automobile", "bird")
    np.testing.assert_array_equal(np.bincount(layout.labels), [6000] * 10)
    pictures = ((i, name, data) for i, (name, data) in enumerate(read_contents(CIFAR10_ZIP, layout.names[::9999])))
    images = decode_images(pictures, 7, 32)
    assert images.shape == (7, 3, 32, 32)
    assert images.std() > 0
