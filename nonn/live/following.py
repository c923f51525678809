"""A coordinator that follows its cluster file: it changes to another export while it answers, node by node.

When the file names another export, or the export's folder holds another one, the coordinator serves both for a while.
While both are served, it queries only the nodes of the export that has more of them, so an answer never mixes two
exports. A node that still serves the other export does not refuse: its answer bears the other version, and it counts as
absent. Once all nodes serve the new export, the former one is dropped. If the file is put back, the new one is.

Nodes may be replaced in place, one after another, or started beside the former ones at other addresses, in which case
no answer lacks a student.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import numpy as np
from grpc import StatusCode
from tritonclient.grpc.service_pb2 import ModelInferRequest, ModelInferResponse

from nonn.core.errors import UserError
from nonn.core.files import stamp_of
from nonn.core.progress import log
from nonn.runtime.cluster import Cluster, load_cluster
from nonn.runtime.coordinator import Coordinator
from nonn.runtime.exported import Manifest
from nonn.runtime.protocol import ProtocolError
from nonn.runtime.served_network import NetworkContract, ServedNetwork

#: Seconds between two looks at the cluster file and at the nodes of a new export. Retries of an unusable file back off
#: up to the second value: files it refers to may still be copying.
FILE_POLL_S, MAX_RETRY_PAUSE_S = 0.5, 8.0
#: Why the circuit of a node of a new export is open until it has answered a probe, and why its circuit of the other
#: export is open from then on.
NOT_YET, ELSEWHERE = "does not serve the new export yet", "serves the other export"


class FollowedNetwork:
    """The network of a cluster file, as a model that can be served; use it in ``async with``.

    Its name is that of the export's folder when it began. Its version, and that of each answer, is the export's: see
    `nonn.runtime.served_network.network_version`. A request for a version is answered by the current export alone.
    """

    platform = "nonn"

    def __init__(self, path: Path):
        self.path = path
        self._cluster = load_cluster(path)
        self.current = ServedNetwork(Coordinator(self._cluster))
        self.next: ServedNetwork | None = None
        self.admission, self.absences = self.current.admission, self.current.absences
        self._stamp: tuple = ()
        self._failed_stamp: tuple = ()  # the stamp of what could not be used
        self._pause = self._next_attempt = 0.0
        self._last_problem = ""
        #: Nodes that did not serve the current export when they were last looked at.
        self._not_on_current: set[str] = set()
        self._following: asyncio.Task[None] | None = None
        self._leaving: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> FollowedNetwork:
        await self.current.__aenter__()
        self._following = asyncio.create_task(self._follow())
        return self

    async def __aexit__(self, *reason: object) -> None:
        tasks = [task for task in (self._following, *self._leaving) if task]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for network in self._networks():
            await network.__aexit__(*reason)

    @property
    def contract(self) -> NetworkContract:
        """That of the current export."""
        return self.current.contract

    @property
    def is_ready(self) -> bool:
        """Whether the circuit of any node is closed."""
        return any(network.is_ready for network in self._networks())

    def _networks(self) -> list[ServedNetwork]:
        """The networks that may answer: first that with the larger share of its nodes; if equal, the newer one."""
        networks = [self.next, self.current] if self.next else [self.current]
        return sorted(networks, key=share_present, reverse=True)

    async def infer(self, request: ModelInferRequest, images: np.ndarray, seconds: float | None) -> ModelInferResponse:
        """Answer by one of the exports, or by the other if no node serves the first; see `nonn.runtime.serving.Model`.

        `seconds` are those that the caller has left.
        """
        loop = asyncio.get_running_loop()
        start = loop.time()
        networks = [self.current] if request.model_version else self._networks()
        for network in networks[:-1]:
            try:
                return await network.infer(request, images, seconds)
            except ProtocolError as error:
                if error.code != StatusCode.UNAVAILABLE:
                    raise
        remaining = None if seconds is None else seconds - (loop.time() - start)
        return await networks[-1].infer(request, images, remaining)

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(FILE_POLL_S)
            try:
                await self._attend()
            except Exception as error:  # perhaps only some of the files have been written yet
                problem = str(error) if isinstance(error, UserError) else f"{self.path}: cannot be followed ({error})."
                if problem != self._last_problem:
                    log(f"{problem} The export from before stays in use.")
                self._last_problem = problem

    async def _attend(self) -> None:
        """Read the file if it has changed, and look at the nodes."""
        now = asyncio.get_running_loop().time()
        if (stamp := self._look()) != self._stamp and (stamp != self._failed_stamp or now >= self._next_attempt):
            self._pause = min(2 * self._pause, MAX_RETRY_PAUSE_S) if stamp == self._failed_stamp else FILE_POLL_S
            self._failed_stamp, self._next_attempt = stamp, now + self._pause
            await self._read_again()
            self._stamp = stamp  # that from before reading, so that later changes are read as well
            self._last_problem = ""
        if self.next:
            self._tell_apart(self.next)
        if self.next and share_present(self.next) == 1:
            former, self.current, self.next = self.current, self.next, None
            log(f"{self.path}: all nodes serve version {self.current.contract.version}")
            self._leave(former)

    def _leave(self, network: ServedNetwork) -> None:
        task = asyncio.create_task(leave(network))
        self._leaving.add(task)
        task.add_done_callback(self._leaving.discard)

    def _tell_apart(self, new: ServedNetwork) -> None:
        """Let no node count for both exports: it serves the one for which it last answered a probe.

        Otherwise a node that was replaced between requests would count for the former export until three requests had
        failed there.
        """
        others = {connection.node.address: connection for connection in new.coordinator.connections}
        not_on_current = set()
        for connection in self.current.coordinator.connections:
            other = others.get(connection.node.address)
            if other is None or other.contract.version == connection.contract.version:
                continue
            if connection.breaker_is_open:
                not_on_current.add(connection.name)
            elif not other.breaker_is_open:
                (other if connection.name in self._not_on_current else connection).open_breaker(ELSEWHERE)
        self._not_on_current = not_on_current

    def _look(self) -> tuple:
        """A value that changes whenever the cluster file or the manifest of its export does."""
        return (self._cluster.export, stamp_of(self.path), stamp_of(self._cluster.export / "manifest.json"))

    async def _read_again(self) -> None:
        """Take over the present content of the file.

        Raises
        ------
        UserError
            It or its export cannot be used, or the export is of other classes or images, or encryption begins or ends.
        """
        read, network = await asyncio.to_thread(self._load)
        cluster = network.coordinator.cluster
        refuse_other_tasks(cluster, self.current.coordinator.manifest, network.coordinator.manifest)
        if read.tls != cluster.tls:
            log(f"{self.path}: tls: is read at the start alone. Start the coordinator again for other certificates.")
        network.contract = replace(network.contract, model=self.current.contract.model)
        network.admission, network.absences = self.admission, self.absences
        self._cluster, former = cluster, self.next
        if same_service(network, self.current):
            self.next = None
        elif former is None or not same_service(network, former):
            await network.__aenter__()
            for connection in network.coordinator.connections:  # each has to answer a probe first
                connection.open_breaker(NOT_YET)
            self.next = network
            log(f"{self.path}: goes over to version {network.contract.version}, node by node")
        if former and former is not self.next:
            self._leave(former)
        for kept in self._networks():
            kept.coordinator.timeout = network.coordinator.timeout
        self.admission.timeout = network.coordinator.timeout

    def _load(self) -> tuple[Cluster, ServedNetwork]:
        """The present cluster file, and its network, which uses the certificates of the start.

        All files are read and compared with their checksums.
        """
        cluster = load_cluster(self.path)
        if (cluster.tls is None) != (self._cluster.tls is None):
            raise UserError(f"{self.path}: tls: is read at the start alone. Start the coordinator again.")
        return cluster, ServedNetwork(Coordinator(cluster.model_copy(update={"tls": self._cluster.tls})))


def share_present(network: ServedNetwork) -> float:
    """The share of a network's nodes whose circuits are closed."""
    connections = network.coordinator.connections
    return sum(not connection.breaker_is_open for connection in connections) / len(connections)


def same_service(one: ServedNetwork, other: ServedNetwork) -> bool:
    """Whether two networks are the same export on the same nodes."""
    versions = {network.contract.version for network in (one, other)}
    return len(versions) == 1 and one.coordinator.cluster.nodes == other.coordinator.cluster.nodes


def refuse_other_tasks(cluster: Cluster, current: Manifest, new: Manifest) -> None:
    """A `UserError` if applications could not take the answers of a new export for those of the current one."""
    images = [(manifest.image.channels, manifest.image.size) for manifest in (current, new)]
    if current.classes != new.classes or images[0] != images[1]:
        remedy = "Start another coordinator for it, at another address."
        raise UserError(f"{cluster.export}: has other classes or images than the network that is served. {remedy}")


async def leave(network: ServedNetwork) -> None:
    """Close a network's connections, once the calls under way have had their time."""
    try:
        await asyncio.sleep(network.coordinator.timeout)
    finally:
        await network.__aexit__(None, None, None)
