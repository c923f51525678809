"""Campaign `nonn soak`: continuous requests to a cluster whose nodes are killed and stopped, on this machine only.

Every so often one node is killed with SIGKILL and started again, another is stopped for longer than the
deadline, and a third gets more calls than it can answer. Every request must be answered, none much later
than the deadline, memory must not grow, and in the end the cluster must be whole again. A node that has too
many calls must refuse some.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import numpy as np
from grpc import aio

from nonn.core.errors import UserError
from nonn.core.options import amount, at_least, seed_number
from nonn.core.progress import track
from nonn.runtime.channel import MODEL_INFER, busy_seconds, open_channel
from nonn.runtime.coordinator import Coordinator, NobodyAnsweredError
from nonn.runtime.processes import Child
from nonn.runtime.protocol import make_request
from nonn.testbed.bed import RunningCluster, running_cluster
from nonn.testbed.latency import memory_kib

#: How long a node is stopped, in deadlines; and seconds that recovery at the end may take.
NAP, RECOVERY_S = 3.0, 15.0
#: Callers of a node that gets too many calls, seconds for which they call, their deadline as a share of the cluster's,
#: and seconds until a refused one returns: earlier than its retry time, or the crowd would not last.
CROWD, RUSH, CROWD_SHARE, RETURN = 64, 1.0, 0.5, 0.02
#: How late an answer may be, in milliseconds: at p99 and at p99.9 of all requests.
LATE_P99_MS, LATE_P999_MS = 5.0, 20.0
#: Growth of memory that counts as a leak, in bytes a request: less than any message of a request.
LEAK_BYTES = 50.0
#: Fewest requests: with fewer, the warm-up of processes would pass for a leak.
FEWEST = 1000


@dataclass
class Soak:
    """The outcomes of a campaign."""

    late_ms: np.ndarray  # (requests,), float64: time beyond the deadline, negative if it was answered earlier
    present: np.ndarray  # (requests,), int64: how many students took part; 0 if it was not answered
    memory: list[tuple[int, int]] = field(default_factory=list)  # requests done, and bytes of this process (RSS) then
    kills: int = 0
    naps: int = 0
    crowds: int = 0
    refused: int = 0  # calls of the crowds
    whole_again: bool = False

    @property
    def unanswered(self) -> int:
        return int((self.present == 0).sum())

    @property
    def late_percentiles_ms(self) -> tuple[float, float]:
        """The 99th and the 99.9th."""
        return tuple(np.quantile(self.late_ms, [0.99, 0.999]))

    @property
    def bytes_per_request(self) -> float:
        """Slope of memory over the second half of the requests, when caches are warm."""
        requests, sizes = np.array(self.memory[len(self.memory) // 2 :], float).T
        return float(np.polyfit(requests, sizes, 1)[0]) if len(requests) > 1 else 0.0

    def problems(self) -> list[str]:
        """Failures of the requirements, a phrase each."""
        problems = []
        if self.unanswered:
            problems.append(f"{self.unanswered} requests were not answered")
        p99, p999 = self.late_percentiles_ms
        if p99 > LATE_P99_MS or p999 > LATE_P999_MS:
            problems.append(f"late by {p99:.1f} ms at p99, {p999:.1f} ms at p99.9")
        if self.bytes_per_request > LEAK_BYTES:
            problems.append(f"memory grew by {self.bytes_per_request:.1f} bytes a request")
        if self.crowds and not self.refused:
            problems.append("no node refused anything, however many calls it had")
        if not self.whole_again:
            problems.append("the cluster was not whole again at the end")
        return problems


async def disturb(bed: RunningCluster, soak: Soak, random: Random, every: float) -> None:
    """Kill and restart a node, then stop one for a while, then call one too often, and so on until cancelled."""
    names = list(bed.children)
    while True:
        await asyncio.sleep(every / 3)
        victim = random.choice(names)
        process = send(bed.children[victim], signal.SIGKILL)
        if await process.wait() != -signal.SIGKILL:
            raise ended_by_itself(bed.children[victim])
        soak.kills += 1
        await bed.restart(victim)
        await bed.children[victim].ready()  # otherwise all nodes of a slow machine might be down in the end
        await asyncio.sleep(every / 3)
        sleeper = send(bed.children[random.choice(names)], signal.SIGSTOP)
        soak.naps += 1
        try:
            await asyncio.sleep(NAP * bed.cluster.deadline_ms / 1000)
        finally:
            with contextlib.suppress(ProcessLookupError):
                sleeper.send_signal(signal.SIGCONT)
        await asyncio.sleep(every / 3)
        soak.crowds += 1
        await crowd(bed, soak, random.choice(names))


def send(child: Child, number: signal.Signals) -> asyncio.subprocess.Process:
    """Send a signal to a node's process, and return that; a `UserError` if the node has already ended."""
    try:
        child.process.send_signal(number)
    except ProcessLookupError:
        raise ended_by_itself(child) from None
    return child.process


def ended_by_itself(child: Child) -> UserError:
    code = child.process.returncode
    return UserError(
        f"{child.node.name} ended by itself, with exit status {code} ({child.last_line or 'it said nothing'})"
    )


async def crowd(bed: RunningCluster, soak: Soak, name: str) -> None:
    """Call a node from many callers at once for a while; answers are ignored."""
    contract = next(contract for node, _, contract in bed.cluster.placed()[1] if node.name == name)
    content = make_request(contract, np.zeros(contract.image_shape[1:], np.uint8)).SerializeToString()
    deadline = bed.cluster.deadline_ms / 1000
    loop = asyncio.get_running_loop()
    end = loop.time() + RUSH

    async def call_on_and_on(call: aio.UnaryUnaryMultiCallable) -> None:
        while loop.time() < end:
            try:
                await call(content, timeout=CROWD_SHARE * deadline)
            except aio.AioRpcError as error:
                soak.refused += busy_seconds(error) is not None
                await asyncio.sleep(RETURN)

    own, limit = bed.cluster.own_identity, contract.message_limit
    async with open_channel(bed.children[name].node, limit, own, own=True) as channel:
        call = channel.unary_unary(MODEL_INFER)
        await asyncio.gather(*(call_on_and_on(call) for _ in range(CROWD)))


async def soak_cluster(export: Path, n_requests: int, deadline_ms: float, every: float, seed: int) -> Soak:
    """Classify random images, one after another, while a node is killed every so many seconds."""
    # Filled beforehand, or the records themselves would look like a leak.
    soak = Soak(late_ms=np.full(n_requests, np.inf), present=np.full(n_requests, -1))
    generator = np.random.default_rng(seed)
    async with running_cluster(export, deadline_ms) as bed, Coordinator(bed.cluster) as coordinator:
        contract = coordinator.placed[0][2]
        disturbing = asyncio.create_task(disturb(bed, soak, Random(seed), every))
        try:
            for number in track(range(n_requests), "requests"):
                image = generator.integers(0, 256, contract.image_shape[1:], dtype=np.uint8)
                start = time.perf_counter()
                try:
                    soak.present[number] = len((await coordinator.classify(image)).present)
                except NobodyAnsweredError:
                    soak.present[number] = 0
                soak.late_ms[number] = (time.perf_counter() - start) * 1000 - deadline_ms
                if number % max(n_requests // 100, 1) == 0:
                    soak.memory.append((number, 1024 * memory_kib("VmRSS")))
                if disturbing.done():
                    disturbing.result()  # it ends only with an error
        finally:
            disturbing.cancel()
            await asyncio.gather(disturbing, return_exceptions=True)
        if not disturbing.cancelled():
            disturbing.result()
        soak.whole_again = await becomes_whole(bed, coordinator, image)
    return soak


async def becomes_whole(bed: RunningCluster, coordinator: Coordinator, image: np.ndarray) -> bool:
    """Whether all nodes take part again within `RECOVERY_S` seconds, without any help."""
    for name, child in bed.children.items():
        if child.has_exited:  # killed at the very end, before its restart
            await bed.restart(name)
    end = time.monotonic() + RECOVERY_S
    while time.monotonic() < end:
        with contextlib.suppress(NobodyAnsweredError):
            if not (await coordinator.classify(image)).absent:
                return True
        await asyncio.sleep(0.05)
    return False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("export", type=Path, metavar="FOLDER", help="folder of an exported network")
    parser.add_argument(
        "--requests", type=at_least(FEWEST), default=100_000, help="images to classify (default: %(default)s)"
    )
    parser.add_argument("--deadline-ms", type=amount, default=100.0, help="time for one image (default: %(default)s)")
    parser.add_argument(
        "--kill-every", type=amount, default=10.0, metavar="S", help="seconds between kills (default: %(default)s)"
    )
    parser.add_argument("--seed", type=seed_number, default=0, help="(default: %(default)s)")
    parser.epilog = "example: nonn soak results/mnist5k/export/4s --requests 1000"


def run(options: argparse.Namespace) -> None:
    """The command ``nonn soak``."""
    if not options.kill_every > 0:
        raise UserError("--kill-every: give more than 0 seconds")
    soak = asyncio.run(
        soak_cluster(options.export, options.requests, options.deadline_ms, options.kill_every, options.seed)
    )
    print(f"{len(soak.late_ms)} requests, {soak.kills} nodes killed, {soak.naps} stopped for a while")
    print(f"{soak.crowds} crowds at a node, {soak.refused} of their calls refused at once")
    for n_students, n_requests in zip(*np.unique(soak.present, return_counts=True), strict=True):
        print(f"  {n_requests:>8}  answered by {n_students} students")
    print("time beyond the deadline: p99 {:.2f} ms, p99.9 {:.2f} ms".format(*soak.late_percentiles_ms))
    print(f"memory: {soak.memory[-1][1] / 2**20:.1f} MiB, {soak.bytes_per_request:+.2f} bytes a request")
    print(f"whole again at the end: {'yes' if soak.whole_again else 'no'}")
    if problems := soak.problems():
        raise UserError("; ".join(problems))
