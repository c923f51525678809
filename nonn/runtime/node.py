"""A node: serves one exported student through the Open Inference Protocol v2, over gRPC.

The student's file is checked against its manifest before it is loaded, every request before it
reaches the student, every feature vector before it leaves. There is no call that loads, unloads or
shares memory. Calls are answered one after another, as they would be on a small device; a call
whose caller has given up while it waited is not computed.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
import time
from collections.abc import AsyncIterator, Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from grpc import StatusCode, aio
from grpc_health.v1 import health, health_pb2_grpc
from prometheus_client import CollectorRegistry, Counter, Histogram, start_http_server
from tritonclient.grpc import service_pb2 as oip
from tritonclient.grpc import service_pb2_grpc as oip_grpc

import nonn
from nonn.errors import UserError
from nonn.progress import log
from nonn.runtime.exported import read_manifest, read_verified
from nonn.runtime.protocol import (
    INPUT,
    OUTPUT,
    VERSION,
    Contract,
    ProtocolError,
    check_model,
    make_response,
    read_request,
)
from nonn.runtime.session import open_session
from nonn.runtime.tls import Guard, Identity, is_loopback, split_address

#: Who may call a node that is not told otherwise.
DEFAULT_CALLERS = ("coordinator",)
#: Calls that may wait or run at once; more are refused as RESOURCE_EXHAUSTED.
CONCURRENT_CALLS = 64
#: Of one connection; beyond it gRPC resets streams without a word, so it is the wider limit.
CONCURRENT_STREAMS = 256
#: Seconds that calls under way have left when the node is told to stop.
GRACE = 1.0
#: Bounds of the latency histogram in seconds: microcontroller to overloaded board.
BUCKETS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2)


class Student:
    """One exported student, verified and ready to run.

    Parameters
    ----------
    path : Path
        An ONNX file beside the ``manifest.json`` that the stage `export` wrote with it.

    Raises
    ------
    UserError
        The manifest does not list the file, or with another SHA-256, or the file is no such student.
    """

    def __init__(self, path: Path):
        manifest = read_manifest(path.parent)
        entry = next((entry for entry in manifest.students if entry.file == path.name), None)
        if entry is None:
            known = ", ".join(entry.file for entry in manifest.students)
            raise UserError(f"{path}: not a student of the manifest beside it. Choose one of {known}.")
        content = read_verified(path, entry.sha256)
        self.contract = Contract(entry.model, manifest.image.channels, manifest.image.size, entry.n_features)
        self.session = open_session(content)
        features = self.run(np.zeros(self.contract.image_shape, np.uint8))
        if features.shape != (1, self.contract.n_features) or features.dtype != np.float32:
            raise UserError(f"{path}: its output is not what the manifest says. Export the network again.")

    def run(self, image: np.ndarray) -> np.ndarray:
        """Feature vector (1, F_i) of an image, uint8 of shape (1, channels, size, size)."""
        return self.session.run([OUTPUT], {INPUT: image})[0]


class Meters:
    """What a node counts, for Prometheus and for the statistics call of the protocol."""

    def __init__(self, model: str):
        self.registry = CollectorRegistry()
        common = {"labelnames": ["model"], "registry": self.registry}
        self.requests = Counter("nonn_requests", "Inference requests.", **common).labels(model)
        self.failures = Counter("nonn_failures", "Requests not answered with features.", **common).labels(model)
        self.latency = Histogram(
            "nonn_request_seconds", "From request read to answer.", buckets=BUCKETS, **common
        ).labels(model)
        self.n_answered = self.n_failed = self.answering_ns = self.failing_ns = 0

    @contextlib.contextmanager
    def measuring(self):
        self.requests.inc()
        start = time.perf_counter_ns()
        try:
            yield
        except BaseException:  # a caller that gives up cancels its call
            self.n_failed += 1
            self.failing_ns += time.perf_counter_ns() - start
            self.failures.inc()
            raise
        elapsed = time.perf_counter_ns() - start
        self.n_answered += 1
        self.answering_ns += elapsed
        self.latency.observe(elapsed / 1e9)

    def statistics(self) -> oip.InferStatistics:
        return oip.InferStatistics(
            success=oip.StatisticDuration(count=self.n_answered, ns=self.answering_ns),
            fail=oip.StatisticDuration(count=self.n_failed, ns=self.failing_ns),
        )


class Service(oip_grpc.GRPCInferenceServiceServicer):
    """The calls that a node answers; all others stay UNIMPLEMENTED."""

    def __init__(self, student: Student):
        self.student, self.contract = student, student.contract
        self.meters = Meters(self.contract.model)
        self.worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="student")

    async def ServerLive(self, request, context):
        return oip.ServerLiveResponse(live=True)

    async def ServerReady(self, request, context):
        return oip.ServerReadyResponse(ready=True)

    async def ServerMetadata(self, request, context):
        return oip.ServerMetadataResponse(name="nonn", version=nonn.__version__, extensions=["statistics"])

    async def ModelReady(self, request, context):
        known = request.name == self.contract.model and request.version in ("", VERSION)
        return oip.ModelReadyResponse(ready=known)

    async def ModelMetadata(self, request, context):
        await self._check_model(request, context)
        tensor = oip.ModelMetadataResponse.TensorMetadata
        return oip.ModelMetadataResponse(
            name=self.contract.model,
            versions=[VERSION],
            platform="onnxruntime_onnx",
            inputs=[tensor(name=INPUT, datatype="UINT8", shape=self.contract.image_shape)],
            outputs=[tensor(name=OUTPUT, datatype="FP32", shape=(1, self.contract.n_features))],
        )

    async def ModelStatistics(self, request, context):
        if request.name:  # without a name: of all models
            await self._check_model(request, context)
        statistics = oip.ModelStatistics(
            name=self.contract.model,
            version=VERSION,
            inference_count=self.meters.n_answered,
            execution_count=self.meters.n_answered,
            inference_stats=self.meters.statistics(),
        )
        return oip.ModelStatisticsResponse(model_stats=[statistics])

    async def ModelInfer(self, request, context):
        try:
            with self.meters.measuring():
                image = read_request(self.contract, request)
                features = await asyncio.get_running_loop().run_in_executor(self.worker, self._infer, image)
                return make_response(self.contract, request.id, features)
        except ProtocolError as refusal:
            await context.abort(refusal.code, str(refusal))

    def _infer(self, image: np.ndarray) -> np.ndarray:
        try:
            features = self.student.run(image)
        except Exception as error:
            log(f"model {self.contract.model}: {error}")
            # What went wrong inside is for this node's log, not for whoever asks.
            raise ProtocolError(StatusCode.INTERNAL, "the student failed; see the node's log") from error
        if not np.isfinite(features).all():
            raise ProtocolError(StatusCode.INTERNAL, "the student's features are not finite")
        return features

    async def _check_model(self, request, context) -> None:
        try:
            check_model(self.contract, request.name, request.version)
        except ProtocolError as refusal:
            await context.abort(refusal.code, str(refusal))


@contextlib.asynccontextmanager
async def serving(
    student: Student, address: str, identity: Identity | None = None, allowed: Collection[str] = ()
) -> AsyncIterator[tuple[int, Meters]]:
    """Serve a student while the block runs; yield the port (useful where 0 was asked for) and its meters.

    Parameters
    ----------
    student : Student
    address : str
        ``host:port``.
    identity : Identity, optional
        For mutual TLS. Without it everything is plain text, which only loopback addresses may be.
    allowed : collection of str
        Common names of the certificates that may call.

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
        raise UserError(f"{address}: plain text is for loopback addresses only. Give --cert, --key and --ca.")
    service = Service(student)
    limit = student.contract.message_limit
    options = {
        "grpc.max_receive_message_length": limit,
        "grpc.max_send_message_length": limit,
        "grpc.max_metadata_size": 8 * 1024,
        "grpc.max_concurrent_streams": CONCURRENT_STREAMS,
        "grpc.so_reuseport": 0,  # a second node on the same port shall fail, not share it
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
        raise UserError(f"{address}: cannot listen there. Is the port free, and the address this machine's?") from None
    await server.start()
    try:
        yield port, service.meters
    finally:
        await status.enter_graceful_shutdown()
        await server.stop(GRACE)
        service.worker.shutdown(cancel_futures=True)


async def serve(
    path: Path,
    address: str,
    identity: Identity | None,
    allowed: Collection[str],
    metrics_port: int | None,
    attached: bool,
) -> None:
    """Serve until SIGINT or SIGTERM, or, if `attached`, until standard input closes."""
    stopped, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stopped.set)
    if attached:
        loop.add_reader(sys.stdin, stopped.set)  # nothing is ever sent: readable means closed
    async with serving(Student(path), address, identity, allowed) as (port, meters):
        if metrics_port is not None:
            try:
                start_http_server(metrics_port, addr="127.0.0.1", registry=meters.registry)
            except (OSError, OverflowError) as error:
                raise UserError(f"--metrics-port: cannot listen on 127.0.0.1:{metrics_port} ({error})") from None
        host, _ = split_address(address)
        log(f"model {path.stem} at {host}:{port}, {'mutual TLS' if identity else 'plain text'}")
        await stopped.wait()


def run(options) -> None:
    """The command ``nonn node``."""
    files = (options.cert, options.key, options.ca)
    if options.insecure == any(files) or (any(files) and not all(files)):
        raise UserError("give --cert, --key and --ca together, or --insecure for plain text on a loopback address")
    identity = None if options.insecure else Identity(*files)
    asyncio.run(
        serve(
            options.model,
            options.address,
            identity,
            options.allow or DEFAULT_CALLERS,
            options.metrics_port,
            options.attached,
        )
    )
