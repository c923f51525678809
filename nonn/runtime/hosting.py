"""The same students in Triton Inference Server or OpenVINO Model Server, instead of `nonn node`.

Both speak the protocol of our nodes and host ONNX files as they are. What is written here follows
their documentation [1]_ [2]_; it has not been tried with either server.

References
----------
.. [1] https://docs.nvidia.com/deeplearning/triton-inference-server/user-guide/docs/user_guide/model_configuration.html
.. [2] https://docs.openvino.ai/2025/model-server/ovms_docs_models_repository.html
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from nonn.core.errors import UserError
from nonn.core.files import replacing, write_json, write_text
from nonn.core.progress import log
from nonn.runtime.exported import INPUT, OUTPUT, Manifest, StudentFile, read_manifest, read_student_file
from nonn.runtime.protocol import version_of

UNTESTED = "Written from the server's documentation; NOT tested with the server."

#: Batches are of one image, as exported, so the batch dimension is an ordinary one (max_batch_size 0).
TRITON = """\
# {untested}
# Start: tritonserver --model-repository=. --model-control-mode=none
name: "{student.model}"
platform: "onnxruntime_onnx"
max_batch_size: 0
input [ {{ name: "{input}", data_type: TYPE_UINT8, dims: [ 1, {image.channels}, {image.size}, {image.size} ] }} ]
output [ {{ name: "{output}", data_type: TYPE_FP32, dims: [ 1, {student.n_features} ] }} ]
instance_group [ {{ kind: KIND_CPU, count: 1 }} ]
parameters {{ key: "intra_op_thread_count" value: {{ string_value: "1" }} }}
"""


def triton_config(manifest: Manifest, student: StudentFile) -> str:
    """A student's ``config.pbtxt``."""
    return TRITON.format(untested=UNTESTED, input=INPUT, output=OUTPUT, student=student, image=manifest.image)


def openvino_config(manifest: Manifest) -> dict:
    """The ``config.json`` of OpenVINO Model Server, for models mounted at ``/models``."""
    models = [{"config": {"name": s.model, "base_path": f"/models/{s.model}"}} for s in manifest.students]
    return {"model_config_list": models}


def write_repository(export: Path, target: Path) -> None:
    """Write a model repository that either server can serve: ``<model>/<version>/model.onnx`` and configurations.

    Raises
    ------
    UserError
        The export is damaged, or the target is there already.
    """
    if os.path.lexists(target):
        raise UserError(f"{target}: is there already. Name a new folder.")
    manifest = read_manifest(export)
    with replacing(target) as folder:
        for student in manifest.students:
            versioned = folder / student.model / version_of(student.sha256)
            versioned.mkdir(parents=True)
            (versioned / "model.onnx").write_bytes(read_student_file(export, manifest, student))
            (versioned.parent / "config.pbtxt").write_text(triton_config(manifest, student), encoding="utf-8")
        write_json(folder / "config.json", openvino_config(manifest))
        write_text(folder / "README", f"Students of a NoNN for Triton or OpenVINO Model Server.\n{UNTESTED}\n")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("export", type=Path, metavar="FOLDER", help="folder of an exported network")
    parser.add_argument("folder", type=Path, metavar="TARGET", help="new folder for the model repository")
    parser.epilog = "example: nonn hosting results/mnist5k/export/2s models"


def run(options: argparse.Namespace) -> None:
    """The command ``nonn hosting``."""
    write_repository(options.export, options.folder)
    log(f"{options.folder}: a model repository for Triton and OpenVINO Model Server. {UNTESTED}")
