"""Standard error of a server: it never blocks the server, and repetitions are counted instead of written.

gRPC writes a line for every handshake that fails, into a pipe that perhaps nobody reads; a server that waits for room
there answers nobody. So a thread stands between: it always reads, and drops what cannot be written.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator

from nonn.runtime import HANDSHAKE_TRACE
from nonn.runtime.tls import handshake_problem

#: Most lines of one kind, and most kinds of lines, in each window of `WINDOW_S` seconds; the rest is counted.
LINES_PER_WINDOW, KINDS_PER_WINDOW, WINDOW_S = 5, 50, 10.0
#: Longest line without its line break: a pipe that has any room takes PIPE_BUF bytes without blocking.
MAX_LINE_BYTES = select.PIPE_BUF - 1

_TRACED = b"CallNextHandshakerLocked: error="
_NOISE = (b"gRPC Tracers:", b"handshake_manager 0x", b"handshake manager 0x", b"Failed to add port to server:")
_PEER = re.compile(r"endpoint_peer_address=ipv[46]:([^,}]+)")


def in_plain_words(line: bytes) -> bytes:
    """A line as it is written; empty if it tells the reader nothing.

    Of gRPC's traces of handshakes only the failures of callers remain, with address and reason.
    """
    if _TRACED not in line:
        traced = b"Handshake failed with error" in line and HANDSHAKE_TRACE in os.environ.get("GRPC_TRACE", "")
        return b"" if traced or any(noise in line for noise in _NOISE) else line
    text = line.partition(_TRACED)[2].decode(errors="replace")
    if text.startswith("OK") or "grpc.internal.server_credentials" not in text:
        return b""
    problem, _, arguments = text.partition(" shutdown=")
    peer = found[1] if (found := _PEER.search(arguments)) else "an unknown address"
    return f"refused a connection from {peer}: {handshake_problem(problem) or problem[:200]}".encode()


class Limiter:
    """Passes the first lines of each kind in a window, and then says how many more there were.

    Lines are of one kind if they differ only in numbers, such as addresses and times.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self.clock, self.since = clock, clock()
        self.seen: Counter[bytes] = Counter()

    def passed(self, line: bytes) -> Iterator[bytes]:
        """The lines to write now that this one has come."""
        yield from self.summary()
        kind = re.sub(rb"[0-9]+", b"#", line)
        if kind not in self.seen and len(self.seen) >= KINDS_PER_WINDOW:
            kind = b"other lines"
        self.seen[kind] += 1
        if self.seen[kind] <= LINES_PER_WINDOW:
            yield line

    def summary(self, at_once: bool = False) -> Iterator[bytes]:
        """What was held back, once its window is over."""
        if not at_once and self.clock() - self.since < WINDOW_S:
            return
        held = [(kind, count - LINES_PER_WINDOW) for kind, count in self.seen.items() if count > LINES_PER_WINDOW]
        self.seen.clear()
        self.since = self.clock()
        for kind, count in held:
            yield b"%d more lines like: %s" % (count, kind)


def _write(descriptor: int, line: bytes) -> None:
    """Write a line if that does not block."""
    with contextlib.suppress(OSError):  # nobody reads any more
        if select.select([], [descriptor], [], 0)[1]:
            os.write(descriptor, line[:MAX_LINE_BYTES] + b"\n")


def _pump(source: int, target: int) -> None:
    limiter, rest = Limiter(), b""
    while True:
        if not select.select([source], [], [], WINDOW_S)[0]:
            lines = limiter.summary()
        elif content := os.read(source, 1 << 16):
            *whole, rest = (rest + content).split(b"\n")
            rest = rest[-(1 << 16) :]
            plain = filter(None, map(in_plain_words, whole))
            lines = (passed for line in plain for passed in limiter.passed(line))
        else:
            for line in filter(None, (rest, *limiter.summary(at_once=True))):
                _write(target, line)
            return os.close(source)
        for line in lines:
            _write(target, line)


@contextlib.contextmanager
def relayed_stderr() -> Iterator[None]:
    """Have everything that this process writes to standard error relayed while the block runs."""
    sys.stderr.flush()
    original = os.dup(2)
    source, inlet = os.pipe()
    os.set_blocking(inlet, True)
    os.dup2(inlet, 2)
    os.close(inlet)
    pump = threading.Thread(target=_pump, args=(source, original), name="stderr", daemon=True)
    pump.start()
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(original, 2)  # without a writer the pipe ends, and so does the thread
        pump.join(1.0)
        if not pump.is_alive():
            os.close(original)
