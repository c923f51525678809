"""Messages between coordinator and nodes: Open Inference Protocol v2, and each is checked.

Images go out as one uint8 tensor, and their feature vectors come back as one fp32 tensor, both as raw bytes: one image
at a time, or several in one message if several wait. Both sides read messages here, and refuse whatever is not exactly
what the manifest of the export promises.

References
----------
.. [1] https://kserve.github.io/website/latest/modelserving/data_plane/v2_protocol/
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import numpy as np
from grpc import StatusCode
from tritonclient.grpc.service_pb2 import ModelInferRequest, ModelInferResponse

from nonn.runtime.exported import INPUT, OUTPUT, Manifest, StudentFile

#: Input in place of an image where the device has a sensor: int64 of shape (1, 1), the index of one of its images.
SAMPLE = "sample"
#: Version of what has no other.
VERSION = "1"
#: Largest message in bytes, unless an image alone needs more.
MIN_MESSAGE_LIMIT = 64 * 1024
#: Most images per message, and their most bytes together.
MAX_BATCH, MAX_BATCH_BYTES = 16, 256 * 1024
#: Room for what surrounds the tensors of a message: names, shapes, the request's id.
ENVELOPE_BYTES = 4096


class ProtocolError(Exception):
    """A message that breaks the protocol: a gRPC status and a sentence for the sender."""

    def __init__(self, code: StatusCode, message: str):
        super().__init__(message)
        self.code = code


def version_of(sha256: str) -> str:
    """The version of a model whose file has this SHA-256, so that answers of another export are recognised.

    It is an integer below 2^60, because Triton and OpenVINO Model Server require numbers.
    """
    return str(int(sha256[:15], 16))


@dataclass(frozen=True)
class ImageContract(ABC):
    """Inputs and outputs of a server of images, uint8 of shape (1, channels, size, size)."""

    model: str  # name of what is served
    channels: int
    size: int
    #: Images (n, channels, size, size), uint8, of the server's own sensor; it then takes their indices too.
    sensor: np.ndarray | None = field(default=None, kw_only=True, compare=False, repr=False)
    version: str = field(default=VERSION, kw_only=True)  # see `version_of`
    largest_batch: int = field(default=1, kw_only=True)  # images that a request may hold

    @property
    def image_shape(self) -> tuple[int, int, int, int]:
        return 1, self.channels, self.size, self.size

    @property
    def request_shape(self) -> tuple[int, int, int, int]:
        """That of a request's images, -1 where there may be several."""
        return 1 if self.largest_batch == 1 else -1, *self.image_shape[1:]

    @property
    @abstractmethod
    def outputs(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Datatype and shape of each output, by name; -1 where a length varies."""

    @property
    def message_limit(self) -> int:
        """Bytes of the largest message that either side accepts."""
        return max(MIN_MESSAGE_LIMIT, self.largest_batch * math.prod(self.image_shape) + ENVELOPE_BYTES)


@dataclass(frozen=True)
class Contract(ImageContract):
    """Inputs and outputs of one node; its model is the stem of the student's ONNX file."""

    n_features: int  # length F_i of the feature vector, float32 of shape (1, F_i)
    feature_limit: float | None = None  # of means of rectified activations, which are at least 0; None: any finite ones

    @property
    def outputs(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        return {OUTPUT: ("FP32", (self.request_shape[0], self.n_features))}

    @property
    def message_limit(self) -> int:
        return max(super().message_limit, 4 * self.largest_batch * self.n_features + ENVELOPE_BYTES)


def student_contract(manifest: Manifest, student: StudentFile) -> Contract:
    """Inputs and outputs of the node of an exported student."""
    image, version = manifest.image, version_of(student.sha256)
    batch = max(1, min(MAX_BATCH, MAX_BATCH_BYTES // (image.channels * image.size**2)))
    shape = (image.channels, image.size, student.n_features)
    return Contract(student.model, *shape, student.feature_limit, version=version, largest_batch=batch)


def make_request(contract: ImageContract, image: np.ndarray | np.integer) -> ModelInferRequest:
    """Request for the features of an image, of the sensor image with an index, or of several images.

    Images are uint8 of shape (channels, size, size), or (k, channels, size, size).
    """
    name, datatype = INPUT, "UINT8"
    shape: tuple[int, ...] = (image.shape[0] if image.ndim == 4 else 1, *contract.image_shape[1:])
    if image.ndim == 0:
        name, datatype, shape, image = SAMPLE, "INT64", (1, 1), np.asarray(image, "<i8")
    tensor = ModelInferRequest.InferInputTensor(name=name, datatype=datatype, shape=shape)
    return ModelInferRequest(model_name=contract.model, inputs=[tensor], raw_input_contents=[image.tobytes()])


def check_image(contract: ImageContract, image: np.ndarray | np.integer) -> None:
    """A ValueError unless this is an image, uint8 of shape (channels, size, size), or the index of a sensor image."""
    shape = contract.image_shape[1:]
    if not isinstance(image, np.integer) and (image.dtype != np.uint8 or image.shape != shape):
        raise ValueError(f"expected an image of uint8 {shape}, not of {image.dtype} {image.shape}")


def read_request(contract: ImageContract, request: ModelInferRequest) -> np.ndarray:
    """The images of a request, uint8 of shape (k, channels, size, size), k from 1 to the contract's `largest_batch`.

    Raises
    ------
    ProtocolError
        NOT_FOUND for another model, INVALID_ARGUMENT for anything else that is not agreed.
    """
    check_model(contract, request.model_name, request.model_version)
    if len(request.inputs) != 1:
        raise invalid(f"expected 1 input, not {len(request.inputs)}")
    (tensor,) = request.inputs
    takes_samples = contract.sensor is not None
    if tensor.name != INPUT and not (takes_samples and tensor.name == SAMPLE):
        raise invalid(f"expected the input {INPUT!r}, not {tensor.name[:64]!r}")
    if request.parameters or tensor.parameters or any(output.parameters for output in request.outputs):
        raise invalid("parameters are not supported; send none")
    wanted = [output.name for output in request.outputs]
    if unknown := [name for name in wanted if name not in contract.outputs]:
        raise invalid(f"no output {unknown[0][:64]!r}; ask for {', '.join(contract.outputs)}, or for none to have all")
    if len(set(wanted)) < len(wanted):
        raise invalid("an output is asked for twice")
    if tensor.HasField("contents"):
        raise invalid("send the pixels as raw_input_contents, not as contents")
    if contract.sensor is not None and tensor.name == SAMPLE:
        data = read_raw(tensor, request.raw_input_contents, "INT64", (1, 1), itemsize=8)
        number = int(np.frombuffer(data, "<i8")[0])
        if not 0 <= number < len(contract.sensor):
            raise invalid(f"the sensor has images 0 to {len(contract.sensor) - 1}, none of number {number}")
        return contract.sensor[number][None]
    n_images = tensor.shape[0] if tensor.shape and 1 < tensor.shape[0] <= contract.largest_batch else 1
    shape = (n_images, *contract.image_shape[1:])
    data = read_raw(tensor, request.raw_input_contents, "UINT8", shape, itemsize=1)
    return np.frombuffer(data, np.uint8).reshape(shape)


def make_response(contract: Contract, request_id: str, features: np.ndarray) -> ModelInferResponse:
    """Response with the feature vectors of k images, float32 of shape (k, F_i)."""
    tensor = ModelInferResponse.InferOutputTensor(
        name=OUTPUT, datatype="FP32", shape=(len(features), contract.n_features)
    )
    raw = [features.astype("<f4", copy=False).tobytes()]
    return ModelInferResponse(
        model_name=contract.model,
        model_version=contract.version,
        id=request_id,
        outputs=[tensor],
        raw_output_contents=raw,
    )


def read_response(contract: Contract, response: ModelInferResponse, n_images: int = 1) -> np.ndarray:
    """The features of a response, float32 of shape (F_i,), or (n_images, F_i) of more than one.

    Raises
    ------
    ProtocolError
        Of another type, shape or length, or with features that no student has: see `check_features`.
    """
    if response.model_name != contract.model:
        raise invalid(f"expected an answer of model {contract.model!r}, not of {response.model_name[:64]!r}")
    if response.model_version != contract.version:
        raise ProtocolError(
            StatusCode.FAILED_PRECONDITION,
            f"it serves model {contract.model!r} of another export (version {response.model_version[:64]!r}, not "
            f"{contract.version!r}). Copy this export's folder there and start the node again.",
        )
    if [output.name for output in response.outputs] != [OUTPUT]:
        raise invalid(f"expected the output {OUTPUT!r} alone")
    (tensor,) = response.outputs
    shape = (n_images, contract.n_features)
    features = np.frombuffer(read_raw(tensor, response.raw_output_contents, "FP32", shape, itemsize=4), "<f4")
    if problem := check_features(contract, features):
        raise invalid(f"features {problem}")
    return features if n_images == 1 else features.reshape(shape)


def check_features(contract: Contract, features: np.ndarray) -> str:
    """What is wrong with the values of a feature vector, in a few words; empty if nothing is.

    A node must not sway the vote by values that an honest one cannot have. With features in [0, L] the student's part
    of the logit of class c stays within a range of s L Σ_k |W_ck|, where W is its block of the final layer and s its
    scale.
    """
    if not np.isfinite(features).all():
        return "that are not finite"
    if contract.feature_limit is None:
        return ""
    if (features < 0).any():
        return "below 0"
    if (features > contract.feature_limit).any():
        return f"up to {features.max():.3g}, beyond the limit of {contract.feature_limit:.3g}"
    return ""


def check_model(contract: ImageContract, model: str, version: str) -> None:
    """Refuse the name of another model, or another version of it."""
    if model != contract.model:
        raise ProtocolError(StatusCode.NOT_FOUND, f"this address serves model {contract.model!r}, not {model[:64]!r}")
    if version not in ("", contract.version):
        known = f"model {model!r} has only version {contract.version}"
        raise ProtocolError(StatusCode.NOT_FOUND, f"{known}, not {version[:64]!r}")


def read_raw(tensor, contents, datatype: str, shape: tuple[int, ...], itemsize: int) -> bytes:
    """Content of a message's only tensor, which must be of this type and shape."""
    if tensor.datatype != datatype:
        raise invalid(f"{tensor.name}: expected the type {datatype}, not {tensor.datatype[:64]!r}")
    if tuple(tensor.shape) != shape:
        raise invalid(f"{tensor.name}: expected the shape {list(shape)}, not {list(tensor.shape)[:8]}")
    if len(contents) != 1:
        raise invalid(f"{tensor.name}: expected its data as one raw tensor, not {len(contents)}")
    if len(contents[0]) != math.prod(shape) * itemsize:
        raise invalid(f"{tensor.name}: expected {math.prod(shape) * itemsize} bytes, not {len(contents[0])}")
    return contents[0]


def invalid(message: str) -> ProtocolError:
    """The error of a message that breaks the protocol."""
    return ProtocolError(StatusCode.INVALID_ARGUMENT, message)
