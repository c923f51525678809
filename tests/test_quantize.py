"""int8: the same answers by and large, integers inside, honest counts, the same bytes each time."""

import hashlib
import os
import platform
import shutil
import subprocess
import sys

import numpy as np
import onnx
import onnxruntime.quantization
import pytest
import torch
from experiments import read_subset
from torch import nn

from nonn.core.architecture import Architecture
from nonn.core.errors import UserError
from nonn.deploy.int8 import CALIBRATION_IMAGES, calibration_images, check_close, fold_norms, weight_bytes
from nonn.deploy.onnx_files import write_classifier, write_student
from nonn.deploy.traced_cost import measure_cost
from nonn.firmware.build_and_run import describe
from nonn.firmware.footprint import blank_program, has_kernels
from nonn.firmware.graph import read_student
from nonn.firmware.source import buffers_of
from nonn.runtime.session import open_session, run_onnx
from nonn.training.networks import ConvNet, predict, whiten

ARCHITECTURES = [
    Architecture(family="airbench", widths=[8, 12, 16], depth=2, mirror=True, strided=True),
    Architecture(family="airbench", widths=[8, 12, 16], depth=3),
    Architecture(family="fast", widths=[9, 12, 15], depth=2),
    Architecture(family="wrn", depth=10),
    Architecture(family="resnet", depth=8),
    Architecture(family="fast", widths=[8, 8, 12, 16], depth=1),
    Architecture(family="mobilenet", widths=[8, 8, 16], depth=2),
]
NAMES = [f"{a.family}-{a.depth}-{len(a.widths)}" for a in ARCHITECTURES]


def make_student(architecture, data, n_filters=6):
    """A student whose batch norms are not what they begin as: statistics, scales of both signs, biases."""
    torch.manual_seed(0)
    student = ConvNet(architecture, data.channels, data.n_classes, n_filters, mean=data.mean, std=data.std)
    whiten(student, data.images)
    for norm in (module for module in student.modules() if isinstance(module, nn.BatchNorm2d)):
        nn.init.uniform_(norm.bias, -0.3, 0.3)
        if norm.weight.requires_grad:
            nn.init.uniform_(norm.weight, -1.5, 1.5)
    with torch.no_grad():
        for _ in range(3):
            student.train()(data.images)
    return student.eval()


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=NAMES)
def test_folding_changes_nothing_but_the_number_of_layers(architecture, data):
    student = make_student(architecture, data)
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    folded = fold_norms(student)
    for original, found in zip(predict(student, data.images), predict(folded, data.images), strict=True):
        torch.testing.assert_close(found, original, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(tensor, before[name]) for name, tensor in student.state_dict().items())
    n_norms = [sum(isinstance(m, nn.BatchNorm2d) for m in model.modules()) for model in (student, folded)]
    if architecture.family in ("airbench", "mobilenet"):
        assert n_norms[1] == 0
    assert n_norms[1] < n_norms[0]


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=NAMES)
def test_int8_students_answer_like_the_float32_ones(architecture, data, tmp_path):
    student = make_student(architecture, data)
    for precision in ("float32", "int8"):
        write_student(student, data, tmp_path / f"{precision}.onnx", precision)
    images, _ = read_subset(data, "test")
    expected = predict(student, images)[0]
    found = run_onnx(tmp_path / "int8.onnx", images.numpy())
    assert not np.array_equal(found, expected)
    check_close("int8.onnx", found, expected)
    if has_kernels(architecture):
        built = read_student(tmp_path / "int8.onnx")
        check_foreseen(built, blank_program(architecture, data.channels, data.size, 6))
    spec, whole = open_session(tmp_path / "int8.onnx"), open_session(tmp_path / "float32.onnx")
    for of in ("get_inputs", "get_outputs"):
        assert [(v.name, v.type, v.shape) for v in getattr(spec, of)()] == [
            (v.name, v.type, v.shape) for v in getattr(whole, of)()
        ]


def check_foreseen(built, foreseen):
    """Steps and buffers of a firmware are those by which `design` has judged it."""
    names = [[describe(step).removesuffix(", mirrored") for step in student.steps] for student in (built, foreseen)]
    assert names[0] == names[1]
    sizes = [sorted(buffer.size for buffer in buffers_of(student).values()) for student in (built, foreseen)]
    assert sizes[0] == sizes[1]


@pytest.fixture
def full_range(monkeypatch):
    """Weights of 8 bits in place of 7."""
    quantise, full = onnxruntime.quantization.quantize_static, {"reduce_range": False}
    monkeypatch.setattr(
        "onnxruntime.quantization.quantize_static", lambda *a, **options: quantise(*a, **options | full)
    )


def largest_pair_sum(path):
    """Of two products of an activation and a weight of the same filter, whichever they are, over all convolutions."""
    model = onnx.load(path)
    tensors = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    sources = {node.output[0]: node for node in model.graph.node}
    largest = []
    for convolution in (node for node in model.graph.node if node.op_type == "Conv"):
        activations, weights = (sources[name] for name in convolution.input[:2])
        assert [tensors[node.input[2]].dtype for node in (activations, weights)] == [np.uint8, np.int8]
        assert not tensors[weights.input[2]].any()
        ordered = np.sort(tensors[weights.input[0]].astype(int).reshape(len(tensors[weights.input[0]]), -1))
        largest.append(255 * max(ordered[:, -2:].clip(min=0).sum(1).max(), -ordered[:, :2].clip(max=0).sum(1).min()))
    return max(largest)


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=NAMES)
def test_two_products_fit_into_16_bits(architecture, data, tmp_path):
    """So that the processors that add two of them in 16 bits have nothing to saturate."""
    write_student(make_student(architecture, data), data, tmp_path / "0.onnx", "int8")
    assert 2**14 < largest_pair_sum(tmp_path / "0.onnx") < 2**15


@pytest.mark.usefixtures("full_range")
def test_two_products_of_8_bit_weights_would_not_fit(data, tmp_path):
    write_student(make_student(ARCHITECTURES[0], data), data, tmp_path / "0.onnx", "int8")
    assert largest_pair_sum(tmp_path / "0.onnx") >= 2**15


def run_emulated(processor, paths, images, folder):
    """Answers of each file by a processor that QEMU emulates; one process for all, since its start takes longest."""
    emulator = shutil.which("qemu-x86_64")
    if platform.machine() != "x86_64" or sys.platform != "linux" or emulator is None:
        pytest.skip("needs Linux on x86-64 and qemu-x86_64 (Debian: apt-get install qemu-user)")
    np.save(folder / "images.npy", images)
    run = (
        "import sys, pathlib, numpy; from nonn.runtime.session import run_onnx; "
        "images, answers, *files = sys.argv[1:]; "
        "numpy.save(answers, [run_onnx(pathlib.Path(file), numpy.load(images)) for file in files])"
    )
    files = [folder / "images.npy", folder / "answers.npy", *paths]
    # Otherwise OpenBLAS may be told to use instructions that the emulated processor lacks.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OPENBLAS")}
    command = [emulator, "-cpu", processor, sys.executable, "-c", run, *files]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200)
    assert result.returncode == 0, result.stderr
    return np.load(folder / "answers.npy")


@pytest.fixture(scope="module")
def answers(data, tmp_path_factory):
    """Of each architecture, by this processor and by an emulated one."""
    folder, images = tmp_path_factory.mktemp("answers"), read_subset(data, "test")[0][:4].numpy()
    paths = [folder / f"{name}.onnx" for name in NAMES]
    for architecture, path in zip(ARCHITECTURES, paths, strict=True):
        write_student(make_student(architecture, data), data, path, "int8")
    here, there = [run_onnx(path, images) for path in paths], run_emulated("Haswell", paths, images, folder)
    return dict(zip(NAMES, zip(here, there, strict=True), strict=True))


@pytest.mark.xdist_group("answers")
@pytest.mark.parametrize("name", NAMES)
def test_a_processor_without_vnni_answers_the_same(name, answers):
    """Haswell has AVX2 and none of the instructions for dot products of integers."""
    here, there = answers[name]
    difference = np.linalg.norm(there - here) / np.linalg.norm(here)
    assert difference < 1e-3, "no more than a value that was rounded otherwise"


@pytest.mark.usefixtures("full_range")
def test_the_emulated_processor_saturates_where_it_can(data, tmp_path):
    """So that the test above would tell."""
    student = make_student(ARCHITECTURES[1], data)
    write_student(student, data, tmp_path / "0.onnx", "int8")
    images = read_subset(data, "test")[0][:4]
    (there,) = run_emulated("Haswell", [tmp_path / "0.onnx"], images.numpy(), tmp_path)
    with pytest.raises(UserError, match="outputs differ"):
        check_close("0.onnx", there, predict(student, images)[0])


def test_weights_are_integers_and_there_once(data, tmp_path):
    """Although the network sees an image twice, and so has each convolution twice."""
    student = make_student(ARCHITECTURES[0], data)
    write_student(student, data, tmp_path / "0.onnx", "int8")
    model = onnx.load(tmp_path / "0.onnx")
    n_convolutions = sum(isinstance(module, nn.Conv2d) for module in student.modules())
    assert sum(node.op_type == "Conv" for node in model.graph.node) == 2 * n_convolutions
    assert not any(node.op_type == "BatchNormalization" for node in model.graph.node)
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    kernels = [tensor for tensor in tensors.values() if len(tensor.dims) == 4 and tensor.dims[2] > 1]
    assert [k.data_type for k in kernels] == [onnx.TensorProto.INT8] * (n_convolutions - 1)  # the bridge is 1×1
    scales = [node.input[1] for node in model.graph.node if node.op_type == "DequantizeLinear"]
    assert any(len(tensors[scale].dims) == 1 and tensors[scale].dims[0] > 1 for scale in scales), "by filter"


def test_the_same_student_gives_the_same_bytes(data, tmp_path):
    sums = set()
    for name in ("a", "b"):
        folder = tmp_path / name
        folder.mkdir()
        write_classifier(make_student(ARCHITECTURES[0], data, n_filters=None), data, folder / "0.onnx", "int8")
        content = (folder / "0.onnx").read_bytes()
        assert bytes(tmp_path) not in content
        sums.add(hashlib.sha256(content).hexdigest())
    assert len(sums) == 1


def test_outputs_that_have_nothing_to_do_with_the_students_are_refused():
    original = torch.tensor([[3.0, 4.0], [0.6, 0.8]])
    check_close("0.onnx", original.numpy() * 1.2, original)
    for wrong in (original.numpy() * 1.3, np.full((2, 2), np.nan, np.float32)):
        with pytest.raises(UserError, match=r"0\.onnx: in int8 its outputs differ .* Set design\.precision to float32"):
            check_close("0.onnx", wrong, original)


def test_calibration_images_are_few_and_from_all_of_the_training_images(data):
    train, _ = read_subset(data, "train")
    assert np.array_equal(calibration_images(data), train.numpy()), "all, where there are few"
    many = data.train.repeat(10)
    found = calibration_images(type(data)(**{**vars(data), "train": many}))
    assert 0.5 * CALIBRATION_IMAGES < len(found) <= CALIBRATION_IMAGES


def test_bytes_of_the_weights_are_those_of_the_tensors_in_the_file(data, tmp_path):
    """But for what the file holds besides: zero points, scales of activations and constants."""
    student = make_student(ARCHITECTURES[2], data)
    write_student(student, data, tmp_path / "0.onnx", "int8")
    model = onnx.load(tmp_path / "0.onnx")
    kernels = [t for t in model.graph.initializer if len(t.dims) == 4 and t.data_type == onnx.TensorProto.INT8]
    weights, filters = sum(int(np.prod(t.dims)) for t in kernels), sum(t.dims[0] for t in kernels)
    counted = measure_cost(student, data.channels, data.size, "int8").weight_bytes
    unfolded = 16 * sum(m.num_features for m in fold_norms(student).modules() if isinstance(m, nn.BatchNorm2d)) // 2
    assert len(kernels) == sum(isinstance(module, nn.Conv2d) for module in student.modules())
    head = 4 * sum(parameter.numel() for parameter in student.head.parameters())
    assert weight_bytes(student) == weights + 8 * filters + unfolded + head
    assert counted == weights + 8 * filters + unfolded, "a student's head stays behind"
