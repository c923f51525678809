"""The coordinator: queries all nodes at once, waits no longer than the deadline, and says which ones answered.

Each image has one absolute deadline. A node that has not answered by then is cancelled and counts as
absent, like one that refuses, fails, or sends anything but the agreed feature vector; the final layer
works with whichever students are left. When a node is absent several times in a row its circuit breaker
opens: it gets no more images, so it costs them no time. It is probed in the background, and rejoins by
itself.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from google.protobuf.message import DecodeError
from grpc import StatusCode, aio
from tritonclient.grpc.service_pb2 import ModelInferRequest, ModelInferResponse

from nonn.core.errors import UserError
from nonn.core.progress import log
from nonn.runtime.admission import MAX_RETRY_S
from nonn.runtime.batches import Batches
from nonn.runtime.channel import (
    ATTEMPT_TIMEOUT_S,
    LATE,
    MODEL_INFER,
    READY,
    STATED,
    busy_seconds,
    open_channel,
    reason_of,
    received,
    wait_all_connected,
)
from nonn.runtime.cluster import Cluster, Node
from nonn.runtime.final import FinalLayer, Prediction, predict
from nonn.runtime.protocol import Contract, ProtocolError, check_image, make_request, read_response
from nonn.runtime.tls import log_former

#: Absences in a row after which a node's circuit breaker opens.
TOLERATED_FAILURES = 3
#: Seconds between probes of a node whose circuit is open: doubled from the first to the longest.
FIRST_PAUSE_S, MAX_PAUSE_S = 0.1, 2.0
#: Seconds between two looks at connections and certificates, and longest pause between attempts to use new ones.
POLL_S, MAX_RENEWAL_PAUSE_S = 1.0, 60.0
#: A deadline is short if it is less than this share of the cluster's: a node that misses it may still be sound.
SHORT_DEADLINE_SHARE = 0.8


#: What a user can do about nodes that do not answer.
REMEDY = "Look at them with `nonn health`, and start those that do not run with `nonn up` or `nonn node`."


class NobodyAnsweredError(UserError):
    """No node has answered."""


class BusyError(NobodyAnsweredError):
    """No node has answered, and at least one was busy; after some seconds it may be asked again."""

    def __init__(self, message: str, seconds: float):
        super().__init__(message)
        self.seconds = seconds


@dataclass(frozen=True)
class Answer:
    """A prediction, and the nodes that took part in it."""

    prediction: Prediction  # its shares are those of the nodes present, in their order
    features: dict[str, np.ndarray]  # (F_i,), float32, of the nodes that took part, by name
    absent: dict[str, str]  # why each of the others did not
    busy: bool = False  # whether an absent node was busy

    @property
    def present(self) -> list[str]:
        """Names of the nodes that took part."""
        return list(self.features)


class NodeConnection:
    """One node as the coordinator sees it, with its circuit breaker."""

    def __init__(self, node: Node, contract: Contract, channel: aio.Channel, timeout: float):
        self.node, self.name, self.contract = node, node.name, contract
        self.timeout = timeout
        self.failures, self.pause = 0, FIRST_PAUSE_S
        self.failed_at = float("-inf")  # by the event loop's time: the last failure that counted
        self.late_under_short_deadline = 0  # images in a row
        self.reason = ""
        self.latency_ms: float | None = None  # of the last answer, there and back
        self.probing: asyncio.Task | None = None
        self.single_probe: asyncio.Task | None = None
        self.batches = Batches(self._timed_infer, contract.largest_batch, self.name)
        self.use(channel)

    def use(self, channel: aio.Channel) -> None:
        """Send later requests over this channel."""
        self.channel = channel
        self.batches.largest = self.contract.largest_batch  # another server may answer there now
        # Answers come back as bytes: gRPC would raise all kinds of errors for what is no message.
        self._call = channel.unary_unary(MODEL_INFER, ModelInferRequest.SerializeToString)

    @property
    def breaker_is_open(self) -> bool:
        """Whether the breaker keeps requests from the node."""
        return self.probing is not None

    async def infer(self, image: np.ndarray | np.integer, timeout: float, image_id: str = "") -> np.ndarray:
        """Features (F_i,) of an image, or (k, F_i) of k, within `timeout` seconds.

        Raises
        ------
        aio.AioRpcError, ProtocolError
            The node does not answer, refuses, or sends something else.
        """
        start, request = time.perf_counter(), make_request(self.contract, image)
        request.id = image_id
        timeout = max(timeout, 0)
        content = await self._call(request, timeout=timeout, metadata=((STATED, f"{1000 * timeout:.3f}"),))
        try:
            response = ModelInferResponse.FromString(received(content))
        except DecodeError:
            raise ProtocolError(StatusCode.INTERNAL, "the answer is no message of the protocol") from None
        features = read_response(self.contract, response, n_images=image.shape[0] if image.ndim == 4 else 1)
        self.latency_ms = (time.perf_counter() - start) * 1000
        return features

    async def infer_batched(self, image: np.ndarray | np.integer, deadline: float) -> np.ndarray:
        """Like `_infer_with_retry`, of one image, which shares a message with others that wait for the node."""
        if isinstance(image, np.integer):
            return await self._infer_with_retry(image, deadline)
        return await self.batches.infer(image, deadline)

    async def _timed_infer(self, images: np.ndarray, deadline: float) -> tuple[np.ndarray, float]:
        """Like `_infer_with_retry`, and the seconds that the last attempt took."""
        features = await self._infer_with_retry(images, deadline)
        assert self.latency_ms is not None
        return features, self.latency_ms / 1000

    async def _infer_with_retry(self, image: np.ndarray | np.integer, deadline: float) -> np.ndarray:
        """Like `infer`, with an absolute deadline (event-loop time).

        Retries once if the node is busy and its retry time is before the deadline.
        """
        loop = asyncio.get_running_loop()
        try:
            return await self.infer(image, deadline - loop.time())
        except aio.AioRpcError as error:
            pause = busy_seconds(error)
            if pause is None or pause >= MAX_RETRY_S or loop.time() + 2 * pause > deadline:
                raise
        await asyncio.sleep(pause)
        return await self.infer(image, deadline - loop.time())

    def succeeded(self) -> None:
        self.failures, self.late_under_short_deadline, self.pause = 0, 0, FIRST_PAUSE_S
        if self.probing:
            self.probing.cancel()
            self.probing = None

    def failed(self, reason: str, began: float = math.inf) -> None:
        """Count a failure of an image that was sent at `began` (event-loop time).

        Images that were already under way when the last failure was counted belong to that failure.
        """
        self.reason = reason
        if began < self.failed_at:
            return
        self.failures, self.failed_at = self.failures + 1, asyncio.get_running_loop().time()
        if self.failures >= TOLERATED_FAILURES and not self.breaker_is_open:
            self.probing = asyncio.create_task(self._probe())

    def open_breaker(self, reason: str) -> None:
        """Ask the node for nothing until it has answered a probe."""
        self.failures = TOLERATED_FAILURES
        self.failed(reason)

    def reset(self) -> None:
        """Forget the failures so far."""
        self.failures = 0

    def missed_short_deadline(self) -> None:
        """Count an image whose deadline was short. After several in a row, find out whether the node hangs."""
        self.late_under_short_deadline += 1
        if self.late_under_short_deadline >= TOLERATED_FAILURES and not self.single_probe:
            self.single_probe = asyncio.create_task(self._probe_once())

    async def _probe_once(self) -> None:
        """Ask for the features of a black image within the full timeout; requests go on meanwhile."""
        began = asyncio.get_running_loop().time()
        try:
            await self.infer(self._blank, self.timeout)
        except Exception as error:  # whatever it is, as in `_probe`
            if busy_seconds(error) is None:
                self.failed(reason_of(error), began)
        finally:  # also if the channel is replaced meanwhile
            self.late_under_short_deadline, self.single_probe = 0, None

    @property
    def _blank(self) -> np.ndarray:
        return np.zeros(self.contract.image_shape[1:], np.uint8)

    async def _probe(self) -> None:
        """Ask for the features of a black image until they come; then let requests through again.

        The node is on probation until it has answered a request: until then a single failure opens
        the breaker again, and the pauses go on growing.
        """
        while True:
            await asyncio.sleep(self.pause)
            self.pause = min(2 * self.pause, MAX_PAUSE_S)
            try:
                await self.infer(self._blank, self.timeout)
            except Exception as error:  # whatever it is: without a probe the node would be cut off for ever
                self.reason = reason_of(error)
                if busy_seconds(error) is None:
                    continue
            except asyncio.CancelledError:
                task = asyncio.current_task()
                if task and task.cancelling():
                    raise
                continue  # the channel was replaced meanwhile
            self.failures, self.probing = TOLERATED_FAILURES - 1, None
            self.batches.largest = self.contract.largest_batch
            return

    async def close(self) -> None:
        for task in (self.probing, self.single_probe):
            if task:
                task.cancel()
        self.batches.close()
        await self.channel.close()


class Coordinator:
    """Classifies images with the nodes of a cluster, which must fit its export; use it in ``async with``."""

    def __init__(self, cluster: Cluster):
        self.cluster = cluster
        self.manifest, self.placed = cluster.placed()
        self.final = FinalLayer.load(cluster.export, self.manifest)
        self.identity = cluster.own_identity
        self.connections: list[NodeConnection] = []
        self.timeout = cluster.deadline_ms / 1000
        self._attending: asyncio.Task | None = None

    @property
    def timeout(self) -> float:
        """Seconds that a node has for an image, or for a probe; may be changed at any time."""
        return self._timeout

    @timeout.setter
    def timeout(self, seconds: float) -> None:
        self._timeout = seconds
        for connection in self.connections:
            connection.timeout = seconds

    async def __aenter__(self) -> Coordinator:
        stamp = self.identity.stamp() if self.identity else None
        for node, _, contract in self.placed:
            channel = open_channel(node, contract.message_limit, self.identity)
            self.connections.append(NodeConnection(node, contract, channel, self.timeout))
        await wait_all_connected(connection.channel for connection in self.connections)
        self._attending = asyncio.create_task(self._attend(stamp))
        return self

    async def _attend(self, stamp: tuple | None) -> None:
        """Keep all nodes connected, since a handshake may outlast a deadline, and use the newest certificates."""
        loop = asyncio.get_running_loop()
        former: list[NodeConnection] = []  # those that still use the former certificates
        reported, pause, next_attempt = "", 0.0, 0.0
        while True:
            await asyncio.sleep(POLL_S)
            if self.identity and (newest := self.identity.stamp()) != stamp:
                stamp, former, reported, pause, next_attempt = newest, self.connections, "", POLL_S, 0.0
            if former and loop.time() >= next_attempt:
                try:
                    former = await self._reopen(former)
                    names = ", ".join(connection.name for connection in former)
                    if names not in ("", reported):
                        problem = "not to be reached with the new certificates so far"
                        log(f"{names}: {problem}. Those from before stay in use.")
                    reported = names
                except Exception as error:  # whatever it is: connections have to be kept
                    log_former(error)
                next_attempt, pause = loop.time() + pause, min(2 * pause, MAX_RENEWAL_PAUSE_S)
            for connection in self.connections:
                connection.channel.get_state(try_to_connect=True)

    async def _reopen(self, connections: list[NodeConnection]) -> list[NodeConnection]:
        """Replace channels; return the connections that keep theirs, since it works and the new one does not.

        Calls that are under way end on the channel on which they began.
        """
        opened = [open_channel(c.node, c.contract.message_limit, self.identity) for c in connections]
        works = [connection.channel.get_state() == READY for connection in connections]
        await wait_all_connected(
            (channel for channel, waits in zip(opened, works, strict=True) if waits), ATTEMPT_TIMEOUT_S
        )
        kept, closed = [], []
        for connection, channel in zip(connections, opened, strict=True):
            if connection.channel.get_state() == READY != channel.get_state():
                kept.append(connection)
                closed.append(channel)
            else:
                closed.append(connection.channel)
                connection.use(channel)
        await asyncio.gather(*(channel.close(self.timeout) for channel in closed))
        return kept

    async def __aexit__(self, *_: object) -> None:
        if self._attending:
            self._attending.cancel()
            await asyncio.gather(self._attending, return_exceptions=True)
        await asyncio.gather(*(connection.close() for connection in self.connections))
        self.connections = []

    async def classify(self, image: np.ndarray | np.integer, seconds: float | None = None) -> Answer:
        """Classify an image, uint8 (channels, size, size), or the sensor image with that index, by the deadline.

        An index is for nodes with sensors of their own; see `nonn.runtime.sensor`. `seconds` sets a deadline that is
        earlier than the cluster's. If it is short, see `SHORT_DEADLINE_SHARE`, nodes that miss it are absent, but that
        counts as a failure only if they do not answer within the cluster's deadline either.

        Raises
        ------
        NobodyAnsweredError
        ValueError
            The image is of another type or shape.
        """
        check_image(self.connections[0].contract, image)
        features, absent, busy = await self._collect(image, seconds)
        if not features:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in absent.items())
            if busy:
                raise BusyError(f"no node has time ({reasons}). Ask less often.", max(busy.values()))
            raise NobodyAnsweredError(f"no node answered ({reasons}). {REMEDY}")
        prediction = predict(self.manifest, self.final, features)
        present = {self.connections[i].name: feature for i, feature in features.items()}
        return Answer(prediction, present, absent, bool(busy))

    async def _collect(
        self, image: np.ndarray | np.integer, seconds: float | None
    ) -> tuple[Mapping[int, np.ndarray], dict[str, str], dict[str, float]]:
        """Features by position of the nodes that answer in time, why the others do not, and how long which are busy."""
        loop = asyncio.get_running_loop()
        timeout = self.timeout if seconds is None else min(seconds, self.timeout)
        is_short, start = timeout < SHORT_DEADLINE_SHARE * self.timeout, loop.time()
        deadline = start + timeout
        # When all circuits are open, there is nothing to lose by asking the nodes all the same.
        all_open = all(connection.breaker_is_open for connection in self.connections)
        calls = {
            position: loop.create_task(connection.infer_batched(image, deadline))
            for position, connection in enumerate(self.connections)
            if all_open or not connection.breaker_is_open
        }
        try:
            await asyncio.wait(calls.values(), timeout=deadline - loop.time())
        finally:
            for pending in calls.values():
                pending.cancel()  # no effect on those that are done
        features, absent, busy = {}, {}, {}
        for position, connection in enumerate(self.connections):
            call = calls.get(position)
            if call is None:
                absent[connection.name] = (
                    f"circuit open after {TOLERATED_FAILURES} failures in a row ({connection.reason})"
                )
                continue
            is_late = not call.done() or call.cancelled()
            error = None if is_late else call.exception()
            if not is_late and not error:
                features[position] = call.result()
                connection.succeeded()
                continue
            absent[connection.name] = reason = reason_of(error) if error else LATE
            if error and (pause := busy_seconds(error)) is not None:
                busy[connection.name] = pause  # a busy node is not a failed one
            elif is_short and reason == LATE:
                connection.missed_short_deadline()
            else:
                connection.failed(reason, start)
        return features, absent, busy


async def classify_once(cluster: Cluster, image: np.ndarray) -> Answer:
    """Classify a single image: connect, ask, disconnect."""
    async with Coordinator(cluster) as coordinator:
        return await coordinator.classify(image)
