"""What the devices run: the same answers in ONNX Runtime, the same bytes, nothing of the machine that wrote it."""

import hashlib
import os
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from experiments import REPOSITORY, read_subset
from PIL import Image

from nonn.cli import main
from nonn.core.architecture import Architecture
from nonn.core.errors import UserError
from nonn.core.files import read_json, write_json
from nonn.core.images import read_image
from nonn.core.params import Params
from nonn.core.paths import Paths
from nonn.data.dataset import Dataset
from nonn.data.tensors import read_tensors
from nonn.deploy.onnx_files import Features, export_onnx
from nonn.deploy.traced_cost import measure_cost
from nonn.method.exporting import FEATURE_MARGIN, as_linear, check_same, export_solo
from nonn.method.loading import load_network
from nonn.method.scoring import score_all
from nonn.runtime.exported import QUANTISATION_SCHEME, read_manifest
from nonn.runtime.hosting import write_repository
from nonn.runtime.inversion import border_brightness
from nonn.runtime.node import ServedStudent
from nonn.runtime.predict import classify
from nonn.runtime.session import open_session, run_onnx
from nonn.split.graph import read_network
from nonn.stages import assemble as assemble_stage
from nonn.stages import export as export_stage
from nonn.stages.export import solo_models
from nonn.testbed.deployments import as_network
from nonn.training.networks import ConvNet, predict, single_pass, whiten


@pytest.fixture
def network(data, built):
    return load_network(built / Paths("tiny").network("2s", 0), data)


# Networks


@torch.no_grad()
def test_onnx_runtime_says_what_torch_says(network, data, exported):
    features = []
    for position, student in enumerate(network.students):
        features.append(run_onnx(exported / f"{position}.onnx", data.images.numpy()))
        expected, _ = predict(student, data.images)
        np.testing.assert_allclose(features[-1], expected, rtol=1e-4, atol=1e-4 * expected.max().item())
    logits = run_onnx(exported / "final.onnx", np.concatenate(features, axis=1))
    np.testing.assert_allclose(logits, network(data.images), rtol=1e-3, atol=1e-3)


def test_files_take_raw_pixels_one_image_at_a_time(exported, data):
    spec = open_session(exported / "0.onnx").get_inputs()[0]
    assert (spec.name, spec.type, spec.shape) == ("image", "tensor(uint8)", [1, data.channels, data.size, data.size])
    final = open_session(exported / "final.onnx")
    assert (final.get_inputs()[0].name, final.get_outputs()[0].shape) == ("features", [1, data.n_classes])


def test_training_heads_stay_behind(network, exported):
    for position, student in enumerate(network.students):
        model = onnx.load(exported / f"{position}.onnx")
        assert not {node.op_type for node in model.graph.node} & {"Gemm", "MatMul"}
        assert open_session(exported / f"{position}.onnx").get_outputs()[0].shape == [1, student.n_features]


def test_the_manifest_describes_the_files(network, data, exported, params):
    manifest = read_json(exported / "manifest.json")
    assert manifest["classes"] == list(data.classes)
    border = border_brightness(read_subset(data, "train")[0].numpy())
    low, high = manifest["image"].pop("border")
    assert border.min() <= low < high <= border.max()
    assert 0.9 < ((low <= border) & (border <= high)).mean() < 1
    assert manifest["image"] == {"channels": 1, "size": 28, "dtype": "uint8"}
    assert manifest["temperatures"] == network.temperatures != [1, 1]
    images, labels = read_subset(data, "test")
    with torch.no_grad():
        assert manifest["test_accuracy"] == (network(images).argmax(1) == labels).double().mean()
    for student, entry in zip(network.students, manifest["students"], strict=True):
        assert entry["n_features"] == student.n_features
        largest = predict(student, read_subset(data, "validation")[0])[0].max().item()
        assert entry["feature_limit"] == pytest.approx(FEATURE_MARGIN * largest)
        assert entry["cost"] == vars(measure_cost(student, 1, 28, params.design.precision))
    final = manifest["final"]
    sums = {entry["file"]: entry["sha256"] for entry in [*manifest["students"], final]}
    sums[final["blocks"]] = final["blocks_sha256"]
    assert {*sums, "manifest.json"} == {path.name for path in exported.iterdir()}
    for name, expected in sums.items():
        assert hashlib.sha256((exported / name).read_bytes()).hexdigest() == expected


def test_the_final_layer_is_also_there_in_blocks(network, exported):
    blocks = read_tensors(exported / "final.safetensors")
    assert all(np.array_equal(blocks[name], array) for name, array in network.final.tensors().items())


def test_the_same_model_gives_the_same_bytes(network, data, exported, tmp_path):
    export_onnx(Features(network.students[0]), data.images[:1], tmp_path / "again.onnx", "image", "features")
    assert (tmp_path / "again.onnx").read_bytes() == (exported / "0.onnx").read_bytes()


def test_nothing_of_the_machine_is_in_the_files(exported):
    for path in exported.glob("*.onnx"):
        content = path.read_bytes()
        for trace in (b"stack_trace", b"site-packages", bytes(REPOSITORY), bytes(Path.cwd())):
            assert trace not in content, f"{path.name} holds {trace}"
        model = onnx.load(path)
        assert not model.metadata_props
        assert not any(node.metadata_props or node.doc_string for node in model.graph.node)


def test_outputs_that_differ_are_refused():
    original = torch.tensor([[1.0, -50.0]])
    check_same(Path("0.onnx"), np.array([[1.004, -50.0]], np.float32), original)
    for wrong in ([[1.006, -50.0]], [[float("nan"), -50.0]]):
        with pytest.raises(UserError, match=r"0\.onnx: outputs differ from the trained model"):
            check_same(Path("0.onnx"), np.array(wrong, np.float32), original)
    with pytest.raises(UserError, match=r"have the shape \(2,\), and those of the trained model \(1, 2\)"):
        check_same(Path("0.onnx"), np.array([1.0, -50.0], np.float32), original)


def test_joined_layer_has_the_sum_of_the_biases(network):
    linear = as_linear(network.final.whole)
    _, biases = zip(*network.final.whole.values(), strict=True)
    np.testing.assert_allclose(linear.bias.detach(), sum(biases), rtol=1e-6)
    assert linear.in_features == sum(student.n_features for student in network.students)


# Models that run alone


def test_a_teacher_of_family_airbench_is_exported(data, tmp_path):
    torch.manual_seed(0)
    architecture = Architecture(family="airbench", widths=[8, 16, 16], depth=2)
    teacher = ConvNet(architecture, data.channels, data.n_classes, mean=data.mean, std=data.std)
    whiten(teacher, data.images)
    teacher.train()(data.images)  # statistics for the batch norms
    images, _ = read_subset(data, "test")
    export_solo({"teacher": teacher.eval()}, data, tmp_path, precision="float32")  # compares with torch itself
    assert run_onnx(tmp_path / "teacher.onnx", images.numpy()).shape == (len(images), data.n_classes)


def test_a_model_that_sees_the_mirror_image_too_is_also_exported_as_a_single_pass(data, tmp_path):
    torch.manual_seed(0)
    architecture = Architecture(family="fast", widths=[4, 8, 8], depth=1, mirror=True)
    model = ConvNet(architecture, data.channels, data.n_classes, mean=data.mean, std=data.std).eval()
    manifest = export_solo({"total": model}, data, tmp_path, precision="float32")["total"]  # compares with torch
    images = read_subset(data, "test")[0][:5]
    once = run_onnx(tmp_path / manifest["students"][0]["single_pass"], images.numpy())
    np.testing.assert_allclose(once, predict(single_pass(model), images)[1], rtol=1e-4, atol=1e-4)


def test_in_int8_the_single_pass_is_int8_too_and_the_teacher_has_none(data, tmp_path):
    torch.manual_seed(0)
    architecture = Architecture(family="fast", widths=[4, 8, 8], depth=1, mirror=True)
    model = ConvNet(architecture, data.channels, data.n_classes, mean=data.mean, std=data.std)
    model.train()(data.images)  # statistics for the batch norms
    manifest = export_solo({"teacher": model.eval(), "total": model}, data, tmp_path, precision="int8")
    assert "single_pass" not in manifest["teacher"]["students"][0]
    path = tmp_path / manifest["total"]["students"][0]["single_pass"]
    assert read_network(path).precision == "int8"  # it can be split
    images = read_subset(data, "test")[0][:5]
    expected = predict(single_pass(model), images)[1].numpy()
    assert np.abs(run_onnx(path, images.numpy()) - expected).max() < 0.25 * np.abs(expected).max()


def test_solo_models_are_the_teacher_and_single_baselines(params, data, experiment):
    assert set(solo_models(params, experiment, data)) == {"teacher", "2s-labels", "2s-kd", "2s-at_kd"}


def test_a_solo_model_classifies(params, data, experiment, tmp_path):
    teacher = solo_models(params, experiment, data)["teacher"]
    manifests = export_solo({"teacher": teacher}, data, tmp_path, precision="float32")
    assert set(manifests) == {"teacher"}
    images, labels = read_subset(data, "test")
    logits = run_onnx(tmp_path / "teacher.onnx", images.numpy())
    np.testing.assert_allclose(logits, predict(teacher, images)[1], rtol=1e-3, atol=1e-3)
    assert manifests["teacher"]["test_accuracy"] == (logits.argmax(1) == labels.numpy()).mean()
    (entry,) = manifests["teacher"]["students"]
    assert entry["cost"] == vars(measure_cost(teacher, 1, 28))


# int8


@pytest.fixture
def int8(params) -> Params:
    """The parameters of the tiny experiment, but for int8 devices."""
    return params.model_copy(update={"design": params.design.model_copy(update={"precision": "int8"})})


@pytest.fixture
def quantised(int8, experiment) -> dict:
    """Manifests of the tiny network and of the models that run alone, exported for int8 devices."""
    for stage, *of in ((assemble_stage, "2s", 0), (export_stage, "2s"), (export_stage, "solo")):
        stage.run(int8, experiment, *of)
    return {name: read_json(experiment.export(name) / "manifest.json") for name in ("2s", "solo")}


def test_an_int8_network_scores_in_onnx_runtime_as_it_is_evaluated(int8, data, experiment, quantised):
    (scores,) = [s for s in score_all(int8, experiment, data) if s.method == "nonn"]
    assert quantised["2s"]["test_accuracy"] == scores.accuracies[0]
    students = load_network(experiment.network("2s", 0), data).students
    for student, entry in zip(students, quantised["2s"]["students"], strict=True):
        assert entry["cost"] == vars(measure_cost(student, 1, 28, precision="int8"))
        weights = onnx.load(experiment.export("2s") / entry["file"]).graph.initializer
        kernels = [t for t in weights if len(t.dims) == 4 and t.dims[2] > 1]
        assert {t.data_type for t in kernels} == {onnx.TensorProto.INT8}


def test_the_teacher_is_exported_in_both_precisions(quantised):
    solo = {name: manifest["students"][0] for name, manifest in quantised["solo"].items()}
    whole, int8 = solo["teacher"]["cost"], solo["teacher_int8"]["cost"]
    assert whole["weight_bytes"] == 4 * whole["params"]
    assert int8["params"] < int8["weight_bytes"] < whole["weight_bytes"] / 2
    assert solo["2s-kd"]["cost"]["weight_bytes"] < 4 * solo["2s-kd"]["cost"]["params"]


def test_manifests_of_int8_files_name_their_scheme(experiment, quantised, exported):
    solo = quantised["solo"]
    assert [m["quantisation"] for m in (quantised["2s"], solo["teacher_int8"], solo["2s-kd"])] == [
        QUANTISATION_SCHEME
    ] * 3
    assert read_manifest(experiment.export("2s")).quantisation == QUANTISATION_SCHEME
    assert all("quantisation" not in manifest for manifest in (solo["teacher"], read_json(exported / "manifest.json")))
    assert read_manifest(exported).quantisation is None, "as in manifests from before forms had names"

    as_network(experiment.export("solo"), "2s-kd", Path("alone"))
    assert read_manifest(Path("alone")).quantisation == QUANTISATION_SCHEME


@pytest.mark.parametrize("form", [None, "u8s8"])
def test_students_quantised_in_another_form_are_refused(form, data, experiment, quantised):
    shutil.copytree(experiment.export("2s"), "older")
    manifest = quantised["2s"] | {"quantisation": form}
    write_json(Path("older/manifest.json"), manifest)
    refusal = r"older/0\.onnx: was quantised in another form than u8s7\. Run the stage `export` again"
    for use in (
        lambda: classify(Path("older"), data.images[0].numpy()),
        lambda: ServedStudent(Path("older/0.onnx")),
        lambda: write_repository(Path("older"), Path("models")),
    ):
        with pytest.raises(UserError, match=refusal):
            use()


# Classifying one image


@torch.no_grad()
def test_classify_says_what_the_network_says(network, data, exported):
    images = read_subset(data, "test")[0][:6]
    logits = network(images)
    for image, expected in zip(images.numpy(), logits, strict=True):
        found = classify(exported, image)
        assert found.label == data.classes[expected.argmax()]
        calibrated = (expected / network.temperatures[1]).softmax(0)
        assert found.probability == pytest.approx(calibrated.max().item(), abs=1e-3)
        assert len(found.shares) == 2
        assert sum(map(abs, found.shares)) == pytest.approx(1)


@torch.no_grad()
def test_shares_are_parts_of_the_lead(network, data, exported):
    """The lead of the predicted class over the mean class is what the students contribute to it."""
    image = data.images[:1]
    winner = int(network(image).argmax())
    features = {i: predict(student, image)[0][0].numpy() for i, student in enumerate(network.students)}
    terms = np.stack(list(network.final.contributions(features).values()))  # (students, classes)
    parts = (terms[:, winner] - terms.mean(1)).tolist()
    assert sum(parts) == pytest.approx((network(image)[0, winner] - network(image).mean()).item(), rel=1e-3)
    expected = [part / sum(map(abs, parts)) for part in parts]
    assert classify(exported, image[0].numpy()).shares == pytest.approx(expected, abs=1e-3)


def test_the_command_prints_class_and_shares(params, data, exported, experiment, capsys):
    shutil.copytree(exported, experiment.export("2s"))
    Image.fromarray(data.images[100, 0].numpy()).save("image.png")
    main(["predict", "image.png"])
    first, *students = capsys.readouterr().out.splitlines()
    expected = classify(exported, data.images[100].numpy())
    assert first.startswith(f"{expected.label}  {expected.probability:.1%}")
    for line, device, share in zip(students, params.networks["2s"].devices, expected.shares, strict=True):
        assert f"on {device}: {share:6.1%}" in line
    with pytest.raises(SystemExit, match=r"params\.yaml: networks: no '9s'; choose one of 2s"):
        main(["predict", "image.png", "--network", "9s"])


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P"])
def test_images_of_any_mode_and_size_are_read(tmp_path, mode, channels):
    Image.new("RGB", (50, 40), (204, 204, 204)).convert(mode).save(tmp_path / "image.png")
    pixels = read_image(tmp_path / "image.png", channels, 28)
    assert (pixels.shape, pixels.dtype) == ((channels, 28, 28), np.uint8)
    assert abs(pixels.astype(int) - 204).max() <= 1


@pytest.mark.parametrize("channels", [1, 3])
def test_photographs_are_turned_upright(tmp_path, channels):
    photograph = Image.new("RGB", (28, 28), "black")
    photograph.paste("white", (0, 0, 14, 28))
    exif = Image.Exif()
    exif[0x0112] = 6  # taken with the camera on its side: the left is the top
    photograph.save(tmp_path / "image.jpg", exif=exif, quality=100)
    pixels = read_image(tmp_path / "image.jpg", channels, 28)
    assert pixels[:, :12].min() > 200
    assert pixels[:, 16:].max() < 50


def test_deep_pixels_are_scaled_as_in_a_dataset(tmp_path):
    Image.fromarray(np.full((28, 28), 2_000, np.uint16)).save(tmp_path / "image.png")
    assert (read_image(tmp_path / "image.png", 1, 28) == round(2_000 / 257)).all()
    assert (read_image(tmp_path / "image.png", 1, 28, white=4_000) == 128).all()
    with pytest.raises(UserError, match=r"image\.png: not a readable image \(a pixel of 2000, above the white of 1000"):
        read_image(tmp_path / "image.png", 1, 28, white=1_000)


def test_pixels_that_fit_are_not_touched(data, tmp_path):
    Image.fromarray(data.images[0, 0].numpy()).save(tmp_path / "image.png")
    np.testing.assert_array_equal(read_image(tmp_path / "image.png", 1, 28), data.images[0])


def png_chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png(size: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A grey picture of `size` times `size` pixels, by its header, and what else the file holds."""
    header = b"IHDR", struct.pack(">IIBBBBB", size, size, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*chunk) for chunk in (header, *chunks))


BOMB = png(30_000, (b"IDAT", b""))
#: Its pixels end in a chunk without a name: Pillow raises a SyntaxError.
NO_CHUNK = png(28, (b"IDAT", zlib.compress(bytes(29 * 28), 0)[:400]), (b"\0\0\0\0", b"x" * 9))


@pytest.mark.parametrize("content", [b"", b"no image", b"\x89PNG\r\n\x1a\n cut off", BOMB, NO_CHUNK, "cut", None])
def test_unreadable_images_are_refused(tmp_path, data: Dataset, content):
    path = tmp_path / "image.png"
    if content == "cut":
        Image.fromarray(data.images[0, 0].numpy()).save(path)
        os.truncate(path, 300)
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"image\.png: (no such file|not a readable image).*Give"):
        read_image(path, 1, 28)
