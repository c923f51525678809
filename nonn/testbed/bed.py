"""A cluster for a campaign: nodes as processes of this machine, under mutual TLS, on ports of their own."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

from nonn.core.errors import UserError
from nonn.runtime.certs import write_certificates
from nonn.runtime.cluster import COORDINATOR, Cluster, local_cluster
from nonn.runtime.processes import Child, start, stop

#: A name that the authority has signed and that no node allows, and the folder of another authority.
STRANGER, OTHER = "stranger", "other"
#: Seconds that a node may take to start, on a busy machine.
STARTING = 60.0


@dataclass
class RunningCluster:
    """A running cluster and its processes, by name of the node."""

    cluster: Cluster
    children: dict[str, Child]

    async def restart(self, name: str) -> None:
        """Start a node again, on the same port, after its process has ended."""
        child = self.children[name]
        node = next(node for node in self.cluster.nodes if node.name == name)
        self.children[name] = await start(self.cluster, node, child.contract)


async def announced_address(child: Child) -> str:
    """Where a node that was to choose its port itself listens.

    Raises
    ------
    UserError
        It has exited instead, or takes too long.
    """
    end = time.monotonic() + STARTING
    while f"model {child.node.model} at " not in child.said:
        if child.has_exited or time.monotonic() > end:
            raise UserError(f"{child.node.name} did not start: {child.said or 'it says nothing'}")
        await asyncio.sleep(0.02)
    return child.said.split(" at ")[1].split(",")[0]


@contextlib.asynccontextmanager
async def running_bed(export: Path, deadline_ms: float) -> AsyncIterator[RunningCluster]:
    """Run all nodes of an exported network while the block runs."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cluster = local_cluster(export, folder, 0, deadline_ms)
        write_certificates(folder, [COORDINATOR, STRANGER, *(node.name for node in cluster.nodes)])
        write_certificates(folder / OTHER, [COORDINATOR])
        children: dict[str, Child] = {}
        try:
            for node, _, contract in cluster.placed()[1]:
                children[node.name] = await start(cluster, node, contract)
            addresses = {name: await announced_address(child) for name, child in children.items()}
            nodes = [node.model_copy(update={"address": addresses[node.name]}) for node in cluster.nodes]
            bed = RunningCluster(cluster.model_copy(update={"nodes": nodes}), children)
            yield bed
        finally:
            await asyncio.gather(*(stop(child) for child in children.values()))
