"""One network split over several devices: what each computes, and what they send each other.

This is the baseline that a NoNN is compared with, since its devices must exchange activations all
the time. A plan consists of *segments*, ONNX files that each device runs one after another, and of
*rounds* between them, in which devices send each other slices of one activation map. It computes
exactly what the unsplit network does. `nonn.split.planner` makes plans; this module stores and runs
them.
"""

from __future__ import annotations

import hashlib
import math
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import onnxruntime
from pydantic import Field, model_validator
from safetensors.numpy import load, save

from nonn.core.errors import UserError, printable
from nonn.core.files import replacing, sha256_of, write_json
from nonn.core.params import Precision, Sha256
from nonn.runtime.exported import Dimension, ImageFormat, Record, read_record, read_verified
from nonn.runtime.protocol import ENVELOPE_BYTES, MIN_MESSAGE_LIMIT, Contract, version_of
from nonn.runtime.session import open_session

SplitMethod = Literal["channels", "rows"]
#: Types of activation maps: in an int8 network those that are exchanged hold unsigned 8-bit integers.
Dtype = Literal["float32", "uint8"]
#: The tensors that every device starts from, and answers with.
IMAGE, FEATURES = "image", "features"
PLAN, PART, FINAL = "plan.json", "part.json", "final.safetensors"
#: Names of files in the folder of a device.
OF_PART = re.compile(rf"{re.escape(PART)}|\d+\.onnx")
PLAN_KIND, REWRITE_REMEDY = "a plan of a split network", "Write the plan again with `nonn split`."

TensorName = Annotated[str, Field(min_length=1, max_length=128)]
Position = Annotated[int, Field(ge=0, lt=2**16)]
Total = Annotated[int, Field(ge=0)]


class Message(Record, extra="forbid"):
    """A slice of an activation map that one device sends another."""

    round: Position  # sent after the segment of this number, and there before the next
    sender: Position
    receiver: Position
    source: TensorName  # the sender's name for the map that is sliced
    name: TensorName  # the receiver's for the slice
    rows: tuple[Position, Position] | None = None  # of the sender's map: first and one past the last; None: all of it
    shape: tuple[Literal[1], Dimension, Dimension, Dimension]  # (1, channels, rows, columns)
    dtype: Dtype = "float32"

    @property
    def n_bytes(self) -> int:
        """Payload, without the framing."""
        return np.dtype(self.dtype).itemsize * math.prod(self.shape)

    def cut(self, source: np.ndarray) -> np.ndarray:
        """The slice of the sender's map: a view of it."""
        return source if self.rows is None else source[:, :, slice(*self.rows)]


class Segment(Record, extra="forbid"):
    """What a device computes between two rounds, an ONNX file: its inputs, outputs, cost and SHA-256."""

    inputs: list[TensorName]
    outputs: Annotated[list[TensorName], Field(min_length=1)]
    params: Total
    weight_bytes: Total
    macs: Total
    sha256: Sha256


class Part(Record, extra="forbid"):
    """A device's part of a plan: all that it needs to know."""

    plan: Sha256 | None = None  # of all segments of all devices: parts of different plans do not fit together
    position: Position
    n_devices: Annotated[int, Field(ge=1, le=2**16)]
    image: ImageFormat  # whole, it is what each device starts from
    columns: tuple[Position, Position]  # of the network's features, those it answers with: first and one past the last
    segments: Annotated[list[Segment | None], Field(min_length=1)]  # None where it has nothing to compute
    messages: list[Message]  # all that it sends or receives, by round

    @property
    def name(self) -> str:
        """Of the device, also in its certificate."""
        return f"device-{self.position}"

    @property
    def n_features(self) -> int:
        return self.columns[1] - self.columns[0]

    @property
    def contract(self) -> Contract:
        """Inputs and outputs of the device, as its coordinator sees them."""
        shape = self.image.channels, self.image.size, self.n_features
        return Contract(str(self.position), *shape, version=self.version)

    @property
    def version(self) -> str:
        """Of the plan, as the protocol has it."""
        assert self.plan is not None  # once the plan is complete
        return version_of(self.plan)

    @model_validator(mode="after")
    def _messages_fit(self) -> Part:
        names = [(m.receiver, m.name) for m in self.messages]
        for m in self.messages:
            between = {m.sender, m.receiver}
            if len(between) != 2 or self.position not in between or max(between) >= self.n_devices:
                raise ValueError(f"{m.name}: from device {m.sender} to {m.receiver} is no message of this device")
            if m.round >= len(self.segments) - 1 or names.count((m.receiver, m.name)) > 1:
                raise ValueError(f"{m.name}: is sent twice, or after the last exchange")
        if self.position >= self.n_devices:
            raise ValueError(f"position {self.position} of {self.n_devices} devices")
        return self

    @property
    def message_limit(self) -> int:
        """Bytes of the largest message that it sends or receives."""
        payload = max((message.n_bytes for message in self.messages), default=0)
        return max(MIN_MESSAGE_LIMIT, payload + ENVELOPE_BYTES, self.contract.message_limit)

    @property
    def params(self) -> int:
        return sum(segment.params for segment in self.segments if segment)

    @property
    def weight_bytes(self) -> int:
        return sum(segment.weight_bytes for segment in self.segments if segment)

    @property
    def macs(self) -> int:
        return sum(segment.macs for segment in self.segments if segment)

    def sent(self, round: int) -> list[Message]:
        return [m for m in self.messages if m.round == round and m.sender == self.position]

    def received(self, round: int) -> list[Message]:
        return [m for m in self.messages if m.round == round and m.receiver == self.position]


@dataclass(frozen=True)
class SplitPlan:
    """A network split over devices."""

    method: SplitMethod
    parts: list[Part]  # by device
    models: list[list[bytes | None]]  # the ONNX files of their segments
    weight: np.ndarray  # (C, F), float32, of the last linear layer, which the coordinator applies
    bias: np.ndarray  # (C,), float32
    scale: float  # what the devices' features, added up, are multiplied by before that
    precision: Precision = "float32"  # that they calculate in

    @property
    def n_devices(self) -> int:
        return len(self.parts)

    @property
    def rounds(self) -> int:
        """How many times the devices exchange slices for one image."""
        return len(self.parts[0].segments) - 1

    @property
    def messages(self) -> list[Message]:
        sent = (m for part in self.parts for m in part.messages if m.sender == part.position)
        return sorted(sent, key=lambda m: (m.round, m.sender, m.receiver))

    def payload_bytes(self, sender: int | None = None) -> int:
        """Bytes that one device, or all, send the others for one image, framing aside."""
        return sum(m.n_bytes for m in self.messages if sender in (None, m.sender))

    @classmethod
    def of(
        cls,
        method: SplitMethod,
        parts: Sequence[Part],
        models: Sequence[list[bytes | None]],
        weight: np.ndarray,
        bias: np.ndarray,
        scale: float,
        precision: Precision,
    ) -> SplitPlan:
        """A complete plan, whose parts bear its hash."""
        digest = hashlib.sha256(weight.tobytes() + bias.tobytes())
        for part in parts:
            digest.update(part.model_dump_json(exclude={"plan"}).encode())
        named = [part.model_copy(update={"plan": digest.hexdigest()}) for part in parts]
        return cls(method, named, list(models), weight, bias, scale, precision)

    def logits(self, features: Sequence[np.ndarray]) -> np.ndarray:
        """Logits (C,) from the features of the devices, each float32 of shape (F_d,)."""
        total = np.zeros(self.weight.shape[1], np.float32)
        for part, answer in zip(self.parts, features, strict=True):
            total[slice(*part.columns)] += answer
        return self.weight @ (total * np.float32(self.scale)) + self.bias

    def save(self, folder: Path) -> None:
        """Write the plan: ``plan.json``, the last layer, and a folder for each device with all that it needs.

        Raises
        ------
        UserError
            The folder exists and holds more than a plan.
        """
        if folder.exists() and not (folder / PLAN).is_file():
            raise UserError(f"{folder}: is there, and is no plan of a split network. Name a new folder.")
        names = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
        others = [name for name in names if name not in (PLAN, FINAL) and not name.isdigit()]
        parts = [folder / name for name in names if name.isdigit()]
        inner = [path for part in parts for path in (part.iterdir() if part.is_dir() else [part])]
        others += [str(path.relative_to(folder)) for path in inner if not OF_PART.fullmatch(path.name)]
        others += [part.name for part in parts if part.is_dir() and not (part / PART).is_file()]
        if others:
            raise UserError(f"{folder}: holds more than a plan, such as {printable(others[0])}. Name a new folder.")
        with replacing(folder) as scratch:
            for part, models in zip(self.parts, self.models, strict=True):
                own = scratch / str(part.position)
                own.mkdir(parents=True)
                write_json(own / PART, part.model_dump(mode="json"))
                for index, model in enumerate(models):
                    if model is not None:
                        (own / f"{index}.onnx").write_bytes(model)
            (scratch / FINAL).write_bytes(save({"weight": self.weight, "bias": self.bias}))
            content = PlanFile(
                method=self.method,
                precision=self.precision,
                scale=self.scale,
                parts=[sha256_of(scratch / str(part.position) / PART) for part in self.parts],
                final=sha256_of(scratch / FINAL),
            )
            write_json(scratch / PLAN, content.model_dump())

    @classmethod
    def load(cls, folder: Path) -> SplitPlan:
        """Read and check a plan that `save` wrote; a `UserError` if it is not as it was written."""
        content = read_record(folder / PLAN, PlanFile, PLAN_KIND, REWRITE_REMEDY)
        for position, sha256 in enumerate(content.parts):
            read_verified(folder / str(position) / PART, sha256)
        parts, models = zip(*(load_part(folder / str(position)) for position in range(len(content.parts))), strict=True)
        final = load(read_verified(folder / FINAL, content.final))
        layer = final["weight"], final["bias"]
        return cls(content.method, list(parts), list(models), *layer, content.scale, content.precision)


class PlanFile(Record, extra="forbid"):
    """All of ``plan.json``: SHA-256 of the devices' parts and of the last layer."""

    method: SplitMethod
    precision: Precision
    scale: float
    parts: Annotated[list[Sha256], Field(min_length=1)]
    final: Sha256


def load_part(folder: Path) -> tuple[Part, list[bytes | None]]:
    """One device's part of a plan, and the ONNX files of its segments.

    Raises
    ------
    UserError
        A file is missing or was changed.
    """
    part = read_record(folder / PART, Part, PLAN_KIND, REWRITE_REMEDY)
    if part.plan is None:
        raise UserError(f"{folder / PART}: does not say of which plan it is. {REWRITE_REMEDY}")
    models = [
        None if segment is None else read_verified(folder / f"{index}.onnx", segment.sha256)
        for index, segment in enumerate(part.segments)
    ]
    return part, models


Sessions = list[onnxruntime.InferenceSession | None]


def open_sessions(models: Sequence[bytes | None]) -> Sessions:
    """Sessions of one device's segments."""
    return [None if model is None else open_session(model) for model in models]


def run_segment(
    segment: Segment, session: onnxruntime.InferenceSession, values: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """A segment's outputs, from the values that the device has."""
    outputs = session.run(segment.outputs, {name: values[name] for name in segment.inputs})
    return dict(zip(segment.outputs, outputs, strict=True))


@dataclass(frozen=True)
class LocalRun:
    """Logits (C,) of one image, and the CPU seconds that each segment took: ``seconds[device][segment]``."""

    logits: np.ndarray
    seconds: list[list[float]]


def run_in_process(plan: SplitPlan, image: np.ndarray, sessions: Sequence[Sessions] | None = None) -> LocalRun:
    """Classify an image, uint8 of shape (channels, size, size), with all devices in this process, one after another.

    For more than one image, give the `open_sessions` of each device's models.
    """
    sessions = sessions or [open_sessions(models) for models in plan.models]
    values: list[dict[str, np.ndarray]] = [{IMAGE: image[None]} for _ in plan.parts]
    seconds: list[list[float]] = [[] for _ in plan.parts]
    for index in range(plan.rounds + 1):
        for part, opened, there, spent in zip(plan.parts, sessions, values, seconds, strict=True):
            start = time.thread_time()
            if segment := part.segments[index]:
                there |= run_segment(segment, opened[index], there)
            spent.append(time.thread_time() - start if segment else 0.0)
        for part in plan.parts:
            for message in part.sent(index):
                sliced = message.cut(values[message.sender][message.source])
                values[message.receiver][message.name] = np.ascontiguousarray(sliced)
    none = np.zeros((1, 0), np.float32)
    return LocalRun(plan.logits([there.get(FEATURES, none)[0] for there in values]), seconds)
