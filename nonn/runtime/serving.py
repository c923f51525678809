"""A server of the Open Inference Protocol v2 over gRPC, for a node's student or a coordinator's network.

Every request is checked before it reaches the model. There is no call that loads, unloads or shares
memory. What is served is a `Model`; who may call it is up to `nonn.runtime.tls`.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import signal
import sys
import time
from collections.abc import AsyncIterator, Collection
from typing import Any, Protocol

import numpy as np
from grpc import aio
from grpc_health.v1 import health, health_pb2_grpc
from prometheus_client import CollectorRegistry, Counter, Histogram, start_http_server
from tritonclient.grpc import service_pb2 as oip
from tritonclient.grpc import service_pb2_grpc as oip_grpc

import nonn
from nonn.core.errors import UserError
from nonn.core.progress import log
from nonn.runtime.protocol import INPUT, VERSION, ImageContract, ProtocolError, check_model, read_request
from nonn.runtime.tls import Guard, Identity, is_loopback, split_address

#: Calls that may wait or run at once; more are refused as RESOURCE_EXHAUSTED.
CONCURRENT_CALLS = 64
#: Of one connection; beyond it gRPC resets streams without a word, so it is the wider limit.
CONCURRENT_STREAMS = 256
#: Seconds that calls under way have left when the server is told to stop.
GRACE = 1.0
#: Of Linux's prctl(2).
PR_SET_PDEATHSIG = 1
#: Bounds of the latency histogram in seconds: microcontroller to overloaded board.
BUCKETS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2)


class Model(Protocol):
    """What a server answers with."""

    @property
    def contract(self) -> ImageContract: ...

    @property
    def platform(self) -> str:
        """For the metadata: what runs it."""

    @property
    def is_ready(self) -> bool:
        """Whether a request has a chance."""

    async def infer(
        self, request: oip.ModelInferRequest, image: np.ndarray, seconds: float | None
    ) -> oip.ModelInferResponse:
        """Answer a request whose image, uint8 of shape (1, channels, size, size), has been checked.

        `seconds` are left until the caller gives up; None if it waits for ever. A refusal is a `ProtocolError`.
        """


class Meters:
    """What a server counts, for Prometheus and for the statistics call of the protocol."""

    def __init__(self, model: str):
        self.registry = CollectorRegistry()
        common: dict[str, Any] = {"labelnames": ["model"], "registry": self.registry}
        self.requests = Counter("nonn_requests", "Inference requests.", **common).labels(model)
        self.failures = Counter("nonn_failures", "Requests that were refused or failed.", **common).labels(model)
        latency = Histogram("nonn_request_seconds", "From request read to answer.", buckets=BUCKETS, **common)
        self.latency = latency.labels(model)
        self.statistics = oip.InferStatistics()

    @contextlib.contextmanager
    def measuring(self):
        self.requests.inc()
        start = time.perf_counter_ns()
        try:
            yield
        except BaseException:  # also that of a caller who gives up
            self.failures.inc()
            self._add(self.statistics.fail, start)
            raise
        self.latency.observe(self._add(self.statistics.success, start) / 1e9)

    def _add(self, total: oip.StatisticDuration, start: int) -> int:
        """Count what began at some time, and give the nanoseconds since."""
        elapsed = time.perf_counter_ns() - start
        total.count += 1
        total.ns += elapsed
        return elapsed


class Service(oip_grpc.GRPCInferenceServiceServicer):
    """The calls that are answered; all others stay UNIMPLEMENTED."""

    def __init__(self, model: Model):
        self.model, self.contract = model, model.contract
        self.meters = Meters(self.contract.model)

    async def ServerLive(self, request, context):
        return oip.ServerLiveResponse(live=True)

    async def ServerReady(self, request, context):
        return oip.ServerReadyResponse(ready=self.model.is_ready)

    async def ServerMetadata(self, request, context):
        return oip.ServerMetadataResponse(name="nonn", version=nonn.__version__, extensions=["statistics"])

    async def ModelReady(self, request, context):
        known = request.name == self.contract.model and request.version in ("", VERSION)
        return oip.ModelReadyResponse(ready=known and self.model.is_ready)

    async def ModelMetadata(self, request, context):
        await self._check_model(request, context)
        tensor = oip.ModelMetadataResponse.TensorMetadata
        return oip.ModelMetadataResponse(
            name=self.contract.model,
            versions=[VERSION],
            platform=self.model.platform,
            inputs=[tensor(name=INPUT, datatype="UINT8", shape=self.contract.image_shape)],
            outputs=[tensor(name=name, datatype=kind, shape=s) for name, (kind, s) in self.contract.outputs.items()],
        )

    async def ModelStatistics(self, request, context):
        if request.name:  # without a name: of all models
            await self._check_model(request, context)
        statistics = self.meters.statistics
        model_statistics = oip.ModelStatistics(
            name=self.contract.model,
            version=VERSION,
            inference_count=statistics.success.count,
            execution_count=statistics.success.count,
            inference_stats=statistics,
        )
        return oip.ModelStatisticsResponse(model_stats=[model_statistics])

    async def ModelInfer(self, request, context):
        try:
            with self.meters.measuring():
                image = read_request(self.contract, request)
                return await self.model.infer(request, image, context.time_remaining())
        except ProtocolError as refusal:
            await context.abort(refusal.code, str(refusal))

    async def _check_model(self, request, context) -> None:
        try:
            check_model(self.contract, request.name, request.version)
        except ProtocolError as refusal:
            await context.abort(refusal.code, str(refusal))


@contextlib.asynccontextmanager
async def listening(
    service: oip_grpc.GRPCInferenceServiceServicer,
    address: str,
    message_limit: int,
    identity: Identity | None,
    allowed: Collection[str],
) -> AsyncIterator[int]:
    """Let a service be called at ``host:port`` while the block runs; yield the port, useful where 0 was asked for.

    With an identity it is called under mutual TLS by those whose certificates have an allowed common name. Without
    one everything is plain text.

    Raises
    ------
    UserError
        Plain text beyond loopback, an address that is taken or impossible, or unusable certificates.
    """
    try:
        split_address(address)
    except ValueError as error:
        raise UserError(f"--address: {error}") from None
    if identity is None and not is_loopback(address):
        raise UserError(f"{address}: plain text is for loopback addresses only. Use certificates elsewhere.")
    options = {
        "grpc.max_receive_message_length": message_limit,
        "grpc.max_send_message_length": message_limit,
        "grpc.http2.lookahead_bytes": message_limit,  # a whole message may come without asking for room again
        "grpc.max_metadata_size": 8 * 1024,
        "grpc.max_concurrent_streams": CONCURRENT_STREAMS,
        "grpc.so_reuseport": 0,  # a second server on the same port shall fail, not share it
    }
    server = aio.server(
        interceptors=[Guard(allowed if identity else None)],
        options=list(options.items()),
        maximum_concurrent_rpcs=CONCURRENT_CALLS,
    )
    oip_grpc.add_GRPCInferenceServiceServicer_to_server(service, server)
    status = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(status, server)
    try:
        if identity is None:
            port = server.add_insecure_port(address)
        else:
            port = server.add_secure_port(address, identity.for_server())
    except RuntimeError:
        problem = f"{address}: cannot listen there. Is the port free, and the address this machine's?"
        if identity:
            problem += f" Do {identity.certificate} and {identity.key} belong together?"
        raise UserError(problem) from None
    await server.start()
    try:
        yield port
    finally:
        await status.enter_graceful_shutdown()
        await server.stop(GRACE)


@contextlib.asynccontextmanager
async def serving(
    model: Model, address: str, identity: Identity | None = None, allowed: Collection[str] = ()
) -> AsyncIterator[tuple[int, Meters]]:
    """Serve a model while the block runs, see `listening`; yield the port and the model's meters."""
    service = Service(model)
    async with listening(service, address, model.contract.message_limit, identity, allowed) as port:
        yield port, service.meters


def continue_after_parent() -> None:
    """Have the kernel wake this process when its parent dies, should it be stopped then (SIGSTOP); Linux only."""
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGCONT)


def told_to_stop(attached: bool, *more: signal.Signals) -> asyncio.Event:
    """An event that SIGINT, SIGTERM and `more` signals set, and, if `attached`, standard input when it closes."""
    stopped, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM, *more):
        loop.add_signal_handler(number, stopped.set)
    if attached:
        loop.add_reader(sys.stdin, stopped.set)  # nothing is ever sent: readable means closed
        continue_after_parent()
    return stopped


def announce(what: str, address: str, port: int, identity: Identity | None = None) -> None:
    """Say what listens and where: for `nonn.runtime.processes`, too, which waits for this line."""
    log(f"{what} at {address.rpartition(':')[0]}:{port}, {'mutual TLS' if identity else 'plain text'}")


async def serve(
    model: Model,
    address: str,
    identity: Identity | None,
    allowed: Collection[str],
    metrics_port: int | None,
    attached: bool = False,
    counters: Collection[Counter] = (),
) -> None:
    """Serve until SIGINT or SIGTERM, or, if `attached`, until standard input closes.

    Metrics are those of every server, and `counters` of the model's own.
    """
    stopped = told_to_stop(attached)
    async with serving(model, address, identity, allowed) as (port, meters):
        for counter in counters:
            meters.registry.register(counter)
        if metrics_port is not None:
            try:
                start_http_server(metrics_port, addr="127.0.0.1", registry=meters.registry)
            except (OSError, OverflowError) as error:
                raise UserError(f"--metrics-port: cannot listen on 127.0.0.1:{metrics_port} ({error})") from None
        announce(f"model {model.contract.model}", address, port, identity)
        await stopped.wait()
