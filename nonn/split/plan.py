"""One network split over several devices: what each computes, and what they send each other between.

This is the baseline that a NoNN is compared with, since its devices must exchange activations all
the time. A plan consists of *segments*, ONNX files that each device runs one after another, and of
*rounds* between them, in which devices send each other slices of one activation map; it computes
exactly what the unsplit network does. `nonn.split.planner` makes plans, this module keeps and runs
them.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import onnxruntime
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from nonn.core.errors import UserError
from nonn.core.files import read_json, replacing, write_json
from nonn.runtime.exported import Count, Image, Sha256, read_verified
from nonn.runtime.protocol import ENVELOPE, MESSAGE_LIMIT, Contract
from nonn.runtime.session import open_session

Method = Literal["channels", "rows"]
#: What every device starts from, and what it answers.
IMAGE, FEATURES = "image", "features"
PLAN, PART, FINAL = "plan.json", "part.json", "final.safetensors"
AGAIN = "Write the plan again with `nonn split`."

Name = Annotated[str, Field(min_length=1, max_length=128)]
Position = Annotated[int, Field(ge=0, lt=2**16)]
Total = Annotated[int, Field(ge=0)]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Message(Section):
    """A slice of an activation map that one device sends another, float32.

    Attributes
    ----------
    round : int
        It is sent after the segment of this number, and there before the next.
    sender, receiver : int
        Positions of the devices.
    source, name : str
        The sender's name for the map that is sliced, and the receiver's for the slice.
    rows : (int, int) or None
        Of the sender's map: first and one past the last; None for all of it.
    shape : (1, channels, rows, columns)
    """

    round: Position
    sender: Position
    receiver: Position
    source: Name
    name: Name
    rows: tuple[Position, Position] | None = None
    shape: tuple[Literal[1], Count, Count, Count]

    @property
    def n_bytes(self) -> int:
        """Payload, without the framing."""
        return 4 * math.prod(self.shape)

    def cut(self, source: np.ndarray) -> np.ndarray:
        """The slice of the sender's map: a view of it."""
        return source if self.rows is None else source[:, :, slice(*self.rows)]


class Segment(Section):
    """What a device computes between two rounds, an ONNX file: its inputs, outputs, cost and SHA-256."""

    inputs: list[Name]
    outputs: Annotated[list[Name], Field(min_length=1)]
    params: Total
    macs: Total
    sha256: Sha256


class Part(Section):
    """All that one device needs to know.

    Attributes
    ----------
    position, n_devices : int
    image : Image
        Whole, it is what each device starts from.
    columns : (int, int)
        Which of the network's features it answers with: first and one past the last, maybe none.
    segments : list of Segment or None
        None where it has nothing to compute.
    messages : list of Message
        All that it sends or receives, by round.
    """

    position: Position
    n_devices: Count
    image: Image
    columns: tuple[Position, Position]
    segments: Annotated[list[Segment | None], Field(min_length=1)]
    messages: list[Message]

    @property
    def name(self) -> str:
        """Of the device, also in its certificate."""
        return f"device-{self.position}"

    @property
    def n_features(self) -> int:
        return self.columns[1] - self.columns[0]

    @property
    def contract(self) -> Contract:
        """What passes between it and the coordinator."""
        return Contract(str(self.position), self.image.channels, self.image.size, self.n_features)

    @property
    def message_limit(self) -> int:
        """Bytes of the largest message that it sends or receives."""
        payload = max((message.n_bytes for message in self.messages), default=0)
        return max(MESSAGE_LIMIT, payload + ENVELOPE, self.contract.message_limit)

    @property
    def params(self) -> int:
        return sum(segment.params for segment in self.segments if segment)

    @property
    def macs(self) -> int:
        return sum(segment.macs for segment in self.segments if segment)

    def sent(self, round: int) -> list[Message]:
        return [m for m in self.messages if m.round == round and m.sender == self.position]

    def received(self, round: int) -> list[Message]:
        return [m for m in self.messages if m.round == round and m.receiver == self.position]


@dataclass(frozen=True)
class SplitPlan:
    """A network split over devices.

    Attributes
    ----------
    method : {"channels", "rows"}
    parts : list of Part
        By device.
    models : list of list of bytes or None
        The ONNX files of their segments.
    weight, bias : ndarray of shape (C, F) and (C,), float32
        Of the last linear layer, which the coordinator applies.
    scale : float
        What the devices' features, added up, are multiplied by before that.
    """

    method: Method
    parts: list[Part]
    models: list[list[bytes | None]]
    weight: np.ndarray
    bias: np.ndarray
    scale: float

    @property
    def n_devices(self) -> int:
        return len(self.parts)

    @property
    def rounds(self) -> int:
        """How many times the devices exchange slices for one image."""
        return len(self.parts[0].segments) - 1

    @property
    def messages(self) -> list[Message]:
        return sorted(
            (m for part in self.parts for m in part.messages if m.sender == part.position),
            key=lambda m: (m.round, m.sender, m.receiver),
        )

    def payload_bytes(self, sender: int | None = None) -> int:
        """Bytes that one device, or all, send the others for one image, framing aside."""
        return sum(m.n_bytes for m in self.messages if sender in (None, m.sender))

    def logits(self, features: Sequence[np.ndarray]) -> np.ndarray:
        """Logits (C,) from what the devices answer, each float32 of shape (F_d,)."""
        total = np.zeros(self.weight.shape[1], np.float32)
        for part, own in zip(self.parts, features, strict=True):
            total[slice(*part.columns)] += own
        return self.weight @ (total * np.float32(self.scale)) + self.bias

    def save(self, folder: Path) -> None:
        """Write the plan: ``plan.json``, the last layer, and a folder for each device with all that it needs.

        Raises
        ------
        UserError
            The folder is there and holds something else than a plan.
        """
        from safetensors.numpy import save

        if folder.exists() and not (folder / PLAN).is_file():
            raise UserError(f"{folder}: is there, and is no plan of a split network. Name a new folder.")

        with replacing(folder) as scratch:
            for part, models in zip(self.parts, self.models, strict=True):
                own = scratch / str(part.position)
                own.mkdir(parents=True)
                write_json(own / PART, part.model_dump(mode="json"))
                for index, model in enumerate(models):
                    if model is not None:
                        (own / f"{index}.onnx").write_bytes(model)
            final = save({"weight": self.weight, "bias": self.bias})
            (scratch / FINAL).write_bytes(final)
            parts = [_sha256((scratch / str(part.position) / PART).read_bytes()) for part in self.parts]
            content = PlanFile(method=self.method, scale=self.scale, parts=parts, final=_sha256(final))
            write_json(scratch / PLAN, content.model_dump())

    @classmethod
    def load(cls, folder: Path) -> SplitPlan:
        """Read a plan that `save` wrote, and check it.

        Raises
        ------
        UserError
        """
        from safetensors.numpy import load

        content = _read(folder / PLAN, PlanFile)
        parts, models = [], []
        for position, sha256 in enumerate(content.parts):
            read_verified(folder / str(position) / PART, sha256)
            part, own = load_part(folder / str(position))
            parts.append(part)
            models.append(own)
        final = load(read_verified(folder / FINAL, content.final))
        return cls(content.method, parts, models, final["weight"], final["bias"], content.scale)


class PlanFile(Section):
    """All of ``plan.json``: SHA-256 of the devices' parts and of the last layer."""

    method: Method
    scale: float
    parts: Annotated[list[Sha256], Field(min_length=1)]
    final: Sha256


def load_part(folder: Path) -> tuple[Part, list[bytes | None]]:
    """One device's part of a plan, and the ONNX files of its segments.

    Raises
    ------
    UserError
        Something is missing or not what was written.
    """
    part = _read(folder / PART, Part)
    models = [
        None if segment is None else read_verified(folder / f"{index}.onnx", segment.sha256)
        for index, segment in enumerate(part.segments)
    ]
    return part, models


def _read(path: Path, schema: type[Section]):
    if not path.is_file():
        raise UserError(f"{path}: no such file. {AGAIN}")
    try:
        return schema.model_validate(read_json(path))
    except (ValidationError, json.JSONDecodeError, UnicodeDecodeError) as error:
        what = error.errors()[0]["loc"] if isinstance(error, ValidationError) else error
        raise UserError(f"{path}: not a plan of a split network ({what}). {AGAIN}") from None


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


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
    """Classify an image with all devices in this process, one after another.

    Parameters
    ----------
    plan : SplitPlan
    image : ndarray of shape (channels, size, size), uint8
    sessions : list of Sessions, optional
        `open_sessions` of each device's models, for those who run more than one image.
    """
    sessions = sessions or [open_sessions(models) for models in plan.models]
    values: list[dict[str, np.ndarray]] = [{IMAGE: image[None]} for _ in plan.parts]
    seconds: list[list[float]] = [[] for _ in plan.parts]
    for index in range(plan.rounds + 1):
        for part, own, known, spent in zip(plan.parts, sessions, values, seconds, strict=True):
            start = time.thread_time()
            if segment := part.segments[index]:
                known |= run_segment(segment, own[index], known)
            spent.append(time.thread_time() - start if segment else 0.0)
        for part in plan.parts:
            for message in part.sent(index):
                sliced = message.cut(values[message.sender][message.source])
                values[message.receiver][message.name] = np.ascontiguousarray(sliced)
    none = np.zeros((1, 0), np.float32)
    return LocalRun(plan.logits([known.get(FEATURES, none)[0] for known in values]), seconds)
