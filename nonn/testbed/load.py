"""Campaign `nonn load`: many callers at once at a node and at a coordinator, on this machine only.

Nodes and coordinator run as processes of their own, under mutual TLS. The callers live in this process: each calls,
waits for the answer or the deadline, and calls again. A refused caller returns after the retry time, and one without an
answer in time after a pause that grows with each try; with ``--impatient`` both return at once, as no well-behaved
caller would. With ``--idle`` a stranger, which has a certificate but is on no list, keeps that many calls open without
ever sending a message. Callers share the processor with the servers, so the figures are those of a machine that does
everything.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import numpy as np
from grpc import StatusCode, aio
from tritonclient.grpc.service_pb2 import ModelInferResponse

from nonn.core.errors import UserError
from nonn.core.files import write_json
from nonn.core.names import APPLICATION
from nonn.core.options import amount, natural, numbers, seed_number
from nonn.core.progress import log
from nonn.runtime.admission import MAX_RETRY_S
from nonn.runtime.channel import MODEL_INFER, busy_seconds, open_channel, wait_all_connected
from nonn.runtime.cluster import Node
from nonn.runtime.exported import read_manifest
from nonn.runtime.protocol import ImageContract, make_request
from nonn.runtime.served_network import NetworkContract, network_version
from nonn.runtime.tls import Identity
from nonn.testbed.bed import STRANGER, running_cluster

#: Callers that share a connection, as the threads of an application do.
CALLERS_PER_CONNECTION = 100
#: Seconds at the start of each run that are not counted: callers arrive and estimates settle.
WARM_UP_S = 5.0
#: Mean pause in seconds of a caller that got neither an answer nor a retry time; doubled each time.
PAUSE_S = 0.1
#: Seconds after which the stranger replaces an idle call that was ended.
RECALL_PAUSE_S = 1.0
#: Seconds that a caller waits after a refusal with ``--impatient``: a network would take as long.
IMPATIENT_PAUSE_S = 0.001
COLUMNS = "{:<12} {:>8} {:>11} {:>9} {:>9} {:>9} {:>10} {:>9} {:>9} {:>10}"
HEADER = ("asked", "callers", "answered/s", "p50 ms", "p95 ms", "p99 ms", "refused/s", "late/s", "failed/s", "complete")


@dataclass
class Tally:
    """The outcomes of the calls to a node or a coordinator."""

    asked: str
    callers: int
    seconds: float
    latencies_ms: list[float] = field(default_factory=list)  # of answers
    complete: int = 0  # answers with all students
    refused: int = 0
    late: int = 0
    failed: int = 0

    def summary(self) -> dict:
        """Rates a second, percentiles of the latency in milliseconds, and the share of answers with all students."""
        answered = len(self.latencies_ms)
        p50, p95, p99 = np.quantile(self.latencies_ms, [0.5, 0.95, 0.99]).tolist() if answered else (None,) * 3
        rates = {"answered": answered, "refused": self.refused, "late": self.late, "failed": self.failed}
        return {
            "asked": self.asked,
            "callers": self.callers,
            **{f"{name}_per_s": count / self.seconds for name, count in rates.items()},
            **{"p50_ms": p50, "p95_ms": p95, "p99_ms": p99},
            "complete": self.complete / answered if answered else None,
        }


def row(summary: dict) -> str:
    """A line of the table."""
    times = ["-" if summary[p] is None else f"{summary[p]:.1f}" for p in ("p50_ms", "p95_ms", "p99_ms")]
    rates = [f"{summary[f'{name}_per_s']:.0f}" for name in ("answered", "refused", "late", "failed")]
    complete = "-" if summary["complete"] is None else f"{summary['complete']:.2%}"
    return COLUMNS.format(summary["asked"], summary["callers"], rates[0], *times, *rates[1:], complete)


@dataclass
class LoadTarget:
    """A node or a coordinator that is called, the caller's identity, and the size of a complete answer."""

    node: Node
    contract: ImageContract
    identity: Identity
    n_present: int | None  # students of a complete answer; None if there is only one

    def is_complete(self, content: bytes) -> bool:
        """Whether all students took part in an answer."""
        if self.n_present is None:
            return True
        response = ModelInferResponse.FromString(content)
        position = [output.name for output in response.outputs].index("present")
        return response.outputs[position].shape[0] == self.n_present


async def call_repeatedly(
    call: aio.UnaryUnaryMultiCallable,
    content: bytes,
    target: LoadTarget,
    tally: Tally,
    deadline: float,
    start: float,
    random: Random,
    impatient: bool,
) -> None:
    """One caller in a closed loop, from `start` until the campaign's time is over."""
    loop, in_vain = asyncio.get_running_loop(), 0
    counted, end = start + WARM_UP_S, start + WARM_UP_S + tally.seconds
    await asyncio.sleep(random.random() * 0.8 * WARM_UP_S)  # callers do not start at the same moment
    while loop.time() < end:
        began, pause = loop.time(), 0.0
        kind, answer = "answered", b""
        try:
            answer = await call(content, timeout=deadline)
        except aio.AioRpcError as error:
            seconds = busy_seconds(error)
            if seconds is not None:
                kind, pause = "refused", IMPATIENT_PAUSE_S if impatient else seconds * random.uniform(1.0, 1.1)
            elif error.code() == StatusCode.DEADLINE_EXCEEDED:
                kind = "late"
            else:
                kind = "failed"
        now = loop.time()
        if counted <= now < end:
            if kind == "answered":
                tally.latencies_ms.append(1000 * (now - began))
                tally.complete += target.is_complete(answer)
            else:
                setattr(tally, kind, getattr(tally, kind) + 1)
        in_vain = in_vain + 1 if kind in ("late", "failed") else 0
        if in_vain and not impatient:
            pause = random.uniform(0, min(PAUSE_S * 2**in_vain, MAX_RETRY_S))
        if pause:
            await asyncio.sleep(min(pause, max(end - now, 0)))


@contextlib.asynccontextmanager
async def idle_calls(target: LoadTarget, stranger: Identity, count: int) -> AsyncIterator[None]:
    """Keep `count` calls of headers alone open while the block runs; each that is ended is made again."""

    async def keep_calling(begin: aio.StreamUnaryMultiCallable) -> None:
        while True:
            await begin().code()  # the server ends it, since nothing is ever written
            await asyncio.sleep(RECALL_PAUSE_S)

    async with open_channel(target.node, target.contract.message_limit, stranger, own=True) as channel:
        begin = channel.stream_unary(MODEL_INFER)
        callers = [asyncio.create_task(keep_calling(begin)) for _ in range(count)]
        try:
            yield
        finally:
            for caller in callers:
                caller.cancel()
            await asyncio.gather(*callers, return_exceptions=True)


async def measure(
    target: LoadTarget, callers: int, seconds: float, deadline: float, seed: int, impatient: bool
) -> Tally:
    """Call from so many callers at once for some seconds after the warm-up."""
    tally = Tally(target.node.name, callers, seconds)
    generator = np.random.default_rng(seed)
    image = generator.integers(0, 256, target.contract.image_shape[1:], dtype=np.uint8)
    content = make_request(target.contract, image).SerializeToString()
    async with contextlib.AsyncExitStack() as stack:
        channels = []
        for _ in range(-(-callers // CALLERS_PER_CONNECTION)):
            channel = open_channel(target.node, target.contract.message_limit, target.identity, own=True)
            channels.append(await stack.enter_async_context(channel))
        await wait_all_connected(channels)
        calls = [channel.unary_unary(MODEL_INFER) for channel in channels]
        start = asyncio.get_running_loop().time()
        common = (content, target, tally, deadline, start)
        loops = (
            call_repeatedly(calls[i % len(calls)], *common, Random(f"{seed} {i}"), impatient) for i in range(callers)
        )
        await asyncio.gather(*loops)
    return tally


@contextlib.asynccontextmanager
async def running_targets(export: Path, deadline_ms: float) -> AsyncIterator[list[LoadTarget]]:
    """A running node and a running coordinator of an exported network, with nodes of its own."""
    async with running_cluster(export, deadline_ms) as bed, bed.running_coordinator() as coordinator:
        identity = bed.cluster.own_identity
        assert identity, "a bed has certificates"
        manifest, placed = bed.cluster.placed()
        node, _, contract = placed[0]
        image, version = manifest.image, network_version(manifest)
        name, n_classes = export.resolve().name, len(manifest.classes)
        network = NetworkContract(name, image.channels, image.size, n_classes, version=version)
        yield [
            LoadTarget(node, contract, identity, None),
            LoadTarget(coordinator, network, Identity.of(APPLICATION, bed.folder), len(placed)),
        ]


async def run_load(
    export: Path, callers: list[int], seconds: float, deadline_ms: float, seed: int, impatient: bool, idle: int
) -> list[dict]:
    """Summaries for each number of callers, first of a node, then of a coordinator; see `Tally.summary`."""
    summaries = []
    async with running_targets(export, deadline_ms) as targets:
        print(COLUMNS.format(*HEADER), flush=True)
        stranger = Identity.of(STRANGER, targets[0].identity.ca.parent)
        for target in targets:
            for count in callers:
                async with idle_calls(target, stranger, idle):
                    tally = await measure(target, count, seconds, deadline_ms / 1000, seed, impatient)
                summaries.append(tally.summary())
                print(row(summaries[-1]), flush=True)
    return summaries


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("export", type=Path, metavar="FOLDER", help="of an exported network")
    parser.add_argument("--callers", type=numbers, default="1,10,100,1000", help="at once (default: %(default)s)")
    parser.add_argument("--seconds", type=amount, default=10.0, help="for each number of them (default: %(default)s)")
    parser.add_argument("--deadline-ms", type=amount, default=100.0, help="of a call (default: %(default)s)")
    parser.add_argument("--impatient", action="store_true", help="retry at once, ignoring retry-after")
    parser.add_argument("--idle", type=natural, default=0, metavar="N", help="calls that a stranger keeps open, silent")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    parser.add_argument("--seed", type=seed_number, default=0)
    parser.epilog = "example: nonn load export/4s --callers 1,10 --seconds 5"


def run(options: argparse.Namespace) -> None:
    """The command ``nonn load``."""
    if not 0 < options.seconds <= 3600:
        raise UserError("--seconds: give more than 0, up to 3600")
    read_manifest(options.export)
    settings = {name: getattr(options, name) for name in ("seconds", "deadline_ms", "impatient", "idle")}
    summaries = asyncio.run(run_load(options.export, options.callers, seed=options.seed, **settings))
    if options.json:
        write_json(options.json, settings | {"loads": summaries})
        log(f"{options.json}: written")
