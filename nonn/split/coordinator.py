"""The coordinator of a split network, and the commands of its devices.

Unlike a NoNN, a split network needs every device for every image: if one is missing there is no
answer at all, only an error that says which.
"""

from __future__ import annotations

import asyncio
import itertools
import secrets
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType

import numpy as np
from google.protobuf.message import DecodeError
from grpc import StatusCode, aio
from tritonclient.grpc.service_pb2 import ModelInferRequest, ModelInferResponse

from nonn.core.errors import UserError
from nonn.runtime.channel import LATE, MODEL_INFER, open_channel, reason_of, settle_all
from nonn.runtime.cluster import COORDINATOR, LONGEST_DEADLINE_MS, Node
from nonn.runtime.processes import nonn_command
from nonn.runtime.protocol import ProtocolError, make_request, read_response
from nonn.runtime.tls import Identity
from nonn.split.node import REPORTING, devices_at
from nonn.split.plan import Part, SplitPlan


class SplitFailedError(UserError):
    """An image without an answer: a device is missing, late or has failed."""


class SplitCoordinator:
    """Classifies images with the devices of a split network; use it in ``async with``.

    Parameters
    ----------
    plan : SplitPlan
    addresses : sequence of str
        ``host:port`` of the devices, by position.
    deadline_ms : float
        Of an image.
    identity : Identity, optional
        The coordinator's, for mutual TLS; without it plain text.

    Raises
    ------
    UserError
        There are not as many addresses as devices, or the deadline is impossible.
    """

    def __init__(self, plan: SplitPlan, addresses: Sequence[str], deadline_ms: float, identity: Identity | None = None):
        if len(addresses) != plan.n_devices:
            raise UserError(f"the plan is for {plan.n_devices} devices, not {len(addresses)}")
        if not 0 < deadline_ms <= LONGEST_DEADLINE_MS:
            raise UserError(f"a deadline of {deadline_ms:g} ms is not in reach; give up to {LONGEST_DEADLINE_MS}")
        self.plan, self.nodes, self.identity = plan, devices_at(addresses), identity
        self.patience = deadline_ms / 1000
        self._channels: list[aio.Channel] = []
        self._calls: list[aio.UnaryUnaryMultiCallable] = []
        # Unique, since devices keep what arrives for an image before the image itself.
        self._ids = (f"{secrets.token_hex(6)}-{count}" for count in itertools.count())
        self._one_at_a_time = asyncio.Lock()

    async def __aenter__(self) -> SplitCoordinator:
        for node, part in zip(self.nodes, self.plan.parts, strict=True):
            self._channels.append(open_channel(node, part.message_limit, self.identity))
        # Bytes, not messages, come back: gRPC would raise whatever a message that is none raises.
        self._calls = [c.unary_unary(MODEL_INFER, ModelInferRequest.SerializeToString) for c in self._channels]
        await settle_all(self._channels)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.gather(*(channel.close() for channel in self._channels))
        self._channels, self._calls = [], []

    async def classify(self, image: np.ndarray | np.integer) -> np.ndarray:
        """Logits (C,) of an image, uint8 of shape (channels, size, size), or the one of a number, by the deadline.

        A number is for devices with sensors of their own; see `nonn.runtime.sensor`.

        Raises
        ------
        SplitFailedError
            Names the devices that did not answer, or what those that did complain of.
        ValueError
            The image is of another type or shape.
        """
        shape = self.plan.parts[0].contract.image_shape[1:]
        if not isinstance(image, np.integer) and (image.dtype != np.uint8 or image.shape != shape):
            raise ValueError(f"expected an image of uint8 {shape}, not of {image.dtype} {image.shape}")
        async with self._one_at_a_time:
            return self.plan.logits(await self._collect(image))

    async def _collect(self, image: np.ndarray) -> list[np.ndarray]:
        """Features of all devices, each of shape (F_d,)."""
        image_id = next(self._ids)
        calls = [
            asyncio.create_task(self._ask(part, call, image, image_id))
            for part, call in zip(self.plan.parts, self._calls, strict=True)
        ]
        try:
            # A device that has failed has failed the image: the others need not be waited for.
            _, late = await asyncio.wait(calls, timeout=self.patience, return_when=asyncio.FIRST_EXCEPTION)
            failed = any(call.done() and call.exception() for call in calls)
            if not late and not failed:
                return [call.result() for call in calls]
            if not failed:
                await asyncio.wait(late, timeout=REPORTING)  # now they say whom they have waited for
            reasons = {
                node.name: reason_of(call.exception()) if call.done() and call.exception() else LATE
                for node, call in zip(self.nodes, calls, strict=True)
                if (call in late and not failed) or (call.done() and call.exception())
            }
        finally:
            for call in calls:
                call.cancel()  # of those that are done nothing changes
        # First those that said nothing: the others may only have waited for them.
        names = sorted(reasons, key=lambda name: reasons[name] != LATE)
        complaints = "; ".join(f"{name}: {reasons[name]}" for name in names)
        raise SplitFailedError(f"no class ({complaints}). A split network needs all its devices: start them again.")

    async def _ask(self, part: Part, call: aio.UnaryUnaryMultiCallable, image: np.ndarray, image_id: str) -> np.ndarray:
        request = make_request(part.contract, image)
        request.id = image_id
        content = await call(request, timeout=self.patience + REPORTING)
        try:
            response = ModelInferResponse.FromString(content)
        except DecodeError:
            raise ProtocolError(StatusCode.INTERNAL, "the answer is no message of the protocol") from None
        return read_response(part.contract, response)


def device_commands(
    folder: Path,
    addresses: Sequence[str],
    certificates: Path | None = None,
    prefixes: Iterable[Sequence[str]] = (),
    sensor: Path | None = None,
) -> dict[Node, list[str]]:
    """What serves each device of a plan, for `nonn.runtime.processes.running`; ready when they have reached each other.

    Parameters
    ----------
    folder : Path
        Of a plan that `SplitPlan.save` wrote.
    addresses : sequence of str
        ``host:port`` of the devices, by position.
    certificates : Path, optional
        A folder of `nonn certs` with those of the coordinator and of ``device-<position>``; without
        it plain text.
    prefixes : iterable of sequence of str
        What each device's command is run behind, for example ``ip netns exec NAME``.
    sensor : Path, optional
        A file of images that stands for the camera of each device.
    """
    commands = {}
    for node, prefix in itertools.zip_longest(devices_at(addresses), prefixes, fillvalue=()):
        arguments = ("split-node", str(folder / node.model), "--devices", *addresses)
        identity = Identity.of(node.name, certificates) if certificates else None
        commands[node] = [*prefix, *nonn_command(*arguments, identity=identity, caller=COORDINATOR, sensor=sensor)]
    return commands
