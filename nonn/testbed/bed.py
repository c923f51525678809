"""A cluster for a campaign: nodes as processes of this machine, under mutual TLS, on ports of their own."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

from nonn.core.files import scratch_folder
from nonn.core.names import APPLICATION, COORDINATOR
from nonn.runtime.certs import write_certificates
from nonn.runtime.cluster import Cluster, Node, local_cluster, write_cluster
from nonn.runtime.processes import Child, coordinator_command, node_commands, running, start

#: A name with a certificate that no node allows, and the folder of another authority.
STRANGER, OTHER = "stranger", "other"


@dataclass
class RunningCluster:
    """A running cluster and its processes, by name of the node."""

    cluster: Cluster
    children: dict[str, Child]
    folder: Path  # of the certificates: those of the nodes, of a coordinator, an application, and a stranger

    @property
    def cluster_file(self) -> Path:
        return self.folder / "cluster.yaml"

    async def restart(self, name: str) -> None:
        """Start a node again, on the same port, after its process has ended."""
        node = self.children[name].node
        self.children[name] = await start(node, node_commands(self.cluster)[node])

    @contextlib.asynccontextmanager
    async def running_coordinator(self, *options: str) -> AsyncIterator[Node]:
        """Run a coordinator for applications while the block runs; `options` are those of `nonn coordinate`."""
        write_cluster(self.cluster_file, self.cluster)
        node = Node(name=COORDINATOR, address="127.0.0.1:0", model=COORDINATOR)
        async with running({node: coordinator_command(self.cluster_file, node.address, *options)}) as children:
            yield children[COORDINATOR].node


@contextlib.asynccontextmanager
async def running_cluster(export: Path, deadline_ms: float) -> AsyncIterator[RunningCluster]:
    """Run all nodes of an exported network while the block runs."""
    with scratch_folder() as folder:
        cluster = local_cluster(export, folder, 0, deadline_ms)
        write_certificates(folder, [COORDINATOR, APPLICATION, STRANGER, *(node.name for node in cluster.nodes)])
        write_certificates(folder / OTHER, [COORDINATOR])
        async with running(node_commands(cluster)) as children:
            nodes = [children[node.name].node for node in cluster.nodes]  # each has chosen its port
            yield RunningCluster(cluster.model_copy(update={"nodes": nodes}), children, folder)
