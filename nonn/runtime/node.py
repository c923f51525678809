"""A node: serves one exported student through the Open Inference Protocol v2, over gRPC.

The student's file is checked against its manifest before it is loaded, every request before it
reaches the student, every feature vector before it leaves. Calls are answered one after another, as
they would be on a small device; those for which there is no time are refused, see `nonn.runtime.admission`.
A call whose caller gives up while it waits is not computed, unless the student is so fast that it does
not matter.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import onnxruntime
from grpc import StatusCode
from tritonclient.grpc.service_pb2 import ModelInferRequest, ModelInferResponse

from nonn.core.errors import UserError
from nonn.core.progress import log
from nonn.runtime.admission import Admission
from nonn.runtime.exported import INPUT, OUTPUT, read_manifest
from nonn.runtime.logs import relayed_stderr
from nonn.runtime.protocol import ProtocolError, check_features, make_response, student_contract
from nonn.runtime.sensor import load_sensor
from nonn.runtime.serving import serve
from nonn.runtime.serving_options import add_device, add_metrics_port, callers_from, identity_from
from nonn.runtime.students import open_student

#: Seconds for which a student may block the event loop. Computing in a thread takes two changes of thread,
#: each of which costs about as much as a very small student.
QUICK_S = 1e-3
#: First estimate of the seconds that a call takes besides the student.
CALL_S = 3e-4
#: Seconds within which a call without a deadline is answered; and see `nonn.runtime.admission.Admission`.
TIMEOUT_S, SHARE = 10.0, 0.5


def run_one_by_one(session: onnxruntime.InferenceSession, images: np.ndarray) -> np.ndarray:
    """Feature vectors (k, F_i) of images, uint8 of shape (k, channels, size, size)."""
    return np.concatenate([session.run([OUTPUT], {INPUT: image[None]})[0] for image in images])


class ServedStudent:
    """One exported student, verified and ready to run: an ONNX file beside the manifest that was written with it.

    `run` computes feature vectors (k, F_i), float32, of images, uint8 of shape (k, channels, size, size). By default
    ONNX Runtime does; any other `run` is taken for slow and waited for in a thread.

    Raises
    ------
    UserError
        The manifest does not list the file, or lists another SHA-256, or the file does not fit the manifest.
    """

    platform, is_ready = "onnxruntime_onnx", True

    def __init__(self, path: Path, sensor: Path | None = None, run: Callable[[np.ndarray], np.ndarray] | None = None):
        manifest = read_manifest(path.parent)
        entry = next((entry for entry in manifest.students if entry.file == path.name), None)
        if entry is None:
            known = ", ".join(entry.file for entry in manifest.students)
            raise UserError(f"{path}: not a student of the manifest beside it. Choose one of {known}.")
        session = open_student(path.parent, manifest, entry)
        self.run = run or partial(run_one_by_one, session)
        images = load_sensor(sensor, manifest.image.shape)
        self.contract = replace(student_contract(manifest, entry), sensor=images)
        blank = np.zeros(self.contract.image_shape, np.uint8)
        features = self.run(blank)
        if features.shape != (1, self.contract.n_features) or features.dtype != np.float32:
            raise UserError(f"{path}: its output is not what the manifest says. Export the network again.")
        start = time.perf_counter()  # the first run, above, has allocated memory for this one
        self.run(blank)
        seconds = time.perf_counter() - start
        self.quick_batch = 0 if run else int(QUICK_S / seconds)
        self.admission = Admission(seconds + CALL_S, TIMEOUT_S, SHARE)
        self.worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="student")

    async def infer(self, request: ModelInferRequest, images: np.ndarray, _seconds: float | None) -> ModelInferResponse:
        """Answer with the features of images; see `nonn.runtime.serving.Model`."""
        if len(images) <= self.quick_batch:
            features = self._checked(images)
        else:
            features = await asyncio.get_running_loop().run_in_executor(self.worker, self._checked, images)
        return make_response(self.contract, request.id, features)

    def _checked(self, images: np.ndarray) -> np.ndarray:
        try:
            features = self.run(images)
        except Exception as error:
            log(f"model {self.contract.model}: {error}")
            # The cause is for this node's log, not for the caller.
            raise ProtocolError(StatusCode.INTERNAL, "the student failed; see the node's log") from error
        if problem := check_features(self.contract, features):
            raise ProtocolError(StatusCode.INTERNAL, f"the student has features {problem}")
        return features


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", type=Path, metavar="MODEL.onnx", help="an exported student, with manifest.json next to it"
    )
    parser.add_argument("--address", default="127.0.0.1:7100", help="host:port to listen on (default: %(default)s)")
    add_device(parser)
    add_metrics_port(parser)
    parser.epilog = "example: nonn node results/mnist5k/export/2s/0.onnx --insecure"


def run(options: argparse.Namespace) -> None:
    """The command ``nonn node``."""
    identity = identity_from(options)
    student, allowed = ServedStudent(options.model, options.sensor), callers_from(options, identity)
    with relayed_stderr():
        asyncio.run(serve(student, options.address, identity, allowed, options.metrics_port, options.attached))
