"""The live page: what it shows, and whom it refuses."""

import asyncio
import contextlib
import json
import re
import signal
import sys
import threading
from io import BytesIO

import aiohttp
import numpy as np
import pytest
from clusters import CLASSES, N_FEATURES, PATIENCE, free_ports, make_image, nobody_listens, until
from pages import (
    SAME,
    device,
    everyone,
    make_pictures,
    picture_file,
    silence,
    snapshots,
    start_up,
    wait_for,
)
from PIL import Image

from nonn.core.errors import UserError
from nonn.live.pictures import MAX_PIXELS, PLAIN, as_png, find_pictures, sent_picture
from nonn.live.state import FASTEST, LiveCluster
from nonn.live.web import MAX_PICTURE_BYTES, Page, opened, read_page, serve_page
from nonn.runtime.cluster import Cluster
from nonn.runtime.exported import read_manifest
from nonn.runtime.predict import classify
from nonn.runtime.processes import UP, Child, node_commands, running


@contextlib.asynccontextmanager
async def served(cluster: Cluster):
    """Address of the page of a running cluster, and its nodes' processes by name."""
    async with running(node_commands(cluster)) as children:
        for child in children.values():
            child.state = "up"  # nobody watches here
        (port,) = free_ports(1)
        page = asyncio.create_task(serve_page(cluster, list(children.values()), make_pictures(), port))
        try:
            await until(lambda: not nobody_listens([f"127.0.0.1:{port}"]))
            yield f"http://127.0.0.1:{port}", children
        finally:
            page.cancel()
            await asyncio.gather(page, return_exceptions=True)


def test_the_page_has_no_address_but_its_own():
    page, policy = read_page()
    assert "//" not in re.sub(r"^\s*//.*|\s// .*", "", page, flags=re.MULTILINE)
    assert not re.search(r"<link|@import|url\(|<iframe|<object", page)
    assert set(re.findall(r'(?:src|href|action)="([a-z]+:)', page)) <= {"data:"}
    assert not re.search(r"innerHTML|insertAdjacentHTML|document\.write|eval\(|\son\w+=", page)
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy
    assert "http" not in policy


def test_strangers_are_refused(cluster):
    """Names that were rebound to this machine, pages of other sites, and posts that are not the page's."""

    async def scenario():
        # Nothing of this needs nodes that run: the page answers, whatever they do.
        children = [Child(node, None) for node in cluster.nodes]
        runner = aiohttp.web.AppRunner(Page(LiveCluster(cluster, children, make_pictures())).application())
        await runner.setup()
        await aiohttp.web.TCPSite(runner, "127.0.0.1", 0).start()
        own = f"http://127.0.0.1:{runner.addresses[0][1]}"
        wish = json.dumps({"node": "node-0", "silent": True})

        async def status(method: str, path: str, headers: dict, body: str | bytes | None = None) -> int:
            async with session.request(method, own + path, headers=headers, data=body) as response:
                assert "default-src 'none'" in response.headers["Content-Security-Policy"]
                assert response.headers["X-Content-Type-Options"] == "nosniff"
                return response.status

        async with aiohttp.ClientSession() as session:
            assert await status("GET", "/", {}) == 200
            assert await status("GET", "/", {"Host": "localhost:1"}) == 200  # through a tunnel
            for host in ("evil.example", "evil.example:80", "127.0.0.1.evil.example", "[", "127.0.0.1@evil.example"):
                assert await status("GET", "/", {"Host": host}) == 403, host
            assert await status("GET", "/", {"Origin": "http://evil.example"}) == 403
            assert await status("GET", "/events", {"Sec-Fetch-Site": "cross-site"}) == 403
            for origin in ({}, {"Origin": "null"}, {"Origin": "http://127.0.0.1:1"}, {"Origin": own + ".evil.example"}):
                assert await status("POST", "/switch", SAME | origin, wish) == 403, origin
            good = SAME | {"Origin": own}
            assert await status("POST", "/switch", {"Origin": own, "Content-Type": "text/plain"}, wish) == 415
            for body in ("", "{", "[]", '{"node": "node-0"}', '{"node": "node-0", "silent": true, "more": 1}'):
                assert await status("POST", "/switch", good, body) == 400, body
            assert await status("POST", "/switch", good, wish + " " * 2000) == 413
            assert await status("POST", "/switch", good, wish.replace("node-0", "node-9")) == 409
            assert await status("POST", "/playback", good, '{"rate": 1e9}') == 400
            assert await status("POST", "/playback", good, '{"rate": 2, "held": true}') == 204
            picture = {"Origin": own, "Content-Type": "application/octet-stream"}
            content = picture_file(make_image())
            assert await status("POST", "/picture", {"Content-Type": "application/octet-stream"}, content) == 403
            assert await status("POST", "/picture", picture | {"Origin": "http://evil.example"}, content) == 403
            assert await status("POST", "/picture", picture | {"Content-Type": "image/png"}, content) == 415
            assert await status("POST", "/picture", picture, b"no picture") == 400
            assert await status("POST", "/picture", picture, bytes(MAX_PICTURE_BYTES + 1)) == 413
            assert await status("POST", "/picture", picture, content) == 204
            assert await status("GET", "/switch", {}) == 405
            assert await status("GET", "/../params.yaml", {}) == 404
        await runner.cleanup()

    asyncio.run(scenario())


def test_events_tell_what_goes_on_and_the_switch_silences(cluster, monkeypatch):
    monkeypatch.setattr("nonn.runtime.processes.GRACE_S", PATIENCE)
    cluster = cluster.model_copy(update={"deadline_ms": 1000})

    async def scenario():
        async with served(cluster) as (address, children), aiohttp.ClientSession() as session:
            headers = SAME | {"Origin": address}

            async def post(path: str, **wish) -> None:
                async with session.post(f"{address}/{path}", headers=headers, json=wish) as response:
                    assert response.status == 204

            events = snapshots(session, address)
            whole = await wait_for(events, everyone)
            assert whole["classes"] == CLASSES
            assert whole["deadline_ms"] == 1000
            assert whole["picture"]["truth"] == CLASSES[int(whole["picture"]["place"][0]) - 1]
            assert sum(whole["prediction"]["probabilities"]) == pytest.approx(1, abs=1e-3)
            assert [len(d["features"]) for d in whole["devices"]] == list(N_FEATURES)
            assert sum(abs(d["share"]) for d in whole["devices"]) == pytest.approx(1)
            assert all(d["latency_ms"] > 0 for d in whole["devices"])
            await post("playback", held=True, rate=10)
            await wait_for(events, lambda s: s["held"])
            await post("switch", node="node-1", silent=True)
            gone = await wait_for(
                events, lambda s: s["prediction"] and s["prediction"]["present"] == ["node-0", "node-2"]
            )
            assert gone["prediction"]["took_ms"] > 0
            assert device(gone, "node-1")["share"] is None
            assert "no answer by the deadline" in device(gone, "node-1")["reason"]
            left = await wait_for(events, lambda s: device(s, "node-1")["breaker"] == "open")
            assert left["picture"]["place"] == gone["picture"]["place"]  # it is held
            assert not children["node-1"].has_exited
            await post("switch", node="node-1", silent=False)
            assert not device(await wait_for(events, everyone), "node-1")["silent"]
            await post("playback", step=True)
            await wait_for(events, lambda s: s["picture"]["place"] != gone["picture"]["place"])
            await post("switch", node="node-2", silent=True)
        # Had the page not let it go on, it could not have ended by itself.
        assert children["node-2"].process.returncode == 0
        assert nobody_listens(node.address for node in cluster.nodes)

    asyncio.run(scenario())


def test_a_picture_that_is_sent_is_classified_and_held(cluster):
    cluster = cluster.model_copy(update={"deadline_ms": 1000})
    pixels = make_image(7)
    expected = {invert: classify(cluster.export, 255 - pixels if invert else pixels) for invert in (False, True)}

    async def scenario():
        async with served(cluster) as (address, _), aiohttp.ClientSession() as session:
            events = snapshots(session, address)
            await wait_for(events, everyone)
            headers = {"Content-Type": "application/octet-stream", "Origin": address}
            for invert, prediction in expected.items():
                url = f"{address}/picture?name=mine.png&invert={str(invert).lower()}"
                async with session.post(url, headers=headers, data=picture_file(pixels)) as response:
                    assert response.status == 204
                png = as_png(255 - pixels if invert else pixels)
                shown = await wait_for(events, lambda s, png=png: everyone(s) and s["picture"]["png"] == png)
                assert (shown["picture"]["name"], shown["picture"]["place"], shown["held"]) == ("mine.png", None, True)
                assert shown["prediction"]["label"] == prediction.label
                assert shown["prediction"]["probability"] == pytest.approx(prediction.probability, abs=1e-6)
            wish = {"held": False, "step": True}
            async with session.post(f"{address}/playback", headers=SAME | {"Origin": address}, json=wish) as response:
                assert response.status == 204
            await wait_for(events, lambda s: s["picture"]["place"] is not None)

    asyncio.run(scenario())


def test_a_post_that_does_not_come_is_ended(cluster, monkeypatch):
    monkeypatch.setattr("nonn.live.web.POST_TIMEOUT_S", 0.2)

    async def scenario():
        children = [Child(node, None) for node in cluster.nodes]
        runner = aiohttp.web.AppRunner(Page(LiveCluster(cluster, children, make_pictures())).application())
        await runner.setup()
        await aiohttp.web.TCPSite(runner, "127.0.0.1", 0).start()
        port = runner.addresses[0][1]
        for path, kind in (("/picture", "application/octet-stream"), ("/switch", "application/json")):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            own = f"Host: 127.0.0.1:{port}\r\nOrigin: http://127.0.0.1:{port}\r\n"
            writer.write(f"POST {path} HTTP/1.1\r\n{own}Content-Type: {kind}\r\nContent-Length: 99\r\n\r\nx".encode())
            async with asyncio.timeout(PATIENCE):
                assert b" 408 " in await reader.readline()
            writer.close()
        await runner.cleanup()

    asyncio.run(scenario())


def test_what_is_no_http_is_refused_without_a_word_on_the_terminal(cluster, caplog):
    async def scenario():
        children = [Child(node, None) for node in cluster.nodes]
        async with opened(Page(LiveCluster(cluster, children, make_pictures())).application(), 0, "--web") as address:
            port = int(address.rpartition(":")[2])
            own = f"Host: 127.0.0.1:{port}\r\nOrigin: http://127.0.0.1:{port}\r\n"
            kinds = {"/picture": "application/octet-stream", "/switch": "application/json"}
            requests = [
                f"POST {path} HTTP/1.1\r\n{own}Content-Type: {kind}\r\nContent-Encoding: {encoding}\r\n"
                f"Content-Length: 4\r\n\r\nxxxx"
                for path, kind in kinds.items()
                for encoding in ("gzip", "deflate")
            ]
            requests += ["POST /switch HTTP/1.1\r\nContent-Length: -1\r\n\r\n", "GET http://[ HTTP/1.1\r\n\r\n"]
            for request in requests:
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(request.encode())
                async with asyncio.timeout(PATIENCE):
                    assert b" 400 " in await reader.readline()
                writer.close()

    asyncio.run(scenario())
    assert not caplog.records


def test_silent_connections_are_few_and_ended(cluster, monkeypatch):
    monkeypatch.setattr("nonn.live.web.MAX_CONNECTIONS", 2)
    monkeypatch.setattr("nonn.live.web.IDLE_TIMEOUT_S", 0.5)

    async def scenario():
        application = Page(
            LiveCluster(cluster, [Child(node, None) for node in cluster.nodes], make_pictures())
        ).application()
        async with opened(application, 0, "--web") as address, asyncio.timeout(PATIENCE):
            port = int(address.rpartition(":")[2])
            ends = [await asyncio.open_connection("127.0.0.1", port) for _ in range(3)]
            for _, writer in ends[:2]:
                writer.write(b"GET / HTTP/1.1\r\nHost: 127.0.0.1")  # and no more
            with contextlib.suppress(ConnectionError):
                assert await ends[2][0].read() == b"", "one too many"
            for reader, _ in ends[:2]:
                assert await reader.read() == b""
            async with aiohttp.ClientSession() as session, session.get(address) as response:
                assert response.status == 200

    asyncio.run(scenario())


def test_pictures_that_are_too_large_or_none_are_refused(network_folder):
    manifest = read_manifest(network_folder)
    wide = BytesIO()
    Image.new("1", (MAX_PIXELS // 1000 + 1, 1000)).save(wide, "PNG")
    # Pillow would start another program for it.
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n"
    for content, reason in (
        (b"none", "not an image"),
        (postscript, "not an image"),
        (wide.getvalue(), "pixels are too many"),
    ):
        with pytest.raises(UserError, match=rf"mine: cannot be read \(.*{reason}\)\. Send one of JPEG, PNG"):
            sent_picture("mine", content, False, manifest)


@pytest.mark.parametrize(
    ("mode", "kind", "refused"),
    [
        ("1", "PNG", False),
        ("P", "GIF", False),
        ("RGB", "JPEG", False),
        ("RGB", "WEBP", True),
        ("RGBA", "PNG", True),
        ("I;16", "PNG", True),
    ],
)
def test_what_takes_more_memory_may_have_fewer_pixels(mode, kind, refused, network_folder, monkeypatch):
    monkeypatch.setattr("nonn.live.pictures.MAX_DECODED_BYTES", PLAIN * 10_000)
    content = BytesIO()
    Image.new(mode, (100, 100)).save(content, kind)
    with pytest.raises(UserError, match="100 × 100 pixels are too many") if refused else contextlib.nullcontext():
        sent_picture("mine", content.getvalue(), False, read_manifest(network_folder))


def test_pictures_are_decoded_one_by_one_whoever_gives_up(cluster, monkeypatch):
    """A post that is cancelled leaves its thread at work."""
    decoding, may_end = [], threading.Event()

    def decode(*_):
        decoding.append(None)
        may_end.wait(PATIENCE)
        return make_pictures(1)[0]

    monkeypatch.setattr("nonn.live.web.sent_picture", decode)

    async def scenario():
        application = Page(LiveCluster(cluster, [Child(n, None) for n in cluster.nodes], make_pictures())).application()
        async with opened(application, 0, "--web") as address, aiohttp.ClientSession() as session:
            headers = {"Content-Type": "application/octet-stream", "Origin": address}
            first = asyncio.create_task(session.post(f"{address}/picture", headers=headers, data=b"x"))
            await until(lambda: decoding)
            first.cancel()
            for _ in range(2):
                with contextlib.suppress(TimeoutError):
                    await session.post(
                        f"{address}/picture", headers=headers, data=b"x", timeout=aiohttp.ClientTimeout(total=0.3)
                    )
            assert len(decoding) == 1
            may_end.set()
            async with session.post(f"{address}/picture", headers=headers, data=b"x") as response:
                assert response.status == 204

    asyncio.run(scenario())


def test_who_reads_nothing_loses_his_place(cluster, monkeypatch):
    monkeypatch.setattr("nonn.live.web.MAX_VIEWERS", 1)
    monkeypatch.setattr("nonn.live.web.VIEWER_TIMEOUT_S", 0.2)

    async def scenario():
        live = LiveCluster(cluster, [Child(node, None) for node in cluster.nodes], make_pictures())
        live.snapshot = lambda: {"much": "x" * 2**24}
        page = Page(live)
        async with opened(page.application(), 0, "--web") as address, asyncio.timeout(PATIENCE):
            port = int(address.rpartition(":")[2])
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.transport.pause_reading()
            writer.write(f"GET /events HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n\r\n".encode())
            await until(lambda: page.viewers == 1)
            await live._publish()
            await until(lambda: page.viewers == 0)
            writer.close()

    asyncio.run(scenario())


def test_a_photograph_that_is_sent_has_the_pixels_that_a_device_reads(network_folder, tmp_path):
    manifest = read_manifest(network_folder)
    pixels = np.random.default_rng(0).integers(0, 256, (600, 800, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.jpg")
    sent = sent_picture("photo.jpg", (tmp_path / "photo.jpg").read_bytes(), False, manifest)
    (found,) = find_pictures([tmp_path / "photo.jpg"], manifest)
    np.testing.assert_array_equal(sent.read(), found.read())


def test_a_picture_that_cannot_be_read_is_told_and_passed_over(cluster, tmp_path):
    (tmp_path / "broken.png").write_text("no picture")
    pictures = find_pictures([tmp_path / "broken.png"], read_manifest(cluster.export)) + make_pictures(1)

    async def told(live: LiveCluster):
        version = 0
        while True:
            version = await live.changed(version)
            yield live.snapshot()

    async def scenario():
        children = [Child(node, None, state=UP) for node in cluster.nodes]  # no process
        live = LiveCluster(cluster, children, pictures)
        live.play(rate=FASTEST)
        running = asyncio.create_task(live.run())
        events = told(live)
        await wait_for(events, lambda s: "broken.png: not a readable image" in s["problem"])
        passed_over = await wait_for(events, lambda s: s["problem"] == "no device answered")
        assert passed_over["picture"]["place"] == "2 of 2"
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)

    asyncio.run(scenario())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_nothing_is_left_behind_not_even_a_silenced_node(cluster, pictures_folder, number):
    if number == signal.SIGKILL and sys.platform != "linux":
        pytest.skip("only Linux wakes a stopped process whose parent was killed")
    process, address = start_up("--images", pictures_folder)
    asyncio.run(silence(address, "node-1"))
    process.send_signal(number)
    assert process.wait(timeout=PATIENCE) == (0 if number == signal.SIGINT else -signal.SIGKILL)
    asyncio.run(until(lambda: nobody_listens(node.address for node in cluster.nodes)))
