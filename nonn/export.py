"""Stage `export`: write what the devices run, as ONNX, and score the files again.

A network becomes one file a student (uint8 image in, feature vector out) and one for the final
layer (concatenated feature vectors in, logits out). Teacher and single baselines, which run alone
on one device, become one file each (image in, logits out). Every file is re-scored on the test
images in ONNX Runtime: an export that changes an accuracy is an error.
"""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from nonn.assemble import NetworkOfNetworks, load_network
from nonn.baseline import load_baseline
from nonn.cost import measure_cost
from nonn.dataset import Dataset, load_dataset
from nonn.errors import UserError
from nonn.files import replacing, sha256_of, write_json, write_tensors
from nonn.final_layer import LinearBlocks
from nonn.models import Network, predict, single_pass
from nonn.params import PARTITION_METHODS, SOLO, Params
from nonn.paths import Paths
from nonn.progress import track
from nonn.runtime.session import run_onnx
from nonn.teacher import load_teacher

OPSET = 18
#: Largest difference of an output between torch and ONNX Runtime, relative to the largest output.
TOLERANCE = 1e-4
#: Largest feature accepted of a student, relative to its largest on validation images. Measured on 14
#: students of mnist5k: test images reach 1.15, images of another kind (inverted, noise, stripes) 1.5, so
#: that no honest node is refused; and no rogue has more than four times an honest node's range.
FEATURE_MARGIN = 4.0


class Features(nn.Module):
    """What a device runs: the student without its training head."""

    def __init__(self, student: Network):
        super().__init__()
        self.student = student

    def forward(self, images: Tensor) -> Tensor:
        return self.student(images)[0]


class Logits(nn.Module):
    """A model that classifies alone."""

    def __init__(self, model: Network):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images)[1]


def joined(layer: LinearBlocks) -> nn.Linear:
    """The final layer as one linear layer over the concatenated feature vectors."""
    weight = torch.cat(list(layer.weights), dim=1)
    linear = nn.Linear(weight.shape[1], weight.shape[0])
    with torch.no_grad():
        linear.weight.copy_(weight)
        linear.bias.copy_(torch.stack(list(layer.biases)).sum(0))
    return linear


def export_onnx(model: nn.Module, example: Tensor, path: Path, input_name: str, output_name: str) -> None:
    """Write a model as one ONNX file for batches of one, the same bytes each time.

    Parameters
    ----------
    model : nn.Module
    example : Tensor
        An input, with its batch dimension of 1.
    path : Path
    input_name, output_name : str
    """
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
    proto = program.model_proto
    # The exporter notes source lines with absolute paths: they differ between machines.
    for item in (
        proto,
        proto.graph,
        *proto.graph.node,
        *proto.graph.value_info,
        *proto.graph.input,
        *proto.graph.output,
    ):
        del item.metadata_props[:]
        item.doc_string = ""
    onnx.checker.check_model(proto)
    path.write_bytes(proto.SerializeToString(deterministic=True))


def check_same(path: Path, exported: np.ndarray, original: Tensor) -> None:
    """Refuse an exported file whose outputs differ from the model's.

    Raises
    ------
    UserError
    """
    original = original.numpy()
    difference = np.abs(exported - original).max() / max(np.abs(original).max(), 1e-9)
    if not difference <= TOLERANCE:
        raise UserError(
            f"{path.name}: outputs differ from the trained model by {difference:.1e} of the largest output. "
            "This is a fault of the exporter: try the versions in requirements.lock."
        )


def feature_limit(student: Network, data: Dataset) -> float:
    """Largest feature that is accepted of a student: `FEATURE_MARGIN` times the largest on validation images."""
    images, _ = data.split("validation")
    return FEATURE_MARGIN * predict(student, images)[0].max().item()


def _entry(path: Path, model: Network, data: Dataset, bytes_per_value: int) -> dict:
    cost = measure_cost(model, data.channels, data.size, bytes_per_value)
    return {"file": path.name, "sha256": sha256_of(path), "cost": vars(cost)}


def export_network(model: NetworkOfNetworks, data: Dataset, folder: Path, bytes_per_value: int) -> dict:
    """Export an assembled network into `folder`; return its manifest.

    The manifest lists each student's file, its SHA-256, feature length, largest feature accepted and
    cost, the final layer (as one ONNX file for when all students are present, and in blocks by
    student for when some are missing), the classes, and the accuracy of the exported files on the
    test images.
    """
    images, labels = data.split("test")
    example, students, features = images[:1], [], []
    for position, student in enumerate(track(list(model.students), "export")):
        path = folder / f"{position}.onnx"
        export_onnx(Features(student), example, path, "image", "features")
        features.append(run_onnx(path, images.numpy()))
        check_same(path, features[-1], predict(student, images)[0])
        entry = {"n_features": student.n_features, "feature_limit": feature_limit(student, data)}
        students.append(_entry(path, student, data, bytes_per_value) | entry)
    path, joint = folder / "final.onnx", np.concatenate(features, axis=1)
    export_onnx(joined(model.final.whole), torch.from_numpy(joint[:1]), path, "features", "logits")
    logits = run_onnx(path, joint)
    with torch.inference_mode():
        check_same(path, logits, model.final(model.features(images)))
    blocks = folder / "final.safetensors"
    write_tensors(blocks, model.final.state_dict())
    final = {"file": path.name, "sha256": sha256_of(path), "blocks": blocks.name, "blocks_sha256": sha256_of(blocks)}
    return _manifest(data, students, logits, labels) | {"final": final}


def export_solo(models: dict[str, Network], data: Dataset, folder: Path, bytes_per_value: int) -> dict:
    """Export models that run alone, named by the keys of `models`; return their manifests."""
    images, labels = data.split("test")
    manifests = {}
    for name, model in track(list(models.items()), "export"):
        path = folder / f"{name}.onnx"
        export_onnx(Logits(model), images[:1], path, "image", "logits")
        logits = run_onnx(path, images.numpy())
        check_same(path, logits, predict(model, images)[1])
        # At lower precision only students run: the teacher's ratio includes the change.
        entry = _entry(path, model, data, 4 if name == "teacher" else bytes_per_value)
        if model.mirrors:  # `distributed` splits a network over devices only as a single pass
            entry["single_pass"] = f"{name}-single.onnx"
            export_onnx(Logits(single_pass(model)), images[:1], folder / entry["single_pass"], "image", "logits")
        manifests[name] = _manifest(data, [entry], logits, labels)
    return manifests


def _manifest(data: Dataset, students: list[dict], logits: np.ndarray, labels: Tensor) -> dict:
    return {
        "classes": list(data.classes),
        "image": {"channels": data.channels, "size": data.size, "dtype": "uint8"},
        "students": students,
        "test_accuracy": float((logits.argmax(1) == labels.numpy()).mean()),
    }


def solo_models(params: Params, paths: Paths, data: Dataset) -> dict[str, Network]:
    """The teacher and the first seed of every single-model baseline, by export name."""
    models = {"teacher": load_teacher(paths, data)}
    for network, method, seeds in params.baseline_jobs():
        if method not in PARTITION_METHODS:
            models[f"{network}-{method}"] = load_baseline(paths.baseline(network, method, seeds[0]), data)[0]
    return models


def run(params: Params, paths: Paths, name: str) -> None:
    torch.set_num_threads(1)
    data, precision = load_dataset(paths), params.design.bytes_per_value
    with replacing(paths.export(name)) as folder:
        folder.mkdir(parents=True)
        if name == SOLO:
            manifest = export_solo(solo_models(params, paths, data), data, folder, precision)
        else:
            manifest = export_network(load_network(paths.network(name, params.seeds[0]), data), data, folder, precision)
        write_json(folder / "manifest.json", manifest)
