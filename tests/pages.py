"""The live page, for several tests of it: its events, its switch, and ``nonn up --web``."""

import asyncio
import json
import re
import subprocess
import sys
import threading
from io import BytesIO

import aiohttp
import numpy as np
from clusters import CLASSES, PATIENCE, make_image
from PIL import Image

from nonn.live.pictures import ShownPicture

#: What a browser with this page sends with a post.
SAME = {"Content-Type": "application/json"}


def picture_file(pixels: np.ndarray) -> bytes:
    content = BytesIO()
    Image.fromarray(pixels[0]).save(content, "PNG")
    return content.getvalue()


def make_pictures(count: int = 2) -> list[ShownPicture]:
    return [ShownPicture(f"picture {seed}", CLASSES[seed], lambda seed=seed: make_image(seed)) for seed in range(count)]


async def snapshots(session: aiohttp.ClientSession, address: str):
    """What the page is told, one snapshot after another."""
    async with session.get(f"{address}/events") as response:
        assert response.content_type == "text/event-stream"
        while line := await response.content.readuntil(b"\n\n"):
            assert line.startswith(b"data: ")
            yield json.loads(line.removeprefix(b"data: "))


async def wait_for(events, condition) -> dict:
    async with asyncio.timeout(PATIENCE):
        while True:
            snapshot = await anext(events)
            if condition(snapshot):
                return snapshot


def device(snapshot: dict, name: str) -> dict:
    return next(device for device in snapshot["devices"] if device["name"] == name)


def everyone(snapshot: dict) -> bool:
    return bool(snapshot["prediction"]) and len(snapshot["prediction"]["present"]) == 3


def start_up(*flags: str) -> tuple[subprocess.Popen, str]:
    """``nonn up --web``, and where its page is; one that hangs is killed after three minutes."""
    command = [sys.executable, "-m", "nonn", "up", "--web", "0", *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    timer = threading.Timer(180, process.kill)
    timer.daemon = True
    timer.start()
    for line in process.stdout:
        # Nodes write to the same pipe, so what one of them says may stand on the same line.
        if found := re.search(r"live page: (http://[\d.]+:\d+)", line):
            threading.Thread(target=process.stdout.read, daemon=True).start()
            return process, found[1]
    raise AssertionError("it ended early")


async def silence(address: str, node: str) -> None:
    async with aiohttp.ClientSession() as session:
        await wait_for(snapshots(session, address), everyone)
        wish = {"node": node, "silent": True}
        async with session.post(f"{address}/switch", headers=SAME | {"Origin": address}, json=wish) as response:
            assert response.status == 204
