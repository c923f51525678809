"""Data sets that torchvision downloads and reads."""

from pathlib import Path

import numpy as np
import pytest
import torchvision
from pictures import SIZE, load_images, write_fashion_mnist
from PIL import Image

from nonn.core.errors import UserError
from nonn.data.packaged import DOWNLOADS

pytestmark = pytest.mark.usefixtures("folder", "without_network")


def test_torchvision_files_in_place_need_no_network():
    train, test = write_fashion_mnist(40, 20)
    raw = load_images("torchvision:FashionMNIST", SIZE)
    np.testing.assert_array_equal(raw.images[:, 0], np.concatenate([train, test]))
    np.testing.assert_array_equal(raw.labels, np.arange(60) % 20 % 10)
    np.testing.assert_array_equal(raw.is_test, np.arange(60) >= 40)
    assert raw.classes[0] == "T-shirt/top"
    assert raw.classes[9] == "Ankle boot"


def test_torchvision_sum_covers_pixels_and_labels():
    write_fashion_mnist(20, 10)
    before = load_images("torchvision:FashionMNIST", SIZE).sha256
    assert load_images("torchvision:FashionMNIST", 32).sha256 == before
    for name in ("train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"):
        path = DOWNLOADS / "FashionMNIST/raw" / name
        whole = path.read_bytes()
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        assert load_images("torchvision:FashionMNIST", SIZE).sha256 != before
        path.write_bytes(whole)


def test_torchvision_half_unpacked():
    write_fashion_mnist(40, 20)
    path = DOWNLOADS / "FashionMNIST/raw/t10k-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"dataset\.source: torchvision cannot provide FashionMNIST"):
        load_images("torchvision:FashionMNIST", SIZE)


@pytest.mark.parametrize("name", ["CIFAR10", "FashionMNIST", "SVHN"])
def test_torchvision_without_network(name):
    with pytest.raises(UserError, match=rf"dataset\.source: .*{name}[\s\S]*unreachable[\s\S]*folder or archive"):
        load_images(f"torchvision:{name}", SIZE)


def test_torchvision_corrupted_download(monkeypatch):
    utils = torchvision.datasets.utils
    monkeypatch.setattr(utils, "_get_redirect_url", lambda url, **_: url)
    monkeypatch.setattr(utils, "_urlretrieve", lambda _url, path: Path(path).write_bytes(b"rubbish"))
    with pytest.raises(UserError, match=r"cannot provide CIFAR100 \(File not found or corrupted"):
        load_images("torchvision:CIFAR100", SIZE)


def test_torchvision_datasets_that_name_their_splits(monkeypatch):
    class Numbers(list):
        """Stands for SVHN, which takes `split` and has no class names."""

        def __init__(self, root, split, download):
            assert Path(root) == DOWNLOADS
            assert download
            counts = {"train": 6, "test": 3}
            super().__init__((Image.new("RGB", (32, 32)), i % 3) for i in range(counts[split]))

    monkeypatch.setattr(torchvision.datasets, "SVHN", Numbers)
    raw = load_images("torchvision:SVHN", SIZE)
    assert raw.images.shape == (9, 3, SIZE, SIZE)
    assert raw.classes == ("0", "1", "2")
    assert raw.is_test.sum() == 3
