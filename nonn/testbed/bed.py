"""A cluster for a campaign: nodes as processes of this machine, under mutual TLS, on ports of their own."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

from nonn.core.files import scratch_folder
from nonn.core.names import COORDINATOR
from nonn.runtime.certs import write_certificates
from nonn.runtime.cluster import Cluster, local_cluster
from nonn.runtime.processes import Child, node_commands, running, start

#: A name that the authority has signed and that no node allows, and the folder of another authority.
STRANGER, OTHER = "stranger", "other"


@dataclass
class RunningCluster:
    """A running cluster and its processes, by name of the node."""

    cluster: Cluster
    children: dict[str, Child]

    async def restart(self, name: str) -> None:
        """Start a node again, on the same port, after its process has ended."""
        node = self.children[name].node
        self.children[name] = await start(node, node_commands(self.cluster)[node])


@contextlib.asynccontextmanager
async def running_bed(export: Path, deadline_ms: float) -> AsyncIterator[RunningCluster]:
    """Run all nodes of an exported network while the block runs."""
    with scratch_folder() as folder:
        cluster = local_cluster(export, folder, 0, deadline_ms)
        write_certificates(folder, [COORDINATOR, STRANGER, *(node.name for node in cluster.nodes)])
        write_certificates(folder / OTHER, [COORDINATOR])
        async with running(node_commands(cluster)) as children:
            nodes = [children[node.name].node for node in cluster.nodes]  # each has chosen its port
            yield RunningCluster(cluster.model_copy(update={"nodes": nodes}), children)
