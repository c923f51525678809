"""A whole network as a model that a coordinator serves to applications, by the protocol that its nodes speak.

An application sends one image and gets the class, all probabilities, and the names of the nodes that
took part. It knows nothing of students, deadlines and breakers: a network with a node missing answers
as usual, and with all missing it is UNAVAILABLE.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
from grpc import StatusCode
from prometheus_client import Counter
from tritonclient.grpc.service_pb2 import ModelInferRequest, ModelInferResponse
from tritonclient.utils import serialize_byte_tensor

from nonn.runtime.admission import Admission, OverloadedError
from nonn.runtime.coordinator import Answer, BusyError, Coordinator, NobodyAnsweredError
from nonn.runtime.exported import Manifest
from nonn.runtime.protocol import ENVELOPE_BYTES, ImageContract, ProtocolError, version_of

#: Share of the caller's time left that the nodes may take; the rest is for the answer's way back.
CALLERS_SHARE = 0.9
#: First estimate of the seconds that a call takes while others are under way; for the rest see `Admission`. Calls are
#: stale sooner here than at nodes, which would otherwise refuse them as stale.
CALL_S, SHARE, STALE = 2e-3, 0.4, 0.25


@dataclass(frozen=True)
class NetworkContract(ImageContract):
    """Inputs and outputs of a network; its model is the name of the export's folder."""

    n_classes: int  # C

    @property
    def outputs(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        return {"probabilities": ("FP32", (1, self.n_classes)), "label": ("BYTES", (1,)), "present": ("BYTES", (-1,))}

    @property
    def message_limit(self) -> int:
        return max(super().message_limit, 4 * self.n_classes + ENVELOPE_BYTES)


def make_answer(contract: NetworkContract, request: ModelInferRequest, answer: Answer) -> ModelInferResponse:
    """The answer to an application: the outputs that it asked for, or all.

    ``probabilities``, float32 of shape (1, C), in the order of the manifest's classes; ``label``, the
    most probable class; ``present``, the names of the nodes that took part.
    """
    prediction = answer.prediction
    tensors = {
        "probabilities": np.array([prediction.probabilities], "<f4"),
        "label": _strings([prediction.label]),
        "present": _strings(answer.present),
    }
    response = ModelInferResponse(model_name=contract.model, model_version=contract.version, id=request.id)
    for name in [output.name for output in request.outputs] or contract.outputs:
        tensor, (datatype, _) = tensors[name], contract.outputs[name]
        response.outputs.add(name=name, datatype=datatype, shape=tensor.shape)
        raw = tensor.tobytes() if datatype == "FP32" else serialize_byte_tensor(tensor).item()
        response.raw_output_contents.append(raw)
    return response


def network_version(manifest: Manifest) -> str:
    """The version of a network: that of its students and its final layer together."""
    parts = [student.sha256 for student in manifest.students] + [manifest.final.blocks_sha256]
    return version_of(hashlib.sha256("".join(parts).encode()).hexdigest())


def _strings(words: list[str]) -> np.ndarray:
    return np.array([word.encode() for word in words], dtype=object)


class ServedNetwork:
    """A network as a model that can be served, while it is entered; see `nonn.runtime.serving.Model`.

    Raises
    ------
    UserError
        The coordinator's cluster does not fit its export.
    """

    platform = "nonn"

    def __init__(self, coordinator: Coordinator):
        self.coordinator = coordinator
        manifest, image = coordinator.manifest, coordinator.manifest.image
        name = coordinator.cluster.export.resolve().name
        self.contract = NetworkContract(
            name, image.channels, image.size, len(manifest.classes), version=network_version(manifest)
        )
        self.admission = Admission(CALL_S, coordinator.timeout, SHARE, STALE)
        self.absences = Counter("nonn_absences", "Images answered without a node.", ["node"], registry=None)

    async def __aenter__(self) -> ServedNetwork:
        await self.coordinator.__aenter__()
        return self

    async def __aexit__(self, *reason: object) -> None:
        await self.coordinator.__aexit__(*reason)

    @property
    def is_ready(self) -> bool:
        """Whether the circuit of any node is closed."""
        return not all(connection.breaker_is_open for connection in self.coordinator.connections)

    async def infer(self, request: ModelInferRequest, images: np.ndarray, seconds: float | None) -> ModelInferResponse:
        """Answer with whichever students replied by the deadline, the caller's if that is sooner."""
        try:
            answer = await self.coordinator.classify(images[0], None if seconds is None else CALLERS_SHARE * seconds)
        except BusyError as busy:
            self.admission.slow_down()
            raise OverloadedError(busy.seconds) from None
        except NobodyAnsweredError as error:
            raise ProtocolError(StatusCode.UNAVAILABLE, str(error)) from None
        for name in answer.absent:
            self.absences.labels(name).inc()
        if answer.busy:
            self.admission.slow_down()
        return make_answer(self.contract, request, answer)
