"""Calibrated confidence, `nonn predict` without a clone, and hints at inverted pictures."""

import shutil

import numpy as np
import pytest
import torch
from clusters import CLASSES, SIZE, make_image
from PIL import Image as Pillow

from nonn.cli import main
from nonn.core.files import read_json, write_json
from nonn.method.calibration import HIGHEST, calibration_error, fit_temperature, fit_temperatures, measure_calibration
from nonn.method.final_layer import logits_of
from nonn.runtime.exported import ImageFormat, read_manifest
from nonn.runtime.final import FinalLayer, read_out
from nonn.runtime.inversion import border_brightness, looks_inverted, usual_border
from nonn.runtime.predict import classify


def drawn_from(temperature: float, n_images: int = 4000) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of 10 classes, and labels drawn from the probabilities that they have at a temperature."""
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(n_images, 10, generator=generator, dtype=torch.float64)
    return logits, torch.multinomial((logits / temperature).softmax(1), 1, generator=generator)[:, 0]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_the_temperature_that_labels_were_drawn_with_is_found(temperature):
    logits, labels = drawn_from(temperature)
    found = fit_temperature(logits, labels)
    assert found == pytest.approx(temperature, rel=0.05)
    assert calibration_error(logits, labels, found) < 0.03
    if temperature != 1:
        assert calibration_error(logits, labels) > 2 * calibration_error(logits, labels, found)


def test_no_network_is_certain_because_it_was_always_right():
    logits = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    temperature = fit_temperature(logits, logits.argmax(1))
    assert 0.01 < temperature < 1
    assert (logits / temperature).softmax(1).max(1).values.mean() < 1 - 0.5 / 51


def test_a_network_that_guesses_becomes_unsure():
    logits, _ = drawn_from(1.0)
    labels = torch.randint(0, 10, (len(logits),), generator=torch.Generator().manual_seed(1))
    assert 10 < fit_temperature(logits, labels) <= HIGHEST


def test_the_calibration_error_by_hand():
    """Three answers with 80 %, two of them right; one with 60 %, right: (3 * |0.8 - 2/3| + 0.4) / 4."""
    logits = torch.tensor([[0.8, 0.2]] * 3 + [[0.4, 0.6]]).log()
    assert calibration_error(logits, torch.tensor([0, 0, 1, 1])) == pytest.approx((3 * (0.8 - 2 / 3) + 0.4) / 4)


def test_calibration_is_measured_for_each_number_of_missing_devices():
    logits, labels = drawn_from(2.0)

    def answer(present):
        return logits if len(present) == 2 else logits / 4  # not sure enough when a device is missing

    whole, one_missing = measure_calibration([answer], [[0.5, 2.0]], 2, labels, seed=0)
    assert (whole["missing"], whole["n_subsets"], one_missing["missing"], one_missing["n_subsets"]) == (0, 1, 1, 2)
    assert whole["calibrated"] == calibration_error(logits, labels, 2.0) < whole["uncalibrated"]
    assert one_missing["calibrated"] == pytest.approx(whole["calibrated"])
    assert one_missing["calibrated"] < one_missing["uncalibrated"]


def test_the_temperature_changes_no_answer_and_no_share(network_folder):
    plain = read_manifest(network_folder)
    assert plain.temperature(3) == 1, "of a manifest from before there were any"
    random = np.random.default_rng(0)
    for temperature in (0.1, 7.0):
        manifest = plain.model_copy(update={"temperatures": (9.0, 9.0, temperature)})
        for _ in range(20):
            terms = list(random.normal(size=(3, len(CLASSES))))
            before, after = read_out(plain, terms), read_out(manifest, terms)
            assert (after.label, after.shares) == (before.label, before.shares)
            assert (after.probability > before.probability) == (temperature < 1)
            powers = np.array(before.probabilities) ** (1 / temperature)
            np.testing.assert_allclose(after.probabilities, powers / powers.sum())


@pytest.mark.parametrize("wrong", ["[0, 1, 1]", "[-1, 1, 1]", "[1, 1, 1e999]", "null", "[1, 1]"])
def test_impossible_temperatures_are_refused(network_folder, tmp_path, wrong):
    shutil.copytree(network_folder, tmp_path / "export")
    path = tmp_path / "export/manifest.json"
    path.write_text(path.read_text().replace("{", f'{{"temperatures": {wrong},', 1))
    with pytest.raises(SystemExit, match=r"manifest\.json: not the manifest of an exported network \(.*temperatures"):
        main(["predict", "image.png", "--export", str(tmp_path / "export")])


def test_each_number_of_students_has_its_temperature():
    """Three students that see the same, of which missing ones count as zeros: only the logits shrink."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 4, (400,), generator=generator)
    features = 3 * [90 * torch.eye(4)[labels] + 45 * torch.randn(400, 4, generator=generator)]
    layer = FinalLayer({i: (np.eye(4) / 3, np.zeros(4)) for i in range(3)}, scales=np.ones(3))
    temperatures = fit_temperatures(layer, features, labels)
    assert temperatures == pytest.approx([temperatures[2] / 3, temperatures[2] * 2 / 3, temperatures[2]], rel=0.01)
    for present, temperature in zip(((0,), (1, 2), (0, 1, 2)), temperatures, strict=True):
        logits = logits_of(layer, features, present)
        assert calibration_error(logits, labels, temperature) < calibration_error(logits, labels)


# Without a clone


@pytest.fixture
def export(network_folder, folder):
    """A copy of the hand-made export, and a picture beside it, in a folder without parameters."""
    shutil.copytree(network_folder, "export")
    Pillow.fromarray(make_image()[0]).save("image.png")
    return folder / "export"


def test_a_folder_is_all_that_predict_needs(export, capsys):
    main(["predict", "image.png", "--export", "export"])
    first, *students = capsys.readouterr().out.splitlines()
    expected = classify(export, make_image())
    assert first == f"{expected.label}  {expected.probability:.1%}  (export, image.png)"
    lines = [f"  student {i}: {share:6.1%} of the lead" for i, share in enumerate(expected.shares)]
    assert students == lines


@pytest.mark.usefixtures("folder")
def test_without_a_folder_one_line_says_what_to_do():
    with pytest.raises(SystemExit, match=r"params\.yaml: no such file here\. .*`nonn demo`: --export \S+digits$"):
        main(["predict", "image.png"])


@pytest.mark.parametrize("name", ["1.onnx", "final.safetensors"])
def test_files_that_are_not_those_of_the_manifest_are_refused(export, name):
    content = bytearray((export / name).read_bytes())
    content[-1] ^= 1
    (export / name).write_bytes(content)
    with pytest.raises(SystemExit, match=f"{name}: its SHA-256 is not that of the manifest beside it"):
        main(["predict", "image.png", "--export", "export"])


# Inverted pictures

DARK, COLOUR = ImageFormat(channels=1, size=SIZE, dtype="uint8", border=(0, 3)), (20.0, 230.0)


def framed(border: int, inside: int, channels: int = 1) -> np.ndarray:
    pixels = np.full((channels, SIZE, SIZE), border, np.uint8)
    pixels[:, 1:-1, 1:-1] = inside
    return pixels


@pytest.mark.parametrize("channels", [1, 3])
def test_the_border_is_the_outermost_pixels(channels):
    images = np.stack([framed(level, 99, channels) for level in range(100)])
    np.testing.assert_array_equal(border_brightness(images), np.arange(100))
    assert usual_border([images[:60], images[60:]]) in [(0.5, 98.5), (0.49, 98.51)]


def test_dark_on_light_is_noticed_where_training_pictures_are_light_on_dark():
    assert looks_inverted(framed(255, 0), DARK)
    assert looks_inverted(framed(200, 30), DARK), "ink on paper"
    assert not looks_inverted(framed(0, 255), DARK)
    assert not looks_inverted(framed(60, 255), DARK), "chalk on a board"
    bright = DARK.model_copy(update={"border": (250, 255)})
    assert looks_inverted(framed(10, 255), bright)
    assert not looks_inverted(framed(255, 0), bright)


def test_nothing_is_said_where_borders_are_of_all_kinds_or_unknown():
    for border in (COLOUR, None):
        image = DARK.model_copy(update={"border": border})
        assert not any(looks_inverted(framed(level, 128), image) for level in range(256))


def test_predict_says_so_and_inverts(export, capsys):
    path = export / "manifest.json"
    manifest = read_json(path)
    manifest["image"]["border"] = [0, 3]
    write_json(path, manifest)
    Pillow.fromarray(framed(255, 40)[0]).save("ink.png")
    main(["predict", "ink.png", "--export", "export"])
    printed = capsys.readouterr()
    hint = "ink.png: the picture looks inverted: its border is bright, that of the training pictures dark."
    assert printed.err.startswith(hint + " Try --invert.")
    main(["predict", "ink.png", "--export", "export", "--invert"])
    inverted = capsys.readouterr()
    assert inverted.err == ""
    assert inverted.out != printed.out
    expected = classify(export, framed(0, 215))
    assert inverted.out.startswith(f"{expected.label}  {expected.probability:.1%}")
