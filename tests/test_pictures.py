"""Pictures of the live page: where they come from, and that they travel unchanged."""

import base64
import json
import socket
from io import BytesIO

import numpy as np
import pytest
from clusters import CHANNELS, SIZE, make_image, nobody_listens
from PIL import Image
from safetensors.numpy import save_file

from nonn.cli import main
from nonn.core.errors import UserError
from nonn.live.pictures import as_png, dataset_pictures, find_pictures
from nonn.runtime.exported import read_manifest


def test_the_class_of_a_file_is_that_of_its_folder(network_folder, tmp_path):
    for name in ("ant", "unheard of"):
        (tmp_path / name).mkdir()
        Image.fromarray(make_image()[0]).resize((9, 9)).save(tmp_path / name / "a.PNG")
    (tmp_path / "ant/notes.txt").touch()
    pictures = find_pictures([tmp_path], read_manifest(network_folder))
    assert sorted((p.name, p.truth) for p in pictures if p.truth) == [("a.PNG", "ant")]
    assert len(pictures) == 2
    assert {p.read().shape for p in pictures} == {(CHANNELS, SIZE, SIZE)}


def test_missing_pictures_are_refused(network_folder, tmp_path):
    manifest = read_manifest(network_folder)
    with pytest.raises(UserError, match=r"--images: .*nowhere: no such file or folder"):
        find_pictures([tmp_path / "nowhere"], manifest)
    with pytest.raises(UserError, match="--images: no pictures"):
        find_pictures([tmp_path], manifest)
    with pytest.raises(UserError, match="no such file, so there is nothing to classify"):
        dataset_pictures(tmp_path / "dataset.safetensors", manifest)


def test_test_images_of_the_experiment_are_shown(network_folder, tmp_path):
    path, manifest = tmp_path / "dataset.safetensors", read_manifest(network_folder)
    images = np.stack([make_image(seed) for seed in range(6)])
    arrays = {"images": images, "labels": np.array([0, 1, 2, 3, 0, 1]), "test": np.array([1, 4, 5])}
    save_file(arrays, path)
    pictures = dataset_pictures(path, manifest)
    assert {(p.name, p.truth) for p in pictures} == {
        ("test image 0", "bee"),
        ("test image 1", "ant"),
        ("test image 2", "bee"),
    }
    for picture in pictures:
        expected = make_image([1, 4, 5][int(picture.name.split()[-1])])
        np.testing.assert_array_equal(picture.read(), expected)
    info = {"classes": ["ant", "bee", "cow"], "channels": 1, "size": 4}
    path.with_suffix(".json").write_text(json.dumps(info | {"classes": ["ant", "cow", "bee"]}))
    with pytest.raises(UserError, match="is not the dataset of this network"):
        dataset_pictures(path, manifest)
    path.with_suffix(".json").unlink()
    save_file(arrays | {"images": images[:, :, :2]}, path)
    with pytest.raises(UserError, match="is not the dataset of this network"):
        dataset_pictures(path, manifest)
    path.write_text("rubbish")
    with pytest.raises(UserError, match="damaged"):
        dataset_pictures(path, manifest)


def test_pictures_travel_unchanged():
    for channels in (1, 3):
        pixels = np.random.default_rng(0).integers(0, 256, (channels, 5, 5), dtype=np.uint8)
        with Image.open(BytesIO(base64.b64decode(as_png(pixels)))) as image:
            np.testing.assert_array_equal(np.asarray(image).reshape(5, 5, -1).transpose(2, 0, 1), pixels)


def test_wrong_settings_are_refused(cluster, tmp_path):
    with pytest.raises(SystemExit, match=r"--images: are shown on the page\. Give --web"):
        main(["up", "--images", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"dataset\.safetensors: no such file"):
        main(["up", "--web"])
    Image.fromarray(make_image()[0]).save("image.png")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        with pytest.raises(SystemExit, match=f"--web: cannot listen on 127.0.0.1:{port}"):
            main(["up", "--web", port, "--images", "image.png"])
    assert nobody_listens(node.address for node in cluster.nodes)
