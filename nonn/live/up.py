"""A whole cluster on one machine: each node is a child process, and a live table shows their state."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import shutil
import signal
import sys
from collections.abc import Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any

from grpc import aio
from tritonclient.grpc import service_pb2 as oip
from tritonclient.grpc import service_pb2_grpc as oip_grpc

from nonn.core.chips import CHIPS
from nonn.core.errors import UserError
from nonn.core.options import complete_from
from nonn.core.progress import log
from nonn.live import PAGE_PORT
from nonn.runtime.attached import told_to_stop
from nonn.runtime.channel import LATE, open_channel, reason_of, received
from nonn.runtime.cluster import CLUSTER_FILE, Cluster, load_cluster
from nonn.runtime.logs import relayed_stderr
from nonn.runtime.processes import COLUMNS, UP, Child, node_commands, reasons, running
from nonn.runtime.protocol import Contract, ProtocolError

#: Seconds between two looks at a node, and that an answer may take.
POLL_S, ANSWER_TIMEOUT_S = 1.0, 0.5
#: Looks between two lines of counts where there is no terminal.
SPARSE = 60
NO_ANSWER = "no answer"
#: Looks in a row without an answer, of a node that listens, after which the reason is logged.
TOLD_AT = 2

#: A task that runs beside the nodes until it is cancelled.
SideTask = Callable[[list[Child]], Coroutine[Any, Any, None]]


async def watch(child: Child, contract: Contract, cluster: Cluster) -> None:
    """Ask a node for its counts at intervals, until its process ends."""
    async with open_channel(child.node, contract.message_limit, cluster.own_identity) as channel:
        stub = oip_grpc.GRPCInferenceServiceStub(channel)
        while not child.has_exited:
            try:
                request = oip.ModelStatisticsRequest(name=contract.model)
                answer = received(await stub.ModelStatistics(request, timeout=ANSWER_TIMEOUT_S))
                child.update(answer.model_stats[0].inference_stats)
            except (aio.AioRpcError, ProtocolError, IndexError) as error:
                _missed(child, reason_of(error))
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(child.process.wait(), POLL_S)
    child.state = f"exited ({child.process.returncode})"


def _missed(child: Child, reason: str) -> None:
    """Count a look without an answer; log why after the second in a row, as a node may have just begun to listen."""
    child.missed += child.is_ready
    if child.missed == TOLD_AT and reason != LATE:
        log(f"{child.node.name}: listens, and does not answer ({reason})")
    if child.state == UP or child.missed >= TOLD_AT:
        child.state = NO_ANSWER


async def show(children: list[Child]) -> None:
    """Show a live table on a terminal; elsewhere a line for each change, and the counts at times."""
    header = COLUMNS.format("node", "student", "address", "state", "latency", "requests", "failures")
    known: dict[str, str] = {}
    look = 0
    while True:
        if sys.stdout.isatty():
            up = f"\x1b[{len(children) + 1}F\x1b[J" if look else ""
            width = shutil.get_terminal_size().columns  # a line that wraps would spoil the next renewal
            print(up + "\n".join(line[:width] for line in [header, *(child.row() for child in children)]), flush=True)
        else:
            for child in children:
                if known.get(child.node.name) != child.state:
                    known[child.node.name] = child.state
                    details = (
                        f": {child.last_line}" if child.has_exited and child.last_line else f" at {child.node.address}"
                    )
                    print(f"{child.node.name}: {child.state}{details}", flush=True)
            if look and look % SPARSE == 0:
                print("\n".join([header, *(child.row() for child in children)]), flush=True)
        look += 1
        await asyncio.sleep(POLL_S / 2)


async def run_cluster(
    cluster: Cluster, *pages: SideTask, boards: str | None = None, stopped: asyncio.Event | None = None
) -> None:
    """Run all nodes of a cluster, and `pages` beside them, until `stopped` is set, by default on a signal.

    With `boards`, a microcontroller of the catalogue, each student is firmware on an emulated one.

    Raises
    ------
    UserError
        The cluster does not fit its export, certificates are missing, all nodes have exited, or a page failed.
    """
    stopped = stopped or told_to_stop(False, signal.SIGHUP)
    cluster.placed()  # refuses what does not fit
    for identity in (cluster.own_identity, *(cluster.identity(node.name) for node in cluster.nodes)):
        if identity:
            identity.for_server()  # refuses bad certificates before anything starts
    async with running(node_commands(cluster, board=boards), wait=False) as children:
        table = asyncio.create_task(show(list(children.values())))
        try:
            await attend(cluster, children, pages, stopped)
        finally:
            table.cancel()
            await asyncio.gather(table, return_exceptions=True)


async def attend(
    cluster: Cluster, by_name: Mapping[str, Child], pages: Sequence[SideTask], stopped: asyncio.Event
) -> None:
    """Watch the running nodes of a cluster, and run `pages` beside them, until `stopped` is set.

    Raises
    ------
    UserError
        All nodes have exited, or a page failed.
    """
    _, placed = cluster.placed()
    children = list(by_name.values())
    exits = asyncio.gather(*(watch(by_name[node.name], contract, cluster) for node, _, contract in placed))
    end = asyncio.create_task(stopped.wait())
    tasks: list[asyncio.Future] = [exits, end, *(asyncio.create_task(page(children)) for page in pages)]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    if not stopped.is_set():
        raise UserError(f"all nodes have exited ({reasons(children)})")


def live_page(cluster: Cluster, images: Sequence[Path] | None, port: int) -> SideTask:
    """The page of ``--web``, with these pictures or the experiment's test images; a `UserError` if there are none."""
    from nonn.live.pictures import dataset_pictures, find_pictures
    from nonn.live.web import serve_page

    manifest, _ = cluster.placed()
    if images:
        pictures = find_pictures(images, manifest)
    else:
        pictures = dataset_pictures(cluster.export.resolve().parent.parent / "dataset.safetensors", manifest)
    return lambda children: serve_page(cluster, children, pictures, port)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--cluster", type=Path, default=CLUSTER_FILE, metavar="FILE", help="the cluster (default: %(default)s)"
    )
    parser.add_argument(
        "--web",
        type=int,
        nargs="?",
        const=PAGE_PORT,
        metavar="PORT",
        help=f"also serve the live page on 127.0.0.1:PORT ({PAGE_PORT})",
    )
    parser.add_argument(
        "--images",
        type=Path,
        nargs="+",
        metavar="PATH",
        help="files or folders of pictures for the page (default: test images)",
    )
    boards = parser.add_argument(
        "--boards", metavar="NAME", help="run int8 students as firmware on emulated microcontrollers, such as stm32h743"
    )
    complete_from(boards, lambda: list(CHIPS))
    parser.epilog = "example: nonn up --web"


def run(options: argparse.Namespace) -> None:
    """The command ``nonn up``."""
    cluster = load_cluster(options.cluster)
    if options.images and options.web is None:
        raise UserError("--images: are shown on the page. Give --web, too.")
    pages = [] if options.web is None else [live_page(cluster, options.images, options.web)]
    with relayed_stderr():
        asyncio.run(run_cluster(cluster, *pages, boards=options.boards))
    log(f"{len(cluster.nodes)} nodes stopped")
