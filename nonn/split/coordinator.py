"""Running a split network: its coordinator, and all its devices as processes of this machine.

Unlike a NoNN, a split network needs every device for every image: if one is missing there is no
answer at all, only an error that says which.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import secrets
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from types import TracebackType

import numpy as np
from google.protobuf.message import DecodeError
from grpc import StatusCode, aio
from tritonclient.grpc.service_pb2 import ModelInferRequest, ModelInferResponse

from nonn.core.errors import UserError
from nonn.runtime.channel import MODEL_INFER, open_channel, reason_of, settle_all
from nonn.runtime.cluster import COORDINATOR, LONGEST_DEADLINE_MS
from nonn.runtime.processes import Child, spawn, stop
from nonn.runtime.protocol import ProtocolError, make_request, read_response
from nonn.runtime.tls import Identity
from nonn.split.node import REPORTING, devices_at
from nonn.split.plan import Part, SplitPlan, load_part

#: Seconds that a device may take until it has loaded its part and reached its peers.
START_TIMEOUT = 60.0
LATE = "no answer by the deadline"


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


async def start_devices(
    folder: Path,
    addresses: Sequence[str],
    certificates: Path | None = None,
    prefixes: Sequence[Sequence[str]] | None = None,
    sensor: Path | None = None,
) -> list[Child]:
    """Start all devices of a plan as child processes, and wait until they have reached each other.

    They end with this process however it ends, as those of `nonn up` do.

    Parameters
    ----------
    folder : Path
        Of a plan that `SplitPlan.save` wrote.
    addresses : sequence of str
        ``host:port`` of the devices, by position.
    certificates : Path, optional
        A folder of `nonn certs` with those of the coordinator and of ``device-<position>``; without
        it plain text.
    prefixes : sequence of sequence of str, optional
        What each device's command is run behind, for example ``ip netns exec NAME``.
    sensor : Path, optional
        A file of images that stands for the camera of each device.

    Raises
    ------
    UserError
        A device has exited or is not ready in time; none is left behind.
    """
    children: list[Child] = []
    prefixes = prefixes or [()] * len(addresses)
    try:
        for node, prefix in zip(devices_at(addresses), prefixes, strict=True):
            part, _ = load_part(folder / node.model)
            arguments = ["split-node", str(folder / node.model), "--devices", *addresses, "--attached"]
            if certificates:
                own = Identity.of(node.name, certificates)
                arguments += ["--cert", str(own.certificate), "--key", str(own.key), "--ca", str(own.ca)]
                arguments += ["--allow", COORDINATOR]
            else:
                arguments.append("--insecure")
            if sensor:
                arguments += ["--sensor", str(sensor)]
            children.append(await spawn(node, part.contract, arguments, prefix))
        async with asyncio.timeout(START_TIMEOUT):
            await asyncio.gather(*(_ready(child) for child in children))
    except BaseException as error:
        await stop_devices(children)
        if isinstance(error, TimeoutError):
            said = "; ".join(f"{child.node.name}: {child.said or 'nothing said'}" for child in children)
            raise UserError(f"the devices did not get ready in {START_TIMEOUT:g} s ({said})") from None
        raise
    return children


async def _ready(child: Child) -> None:
    while not child.said.startswith("ready: "):
        if child.has_exited:
            await child.listener  # its last words may still be on their way
            raise UserError(f"{child.node.name} did not start: {child.said}")
        await asyncio.sleep(0.02)


async def stop_devices(children: Sequence[Child]) -> None:
    """End the processes that `start_devices` started."""
    await asyncio.gather(*(stop(child) for child in children))


@contextlib.asynccontextmanager
async def running_devices(
    folder: Path,
    addresses: Sequence[str],
    certificates: Path | None = None,
    prefixes: Sequence[Sequence[str]] | None = None,
    sensor: Path | None = None,
) -> AsyncIterator[list[Child]]:
    """Run all devices of a plan while the block runs; parameters are those of `start_devices`."""
    children = await start_devices(folder, addresses, certificates, prefixes, sensor)
    try:
        yield children
    finally:
        await stop_devices(children)
