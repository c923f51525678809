"""ONNX files that devices run, in float32 or in int8: from a uint8 image to a feature vector or to logits."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import onnx
import torch
from torch import Tensor, nn

from nonn.core.files import scratch_folder
from nonn.core.params import Precision
from nonn.data.dataset import Dataset
from nonn.deploy.int8 import calibration_images, fold_norms, quantise
from nonn.training.networks import ConvNet

OPSET = 18


class Features(nn.Module):
    """What a device runs: the student without its training head."""

    def __init__(self, student: ConvNet):
        super().__init__()
        self.student = student

    def forward(self, images: Tensor) -> Tensor:
        return self.student(images)[0]


class Logits(nn.Module):
    """A model that classifies alone."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images)[1]


def export_onnx(model: nn.Module, example: Tensor, path: Path, input_name: str, output_name: str) -> None:
    """Write a model as one ONNX file for batches of one, as `example` is; the same bytes each time."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        program = torch.onnx.export(
            model.eval(),
            (example,),
            input_names=[input_name],
            output_names=[output_name],
            opset_version=OPSET,
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    assert program is not None  # it would be None without dynamo
    proto = program.model_proto  # made anew at each access
    graph = proto.graph
    # The exporter notes source lines with absolute paths: they differ between machines.
    for item in (proto, graph, *graph.node, *graph.value_info, *graph.input, *graph.output):
        del item.metadata_props[:]
        item.doc_string = ""
    onnx.checker.check_model(proto)
    path.write_bytes(proto.SerializeToString(deterministic=True))


def write_student(student: ConvNet, data: Dataset, path: Path, precision: Precision) -> None:
    """Write what the device of a student runs; in int8 if `precision` says so."""
    _write(Features, "features", student, data, path, precision)


def write_classifier(model: ConvNet, data: Dataset, path: Path, precision: Precision) -> None:
    """Write a model that classifies alone; in int8 if `precision` says so."""
    _write(Logits, "logits", model, data, path, precision)


def _write(
    kind: type[nn.Module], output_name: str, model: ConvNet, data: Dataset, path: Path, precision: Precision
) -> None:
    model = model if precision == "float32" else fold_norms(model)
    export_onnx(kind(model), data.images[:1], path, "image", output_name)
    if precision == "int8":
        quantise(path, calibration_images(data))


def student_content(student: ConvNet, data: Dataset, precision: Precision) -> bytes:
    """The content of the file that `write_student` writes."""
    with scratch_folder() as folder:
        path = folder / "student.onnx"
        write_student(student, data, path, precision)
        return path.read_bytes()
