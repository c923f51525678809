"""Slices that the devices of a split network send each other, and how a device waits for them.

A slice of an activation map is a request of the same protocol as an image: one tensor as raw bytes, with 4 bytes a
value, or 1 in an int8 network, under the image's id. It may arrive before the image.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

import numpy as np
from grpc import StatusCode
from tritonclient.grpc.service_pb2 import ModelInferRequest

from nonn.runtime.protocol import ProtocolError, invalid, read_raw
from nonn.split.plan import Dtype, Message

#: The model that a slice is addressed to.
EXCHANGE = "exchange"
MAX_ID_LENGTH = 64
#: Names of types in the protocol, and as they travel.
WIRE: dict[Dtype, tuple[str, np.dtype]] = {"float32": ("FP32", np.dtype("<f4")), "uint8": ("UINT8", np.dtype("u1"))}


def make_slice(message: Message, image_id: str, version: str, source: np.ndarray) -> bytes:
    """The request that carries a slice of the sender's map, ready to be sent to any number of receivers.

    `version` is that of the plan, see `nonn.split.plan.Part`.
    """
    datatype, dtype = WIRE[message.dtype]
    tensor = ModelInferRequest.InferInputTensor(name=message.name, datatype=datatype, shape=message.shape)
    raw = [message.cut(source).astype(dtype, copy=False).tobytes()]
    request = ModelInferRequest(
        model_name=EXCHANGE, model_version=version, id=image_id, inputs=[tensor], raw_input_contents=raw
    )
    return request.SerializeToString()


def find_message(expected: dict[str, Message], version: str, request: ModelInferRequest) -> Message:
    """The expected message that a request carries; a `ProtocolError` if it is none."""
    check_id(request)
    if request.model_version != version:
        other = f"a slice of another plan (version {request.model_version[:64]!r}, not {version!r})"
        raise ProtocolError(StatusCode.FAILED_PRECONDITION, f"{other}; copy the parts of one plan to all devices")
    if len(request.inputs) != 1:
        raise invalid(f"expected 1 input, not {len(request.inputs)}")
    name = request.inputs[0].name
    if name not in expected:
        raise ProtocolError(StatusCode.NOT_FOUND, f"no slice {name[:64]!r} is expected here")
    return expected[name]


def read_slice(message: Message, request: ModelInferRequest) -> np.ndarray:
    """The slice of a request, without a copy.

    Raises
    ------
    ProtocolError
        Of another type, shape or length, or not finite.
    """
    (tensor,) = request.inputs
    if request.parameters or tensor.parameters or request.outputs or tensor.HasField("contents"):
        raise invalid(f"{tensor.name}: expected its data as raw_input_contents and nothing else")
    datatype, dtype = WIRE[message.dtype]
    data = read_raw(tensor, request.raw_input_contents, datatype, message.shape, itemsize=dtype.itemsize)
    values = np.frombuffer(data, dtype).reshape(message.shape)
    if message.dtype == "float32" and not np.isfinite(values).all():
        raise invalid(f"{tensor.name}: values that are not finite")
    return values


def check_id(request: ModelInferRequest) -> None:
    """Refuse a request without the id of an image."""
    if not 0 < len(request.id) <= MAX_ID_LENGTH:
        raise invalid(f"give the image an id of up to {MAX_ID_LENGTH} characters, the same for all devices")


class Exchange:
    """The slices that have arrived for one image, and those that are missing."""

    def __init__(self) -> None:
        self.arrived: dict[str, np.ndarray] = {}
        self.expected: dict[str, Message] = {}
        self.failure: Exception | None = None
        self._waiter: asyncio.Future | None = None

    @property
    def missing(self) -> list[Message]:
        """Messages that the present round still waits for."""
        return [message for name, message in self.expected.items() if name not in self.arrived]

    def put(self, name: str, values: np.ndarray) -> None:
        """Store a slice; a `ProtocolError` if it has arrived before."""
        if name in self.arrived:
            raise ProtocolError(StatusCode.ALREADY_EXISTS, f"{name} has arrived before")
        self.arrived[name] = values
        if not self.missing:
            self._wake()

    def fail(self, error: Exception) -> None:
        """Let `take` raise an error instead of waiting; the first one counts."""
        self.failure = self.failure or error
        self._wake()

    async def take(self, messages: Iterable[Message]) -> dict[str, np.ndarray]:
        """Wait for all slices of one round, and return them by name."""
        self.expected = {message.name: message for message in messages}
        # Yield to the event loop once, so that this device's own slices are sent first.
        await asyncio.sleep(0)
        if self.missing and not self.failure:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        if self.failure:
            raise self.failure
        return {name: self.arrived[name] for name in self.expected}

    def _wake(self) -> None:
        if self._waiter and not self._waiter.done():
            self._waiter.set_result(None)
