"""A server of the Open Inference Protocol v2 over gRPC, for a node's student or a coordinator's network.

Every request is checked before it reaches the model. There is no call that loads, unloads or shares
memory. What is served is a `Model`; who may call it is up to `nonn.runtime.tls`.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import resource
import socket
from collections.abc import AsyncIterator, Collection
from typing import Protocol

import numpy as np
from grpc import aio
from grpc_health.v1 import health, health_pb2_grpc
from prometheus_client import Counter
from tritonclient.grpc import service_pb2 as oip
from tritonclient.grpc import service_pb2_grpc as oip_grpc

import nonn
from nonn.core.errors import UserError
from nonn.runtime.addresses import is_loopback, split_address
from nonn.runtime.admission import Admission
from nonn.runtime.attached import announce, told_to_stop
from nonn.runtime.exported import INPUT
from nonn.runtime.guard import Guard
from nonn.runtime.metrics import Meters, serving_metrics
from nonn.runtime.protocol import ImageContract, ProtocolError, check_model, read_request
from nonn.runtime.tls import Identity

#: Most calls of one connection at once; further ones gRPC holds back at the caller, or resets without a reason.
MAX_STREAMS = 256
#: Most connections at once, if the limit of open files is not lower; further ones are closed at once. Then how many
#: seconds each may be idle, and may take for its handshake.
MAX_CONNECTIONS, IDLE_S, HANDSHAKE_S = 2048, 600, 5
#: Most calls that gRPC holds until this process looks at them.
MAX_PENDING = 4096
#: Files that a server has open besides its connections.
OTHER_FILES = 64
#: Seconds between two looks at the dates of certificates.
DAY_S = 24 * 3600.0
#: Seconds that calls under way have left when the server is told to stop.
GRACE_S = 1.0


class Served(Protocol):
    """What a server says of what it serves."""

    @property
    def contract(self) -> ImageContract: ...

    @property
    def platform(self) -> str:
        """What runs it, for the metadata."""

    @property
    def is_ready(self) -> bool:
        """Whether a request may be answered."""


class Model(Served, Protocol):
    """What a server answers with."""

    @property
    def admission(self) -> Admission: ...

    async def infer(
        self, request: oip.ModelInferRequest, images: np.ndarray, seconds: float | None
    ) -> oip.ModelInferResponse:
        """Answer a request whose k images, uint8 of shape (k, channels, size, size), have been checked.

        `seconds` are left until the caller gives up; None if it waits for any time. A refusal is a `ProtocolError`.
        """


class Service(oip_grpc.GRPCInferenceServiceServicer):
    """The calls that every server answers beside ModelInfer; all others stay UNIMPLEMENTED."""

    def __init__(self, model: Served):
        self.model = model
        self.meters = Meters(self.contract.model)

    @property
    def contract(self) -> ImageContract:
        """That of the model, which may change while it is served."""
        return self.model.contract

    async def ServerLive(self, request, context):
        return oip.ServerLiveResponse(live=True)

    async def ServerReady(self, request, context):
        return oip.ServerReadyResponse(ready=self.model.is_ready)

    async def ServerMetadata(self, request, context):
        return oip.ServerMetadataResponse(name="nonn", version=nonn.__version__, extensions=["statistics"])

    async def ModelReady(self, request, context):
        known = request.name == self.contract.model and request.version in ("", self.contract.version)
        return oip.ModelReadyResponse(ready=known and self.model.is_ready)

    async def ModelMetadata(self, request, context):
        await self._check_model(request, context)
        tensor = oip.ModelMetadataResponse.TensorMetadata
        return oip.ModelMetadataResponse(
            name=self.contract.model,
            versions=[self.contract.version],
            platform=self.model.platform,
            inputs=[tensor(name=INPUT, datatype="UINT8", shape=self.contract.request_shape)],
            outputs=[tensor(name=name, datatype=kind, shape=s) for name, (kind, s) in self.contract.outputs.items()],
        )

    async def ModelStatistics(self, request, context):
        if request.name:  # without a name: of all models
            await self._check_model(request, context)
        statistics = self.meters.statistics
        model_statistics = oip.ModelStatistics(
            name=self.contract.model,
            version=self.contract.version,
            inference_count=self.meters.images,
            execution_count=statistics.success.count,
            inference_stats=statistics,
        )
        return oip.ModelStatisticsResponse(model_stats=[model_statistics])

    async def _check_model(self, request, context) -> None:
        try:
            check_model(self.contract, request.name, request.version)
        except ProtocolError as refusal:
            await context.abort(refusal.code, str(refusal))


class ModelService(Service):
    """The calls that a node or a coordinator answers."""

    model: Model

    def __init__(self, model: Model):
        super().__init__(model)

    async def ModelInfer(self, request, context):
        try:
            with self.meters.measuring():
                images = read_request(self.contract, request)
                answer = await self.model.infer(request, images, context.time_remaining())
            self.meters.images += len(images)
            return answer
        except ProtocolError as refusal:
            await context.abort(refusal.code, str(refusal))


class Health(health.aio.HealthServicer):
    """The standard health service: the whole server is SERVING while its model is ready."""

    def __init__(self, service: oip_grpc.GRPCInferenceServiceServicer):
        super().__init__()
        self.service = service

    async def Check(self, request, context):
        answer = await super().Check(request, context)
        if not (await self.service.ServerReady(oip.ServerReadyRequest(), context)).ready:
            answer.status = answer.NOT_SERVING
        return answer


def channel_options(message_limit: int) -> list[tuple[str, int]]:
    """Options of a server's connections, for messages of at most so many bytes."""
    options = {
        "grpc.max_receive_message_length": message_limit,
        "grpc.max_send_message_length": message_limit,
        "grpc.http2.lookahead_bytes": message_limit,  # a whole message fits the flow-control window
        "grpc.max_metadata_size": 8 * 1024,
        "grpc.max_concurrent_streams": MAX_STREAMS,
        "grpc.max_allowed_incoming_connections": connection_limit(),
        "grpc.server_handshake_timeout_ms": 1000 * HANDSHAKE_S,
        "grpc.max_connection_idle_ms": 1000 * IDLE_S,
        # A caller whose power fails closes no connection: it is given up in less than two minutes.
        "grpc.keepalive_time_ms": 60_000,
        "grpc.keepalive_timeout_ms": 20_000,
        # Beyond it gRPC itself refuses calls, as CANCELLED and without a retry time.
        "grpc.server.max_pending_requests": MAX_PENDING,
        "grpc.server.max_pending_requests_hard_limit": 2 * MAX_PENDING,
        "grpc.so_reuseport": 0,  # a second server on the same port should fail, not share it
    }
    return list(options.items())


def connection_limit() -> int:
    """Most connections that a server takes: `MAX_CONNECTIONS`, or fewer if it may not open enough files.

    Each needs two files, since a connection that is refused is accepted first. The soft limit is raised if needed.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = 2 * MAX_CONNECTIONS + OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < needed:
        soft = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    files = needed if soft == resource.RLIM_INFINITY else soft
    return max(min(MAX_CONNECTIONS, (files - OTHER_FILES) // 2), 1)


@contextlib.asynccontextmanager
async def listening(
    service: oip_grpc.GRPCInferenceServiceServicer,
    address: str,
    message_limit: int,
    identity: Identity | None,
    allowed: Collection[str],
    admission: Admission | None = None,
    meters: Meters | None = None,
) -> AsyncIterator[int]:
    """Let a service be called at ``host:port`` while the block runs; yield the port, useful where 0 was asked for.

    With an identity it is called under mutual TLS by those whose certificates have an allowed common name. Without
    one everything is plain text. `admission` is for inference requests, `meters` for calls that the service never sees.

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
    guard = Guard(allowed if identity else None, admission, meters)
    server = aio.server(interceptors=[guard], options=channel_options(message_limit))
    oip_grpc.add_GRPCInferenceServiceServicer_to_server(service, server)
    status = Health(service)
    health_pb2_grpc.add_HealthServicer_to_server(status, server)
    credentials = identity and identity.for_server()
    try:
        port = server.add_secure_port(address, credentials) if identity else server.add_insecure_port(address)
    except RuntimeError:
        raise UserError(f"{address}: cannot listen there: {why_not(address)}") from None
    await server.start()
    warning = asyncio.create_task(warn_daily(identity)) if identity else None
    try:
        yield port
    finally:
        if warning:
            warning.cancel()
        await status.enter_graceful_shutdown()
        await server.stop(GRACE_S)


async def warn_daily(identity: Identity) -> None:
    """Say each day which certificates expire soon."""
    while True:
        with contextlib.suppress(UserError):  # where new files are used, it is said what is wrong with them
            identity.warn()
        await asyncio.sleep(DAY_S)


def why_not(address: str) -> str:
    """Why nothing can listen at ``host:port``: found by another attempt."""
    host, port = split_address(address)
    try:
        family, kind, *_, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(where)
            probe.listen()
    except (socket.gaierror, UnicodeError):
        return "no machine of this name is known. Give an address of this machine."
    except OSError as error:
        reasons = {
            errno.EADDRINUSE: "another program listens on this port. Stop it, or choose another port.",
            errno.EADDRNOTAVAIL: "this machine has no such address. Give one of its own, or 0.0.0.0 for all.",
            errno.EACCES: "this user may not use this port. Choose one from 1024 on.",
        }
        return reasons.get(error.errno or 0, f"{error.strerror}.")
    return "the port was taken a moment ago. Try again."


@contextlib.asynccontextmanager
async def serving(
    model: Model, address: str, identity: Identity | None = None, allowed: Collection[str] = ()
) -> AsyncIterator[tuple[int, Meters]]:
    """Serve a model while the block runs, see `listening`; yield the port and the model's meters."""
    service = ModelService(model)
    limit = model.contract.message_limit
    async with listening(service, address, limit, identity, allowed, model.admission, service.meters) as port:
        yield port, service.meters


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
    async with contextlib.AsyncExitStack() as stack:
        port, meters = await stack.enter_async_context(serving(model, address, identity, allowed))
        for counter in counters:
            meters.registry.register(counter)
        if metrics_port is not None:
            await stack.enter_async_context(serving_metrics(meters.registry, metrics_port))
        announce(f"model {model.contract.model}", address, port, identity is not None)
        await stopped.wait()
