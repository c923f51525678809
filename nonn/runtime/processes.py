"""Nodes as child processes of this machine: started, watched, ended in one way."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

from tritonclient.grpc import service_pb2 as oip

from nonn.runtime.cluster import Cluster, Node
from nonn.runtime.protocol import Contract

#: Seconds that a node has to stop before it is killed.
GRACE = 3.0


COLUMNS = "{:<14} {:<8} {:<22} {:<16} {:>10} {:>10} {:>9}"
UP = "up"


@dataclass
class Child:
    """A node's process and what was last seen of it."""

    node: Node
    contract: Contract
    process: asyncio.subprocess.Process
    state: str = "starting"
    said: str = ""
    requests: int = 0
    failures: int = 0
    latency_ms: float | None = None
    listener: asyncio.Task | None = None
    _seen: oip.InferStatistics = field(default_factory=oip.InferStatistics)

    @property
    def has_exited(self) -> bool:
        return self.process.returncode is not None

    def update(self, statistics: oip.InferStatistics) -> None:
        """Take over a node's counts; the latency is the mean since the last look, kept while nothing happens."""
        success, before = statistics.success, self._seen.success
        if success.count > before.count:
            self.latency_ms = (success.ns - before.ns) / (success.count - before.count) / 1e6
        self.requests, self.failures = success.count + statistics.fail.count, statistics.fail.count
        self.state, self._seen = UP, statistics

    def row(self) -> str:
        latency = "" if self.latency_ms is None else f"{self.latency_ms:.2f} ms"
        counts = (latency, self.requests, self.failures)
        return COLUMNS.format(self.node.name, self.node.model, self.node.address, self.state, *counts)


async def start(cluster: Cluster, node: Node, contract: Contract, prefix: Sequence[str] = ()) -> Child:
    """Start a node as a child process, in a session of its own so that Ctrl-C reaches it only through us.

    `prefix` is a command that runs another, such as ``ip netns exec NAME``.
    """
    arguments = [str(cluster.export / f"{node.model}.onnx"), "--address", node.address, "--attached"]
    if identity := cluster.identity(node.name):
        arguments += ["--cert", str(identity.certificate), "--key", str(identity.key), "--ca", str(identity.ca)]
        arguments += ["--allow", cluster.tls.coordinator]
    else:
        arguments.append("--insecure")
    if cluster.sensor:
        arguments += ["--sensor", str(cluster.sensor)]
    return await spawn(node, contract, ["node", *arguments], prefix)


async def spawn(node: Node, contract: Contract, arguments: Sequence[str], prefix: Sequence[str] = ()) -> Child:
    """Run ``nonn`` with some arguments as a child process, for example behind ``ip netns exec NAME``."""
    process = await asyncio.create_subprocess_exec(
        *(*prefix, sys.executable, "-m", "nonn", *arguments),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,
    )
    child = Child(node, contract, process)
    child.listener = asyncio.create_task(listen(child))
    return child


async def listen(child: Child) -> None:
    """Keep the last line that a child says: why it failed, if it does."""
    while line := await child.process.stderr.readline():
        child.said = line.decode(errors="replace").strip()[:200] or child.said


async def stop(child: Child) -> None:
    """End a child process: politely, then by force."""
    if not child.has_exited:
        child.process.terminate()
        try:
            await asyncio.wait_for(child.process.wait(), GRACE)
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
                child.process.kill()
            await child.process.wait()
    if child.listener:
        await child.listener
