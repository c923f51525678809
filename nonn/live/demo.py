"""A network in a minute: the one that comes with the package, on this machine, and its live page."""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
import threading
import webbrowser

from nonn import demo
from nonn.core.errors import UserError
from nonn.core.progress import log
from nonn.live import PAGE_PORT
from nonn.live.pictures import find_pictures
from nonn.live.up import attend
from nonn.live.web import serve_page
from nonn.runtime.attached import told_to_stop
from nonn.runtime.cluster import local_cluster
from nonn.runtime.coordinator import classify_once
from nonn.runtime.logs import relayed_stderr
from nonn.runtime.predict import describe
from nonn.runtime.processes import node_commands, running

#: Milliseconds within which nodes answer even where many processes share few cores.
DEADLINE_MS = 500.0


def open_browser(address: str) -> None:
    """Open the page in a browser, if there is a screen: a text browser would take over the terminal.

    In a thread, since the program that starts a browser may not return until that is closed.
    """
    screens = ("BROWSER", "DISPLAY", "WAYLAND_DISPLAY")
    if not sys.platform.startswith("linux") or any(map(os.environ.get, screens)):
        threading.Thread(target=webbrowser.open, args=[address], daemon=True).start()


async def run_demo(port: int, once: bool, browser: bool) -> None:
    """Start a node for each student, print the answer to the first picture, and unless `once` serve the page.

    Raises
    ------
    UserError
        A file of the package is not the one that was shipped, a node does not start, or the port is taken.
    """
    cluster = local_cluster(demo.NETWORK, certificates=None, port=0, deadline_ms=DEADLINE_MS)
    pictures = find_pictures([demo.PICTURES], cluster.placed()[0])
    log(f"starting {len(cluster.nodes)} nodes, each with one student of the network in {demo.NETWORK}")
    async with running(node_commands(cluster)) as children:
        cluster = cluster.model_copy(update={"nodes": [child.node for child in children.values()]})
        first = pictures[0]
        answer = await classify_once(cluster, first.read())
        print(describe(answer.prediction, f"in truth {first.truth}: {first.name}", answer.present, answer.absent))
        sys.stdout.flush()
        if once:
            return

        async def page(cards) -> None:
            await serve_page(cluster, cards, pictures, port, option="--port", listening=show)

        async def show(address: str) -> None:
            print(f"live page: {address} (Ctrl-C ends it)", flush=True)
            if browser:
                open_browser(address)

        await attend(cluster, children, [page], told_to_stop(False, signal.SIGHUP))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--once", action="store_true", help="print one answer and exit, without a page")
    parser.add_argument("--no-browser", dest="browser", action="store_false", help="print the page's address only")
    parser.add_argument("--port", type=int, default=PAGE_PORT, help="of the page on 127.0.0.1 (default: %(default)s)")
    parser.epilog = "example: nonn demo"


def run(options: argparse.Namespace) -> None:
    """The command ``nonn demo``."""
    if not (demo.NETWORK / "manifest.json").is_file():
        raise UserError(f"{demo.NETWORK}: holds no network. Install the package again, or `nonn ship` one.")
    with relayed_stderr():
        asyncio.run(run_demo(options.port, options.once, options.browser))
