"""Child processes of this machine, such as nodes: started, waited for, watched, and ended in one way.

Children end with this process, however it ends: they are told to stop and waited for. If this process is killed, their
standard input closes, and they stop by themselves.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import sys
from collections.abc import AsyncIterator, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, repeat
from pathlib import Path

from tritonclient.grpc import service_pb2 as oip

from nonn.core.errors import UserError
from nonn.runtime.cluster import Cluster, Node
from nonn.runtime.tls import Identity

#: Seconds until all children must listen, on a busy machine too, and that a child has to stop before it is killed.
START_TIMEOUT_S, GRACE_S = 60.0, 3.0
#: The line of a child that is ready; see `nonn.runtime.attached.announce`.
ANNOUNCEMENT = re.compile(r".* at (\S+:\d+), (mutual TLS|plain text)")

COLUMNS = "{:<14} {:<8} {:<22} {:<16} {:>10} {:>10} {:>9}"
UP = "up"


@dataclass
class Child:
    """A process that serves as a node, and its last known state."""

    node: Node
    process: asyncio.subprocess.Process
    state: str = "starting"
    last_line: str = ""
    requests: int = 0
    failures: int = 0
    latency_ms: float | None = None
    listener: asyncio.Task | None = None
    is_ready: bool = False
    missed: int = 0  # looks in a row without an answer
    ready_or_ended: asyncio.Event = field(default_factory=asyncio.Event)
    _seen: oip.InferStatistics = field(default_factory=oip.InferStatistics)

    @property
    def has_exited(self) -> bool:
        return self.process.returncode is not None

    def update(self, statistics: oip.InferStatistics) -> None:
        """Take over a node's counts. The latency is the mean over the answers since the last look, if there are any."""
        success, before = statistics.success, self._seen.success
        if success.count > before.count:
            self.latency_ms = (success.ns - before.ns) / (success.count - before.count) / 1e6
        self.requests, self.failures = success.count + statistics.fail.count, statistics.fail.count
        self.state, self._seen, self.missed = UP, statistics, 0

    def row(self) -> str:
        latency = "" if self.latency_ms is None else f"{self.latency_ms:.2f} ms"
        counts = (latency, self.requests, self.failures)
        return COLUMNS.format(self.node.name, self.node.model, self.node.address, self.state, *counts)

    async def listen(self) -> None:
        """Keep the last line of the process, which says why it failed if it does; one line says where it listens."""
        assert self.process.stderr is not None  # a pipe
        while line := await self.process.stderr.readline():
            text = line.decode(errors="replace").strip()
            self.last_line = text[:200] or self.last_line
            if found := ANNOUNCEMENT.fullmatch(text):
                self.node, self.is_ready = self.node.model_copy(update={"address": found[1]}), True
                self.ready_or_ended.set()
        self.ready_or_ended.set()

    async def ready(self) -> None:
        """Wait until the process listens; if it ends instead, raise a `UserError` with its last words."""
        await self.ready_or_ended.wait()
        if not self.is_ready:
            raise UserError(f"{self.node.name} did not start: {self.last_line or 'it says nothing'}")


def reasons(children: Iterable[Child]) -> str:
    """Last line or state of each child, by name."""
    return "; ".join(f"{child.node.name}: {child.last_line or child.state}" for child in children)


def coordinator_command(cluster: Path, address: str, *options: str) -> list[str]:
    """Command that serves the network of a cluster file to applications for as long as this process lives."""
    arguments = ["coordinate", "--cluster", str(cluster), "--address", address]
    return [sys.executable, "-m", "nonn", *arguments, "--attached", *options]


def nonn_command(*arguments: str, identity: Identity | None, caller: str, sensor: Path | None) -> list[str]:
    """Command of ``nonn`` that serves a part of a network to this caller for as long as this process lives."""
    options: dict[str, Path | str | None] = {"--sensor": sensor}
    if identity:
        options |= {"--cert": identity.certificate, "--key": identity.key, "--ca": identity.ca, "--allow": caller}
    words = [word for name, value in options.items() if value for word in (name, str(value))]
    return [sys.executable, "-m", "nonn", *arguments, "--attached", *words, *([] if identity else ["--insecure"])]


def node_commands(
    cluster: Cluster, prefixes: Iterable[Sequence[str]] = (), board: str | None = None
) -> dict[Node, list[str]]:
    """Commands that serve the nodes of a cluster, each behind a prefix, such as ``ip netns exec NAME``.

    With a `board` of the catalogue, each student runs as firmware on an emulated one.
    """
    caller = cluster.tls.coordinator if cluster.tls else ""
    commands = {}
    for node, prefix in zip(cluster.nodes, chain(prefixes, repeat(())), strict=False):
        model = str(cluster.export / f"{node.model}.onnx")
        program = ["board", model, "--device", board] if board else ["node", model]
        arguments = (*program, "--address", node.address)
        identity = cluster.identity(node.name)
        commands[node] = [*prefix, *nonn_command(*arguments, identity=identity, caller=caller, sensor=cluster.sensor)]
    return commands


@contextlib.asynccontextmanager
async def running(commands: Mapping[Node, Sequence[str]], wait: bool = True) -> AsyncIterator[dict[str, Child]]:
    """Run a command for each node while the block runs; yield the children by name.

    By default it first waits until all listen; a child's node then says where. The children that the dict holds at the
    end are stopped, so a child that is started again has to replace the former one there.

    Raises
    ------
    UserError
        A child has ended instead, or they take longer than `START_TIMEOUT_S`. All are stopped then.
    """
    children: dict[str, Child] = {}
    try:
        for node, command in commands.items():
            children[node.name] = await start(node, command)
        if wait:
            await _ready(children.values())
        yield children
    finally:
        await asyncio.gather(*(stop(child) for child in children.values()))


async def _ready(children: Collection[Child]) -> None:
    try:
        async with asyncio.timeout(START_TIMEOUT_S):
            await asyncio.gather(*(child.ready() for child in children))
    except TimeoutError:
        late = reasons(child for child in children if not child.is_ready)
        raise UserError(f"not ready in {START_TIMEOUT_S:g} s ({late}); is this machine busy?") from None


async def start(node: Node, command: Sequence[str]) -> Child:
    """Start a child process in its own session, so that Ctrl-C reaches it only through this process."""
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        *command, stdin=pipe, stdout=asyncio.subprocess.DEVNULL, stderr=pipe, start_new_session=True
    )
    child = Child(node, process)
    child.listener = asyncio.create_task(child.listen())
    return child


async def stop(child: Child) -> None:
    """End a child process: politely, then by force."""
    if not child.has_exited:
        child.process.terminate()
        try:
            await asyncio.wait_for(child.process.wait(), GRACE_S)
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
                child.process.kill()
            await child.process.wait()
    if child.listener:
        await child.listener
