"""Echoes over real sockets: the times of UDP messages, of a TCP stream, and of one image's messages on links."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import statistics
import struct
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence

from nonn.core.errors import UserError
from nonn.core.links import MTU, round_trip, tcp_goodput
from nonn.core.progress import track
from nonn.runtime.addresses import split_address
from nonn.runtime.cluster import Node
from nonn.runtime.processes import running
from nonn.testbed import echo_server
from nonn.testbed.emulation import EmulatedNetwork

PAYLOADS = (64, 256, 1024, 4096, 12288)  # bytes
#: Round trips of each payload: as many as fit into some seconds, within bounds.
ECHO_SECONDS, FEWEST, MOST = 2.0, 10, 300
#: Seconds until a TCP stream is counted and while it is; at slow rates until so many packets have come.
WARMUP_SECONDS, STREAM_SECONDS, STREAM_PACKETS = 1.0, 3.0, 200

MAX_DATAGRAM_BYTES = 65_507  # bytes of a UDP message
ECHO_TIMEOUT_S = 5.0
STALL_TIMEOUT_S = 30.0  # seconds without a byte after which a stream is given up
RESET_ON_CLOSE = struct.pack("ii", 1, 0)


@contextlib.contextmanager
def ahead_of_others() -> Iterator[None]:
    """Run this thread before all ordinary ones, if that is permitted: the link is measured, not other work here."""
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    except (AttributeError, OSError):  # not Linux, or not permitted
        yield
        return
    try:
        yield
    finally:
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


@contextlib.contextmanager
def udp_echo(network: EmulatedNetwork, host: str) -> Iterator[tuple[str, int]]:
    """Send back every UDP message that a host gets while the block runs; yields where it listens."""
    with network.inside(host):
        server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    server.bind((network.address(host), 0))
    address = server.getsockname()

    def serve() -> None:
        with ahead_of_others():
            while True:
                message, sender = server.recvfrom(MAX_DATAGRAM_BYTES)
                if sender == address:  # from itself: the end
                    return
                server.sendto(message, sender)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield address
    finally:
        server.sendto(b"", address)
        thread.join()
        server.close()


def measure_round_trips(network: EmulatedNetwork, sender: str, receiver: str, payload: int, count: int) -> list[float]:
    """Seconds of round trips of UDP messages of at least 8 bytes; what takes longer than `ECHO_TIMEOUT_S` is lost."""
    times = []
    with network.inside(sender):
        client = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with client, udp_echo(network, receiver) as address, ahead_of_others():
        client.settimeout(ECHO_TIMEOUT_S)
        for number in range(count):
            message = number.to_bytes(8, "big").ljust(payload, b"\0")
            start = time.perf_counter()
            client.sendto(message, address)
            with contextlib.suppress(TimeoutError):
                while client.recv(MAX_DATAGRAM_BYTES) != message:
                    pass  # an echo that had been given up
                times.append(time.perf_counter() - start)
    return times


def measure_throughput(network: EmulatedNetwork, sender: str, receiver: str, warmup: float, seconds: float) -> float:
    """Payload bits a second that one TCP stream brings to `receiver`, once slow start is over."""
    with network.inside(receiver):
        listener = socket.create_server((network.address(receiver), 0))
    with network.inside(sender):
        source = socket.socket()
    source.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)  # what is queued need not arrive

    def send() -> None:
        block = bytes(1 << 16)
        with contextlib.suppress(OSError):  # the end
            source.connect(listener.getsockname())
            while True:
                source.send(block)

    thread = threading.Thread(target=send, daemon=True)
    thread.start()
    with listener, source:
        listener.settimeout(STALL_TIMEOUT_S)
        try:
            sink, _ = listener.accept()
            with sink:
                sink.settimeout(STALL_TIMEOUT_S)
                return _count_stream(sink, warmup, seconds)
        except TimeoutError:
            raise UserError(f"the link: no byte came through for {STALL_TIMEOUT_S:g} s; has its relay ended?") from None
        finally:
            with contextlib.suppress(OSError):  # it was never connected
                source.shutdown(socket.SHUT_RDWR)
            thread.join(STALL_TIMEOUT_S)


def _count_stream(sink: socket.socket, warmup: float, seconds: float) -> float:
    buffer = bytearray(1 << 18)
    warm = time.monotonic() + warmup
    while time.monotonic() < warm:
        sink.recv_into(buffer)
    received, start = 0, time.monotonic()
    while (now := time.monotonic()) < start + seconds or not received:
        received += sink.recv_into(buffer)
    return 8 * received / (now - start)


def measure_link(network: EmulatedNetwork) -> dict:
    """Measure between the first two hosts of a network.

    Returns
    -------
    dict
        ``round_trips``: for each payload its theory (None on loopback), median, 95th percentile and
        largest in milliseconds, and how many; ``tcp_mbps`` and, at most, ``tcp_theory_mbps``.
    """
    first, second, *_ = network.hosts
    link = network.link
    rows = []
    for payload in track(PAYLOADS, "round trips"):
        theory = round_trip(link, payload) if link else None
        count = min(max(int(ECHO_SECONDS / (theory or 1e-3)), FEWEST), MOST)
        times = [1000 * seconds for seconds in measure_round_trips(network, first, second, payload, count)]
        if not times:
            raise UserError(f"the link: of {count} messages none came back; has its relay ended?")
        rows.append(
            {
                "payload_bytes": payload,
                "theory_ms": theory and 1000 * theory,
                "median_ms": statistics.median(times),
                "p95_ms": statistics.quantiles(times, n=20, method="inclusive")[-1],
                "largest_ms": max(times),
                "count": len(times),
            }
        )
    seconds = max(STREAM_SECONDS, STREAM_PACKETS * MTU * 8 / link.rate_bps if link else 0)
    throughput = measure_throughput(network, first, second, WARMUP_SECONDS, seconds)
    theory = tcp_goodput(link) / 1e6 if link else None
    return {"round_trips": rows, "tcp_mbps": throughput / 1e6, "tcp_theory_mbps": theory}


def format_measurement(measured: dict) -> str:
    """A table of what `measure_link` returns."""
    theory = "{:.3f}".format
    lines = ["{:>8} {:>10} {:>10} {:>10} {:>10} {:>6}".format("bytes", "theory ms", "median", "p95", "largest", "n")]
    for row in measured["round_trips"]:
        expected = "–" if row["theory_ms"] is None else theory(row["theory_ms"])
        found = "{median_ms:>10.3f} {p95_ms:>10.3f} {largest_ms:>10.3f} {count:>6}".format(**row)
        lines.append(f"{row['payload_bytes']:>8} {expected:>10} {found}")
    expected = measured["tcp_theory_mbps"]
    limit = f" of at most {theory(expected)}" if expected else ""
    lines.append(f"TCP stream: {measured['tcp_mbps']:.3f}{limit} Mbit/s")
    return "\n".join(lines)


@contextlib.asynccontextmanager
async def tcp_echoes(
    addresses: Sequence[str], prefixes: Sequence[Sequence[str]]
) -> AsyncIterator[Callable[[tuple[int, int]], Awaitable[int]]]:
    """Run an echo process at each address, each behind a prefix; yield what asks all at once, and says how many.

    What is asked has a size in bytes, and an answer's, without headers of TCP and IP. A process that cannot listen at
    its address is a `UserError`.
    """
    commands = {}
    for position, (address, prefix) in enumerate(zip(addresses, prefixes, strict=True)):
        node = Node(name=f"echo-{position}", address=address, model="echo")
        commands[node] = [*prefix, sys.executable, "-m", echo_server.__name__, address]

    async def ask_all(sizes: tuple[int, int]) -> int:
        return len(await asyncio.gather(*(echo_server.ask(*stream, *sizes) for stream in streams)))

    async with running(commands), contextlib.AsyncExitStack() as stack:
        streams = []
        for address in addresses:
            streams.append(await asyncio.open_connection(*split_address(address)))
            stack.callback(streams[-1][1].close)
        yield ask_all
