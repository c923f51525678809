"""The live page: what it shows, whom it refuses, and, in a real browser, what its switch does."""

import asyncio
import base64
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from io import BytesIO

import aiohttp
import numpy as np
import pytest
from clusters import CHANNELS, CLASSES, N_FEATURES, PATIENCE, SIZE, free_ports, make_image, nobody_listens, until
from PIL import Image
from safetensors.numpy import save_file

from nonn.cli import main
from nonn.core.errors import UserError
from nonn.live.pictures import LARGEST, Picture, as_png, dataset_pictures, find_pictures, sent_picture
from nonn.live.state import FASTEST, Live
from nonn.live.web import LARGEST_PICTURE, Page, opened, read_page, serve_page
from nonn.runtime.cluster import Cluster, write_cluster
from nonn.runtime.exported import read_manifest
from nonn.runtime.predict import classify
from nonn.runtime.processes import UP, Child, node_commands, running

#: What a browser with this page sends with a post.
SAME = {"Content-Type": "application/json"}


def picture_file(pixels: np.ndarray) -> bytes:
    content = BytesIO()
    Image.fromarray(pixels[0]).save(content, "PNG")
    return content.getvalue()


def make_pictures(count: int = 2) -> list[Picture]:
    return [Picture(f"picture {seed}", CLASSES[seed], lambda seed=seed: make_image(seed)) for seed in range(count)]


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


# The page itself


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
        runner = aiohttp.web.AppRunner(Page(Live(cluster, children, make_pictures())).application())
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
            assert await status("POST", "/picture", picture, bytes(LARGEST_PICTURE + 1)) == 413
            assert await status("POST", "/picture", picture, content) == 204
            assert await status("GET", "/switch", {}) == 405
            assert await status("GET", "/../params.yaml", {}) == 404
        await runner.cleanup()

    asyncio.run(scenario())


# At work


def test_events_tell_what_goes_on_and_the_switch_silences(cluster, monkeypatch):
    monkeypatch.setattr("nonn.runtime.processes.GRACE", PATIENCE)
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
    monkeypatch.setattr("nonn.live.web.SLOWEST_POST", 0.2)

    async def scenario():
        children = [Child(node, None) for node in cluster.nodes]
        runner = aiohttp.web.AppRunner(Page(Live(cluster, children, make_pictures())).application())
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


def test_silent_connections_are_few_and_ended(cluster, monkeypatch):
    monkeypatch.setattr("nonn.live.web.CONNECTIONS", 2)
    monkeypatch.setattr("nonn.live.web.LONGEST_SILENCE", 0.5)

    async def scenario():
        application = Page(Live(cluster, [Child(node, None) for node in cluster.nodes], make_pictures())).application()
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
    Image.new("1", (LARGEST // 1000 + 1, 1000)).save(wide, "PNG")
    for content, reason in ((b"none", "not an image"), (wide.getvalue(), "pixels are too many")):
        with pytest.raises(UserError, match=rf"mine: cannot be read \(.*{reason}\)\. Send a PNG"):
            sent_picture("mine", content, False, manifest)


def test_a_picture_that_cannot_be_read_is_told_and_passed_over(cluster, tmp_path):
    (tmp_path / "broken.png").write_text("no picture")
    pictures = find_pictures([tmp_path / "broken.png"], read_manifest(cluster.export)) + make_pictures(1)

    async def told(live: Live):
        version = 0
        while True:
            version = await live.changed(version)
            yield live.snapshot()

    async def scenario():
        children = [Child(node, None, state=UP) for node in cluster.nodes]  # no process
        live = Live(cluster, children, pictures)
        live.play(rate=FASTEST)
        running = asyncio.create_task(live.run())
        events = told(live)
        await wait_for(events, lambda s: "broken.png: not a readable image" in s["problem"])
        passed_over = await wait_for(events, lambda s: s["problem"] == "no device answered")
        assert passed_over["picture"]["place"] == "2 of 2"
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)

    asyncio.run(scenario())


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


@pytest.fixture
def pictures_folder(cluster, tmp_path) -> str:
    cluster = cluster.model_copy(update={"deadline_ms": 1000})
    write_cluster(tmp_path / "cluster.yaml", cluster)
    for seed in range(3):
        (tmp_path / "pictures" / CLASSES[seed]).mkdir(parents=True)
        Image.fromarray(make_image(seed)[0]).save(tmp_path / "pictures" / CLASSES[seed] / f"{seed}.png")
    return str(tmp_path / "pictures")


async def silence(address: str, node: str) -> None:
    async with aiohttp.ClientSession() as session:
        await wait_for(snapshots(session, address), everyone)
        wish = {"node": node, "silent": True}
        async with session.post(f"{address}/switch", headers=SAME | {"Origin": address}, json=wish) as response:
            assert response.status == 204


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_nothing_is_left_behind_not_even_a_silenced_node(cluster, pictures_folder, number):
    if number == signal.SIGKILL and sys.platform != "linux":
        pytest.skip("only Linux wakes a stopped process whose parent was killed")
    process, address = start_up("--images", pictures_folder)
    asyncio.run(silence(address, "node-1"))
    process.send_signal(number)
    assert process.wait(timeout=PATIENCE) == (0 if number == signal.SIGINT else -signal.SIGKILL)
    asyncio.run(until(lambda: nobody_listens(node.address for node in cluster.nodes)))


# Pictures


def test_the_class_of_a_file_is_that_of_its_folder(network_folder, tmp_path):
    for name in ("ant", "unheard of"):
        (tmp_path / name).mkdir()
        Image.fromarray(make_image()[0]).resize((9, 9)).save(tmp_path / name / "a.PNG")
    (tmp_path / "ant/notes.txt").touch()
    pictures = find_pictures([tmp_path], read_manifest(network_folder))
    assert sorted((p.name, p.truth) for p in pictures if p.truth) == [("a.PNG", "ant")]
    assert len(pictures) == 2
    assert {p.read().shape for p in pictures} == {(CHANNELS, SIZE, SIZE)}


def test_missing_pictures_are_refused(network_folder, tmp_path):
    manifest = read_manifest(network_folder)
    with pytest.raises(UserError, match=r"--images: .*nowhere: no such file or folder"):
        find_pictures([tmp_path / "nowhere"], manifest)
    with pytest.raises(UserError, match="--images: no pictures"):
        find_pictures([tmp_path], manifest)
    with pytest.raises(UserError, match="no such file, so there is nothing to classify"):
        dataset_pictures(tmp_path / "dataset.safetensors", manifest)


def test_test_images_of_the_experiment_are_shown(network_folder, tmp_path):
    path, manifest = tmp_path / "dataset.safetensors", read_manifest(network_folder)
    images = np.stack([make_image(seed) for seed in range(6)])
    arrays = {"images": images, "labels": np.array([0, 1, 2, 3, 0, 1]), "test": np.array([1, 4, 5])}
    save_file(arrays, path)
    pictures = dataset_pictures(path, manifest)
    assert {(p.name, p.truth) for p in pictures} == {
        ("test image 0", "bee"),
        ("test image 1", "ant"),
        ("test image 2", "bee"),
    }
    for picture in pictures:
        expected = make_image([1, 4, 5][int(picture.name.split()[-1])])
        np.testing.assert_array_equal(picture.read(), expected)
    save_file(arrays | {"images": images[:, :, :2]}, path)
    with pytest.raises(UserError, match="is not the dataset of this network"):
        dataset_pictures(path, manifest)
    path.write_text("rubbish")
    with pytest.raises(UserError, match="damaged"):
        dataset_pictures(path, manifest)


def test_pictures_travel_unchanged():
    for channels in (1, 3):
        pixels = np.random.default_rng(0).integers(0, 256, (channels, 5, 5), dtype=np.uint8)
        with Image.open(BytesIO(base64.b64decode(as_png(pixels)))) as image:
            np.testing.assert_array_equal(np.asarray(image).reshape(5, 5, -1).transpose(2, 0, 1), pixels)


def test_wrong_settings_are_refused(cluster, tmp_path):
    with pytest.raises(SystemExit, match=r"--images: are shown on the page\. Give --web"):
        main(["up", "--images", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"dataset\.safetensors: no such file"):
        main(["up", "--web"])
    Image.fromarray(make_image()[0]).save("image.png")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        with pytest.raises(SystemExit, match=f"--web: cannot listen on 127.0.0.1:{port}"):
            main(["up", "--web", port, "--images", "image.png"])
    assert nobody_listens(node.address for node in cluster.nodes)


# In a browser


@pytest.fixture
def browser(tmp_path, monkeypatch):
    """Headless Chromium with an empty profile, driven by the system's chromedriver: nothing is downloaded."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if not (chromium and driver):
        pytest.skip("chromium or chromedriver is not installed (Debian: apt-get install chromium chromium-driver)")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    monkeypatch.setenv("SE_OFFLINE", "true")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    flags = ["headless", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking"]
    flags += ["disable-component-update", "disable-sync", "disable-dev-shm-usage", f"user-data-dir={tmp_path}/profile"]
    flags += ["use-fake-ui-for-media-stream", "use-fake-device-for-media-stream"]
    flags += ["no-sandbox"] if os.geteuid() == 0 else []
    for flag in flags:
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with webdriver.Chrome(options=options, service=Service(driver)) as browser:
        browser.set_window_size(390, 900)  # a phone's
        yield browser


@pytest.mark.usefixtures("cluster")
def test_clicking_the_switch_silences_a_device(browser, pictures_folder):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import WebDriverWait

    def text(name: str) -> str:
        return browser.find_element(By.ID, name).text

    def until(condition) -> None:
        WebDriverWait(browser, PATIENCE, poll_frequency=0.05).until(lambda _: condition())

    process, address = start_up("--images", pictures_folder)
    try:
        browser.get(address)
        until(lambda: text("summary").startswith("3 of 3 devices take part"))
        browser.find_element(By.ID, "hold").click()
        until(lambda: browser.find_element(By.ID, "hold").get_attribute("aria-pressed") == "true")
        assert text("label") in CLASSES
        before, caption = text("classes"), text("caption")
        switch = browser.find_element(By.ID, "switch-node-1")
        assert (switch.aria_role, switch.accessible_name) == ("switch", "node-1 answers")
        card = switch.find_element(By.XPATH, "ancestor::article")
        assert switch.get_attribute("aria-checked") == "true"
        switch.click()
        until(lambda: text("summary").startswith("2 of 3 devices take part"))
        assert switch.get_attribute("aria-checked") == "false"
        assert card.get_attribute("data-state") == "silenced"
        assert text("classes") != before
        assert text("caption") == caption  # the same picture, with another prediction
        until(lambda: card.find_element(By.CLASS_NAME, "breaker").text == "open")
        switch.send_keys(Keys.SPACE)  # back again, from the keyboard
        until(lambda: text("summary").startswith("3 of 3 devices take part"))
        until(lambda: text("classes") == before)
        width = browser.execute_script("return [document.documentElement.scrollWidth, innerWidth]")
        assert width[0] <= width[1]
        assert browser.get_log("browser") == []
        process.send_signal(signal.SIGINT)
        until(lambda: "does not answer" in text("problem"))
        assert process.wait(timeout=PATIENCE) == 0
    finally:
        process.kill()
        process.wait()


@pytest.mark.usefixtures("cluster")
def test_pictures_of_the_viewers_own(browser, pictures_folder, tmp_path):
    """A file, the same inverted, a drawing, and a frame of the camera, which here is Chromium's test pattern."""
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    def find(name: str):
        return browser.find_element(By.ID, name)

    def until(condition) -> None:
        WebDriverWait(browser, PATIENCE, poll_frequency=0.05).until(lambda _: condition())

    def shown() -> np.ndarray:
        content = base64.b64decode(find("picture").get_attribute("src").partition(",")[2])
        return np.asarray(Image.open(BytesIO(content)))[None]

    pixels = make_image(7)
    (tmp_path / "mine.png").write_bytes(picture_file(pixels))
    process, address = start_up("--images", pictures_folder)
    try:
        browser.get(address)
        until(lambda: find("summary").text.startswith("3 of 3 devices take part"))
        assert "A device's share says how much of the lead" in find("explained").text
        assert find("calibrated").text == "The probabilities are not calibrated."
        find("file").send_keys(str(tmp_path / "mine.png"))
        until(lambda: find("caption").text == "mine.png")
        np.testing.assert_array_equal(shown(), pixels)
        find("invert").click()
        until(lambda: np.array_equal(shown(), 255 - pixels))
        (tmp_path / "none.png").write_text("no picture")
        find("file").send_keys(str(tmp_path / "none.png"))
        until(lambda: "none.png: cannot be read (not an image)" in find("refused").text)
        find("draw").click()
        sketch = find("sketch")
        browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", sketch)
        ActionChains(browser).move_to_element(sketch).click_and_hold().move_by_offset(0, 60).release().perform()
        until(lambda: find("caption").text == "your drawing")
        assert shown()[0, :, 0].max() == 0, "black at the left"
        assert shown()[0, 2, 1:3].min() > 20, "a light stroke down from the middle"
        until(lambda: find("camera").is_displayed())
        find("camera").click()
        until(lambda: browser.execute_script("return arguments[0].videoWidth", find("viewfinder")) > 0)
        find("shoot").click()
        until(lambda: find("caption").text == "your camera")
        find("camera").click()
        assert not find("viewfinder").is_displayed()
        find("hold").click()
        until(lambda: find("caption").text.endswith("of 3), in truth " + find("caption").text.rpartition(" ")[2]))
        width = browser.execute_script("return [document.documentElement.scrollWidth, innerWidth]")
        assert width[0] <= width[1]
        logged = [entry for entry in browser.get_log("browser") if "400" not in entry["message"]]
        assert logged == []
    finally:
        process.kill()
        process.wait()
