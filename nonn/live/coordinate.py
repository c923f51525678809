"""The command ``nonn coordinate``: a coordinator that stays, and with ``--follow`` follows its cluster file."""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path
from typing import Any

from nonn.core.names import APPLICATION
from nonn.live.following import FollowedNetwork
from nonn.runtime.cluster import CLUSTER_FILE, load_cluster
from nonn.runtime.coordinator import Coordinator
from nonn.runtime.logs import relayed_stderr
from nonn.runtime.served_network import ServedNetwork
from nonn.runtime.serving import serve
from nonn.runtime.serving_options import add_metrics_port, add_serving, callers_from


async def coordinate(path: Path, is_followed: bool, address: str, **how: Any) -> None:
    """Serve the network of a cluster file, which may change if it is followed; see `nonn.runtime.serving.serve`."""
    served = FollowedNetwork(path) if is_followed else ServedNetwork(Coordinator(load_cluster(path)))
    async with served as network:
        await serve(network, address, counters=[network.absences], **how)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--cluster", type=Path, default=CLUSTER_FILE, metavar="FILE", help="the cluster (default: %(default)s)"
    )
    parser.add_argument("--address", default="127.0.0.1:7090", help="host:port to listen on (default: %(default)s)")
    add_serving(parser, APPLICATION)
    add_metrics_port(parser)
    parser.add_argument(
        "--follow", action="store_true", help="go over to another export, node by node, when the cluster file names one"
    )
    parser.epilog = "example: nonn coordinate --cluster cluster.yaml --insecure"


def run(options: argparse.Namespace) -> None:
    """The command ``nonn coordinate``."""
    # To applications it shows the certificate that it shows to its nodes.
    identity = None if options.insecure else load_cluster(options.cluster).own_identity
    served = coordinate(
        options.cluster,
        options.follow,
        options.address,
        identity=identity,
        allowed=callers_from(options, identity, APPLICATION),
        metrics_port=options.metrics_port,
        attached=options.attached,
    )
    with relayed_stderr():
        asyncio.run(served)
