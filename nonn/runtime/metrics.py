"""The metrics of a server, and the port on which Prometheus reads them.

The server's own event loop serves the port: few connections at once, each for a few seconds only, which bounds what
half-sent requests can cost. A Host that does not name this machine is refused, against DNS rebinding.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import time
from collections.abc import AsyncIterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.exposition import choose_encoder
from tritonclient.grpc import service_pb2 as oip

from nonn.core.errors import UserError
from nonn.runtime.addresses import OWN_NAMES, host_name

#: Bounds of the latency histogram in seconds: microcontroller to overloaded board.
BUCKETS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2)
#: Most connections to the metrics port at once, seconds that one may take, and most bytes of its request.
MAX_CONNECTIONS, CONNECTION_TIMEOUT_S, MAX_REQUEST_BYTES = 16, 5.0, 8192
HOST = "127.0.0.1"


class Meters:
    """Counters of a server, for Prometheus and for the statistics call of the protocol."""

    def __init__(self, model: str):
        self.registry = CollectorRegistry()
        common: dict[str, Any] = {"labelnames": ["model"], "registry": self.registry}
        self.requests = Counter("nonn_requests", "Inference requests.", **common).labels(model)
        self.failures = Counter("nonn_failures", "Requests that were refused or failed.", **common).labels(model)
        self.refusals = Counter("nonn_refusals", "Calls sent away at once under load.", **common).labels(model)
        unread = "Calls ended unread: of a caller who is not allowed, or without a message of the protocol."
        self.rejections = Counter("nonn_rejections", unread, **common).labels(model)
        latency = Histogram("nonn_request_seconds", "From request read to answer.", buckets=BUCKETS, **common)
        self.latency = latency.labels(model)
        self.statistics = oip.InferStatistics()
        self.images = 0  # answered; a request may hold several

    @contextlib.contextmanager
    def measuring(self):
        self.requests.inc()
        start = time.perf_counter_ns()
        try:
            yield
        except BaseException:  # also the cancellation by a caller that gives up
            self.failures.inc()
            self._add(self.statistics.fail, start)
            raise
        self.latency.observe(self._add(self.statistics.success, start) / 1e9)

    def _add(self, total: oip.StatisticDuration, start: int) -> int:
        """Count what began at `start`; returns the nanoseconds since."""
        elapsed = time.perf_counter_ns() - start
        total.count += 1
        total.ns += elapsed
        return elapsed


def _respond(request: bytes, registry: CollectorRegistry) -> bytes:
    """An HTTP response to a request line and its headers."""
    line, *headers = request.decode("latin-1").split("\r\n")
    method, _, rest = line.partition(" ")
    status, kind, content = "404 Not Found", "text/plain", b"ask for /metrics\n"
    hosts = [text[5:].strip() for text in headers if text.lower().startswith("host:")]
    if any(host_name(host) not in OWN_NAMES for host in hosts):
        reason = f"this port answers to {HOST} and localhost alone; set the Host header so\n"
        status, content = "403 Forbidden", reason.encode()
    elif method != "GET":
        status, content = "405 Method Not Allowed", b"only GET is answered\n"
    elif rest.split(" ")[0].partition("?")[0] in ("/", "/metrics"):
        accepted = next((text[7:] for text in headers if text.lower().startswith("accept:")), "")
        try:
            encode, kind = choose_encoder(accepted)
        except Exception:  # it takes anything for a number of a version
            encode, kind = choose_encoder("")
        status, content = "200 OK", encode(registry)
    head = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(content)}\r\nConnection: close\r\n\r\n"
    return head.encode() + content


@contextlib.asynccontextmanager
async def serving_metrics(registry: CollectorRegistry, port: int) -> AsyncIterator[int]:
    """Answer Prometheus on this port of 127.0.0.1 while the block runs; yield the port, or raise a `UserError`."""
    connections: set[asyncio.StreamWriter] = set()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            if len(connections) >= MAX_CONNECTIONS:
                return
            connections.add(writer)
            async with asyncio.timeout(CONNECTION_TIMEOUT_S):
                writer.write(_respond(await reader.readuntil(b"\r\n\r\n"), registry))
                await writer.drain()
        except (TimeoutError, OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            writer.transport.abort()
        finally:
            connections.discard(writer)
            writer.close()

    try:
        server = await asyncio.start_server(answer, HOST, port, limit=MAX_REQUEST_BYTES)
    except (OSError, OverflowError) as error:
        taken = isinstance(error, OSError) and error.errno == errno.EADDRINUSE
        reason = "another program listens there" if taken else "no port has this number, or it is not for this user"
        raise UserError(f"--metrics-port: {HOST}:{port}: {reason}. Choose another port.") from None
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for writer in list(connections):
            writer.transport.abort()
