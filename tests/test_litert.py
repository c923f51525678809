"""Files of LiteRT: they run in the interpreter of TensorFlow Lite Micro, and answer as ONNX Runtime does."""

import importlib.util
import json

import numpy as np
import pytest
import torch
from experiments import make_dataset, tiny_params, write_dataset
from safetensors.numpy import save_file

from nonn import cli
from nonn.core.architecture import Architecture
from nonn.core.errors import UserError
from nonn.core.files import write_json
from nonn.core.install import LITERT
from nonn.core.paths import Paths
from nonn.deploy.int8 import fold_norms
from nonn.deploy.onnx_files import write_student
from nonn.method.litert import PlainFeatures, check_litert, normalised, without_gelu, write_litert
from nonn.method.litert_integers import Quantised, convolutions_of
from nonn.report.firmware_plots import draw_accuracies
from nonn.runtime.session import run_onnx
from nonn.training.networks import ConvNet, single_pass

is_missing = any(importlib.util.find_spec(name) is None for name in LITERT)
needs_litert = pytest.mark.skipif(is_missing, reason="needs the extra litert (docs/firmware.md)")


def make_student(data, family="fast", mirror=True, depth=1, widths=(8, 12, 16)) -> ConvNet:
    torch.manual_seed(0)
    architecture = Architecture(family=family, widths=list(widths), depth=depth, mirror=mirror)
    student = ConvNet(architecture, data.channels, data.n_classes, 6, mean=data.mean, std=data.std)
    with torch.no_grad():
        for _ in range(3):
            student.train()(data.images)
    return student.eval()


@needs_litert
def test_a_file_answers_as_onnx_runtime(tmp_path):
    data = make_dataset(3, 28)
    student = make_student(data)
    write_student(student, data, tmp_path / "0.onnx", "int8")
    write_litert(student, data, tmp_path / "0.tflite", tmp_path / "0.onnx")
    images = data.subset("test")[0].numpy()
    expected = run_onnx(tmp_path / "0.onnx", images)
    entry, found = check_litert(student, tmp_path / "0.tflite", images, expected)
    assert found.shape == expected.shape
    assert entry["images_checked"] == len(images)
    assert entry["within_one_step"] == 1
    assert entry["operators"] == ["CONV_2D", "MAX_POOL_2D", "MEAN", "RELU"], "norms are folded, nothing is transposed"
    assert 1000 < entry["arena_bytes"] < entry["file_bytes"] < 40_000
    with pytest.raises(UserError, match=r"0\.tflite: in int8 its outputs differ by"):
        check_litert(student, tmp_path / "0.tflite", images, expected + 2 * expected.max())


@needs_litert
def test_a_file_has_the_integers_of_the_onnx_file(tmp_path):
    from ai_edge_litert import schema_py_generated as schema

    data = make_dataset(3, 28)
    student = make_student(data, mirror=False)
    write_student(student, data, tmp_path / "0.onnx", "int8")
    write_litert(student, data, tmp_path / "0.tflite", tmp_path / "0.onnx")
    model = schema.ModelT.InitFromPackedBuf((tmp_path / "0.tflite").read_bytes(), 0)
    (graph,) = model.subgraphs
    held = [model.buffers[tensor.buffer].data for tensor in graph.tensors]
    held = [data.tobytes() for data in held if data is not None]
    convolutions = convolutions_of(tmp_path / "0.onnx")
    assert len(convolutions) == 5
    for convolution in convolutions:
        assert abs(convolution.weights).max() <= 64
        assert np.ascontiguousarray(convolution.weights.transpose(0, 2, 3, 1)).tobytes() in held
        assert convolution.bias.tobytes() in held
    first = graph.tensors[graph.inputs[0]].quantization
    assert (float(first.scale[0]), int(first.zeroPoint[0])) == pytest.approx(tuple(convolutions[0].input))


@needs_litert
@pytest.mark.parametrize(
    ("other", "reason"), [({"widths": (8, 12, 24)}, "weights of another shape"), ({"depth": 2}, "another number of")]
)
def test_the_integers_of_another_student_are_refused(other, reason, tmp_path):
    data = make_dataset(3, 28)
    write_student(make_student(data, **other), data, tmp_path / "0.onnx", "int8")
    with pytest.raises(UserError, match=rf"0\.onnx: is not of this student \({reason}.*Run the stage export again"):
        write_litert(make_student(data), data, tmp_path / "0.tflite", tmp_path / "0.onnx")


@pytest.mark.parametrize("zero", [-128, 0, 7])
def test_integers_stand_for_themselves(zero):
    form, integers = Quantised(0.03, zero), np.arange(-128, 128, dtype=np.int8)
    np.testing.assert_array_equal(form.encode(form.decode(integers)), integers)
    assert form.encode(np.array([1e9, -1e9])).tolist() == [127, -128]


def test_images_are_normalised_channel_by_channel():
    data = make_dataset(3, 28)
    images = data.images[:2].numpy()
    expected = (images.transpose(0, 2, 3, 1) - data.mean.numpy()) / data.std.numpy()
    np.testing.assert_allclose(normalised(make_student(data), images), expected, rtol=1e-5)


@needs_litert
def test_a_file_is_in_one_piece(tmp_path):
    """From 256 KiB on the quantiser puts weights behind the tables, where TensorFlow Lite Micro finds none."""
    data = make_dataset(3, 28)
    student = make_student(data, mirror=False, widths=(48, 112, 256))
    write_student(student, data, tmp_path / "0.onnx", "int8")
    write_litert(student, data, tmp_path / "0.tflite", tmp_path / "0.onnx")
    assert (tmp_path / "0.tflite").stat().st_size > 256 * 1024
    images = data.subset("test")[0].numpy()[:3]
    entry, _ = check_litert(student, tmp_path / "0.tflite", images, run_onnx(tmp_path / "0.onnx", images))
    assert entry["within_one_step"] > 0.9


@needs_litert
def test_gelu_becomes_a_logistic_and_a_product(tmp_path):
    data = make_dataset(3, 28)
    student = make_student(data, family="airbench")
    write_student(student, data, tmp_path / "0.onnx", "int8")
    write_litert(student, data, tmp_path / "0.tflite", tmp_path / "0.onnx")
    images = data.subset("test")[0].numpy()
    entry, _ = check_litert(student, tmp_path / "0.tflite", images, run_onnx(tmp_path / "0.onnx", images))
    assert entry["operators"] == ["CONV_2D", "LOGISTIC", "MAX_POOL_2D", "MEAN", "MUL", "RELU"]
    assert entry["within_one_step"] > 0.5, "those of the quantiser's own integers: 0.3"


def test_students_without_gelu_answer_nearly_the_same():
    data = make_dataset(3, 28)
    student = single_pass(make_student(data, family="airbench"))
    images = data.subset("test")[0].numpy()
    with torch.no_grad():
        found = PlainFeatures(without_gelu(fold_norms(student)))(torch.from_numpy(normalised(student, images)))
        expected = student(torch.from_numpy(images))[0]
    assert 0 < (found - expected).abs().max() < 0.1 * expected.abs().max()


def test_students_with_shortcuts_are_refused(tmp_path):
    data = make_dataset(3, 28)
    student = make_student(data, family="airbench", depth=3)
    with pytest.raises(UserError, match=r"0\.tflite: students with the shortcuts of family airbench cannot be written"):
        write_litert(student, data, tmp_path / "0.tflite", tmp_path / "0.onnx")


def test_the_figure_shows_each_form_with_its_error():
    accuracies = {"float32": 0.95, "int8, ONNX Runtime": 0.94, "int8, LiteRT": 0.9}
    figure = draw_accuracies([{"network": name, "images": 100, "accuracy": accuracies} for name in ("2s", "4s")])
    (axis,) = figure.axes
    assert [label.get_text() for label in axis.get_yticklabels()][2:4] == ["2s, int8, LiteRT", "4s, float32"]
    assert [container.lines[0].get_xdata()[0] for container in axis.containers] == pytest.approx([95, 94, 90] * 2)
    (bar,) = axis.containers[2].lines[2]
    (low, _), (high, _) = bar.get_segments()[0]
    assert (high - low) / 2 == pytest.approx(100 * (0.9 * 0.1 / 100) ** 0.5)


def test_what_cannot_be_written_is_one_line(folder):
    def stop(*arguments) -> str:
        with pytest.raises(SystemExit) as error:
            cli.main(["litert", *arguments])
        return str(error.value)

    write_json(folder / "params.yaml", tiny_params())
    assert stop("5s") == "nonn litert: params.yaml: networks: no '5s'; choose one of 2s."
    assert "design.precision: is float32, and these files are int8" in stop("2s")


def write_network(folder, data, student, with_export=True) -> None:
    """What `nonn litert` reads: a network of one student, its weights, its export and the images."""
    paths = Paths("tiny")
    paths.network("2s", 0).parent.mkdir(parents=True)
    write_dataset(data, paths)
    tensors = {f"students.0.{name}": tensor.numpy() for name, tensor in student.state_dict().items()}
    layer = {"weights.0": np.zeros((3, 6)), "biases.0": np.zeros(3), "scales": np.ones(1), "fills": np.zeros((1, 3))}
    tensors |= {f"final.{name}": value.astype(np.float32) for name, value in layer.items()}
    save_file(tensors, paths.network("2s", 0))
    architecture = {"family": "fast", "widths": [8, 12, 16], "depth": 1}
    missing = {"chosen": "rescale", "not_chosen": []}
    info = {"students": [{"architecture": architecture, "n_filters": 6}], "missing": missing, "temperatures": [1.0]}
    write_json(paths.network("2s", 0).with_suffix(".json"), info | {"validation_accuracy": 0.5})
    paths.export("2s").mkdir(parents=True)
    if with_export:
        write_student(student, data, paths.export("2s") / "0.onnx", "int8")
    write_json(folder / "params.yaml", tiny_params({"design": {"precision": "int8"}}))


@needs_litert
def test_the_command_writes_files_and_what_it_measured(folder, capsys):
    data = make_dataset(1, 28)
    write_network(folder, data, make_student(data, mirror=False))
    cli.main(["litert", "2s", "--images", "10"])
    (entry,) = json.loads((folder / "litert/2s/litert.json").read_text())
    assert (folder / "litert/2s/0.tflite").stat().st_size == entry["file_bytes"]
    assert entry["images_checked"] == 10
    accuracies = json.loads((folder / "litert/2s/accuracy.json").read_text())
    assert accuracies["images"] == 10
    assert list(accuracies["accuracy"]) == ["float32", "int8, LiteRT", "int8, ONNX Runtime"]
    assert (folder / "litert/2s/accuracy.svg").is_file()
    assert f"2s/0.tflite: {entry['file_bytes']:,} bytes" in capsys.readouterr().out


@pytest.mark.skipif(not is_missing, reason="the extra litert is installed")
def test_without_the_extra_one_line_says_where_it_is_described(folder):
    data = make_dataset(1, 28)
    write_network(folder, data, make_student(data, mirror=False), with_export=False)
    with pytest.raises(SystemExit, match=r"nonn litert: litert_torch is not installed: .* see docs/firmware\.md"):
        cli.main(["litert", "2s"])
