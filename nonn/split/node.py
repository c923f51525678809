"""A device of a split network: computes its segments, and exchanges slices with its peers in between.

To the coordinator it is a node like any other: an image comes, features go back. In between it
sends slices of activation maps to the other devices and waits for theirs, round by round. All
sends of a round are under way at once, over connections that were opened beforehand. A device works
on one image at a time: a new image replaces an unfinished one. If a peer stays silent, the image
fails, and the answer names that peer.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
from collections.abc import AsyncIterator, Collection, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from grpc import StatusCode, aio
from tritonclient.grpc import service_pb2 as oip

from nonn.core.errors import UserError, one_line
from nonn.core.names import COORDINATOR
from nonn.core.progress import log
from nonn.runtime.addresses import canonical_address, is_loopback
from nonn.runtime.attached import announce, told_to_stop
from nonn.runtime.channel import MODEL_INFER, READY, open_channel, reason_of, wait_connected
from nonn.runtime.cluster import Node
from nonn.runtime.logs import relayed_stderr
from nonn.runtime.protocol import ProtocolError, make_response, read_request
from nonn.runtime.sensor import load_sensor
from nonn.runtime.serving import Service, listening
from nonn.runtime.serving_options import add_device, callers_from, identity_from
from nonn.runtime.tls import Identity, may_call
from nonn.split.exchange import EXCHANGE, Exchange, check_id, find_message, make_slice, read_slice
from nonn.split.plan import FEATURES, IMAGE, REWRITE_REMEDY, Message, load_part, open_sessions, run_segment

#: Seconds at the end of a call's time that a device keeps for saying which peers were silent.
REPORTING_S = 0.5
#: Seconds that a device works on an image whose caller sets no deadline.
DEFAULT_TIMEOUT_S = 60.0
#: Images for which slices are kept; more than one, because slices may arrive before their image.
KEPT_EXCHANGES = 4


#: Why an image fails when another comes before it is done.
SUPERSEDED = "a newer image has taken this one's place"


class SplitDevice:
    """One device's part of a plan, verified and warmed up; `sensor` as in `nonn.runtime.sensor`.

    Raises
    ------
    UserError
        The folder is damaged.
    """

    platform = "onnxruntime_onnx"
    is_ready = False  # true once it has reached all peers

    def __init__(self, folder: Path, sensor: Path | None = None):
        self.part, models = load_part(folder)
        contract = self.part.contract
        self.contract = replace(contract, sensor=load_sensor(sensor, contract.image_shape[1:]))
        try:
            self.sessions = open_sessions(models)
            self._warm_up()
        except Exception as error:  # ONNX Runtime has no common base of its errors
            raise UserError(f"{folder}: its segments do not run ({one_line(error)}). {REWRITE_REMEDY}") from error

    def _warm_up(self) -> None:
        """Run every segment on zeros, which also checks the tensors that are to be sent."""
        values = {IMAGE: np.zeros(self.contract.image_shape, np.uint8)}
        for index in range(len(self.sessions)):
            values |= self.compute(index, values)
            for message in self.part.sent(index):
                made = message.cut(values[message.source])
                if made.shape != message.shape or made.dtype != np.dtype(message.dtype):
                    raise ValueError(f"{message.name} is not of the shape {message.shape} and type {message.dtype}")
            values |= {m.name: np.zeros(m.shape, m.dtype) for m in self.part.received(index)}
        if self.features(values).shape != (1, self.contract.n_features):
            raise ValueError(f"its features are not {self.contract.n_features}")

    def compute(self, index: int, values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs of a segment from the tensors that the device has so far; none where it has no such segment."""
        segment = self.part.segments[index]
        return run_segment(segment, self.sessions[index], values) if segment else {}

    def features(self, values: dict[str, np.ndarray]) -> np.ndarray:
        """The features for the coordinator, float32 of shape (1, F_d)."""
        return values[FEATURES] if self.contract.n_features else np.zeros((1, 0), np.float32)


class Peer:
    """Another device, to which this one sends."""

    def __init__(self, name: str, channel: aio.Channel):
        self.name, self.channel = name, channel
        # No serialisers: slices are serialised once for all receivers, and answers are empty.
        self.send = channel.unary_unary(MODEL_INFER)


class SplitService(Service):
    """The calls that a device of a split network answers: those of a node, and its peers' slices.

    It sends to `peers`, by position. Images may come from `callers`, and slices only from the device that owns them.
    Without certificates `callers` is None, and any caller may send anything.
    """

    def __init__(self, device: SplitDevice, peers: dict[int, Peer], callers: Collection[str] | None):
        super().__init__(device)
        self.device, self.part, self.peers = device, device.part, peers
        self.callers = callers if callers is None else {name.encode() for name in callers}
        mine = self.part.position
        self.expected = {m.name: m for m in self.part.messages if m.receiver == mine}
        self.received = [self.part.received(index) for index in range(len(self.part.segments))]
        self.sent = [self._by_content(index) for index in range(len(self.part.segments))]
        self.exchanges: dict[str, Exchange] = {}
        self.running: Exchange | None = None
        self.sending: set[asyncio.Task] = set()
        self.connected = asyncio.Event()

    def _by_content(self, index: int) -> list[list[Message]]:
        """The messages after a segment, grouped by content: the same may go to several receivers."""
        groups: dict[tuple, list[Message]] = {}
        for message in self.part.sent(index):
            groups.setdefault((message.name, message.rows), []).append(message)
        return list(groups.values())

    async def connect(self) -> None:
        """Wait for the connections to all peers, however long it takes."""
        await asyncio.gather(*(wait_connected(peer.channel, (READY,)) for peer in self.peers.values()))
        self.device.is_ready = True
        self.connected.set()

    async def ModelInfer(self, request, context):
        try:
            if request.model_name == EXCHANGE:
                return self._receive(request, context)
            self._check_caller(context, self.callers)
            with self.meters.measuring():
                answer = await self._classify(request, context.time_remaining())
            self.meters.images += 1
            return answer
        except ProtocolError as refusal:
            await context.abort(refusal.code, str(refusal))

    def _check_caller(self, context: aio.ServicerContext, names: Collection[bytes] | None) -> None:
        if self.callers is not None and not may_call(context, names or ()):
            raise ProtocolError(StatusCode.PERMISSION_DENIED, "this certificate's name may not send that")

    def _receive(self, request, context) -> oip.ModelInferResponse:
        message = find_message(self.expected, self.part.version, request)
        self._check_caller(context, {f"device-{message.sender}".encode()})
        values = read_slice(message, request)
        self._exchange_of(request.id).put(message.name, values)
        return oip.ModelInferResponse()

    def _exchange_of(self, image_id: str) -> Exchange:
        if image_id not in self.exchanges:
            self.exchanges[image_id] = Exchange()
            waiting = [key for key, exchange in self.exchanges.items() if exchange is not self.running]
            for key in waiting[:-KEPT_EXCHANGES]:
                del self.exchanges[key]
        return self.exchanges[image_id]

    async def _classify(self, request, seconds: float | None) -> oip.ModelInferResponse:
        image = read_request(self.contract, request)
        check_id(request)
        timeout = DEFAULT_TIMEOUT_S if seconds is None else max(seconds - REPORTING_S, seconds / 2)
        if self.running:
            if self.running is self.exchanges.get(request.id):  # both would take the same slices
                raise ProtocolError(StatusCode.ALREADY_EXISTS, "an image of this id is under way; give each its own id")
            self.running.fail(ProtocolError(StatusCode.ABORTED, SUPERSEDED))
        exchange = self.running = self._exchange_of(request.id)
        try:
            async with asyncio.timeout(timeout) as waiting:
                features = await self._run(image, request.id, exchange, waiting)
        except TimeoutError:
            first = exchange.missing[0] if exchange.missing else None
            silent = ", ".join(sorted({f"device-{message.sender}" for message in exchange.missing}))
            why = f"round {first.round}: nothing from {silent} by the deadline" if first else "not done by the deadline"
            raise ProtocolError(StatusCode.UNAVAILABLE, why) from None
        finally:
            if self.running is exchange:
                self.running = None
            if self.exchanges.get(request.id) is exchange:
                del self.exchanges[request.id]
        return make_response(self.device.contract, request.id, features)

    async def _run(self, image: np.ndarray, image_id: str, exchange: Exchange, waiting: asyncio.Timeout) -> np.ndarray:
        """Features of an image, by way of all rounds.

        Segments run in the event loop: a thread would gain nothing, since the device waits for either
        messages or results, and would cost two changes of thread a round.
        """
        values, deadline = {IMAGE: image}, waiting.when()
        assert deadline is not None  # of a timeout of some seconds
        for index, expected in enumerate(self.received):
            try:
                values |= self.device.compute(index, values)
            except Exception as error:
                log(f"model {self.contract.model}, segment {index}: {error}")
                raise ProtocolError(StatusCode.INTERNAL, "a segment failed; see the device's log") from error
            self._send(index, values, image_id, exchange, deadline)
            if index < len(self.received) - 1:
                values |= await exchange.take(expected)
        features = self.device.features(values)
        if not np.isfinite(features).all():
            raise ProtocolError(StatusCode.INTERNAL, "the device's features are not finite")
        return features

    def _send(self, index: int, values: dict, image_id: str, exchange: Exchange, deadline: float) -> None:
        """Start to send this device's slices of a round."""
        if not self.sent[index]:
            return
        seconds = max(deadline - asyncio.get_running_loop().time(), 0)
        calls = []
        for messages in self.sent[index]:
            content = make_slice(messages[0], image_id, self.part.version, values[messages[0].source])
            for message in messages:
                peer = self.peers[message.receiver]
                calls.append((peer, peer.send(content, timeout=seconds)))
        task = asyncio.create_task(self._watch(index, calls, exchange))
        self.sending.add(task)
        task.add_done_callback(self.sending.discard)

    async def _watch(self, index: int, calls: list[tuple[Peer, aio.UnaryUnaryCall]], exchange: Exchange) -> None:
        """Fail the image on the first slice that a peer does not take; one task watches all sends of a round."""
        ended: asyncio.Queue[tuple[Peer, aio.UnaryUnaryCall]] = asyncio.Queue()
        for peer, call in calls:
            call.add_done_callback(partial(lambda peer, call: ended.put_nowait((peer, call)), peer))
        for _ in calls:
            peer, call = await ended.get()
            try:
                await call
            except aio.AioRpcError as error:
                why = f"round {index}: {peer.name}: {reason_of(error)}"
                exchange.fail(ProtocolError(StatusCode.UNAVAILABLE, why))


def devices_at(addresses: Sequence[str]) -> list[Node]:
    """The devices of a split network, by position."""
    return [Node(name=f"device-{i}", address=address, model=str(i)) for i, address in enumerate(addresses)]


@contextlib.asynccontextmanager
async def serving(
    device: SplitDevice,
    addresses: Sequence[str],
    identity: Identity | None = None,
    allowed: Collection[str] = (COORDINATOR,),
) -> AsyncIterator[tuple[int, SplitService]]:
    """Serve a device's part while the block runs, on its own address of these; yield its port and the service.

    Raises
    ------
    UserError
        As of `nonn.runtime.serving.listening`, or the addresses do not fit the plan.
    """
    part = device.part
    if len(addresses) != part.n_devices:
        raise UserError(f"--devices: the plan is for {part.n_devices} devices, not {len(addresses)}")
    try:
        outside = [address for address in addresses if not is_loopback(address)]
    except ValueError as error:
        raise UserError(f"--devices: {error}") from None
    places = [canonical_address(address) for address in addresses]
    if twice := [address for address, place in zip(addresses, places, strict=True) if places.count(place) > 1]:
        raise UserError(f"--devices: {twice[0]} is named twice; each device has an address of its own")
    nodes = devices_at(addresses)
    if identity is None and outside:
        raise UserError(f"{outside[0]}: plain text is for loopback addresses only. Give --cert, --key and --ca.")
    async with contextlib.AsyncExitStack() as stack:
        peers = {}
        for position in sorted({m.receiver for m in part.messages if m.sender == part.position}):
            channel = await stack.enter_async_context(open_channel(nodes[position], part.message_limit, identity))
            peers[position] = Peer(nodes[position].name, channel)
        service = SplitService(device, peers, allowed if identity else None)
        names = {*allowed, *(node.name for node in nodes)}
        address = nodes[part.position].address
        port = await stack.enter_async_context(listening(service, address, part.message_limit, identity, names))
        connecting = asyncio.create_task(service.connect())
        try:
            yield port, service
        finally:
            tasks = [connecting, *service.sending]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def serve(
    device: SplitDevice, addresses: Sequence[str], identity: Identity | None, allowed: Collection[str], attached: bool
) -> None:
    """Serve until SIGINT or SIGTERM, or, if `attached`, until standard input closes."""
    stopped = told_to_stop(attached)
    async with serving(device, addresses, identity, allowed) as (port, service):
        what, names = f"model {device.contract.model}", ", ".join(peer.name for peer in service.peers.values())
        log(f"{what}: connecting to {names or 'nobody'}")
        connected = asyncio.create_task(service.connected.wait())
        address = addresses[device.part.position]

        def say_so(task: asyncio.Task) -> None:
            if not task.cancelled():
                announce(what, address, port, identity is not None)

        connected.add_done_callback(say_so)
        await stopped.wait()
        connected.cancel()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "part", type=Path, metavar="FOLDER/POSITION", help="a device's folder of a plan that `nonn split` wrote"
    )
    parser.add_argument(
        "--devices",
        nargs="+",
        required=True,
        metavar="HOST:PORT",
        help="addresses of all devices, in order; this one listens on its own",
    )
    add_device(parser)
    parser.epilog = "example: nonn split-node plan/0 --devices 127.0.0.1:7100 127.0.0.1:7101 --insecure"


def run(options: argparse.Namespace) -> None:
    """The command ``nonn split-node``."""
    identity = identity_from(options)
    device, allowed = SplitDevice(options.part, options.sensor), callers_from(options, identity)
    with relayed_stderr():
        asyncio.run(serve(device, options.devices, identity, allowed, options.attached))
