"""Family mobilenet at work: a short training, the same answers as ONNX in float32 and int8, attention transfer."""

from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from experiments import make_dataset, read_subset

from nonn.core.architecture import Architecture
from nonn.core.params import SOLO
from nonn.deploy.int8 import check_close
from nonn.deploy.onnx_files import write_classifier, write_student
from nonn.runtime.session import run_onnx
from nonn.split.graph import UnsplittableError, read_network
from nonn.stages import distributed
from nonn.teachers.signals import compute_signals
from nonn.teachers.teacher import train_teacher
from nonn.training.checkpoint import Checkpoint
from nonn.training.distillation import StudentSpec, TransferSet, distill_student
from nonn.training.networks import accuracy, predict

NETWORK = Architecture(family="mobilenet", widths=[4, 6, 8, 16], depth=2)
pytestmark = pytest.mark.xdist_group("mobilenet")  # one worker makes what they share


@pytest.fixture(scope="module")
def images():
    return make_dataset(channels=3, size=48)


@pytest.fixture(scope="module")
def trained(images, params, tmp_path_factory):
    """A mobilenet that was trained for a few steps, and the log of that."""
    schedule = {"architecture": NETWORK, "epochs": 6, "batch_size": 10, "lr": 0.1}
    checkpoint = Checkpoint(tmp_path_factory.mktemp("mobilenet") / "checkpoint.safetensors")
    return train_teacher(images, params.teacher.model_copy(update=schedule), checkpoint)


@pytest.fixture(scope="module")
def files(trained, images, tmp_path_factory):
    """The trained mobilenet as a file of each precision."""
    found = {name: tmp_path_factory.mktemp("solo") / "2s-total.onnx" for name in ("float32", "int8")}
    for precision, path in found.items():
        write_classifier(trained[0], images, path, precision)
    return found


def test_a_few_steps_teach_it(trained, images):
    model, log = trained
    assert log[-1]["train_loss"] < 0.7 * log[0]["train_loss"]
    held_out, labels = read_subset(images, "test")
    assert accuracy(predict(model, held_out)[1], labels) > 0.8


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_a_file_answers_as_the_trained_network_does(precision, trained, images, files):
    model, _ = trained
    held_out, labels = read_subset(images, "test")
    found, expected = run_onnx(files[precision], held_out.numpy()), predict(model, held_out)[1]
    if precision == "float32":
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)
    check_close("model.onnx", found, expected)
    assert (found.argmax(1) == expected.argmax(1).numpy()).mean() >= 0.95
    assert accuracy(torch.from_numpy(found), labels) == pytest.approx(accuracy(expected, labels), abs=0.05)
    operations = {node.op_type for node in onnx.load(files[precision]).graph.node}
    # What compilers for microcontrollers know; integers lie between the two kinds of quantisation.
    known = {"Cast", "Sub", "Div", "Conv", "Clip", "Add", "ReduceMean", "Gemm"}
    assert operations == known | ({"QuantizeLinear", "DequantizeLinear"} if precision == "int8" else set())


def test_a_student_learns_from_filters_and_attention(trained, images, params, tmp_path):
    signals = compute_signals(trained[0], images, params.signals)
    transfer_set = TransferSet(images, signals, params.signals)
    schedule = params.distill.model_copy(update={"epochs": 2})
    weights = []
    for number, attention in enumerate((0.0, 100.0)):
        spec = StudentSpec(
            architecture=NETWORK, filters=[1, 5, 40], kd_weight=0.9, transfer_weight=1.0, attention_weight=attention
        )
        checkpoint = Checkpoint(tmp_path / f"{number}.safetensors")
        student, log = distill_student(transfer_set, spec, schedule, seed=0, checkpoint=checkpoint, label="test")
        assert log[-1]["train_loss"] < log[0]["train_loss"]
        weights.append(student.state_dict()["stages.1.0.layers.0.weight"])
    assert not torch.equal(*weights)
    features, _ = predict(student, read_subset(images, "test")[0])
    assert features.shape == (30, 3)
    write_student(student, images, tmp_path / "student.onnx", "int8")
    check_close("student.onnx", run_onnx(tmp_path / "student.onnx", read_subset(images, "test")[0].numpy()), features)


def test_it_is_not_split_and_the_test_bed_says_so(files, params, monkeypatch, tmp_path, capsys):
    folder = files["float32"].parent
    with pytest.raises(
        UnsplittableError, match=r"an unknown operation\. Give a classifier of family fast, airbench or"
    ):
        read_network(files["float32"])
    manifest = {"2s-total": {"students": [{"file": "2s-total.onnx"}]}}
    monkeypatch.setattr(
        distributed, "read_json", lambda path, _: manifest if folder in path.parents else {"models": {}}
    )
    monkeypatch.setattr(distributed, "network_workload", lambda *_: None)
    monkeypatch.setattr(distributed, "time_final", lambda *_: None)
    paths = SimpleNamespace(export=lambda name: folder if name == SOLO else tmp_path, benchmark=lambda _: tmp_path)
    found = list(distributed.network_deployments(params, paths, "2s", tmp_path))
    assert [deployment.method for deployment in found] == ["nonn"]
    assert "cannot be split" in capsys.readouterr().err
