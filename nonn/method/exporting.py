"""Writing what the devices run as ONNX files, and scoring these again.

A network becomes one file a student (uint8 image in, feature vector out) and one for the final layer (concatenated
feature vectors in, logits out). Teacher and single baselines, which run alone on one device, become one file each
(image in, logits out). Every file is re-scored on the test images in ONNX Runtime: an export that changes an accuracy
is an error. With ``design.precision: int8`` students and baselines are int8 (see `nonn.deploy.int8`), and the teacher
is exported in both precisions; manifests of int8 files name their scheme as ``quantisation``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from nonn.core.errors import UserError
from nonn.core.files import sha256_of
from nonn.core.params import Precision
from nonn.core.progress import track
from nonn.data.dataset import Dataset
from nonn.data.tensors import write_tensors
from nonn.deploy.int8 import check_close
from nonn.deploy.onnx_files import export_onnx, write_classifier, write_student
from nonn.deploy.teacher_files import measure_file_cost, write_teacher
from nonn.deploy.traced_cost import measure_cost
from nonn.method.final_layer import as_tensors, layer_tensors, logits_of
from nonn.method.joining import NetworkOfNetworks
from nonn.runtime.exported import QUANTISATION_SCHEME
from nonn.runtime.final import Blocks
from nonn.runtime.inversion import usual_border
from nonn.runtime.session import run_onnx
from nonn.teachers.foreign import ForeignTeacher
from nonn.training.networks import ConvNet, predict, single_pass

#: Largest difference of an output between torch and ONNX Runtime, relative to the largest output.
TOLERANCE = 1e-4
#: Largest feature accepted of a student, relative to its largest on validation images. On 14 students of mnist5k, test
#: images reach 1.15, and images of other kinds (inverted, noise, stripes) 1.5. So no honest node is refused, and a
#: rogue one has at most four times the range of an honest one.
FEATURE_MARGIN = 4.0
#: The models that see images of the teacher's size.
TEACHERS = ("teacher", "teacher_int8")


def as_linear(blocks: Blocks) -> nn.Linear:
    """A final layer as one linear layer over the concatenated feature vectors."""
    weights, biases = as_tensors(blocks)
    weight = torch.cat(weights, dim=1)
    linear = nn.Linear(weight.shape[1], weight.shape[0])
    with torch.no_grad():
        linear.weight.copy_(weight)
        linear.bias.copy_(torch.stack(biases).sum(0))
    return linear


def check_same(path: Path, exported: np.ndarray, original: Tensor, tolerance: float = TOLERANCE) -> None:
    """Refuse an exported file whose outputs differ from the model's."""
    trained = original.numpy()
    if exported.shape != trained.shape:
        raise UserError(
            f"{path.name}: outputs have the shape {exported.shape}, and those of the trained model {trained.shape}. "
            "This is a fault of the exporter: try the versions in requirements.lock."
        )
    difference = np.abs(exported - trained).max() / max(np.abs(trained).max(), 1e-9)
    if not difference <= tolerance:
        raise UserError(
            f"{path.name}: outputs differ from the trained model by {difference:.1e} of the largest output. "
            "This is a fault of the exporter: try the versions in requirements.lock."
        )


def check_outputs(
    path: Path, exported: np.ndarray, original: Tensor, precision: Precision, tolerance: float = TOLERANCE
) -> None:
    """Refuse a file whose outputs differ from the model's: by rounding at most in float32, slightly at most in int8."""
    if precision == "float32":
        check_same(path, exported, original, tolerance)
    else:
        check_close(path.name, exported, original)


def feature_limit(student: ConvNet, data: Dataset) -> float:
    """Largest feature that is accepted of a student: `FEATURE_MARGIN` times the largest on validation images."""
    images, _ = data.subset("validation")
    return FEATURE_MARGIN * predict(student, images)[0].max().item()


def _entry(path: Path, model: ConvNet | ForeignTeacher, data: Dataset, precision: Precision) -> dict:
    if isinstance(model, ForeignTeacher):
        cost = measure_file_cost(path)
    else:
        cost = measure_cost(model, data.channels, data.size, precision)
    return {"file": path.name, "sha256": sha256_of(path), "cost": vars(cost)}


def export_network(model: NetworkOfNetworks, data: Dataset, folder: Path, precision: Precision) -> dict:
    """Export an assembled network into `folder`; return its manifest.

    The manifest lists each student's file, its SHA-256, feature length, largest feature accepted and cost, the final
    layer (as one ONNX file for when all students are present, and in blocks by student for when some are missing), the
    temperatures, the classes, the usual border of the training images, and the accuracy of the exported files on the
    test images.
    """
    images, labels = data.subset("test")
    students, features, expected = [], [], []
    for position, student in enumerate(track(model.students, "export")):
        path = folder / f"{position}.onnx"
        write_student(student, data, path, precision)
        features.append(run_onnx(path, images.each()))
        original = predict(student, images)[0]
        check_outputs(path, features[-1], original, precision)
        # In float32 the last check is one of the whole network; the layer of int8 students is checked by itself.
        expected.append(original if precision == "float32" else torch.from_numpy(features[-1]))
        entry = {"n_features": student.n_features, "feature_limit": feature_limit(student, data)}
        students.append(_entry(path, student, data, precision) | entry)
    path, joint = folder / "final.onnx", np.concatenate(features, axis=1)
    export_onnx(as_linear(model.final.whole), torch.from_numpy(joint[:1]), path, "features", "logits")
    logits = run_onnx(path, joint)
    check_same(path, logits, logits_of(model.final, expected))
    blocks = folder / "final.safetensors"
    write_tensors(blocks, layer_tensors(model.final))
    final = {"file": path.name, "sha256": sha256_of(path), "blocks": blocks.name, "blocks_sha256": sha256_of(blocks)}
    manifest = _manifest(data, students, logits, labels, precision)
    manifest["image"]["border"] = usual_border(batch.numpy() for batch in data.subset("train")[0].split(100))
    return manifest | {"final": final, "temperatures": list(model.temperatures)}


def export_solo(
    models: Mapping[str, ConvNet | ForeignTeacher],
    students: Dataset,
    folder: Path,
    precision: Precision,
    teacher: Dataset | None = None,
) -> dict:
    """Export models that run alone, named by the keys of `models`; return their manifests.

    `students` are the images as students see them, `teacher` as the teacher does, None for the same. The model
    ``teacher`` is float32 whatever the students are.
    """
    manifests = {}
    for name, model in track(list(models.items()), "export"):
        data = teacher if teacher and name in TEACHERS else students
        images, labels = data.subset("test")
        path, own = folder / f"{name}.onnx", "float32" if name == "teacher" else precision
        tolerance = TOLERANCE
        if isinstance(model, ForeignTeacher):
            write_teacher(model, data, path)
            tolerance = model.body.tolerance
        else:
            write_classifier(model, data, path, own)
        logits = run_onnx(path, images.each())
        check_outputs(path, logits, predict(model, images)[1], own, tolerance)
        entry = _entry(path, model, data, own)
        if isinstance(model, ConvNet) and model.mirrors and (precision == "float32" or name not in TEACHERS):
            # `distributed` splits a network only as a single pass.
            entry["single_pass"] = f"{name}-single.onnx"
            write_classifier(single_pass(model), data, folder / entry["single_pass"], own)
        manifests[name] = _manifest(data, [entry], logits, labels, own)
    return manifests


def _manifest(data: Dataset, students: list[dict], logits: np.ndarray, labels: Tensor, precision: Precision) -> dict:
    form = {"quantisation": QUANTISATION_SCHEME} if precision == "int8" else {}
    image = {"channels": data.channels, "size": data.size, "dtype": "uint8"}
    image |= {} if data.white is None else {"white": data.white}
    return form | {
        "classes": list(data.classes),
        "image": image,
        "students": students,
        "test_accuracy": float((logits.argmax(1) == labels.numpy()).mean()),
    }
