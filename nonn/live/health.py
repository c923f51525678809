"""Whether nodes serve what their cluster file says, asked of them by the protocol: the command ``nonn health``."""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Callable
from pathlib import Path

from grpc import aio
from tritonclient.grpc import service_pb2 as oip
from tritonclient.grpc import service_pb2_grpc as oip_grpc

from nonn.core.errors import UserError
from nonn.core.options import amount
from nonn.runtime.channel import open_channel, reason_of, received, wait_connected
from nonn.runtime.cluster import CLUSTER_FILE, Node, load_cluster
from nonn.runtime.logs import relayed_stderr
from nonn.runtime.protocol import Contract, ProtocolError
from nonn.runtime.tls import Identity

#: Seconds between two questions, and that an answer may take.
POLL_S, ANSWER_TIMEOUT_S = 0.2, 2.0


async def problem_of(stub: oip_grpc.GRPCInferenceServiceStub, contract: Contract) -> str:
    """Why a node does not serve its student of this export; empty if it does."""
    try:
        request = oip.ModelReadyRequest(name=contract.model, version=contract.version)
        answer = received(await stub.ModelReady(request, timeout=ANSWER_TIMEOUT_S))
    except (aio.AioRpcError, ProtocolError) as error:
        return reason_of(error)
    return "" if answer.ready else f"it serves no model {contract.model!r} of version {contract.version}"


async def wait_for(
    node: Node,
    contract: Contract,
    identity: Identity | None,
    seconds: float,
    has_ended: Callable[[], bool] = lambda: False,
) -> str:
    """Ask a node until it serves its student, or the time is over, or it has ended; then why it does not."""
    loop = asyncio.get_running_loop()
    end = loop.time() + seconds
    async with open_channel(node, contract.message_limit, identity, own=True) as channel:
        stub = oip_grpc.GRPCInferenceServiceStub(channel)
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                await wait_connected(channel)
        except TimeoutError:
            pass  # the question says why
        while True:
            problem = await problem_of(stub, contract)
            if not problem or loop.time() >= end or has_ended():
                return problem
            channel.get_state(try_to_connect=True)
            await asyncio.sleep(POLL_S)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--cluster", type=Path, default=CLUSTER_FILE, metavar="FILE", help="the cluster (default: %(default)s)"
    )
    parser.add_argument("--node", action="append", metavar="NAME", help="ask this node only; repeatable")
    parser.add_argument(
        "--wait", type=amount, default=0.0, metavar="S", help="seconds till all have to be there (default: %(default)s)"
    )
    parser.epilog = "example: nonn health --cluster cluster.yaml --wait 30"


def run(options: argparse.Namespace) -> None:
    """The command ``nonn health``: a line for each node, and 1 if one of them does not serve its student."""
    cluster = load_cluster(options.cluster)
    _, placed = cluster.placed()
    names = options.node or [node.name for node, _, _ in placed]
    if unknown := sorted({*names} - {node.name for node, _, _ in placed}):
        raise UserError(f"--node: no {unknown[0]!r} in {options.cluster}.")
    asked = [(node, contract) for node, _, contract in placed if node.name in names]

    async def ask_all() -> list[str]:
        identity = cluster.own_identity
        return await asyncio.gather(*(wait_for(node, contract, identity, options.wait) for node, contract in asked))

    with relayed_stderr():  # gRPC says there in its own words what is told here
        problems = asyncio.run(ask_all())
    for (node, contract), problem in zip(asked, problems, strict=True):
        print(f"{node.name} at {node.address}: {problem or f'serves {contract.model}'}")
    if ill := sum(map(bool, problems)):
        raise UserError(f"{ill} of {len(asked)} nodes do not serve their students of {cluster.export}.")
