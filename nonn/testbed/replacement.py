"""Campaign `nonn replace`: every node of a running cluster gets a student of another export, one after another.

Meanwhile applications call a coordinator that follows its cluster file (`nonn.live.following`), on this machine only.
A node's process is stopped, and one that serves the other export starts in its place, as on a device without room for
two students. No request may be lost. Up to rounding, each answer must be that of the students that took part and the
final layer of the export whose version it bears: features of two exports are never mixed.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from grpc import aio
from tritonclient.grpc.service_pb2 import ModelInferResponse
from tritonclient.utils import deserialize_bytes_tensor

from nonn.core.errors import UserError
from nonn.core.names import APPLICATION
from nonn.core.options import amount, natural
from nonn.core.progress import log
from nonn.live.following import FILE_POLL_S
from nonn.live.health import wait_for
from nonn.runtime.channel import MODEL_INFER, open_channel, wait_connected
from nonn.runtime.cluster import write_cluster
from nonn.runtime.coordinator import MAX_PAUSE_S
from nonn.runtime.exported import read_manifest
from nonn.runtime.final import FinalLayer, predict
from nonn.runtime.node import ServedStudent
from nonn.runtime.processes import START_TIMEOUT_S, node_commands, start, stop
from nonn.runtime.protocol import make_request
from nonn.runtime.served_network import network_version
from nonn.runtime.tls import Identity
from nonn.testbed.bed import RunningCluster, running_cluster

#: Different images that are sent, in turn.
IMAGES = 50
#: Seconds beyond the deadline after which a request counts as lost, and within which the cluster has to be whole.
EXTRA_S, RECOVERY_S = 5.0, 30.0
#: Seconds until the next node is replaced: by then the coordinator has found the one before. Without this pause both
#: exports might have few students.
PAUSE_S = MAX_PAUSE_S + FILE_POLL_S
#: Largest difference of a probability that is rounding.
ROUNDING = 1e-4


class Reference:
    """The answers of an export for some images, with any of its students, computed in this process.

    Parameters
    ----------
    images : ndarray of uint8, shape (n, channels, size, size)
    """

    def __init__(self, folder: Path, images: np.ndarray):
        self.manifest = read_manifest(folder)
        self.version = network_version(self.manifest)
        self.final = FinalLayer.load(folder, self.manifest)
        self.features = [ServedStudent(folder / student.file).run(images) for student in self.manifest.students]

    def probabilities(self, image: int, present: list[int]) -> np.ndarray:
        """Of all classes, float64 of shape (C,), for an image by its number, from the students at these positions."""
        features = {position: self.features[position][image] for position in present}
        return np.array(predict(self.manifest, self.final, features).probabilities)


@dataclass
class Replacement:
    """The outcomes of a campaign."""

    versions: tuple[str, str]  # of the former and of the new export
    latencies_ms: list[float] = field(default_factory=list)  # of answers
    #: Answers by version and by the number of students that took part.
    answers: Counter[tuple[str, int]] = field(default_factory=Counter)
    lost: Counter[str] = field(default_factory=Counter)  # requests without an answer, by reason
    wrong: int = 0  # answers that neither export gives
    seconds: dict[str, float] = field(default_factory=dict)  # that the replacement of each node took, by name
    whole_again: bool = False

    @property
    def requests(self) -> int:
        return len(self.latencies_ms) + self.lost.total()

    def problems(self) -> list[str]:
        """Failures of the requirements, a phrase each."""
        problems = [f"{count} requests were lost ({reason})" for reason, count in self.lost.items()]
        if self.wrong:
            problems.append(f"{self.wrong} answers were of neither export")
        if not self.whole_again:
            problems.append("not all nodes served the new export at the end")
        return problems


class Campaign:
    """Requests to a coordinator, and the nodes behind it that are replaced."""

    def __init__(self, bed: RunningCluster, new: Path, images: np.ndarray, call: aio.UnaryUnaryMultiCallable):
        self.bed, self.new, self.images, self.call = bed, new, images, call
        self.references = {r.version: r for r in (Reference(folder, images) for folder in (bed.cluster.export, new))}
        former, *rest = self.references
        self.seen = Replacement((former, rest[0] if rest else former))
        self.positions = {node.name: position for node, position, _ in bed.cluster.placed()[1]}
        contract = bed.cluster.placed()[1][0][2]
        requests = [make_request(contract, image) for image in images]
        for request in requests:
            request.model_name = bed.cluster.export.resolve().name
        self.contents = [request.SerializeToString() for request in requests]

    async def ask(self) -> tuple[str, int]:
        """Send one request; the version of its answer and the number of students in it, or the error and 0."""
        image = self.seen.requests % len(self.images)
        begun = time.perf_counter()
        try:
            content = await self.call(self.contents[image], timeout=self.bed.cluster.deadline_ms / 1000 + EXTRA_S)
        except aio.AioRpcError as error:
            reason = f"{error.code().name}: {(error.details() or '')[:100]}"
            self.seen.lost[reason] += 1
            return reason, 0
        self.seen.latencies_ms.append(1000 * (time.perf_counter() - begun))
        version, present, probabilities = read_answer(content)
        self.seen.answers[version, len(present)] += 1
        reference = self.references.get(version)
        expected = reference and reference.probabilities(image, [self.positions[name] for name in present])
        if expected is None or np.abs(expected - probabilities).max() > ROUNDING:
            self.seen.wrong += 1
        return version, len(present)

    async def replace_all(self, due: Callable[[int], bool]) -> None:
        """Name the new export in the cluster file, then replace each node as soon as it is due."""
        cluster = self.bed.cluster.model_copy(update={"export": self.new})
        write_cluster(self.bed.cluster_file, cluster)
        contracts = {node.name: contract for node, _, contract in cluster.placed()[1]}
        for number, node in enumerate(cluster.nodes):
            while not due(number):
                await asyncio.sleep(0.01)
            begun = time.monotonic()
            await stop(self.bed.children[node.name])
            child = await start(node, node_commands(cluster)[node])
            self.bed.children[node.name] = child  # so that it ends with the bed in any case
            # Asked by the protocol, since the line by which a child says that it listens may get lost among gRPC's.
            contract = contracts[node.name]
            if problem := await wait_for(
                node, contract, cluster.own_identity, START_TIMEOUT_S, partial(getattr, child, "has_exited")
            ):
                raise UserError(f"{node.name} did not start: {child.last_line or problem}")
            await asyncio.sleep(PAUSE_S)
            self.seen.seconds[node.name] = time.monotonic() - begun
            log(f"{node.name}: replaced in {self.seen.seconds[node.name]:.1f} s, {self.seen.requests} requests so far")


def read_answer(content: bytes) -> tuple[str, list[str], np.ndarray]:
    """Version, names of the nodes that took part, and probabilities (C,) of a coordinator's answer."""
    response = ModelInferResponse.FromString(content)
    raw = {output.name: data for output, data in zip(response.outputs, response.raw_output_contents, strict=True)}
    present = [name.decode() for name in deserialize_bytes_tensor(raw["present"])]
    return response.model_version, present, np.frombuffer(raw["probabilities"], "<f4")


async def replace_cluster(former: Path, new: Path, n_requests: int, callers: int, deadline_ms: float) -> Replacement:
    """Replace all nodes while so many callers send requests, at least `n_requests` in all."""
    shape = (IMAGES, *read_manifest(former).image.shape)
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    async with contextlib.AsyncExitStack() as stack:
        bed = await stack.enter_async_context(running_cluster(former, deadline_ms))
        coordinator = await stack.enter_async_context(bed.running_coordinator("--follow"))
        channel = open_channel(coordinator, 2**20, Identity.of(APPLICATION, bed.folder))
        await stack.enter_async_context(channel)
        await wait_connected(channel)
        campaign = Campaign(bed, new, images, channel.unary_unary(MODEL_INFER))
        await run_campaign(campaign, n_requests, callers)
        return campaign.seen


async def run_campaign(campaign: Campaign, n_requests: int, callers: int) -> None:
    """Call until `n_requests` have been sent and all nodes are replaced; replacements are spread over the requests."""
    seen, parts = campaign.seen, len(campaign.bed.cluster.nodes) + 1
    replacing = asyncio.create_task(
        campaign.replace_all(lambda number: seen.requests >= n_requests * (number + 1) / parts)
    )

    async def keep_asking() -> None:
        while seen.requests < n_requests or not replacing.done():
            await campaign.ask()

    try:
        await asyncio.gather(*(keep_asking() for _ in range(callers)))
        await replacing
    finally:
        replacing.cancel()
        await asyncio.gather(replacing, return_exceptions=True)
    end = time.monotonic() + RECOVERY_S
    while not seen.whole_again and time.monotonic() < end:
        seen.whole_again = await campaign.ask() == (seen.versions[1], parts - 1)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("export", type=Path, metavar="FOLDER", help="folder of an exported network")
    parser.add_argument(
        "--by", type=Path, metavar="FOLDER", help="export that takes its place, of the same classes (default: the same)"
    )
    parser.add_argument("--requests", type=natural, default=10_000, help="in all, at least (default: %(default)s)")
    parser.add_argument("--callers", type=natural, default=2, help="at once (default: %(default)s)")
    parser.add_argument("--deadline-ms", type=amount, default=200.0, help="of the nodes (default: %(default)s)")
    parser.epilog = "example: nonn replace results/mnist5k_full/export/4s --by results/mnist5k/export/4s"


def run(options: argparse.Namespace) -> None:
    """The command ``nonn replace``."""
    new = options.by or options.export
    manifests = [read_manifest(folder) for folder in (options.export, new)]
    tasks = [(m.classes, m.image.channels, m.image.size, [s.model for s in m.students]) for m in manifests]
    if tasks[0] != tasks[1]:
        raise UserError(
            f"{new}: its classes, images or students are not those of {options.export}. Name another export."
        )
    if not options.requests or not options.callers:
        raise UserError("--requests and --callers: give at least 1")
    seen = asyncio.run(replace_cluster(options.export, new, options.requests, options.callers, options.deadline_ms))
    for (version, n_students), count in sorted(seen.answers.items(), key=lambda item: -item[0][1]):
        which = "former" if version == seen.versions[0] else "new"
        print(f"  {count:>8}  answered by {n_students} students of the {which} export")
    p50, p99 = np.quantile(seen.latencies_ms, [0.5, 0.99]) if seen.latencies_ms else (0.0, 0.0)
    print(f"latency: p50 {p50:.1f} ms, p99 {p99:.1f} ms, longest {max(seen.latencies_ms, default=0):.1f} ms")
    longest = max(seen.seconds.values(), default=0.0)
    print(f"{len(seen.seconds)} nodes replaced one after another, each within {longest:.1f} s")
    print(f"answers of neither export: {seen.wrong}")
    print(f"requests lost of {seen.requests}: {seen.lost.total()}")
    if problems := seen.problems():
        raise UserError("; ".join(problems))
