"""The live page of ``nonn up --web`` and ``nonn demo``: one file, one stream of events, and posts of three kinds.

It listens on 127.0.0.1 only. Pages of other sites get nothing: the Host must be this machine by name
(against DNS rebinding), an Origin must be the page's own, and a post needs one. The page loads nothing
from elsewhere, which its Content-Security-Policy also forbids.

aiohttp was chosen because it streams events on the event loop that gRPC uses here, and parses HTTP in well-tested code.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import json
import logging
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib import resources
from typing import Annotated, Any, TypeVar

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError
from pydantic import Field, ValidationError

from nonn.core.errors import UserError
from nonn.core.progress import log
from nonn.core.schema import Section
from nonn.live.pictures import ShownPicture, sent_picture
from nonn.live.state import FASTEST, SLOWEST, LiveCluster
from nonn.runtime.addresses import OWN_NAMES, host_name
from nonn.runtime.cluster import Cluster
from nonn.runtime.processes import Child

HOST = "127.0.0.1"
#: Most viewers at once, seconds for which a viewer may read nothing, most bytes of a small post, and seconds that
#: streams have to end.
MAX_VIEWERS, VIEWER_TIMEOUT_S, MAX_POST_BYTES, GRACE_S = 16, 10.0, 1024, 0.5
#: Most bytes of a picture, and seconds within which a post must arrive.
MAX_PICTURE_BYTES, POST_TIMEOUT_S = 16 * 2**20, 10.0
#: Most connections at once, and seconds for which one may be idle.
MAX_CONNECTIONS, IDLE_TIMEOUT_S = 64, 15.0
#: Most letters of a picture's name that are shown.
MAX_NAME_LENGTH = 60

Wish = TypeVar("Wish", bound=Section)


class Toggle(Section):
    """Silence a node, or let it answer."""

    node: str
    silent: bool


class Playback(Section):
    """Hold the picture or go on, pictures a second, or the next one now."""

    held: bool | None = None
    rate: Annotated[float, Field(ge=SLOWEST, le=FASTEST)] | None = None
    step: bool = False


def read_page() -> tuple[str, str]:
    """The page, and the Content-Security-Policy that allows its own script and style and nothing else."""
    page = resources.files("nonn.live").joinpath("page.html").read_text(encoding="utf-8")
    hashes = {}
    for element in ("script", "style"):
        (content,) = re.findall(f"<{element}>(.*?)</{element}>", page, re.DOTALL)
        hashes[element] = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
    policy = [
        "default-src 'none'",
        f"script-src 'sha256-{hashes['script']}'",
        f"style-src 'sha256-{hashes['style']}'",
        "img-src data:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    ]
    return page, "; ".join(policy)


@web.middleware
async def guard(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """Refuse requests of other sites' pages, and by names that were rebound to this machine."""
    hosts, origin = request.headers.getall("Host", []), request.headers.get("Origin")
    if len(hosts) != 1 or host_name(hosts[0]) not in OWN_NAMES:
        raise web.HTTPForbidden(text=f"open this page as http://{HOST}:PORT\n")
    is_foreign = (origin is not None or request.method != "GET") and origin != f"http://{hosts[0]}"
    site = request.headers.get("Sec-Fetch-Site", "none")
    if is_foreign or (request.path != "/" and site not in ("same-origin", "none")):
        raise web.HTTPForbidden(text="only the page itself may ask this\n")
    try:
        return await handler(request)
    except web.RequestPayloadError:
        raise web.HTTPBadRequest(text="the body is not encoded as its headers say\n") from None


def is_server_fault(record: logging.LogRecord) -> bool:
    """Whether a log record is the server's fault rather than the client's."""
    return not (record.exc_info and isinstance(record.exc_info[1], HttpProcessingError | web.RequestPayloadError))


#: The log of aiohttp's server.
logger = logging.getLogger(__name__)
logger.addFilter(is_server_fault)


class Page:
    """Handlers of the requests of the page and its script."""

    def __init__(self, live: LiveCluster):
        self.live = live
        self.page, policy = read_page()
        self.viewers = 0
        self.event = 0, b""  # the newest version of the snapshot, as it is sent
        # One picture at a time, which bounds their memory: a thread continues after its post is given up.
        self.decoder = ThreadPoolExecutor(max_workers=1, thread_name_prefix="decoder")
        self.headers = {
            "Content-Security-Policy": policy,
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Permissions-Policy": "camera=(self), microphone=()",
            "Cross-Origin-Resource-Policy": "same-origin",
            "Cache-Control": "no-store",
        }

    def application(self) -> web.Application:
        application = web.Application(middlewares=[guard], client_max_size=MAX_POST_BYTES)
        application.add_routes([web.get("/", self.show), web.get("/events", self.stream)])
        application.add_routes([web.post("/switch", self.switch), web.post("/playback", self.playback)])
        application.add_routes([web.post("/picture", self.picture)])
        application.on_response_prepare.append(self.protect)
        return application

    async def protect(self, _: web.Request, response: web.StreamResponse) -> None:
        response.headers.update(self.headers)

    async def show(self, _: web.Request) -> web.Response:
        return web.Response(text=self.page, content_type="text/html")

    async def stream(self, request: web.Request) -> web.StreamResponse:
        """Server-sent events: each new snapshot; slow viewers skip some."""
        if self.viewers >= MAX_VIEWERS:
            raise web.HTTPServiceUnavailable(text="too many viewers\n")
        self.viewers += 1
        try:
            response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
            await response.prepare(request)
            version = 0
            while True:
                version = await self.live.changed(version)
                if version != self.event[0]:
                    self.event = version, f"data: {json.dumps(self.live.snapshot())}\n\n".encode()
                async with asyncio.timeout(VIEWER_TIMEOUT_S):
                    await response.write(self.event[1])
        except ConnectionError:
            return response  # the viewer has left
        except TimeoutError:
            if request.transport:
                request.transport.abort()
            return response
        finally:
            self.viewers -= 1

    async def switch(self, request: web.Request) -> web.Response:
        wish = await read_post(request, Toggle)
        try:
            self.live.silence(wish.node, wish.silent)
        except UserError as error:
            raise web.HTTPConflict(text=f"{error}\n") from None
        return web.Response(status=204)

    async def playback(self, request: web.Request) -> web.Response:
        wish = await read_post(request, Playback)
        self.live.play(wish.held, wish.rate, wish.step)
        return web.Response(status=204)

    async def picture(self, request: web.Request) -> web.Response:
        """Classify a picture whose file is the body; the query says its ``name`` and whether to ``invert`` it."""
        if request.content_type != "application/octet-stream":
            raise web.HTTPUnsupportedMediaType(text="send application/octet-stream\n")
        content = await in_time(read_body(request, MAX_PICTURE_BYTES))
        name = request.query.get("name", "")[:MAX_NAME_LENGTH] or "your picture"
        invert = request.query.get("invert") == "true"
        decode = partial(sent_picture, name, content, invert, self.live.manifest)
        try:
            picture = await asyncio.get_running_loop().run_in_executor(self.decoder, decode)
        except UserError as error:
            raise web.HTTPBadRequest(text=f"{error}\n") from None
        self.live.submit(picture)
        return web.Response(status=204)


async def read_body(request: web.Request, limit: int) -> bytes:
    """Body of a post, at most `limit` bytes."""
    content = bytearray()
    async for chunk in request.content.iter_any():
        content += chunk
        if len(content) > limit:
            raise web.HTTPRequestEntityTooLarge(limit, len(content), text=f"{limit // 2**20} MiB at most\n")
    return bytes(content)


async def in_time(body: Coroutine[Any, Any, bytes]) -> bytes:
    """The body of a post, which must arrive within `POST_TIMEOUT_S`."""
    try:
        return await asyncio.wait_for(body, POST_TIMEOUT_S)
    except TimeoutError:
        raise web.HTTPRequestTimeout(text="too slow\n") from None


async def read_post(request: web.Request, schema: type[Wish]) -> Wish:
    """A small JSON object of a schema; anything else is refused."""
    if request.content_type != "application/json":
        raise web.HTTPUnsupportedMediaType(text="send application/json\n")
    try:
        return schema.model_validate_json(await in_time(request.read()))
    except ValidationError:
        raise web.HTTPBadRequest(text=f"expected the keys {', '.join(schema.model_fields)}\n") from None


async def log_address(address: str) -> None:
    log(f"live page: {address}")


async def serve_page(
    cluster: Cluster,
    children: Sequence[Child],
    pictures: Sequence[ShownPicture],
    port: int,
    option: str = "--web",
    listening: Callable[[str], Awaitable[None]] = log_address,
) -> None:
    """Classify pictures and show the answers, until cancelled; a `UserError` that names `option` if the port is taken.

    `listening` gets the address of the page once it can be opened.
    """
    live = LiveCluster(cluster, children, pictures)
    async with opened(Page(live).application(), port, option) as address:
        await listening(address)
        await live.run()


class Refused(asyncio.Protocol):
    """A connection beyond `MAX_CONNECTIONS`, which is closed."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.abort()


@contextlib.asynccontextmanager
async def opened(application: web.Application, port: int, option: str) -> AsyncIterator[str]:
    """Serve an application on `HOST` while the block runs; yield its address, useful where port 0 was asked for."""
    runner = web.AppRunner(
        application,
        access_log=None,
        logger=logger,
        handler_cancellation=True,
        keepalive_timeout=IDLE_TIMEOUT_S,
        shutdown_timeout=GRACE_S,
    )
    await runner.setup()
    accepted = runner.server
    assert accepted, "it is there once the runner is set up"

    def connect() -> asyncio.Protocol:
        return accepted() if len(accepted.connections) < MAX_CONNECTIONS else Refused()

    try:
        try:
            server = await asyncio.get_running_loop().create_server(connect, HOST, port)
        except (OSError, OverflowError) as error:
            raise UserError(f"{option}: cannot listen on {HOST}:{port} ({error}). Choose another port.") from None
        try:
            yield f"http://{HOST}:{server.sockets[0].getsockname()[1]}"
        finally:
            server.close()
    finally:
        await runner.cleanup()
