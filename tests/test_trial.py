"""Trials with real processes: what is counted could be right, and nothing is left behind, whatever fails."""

import asyncio
import contextlib
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from clusters import CHANNELS, PATIENCE, SIZE, free_ports, nobody_listens

from nonn.core.errors import UserError
from nonn.core.links import Link
from nonn.core.measuring import DistributedParams
from nonn.core.names import COORDINATOR
from nonn.runtime.certs import write_certificates
from nonn.testbed import echo_server
from nonn.testbed.deployments import as_network
from nonn.testbed.echo import tcp_echoes
from nonn.testbed.emulation import EmulatedNetwork, emulated_network
from nonn.testbed.trial import DEADLINE_MS, PORT, Trial, measure

#: Images of the sensor: fewer than a warm-up asks for.
N_IMAGES = 2


@pytest.fixture(scope="module")
def sensor(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("sensor") / "images.npy"
    np.save(path, np.random.default_rng(0).integers(0, 256, (N_IMAGES, CHANNELS, SIZE, SIZE), dtype=np.uint8))
    return path


def test_an_image_as_slow_as_the_stage_may_choose_is_answered_in_half_the_deadline():
    (longest,) = (item.le for item in DistributedParams.model_fields["longest"].metadata if hasattr(item, "le"))
    assert 2 * 1000 * longest <= DEADLINE_MS


@pytest.fixture
def trial(network_folder, certificates, sensor) -> Trial:
    """The hand-made network of three students on loopback, three images."""
    return Trial(
        method="nonn",
        folder=network_folder,
        names=[f"node-{position}" for position in range(3)],
        addresses=[f"127.0.0.1:{port}" for port in free_ports(3)],
        prefixes=[[], [], []],
        certificates=certificates,
        sensor=sensor,
        exchanges=["sensor"],
        runs=3,
        seconds=PATIENCE,
    )


LOOPBACK = EmulatedNetwork((COORDINATOR, "host-0", "host-1", "host-2"))


def changed(trial: Trial, **changes) -> Trial:
    return trial.model_copy(update=changes)


def children() -> set[int]:
    """Processes that this one has started."""
    return {int(pid) for path in Path("/proc/self/task").glob("*/children") for pid in path.read_text().split()}


def mentions(text: str) -> set[str]:
    """Processes whose command says `text`, whoever started them."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if text in path.read_text():
                found.add(path.parent.name)
        except OSError:  # gone meanwhile
            continue
    return found


# On loopback


def test_a_network_on_loopback_is_timed_and_not_counted(trial):
    before = children()
    measured, again = measure(changed(trial, exchanges=["sensor", "broadcast"]), LOOPBACK)
    assert (len(again.latencies_ms), again.absent) == (3, 0)
    assert measured.latencies_ms.shape == (3,)
    assert (measured.latencies_ms > 0).all()
    assert (measured.absent, measured.traffic, measured.wire_bytes()) == (0, {}, None)
    assert children() <= before
    assert nobody_listens(trial.addresses)


def test_a_trial_ends_with_whoever_has_started_it(trial):
    code = "import sys; from nonn.testbed import trial; from nonn.testbed.emulation import EmulatedNetwork; "
    code += "say = trial._say; trial._say = lambda process, line: (say(process, line), print(line[:2], flush=True)); "
    code += "trial.measure(trial.Trial.model_validate_json(sys.argv[1]), EmulatedNetwork(('coordinator',)))"
    endless = changed(trial, runs=10**9, seconds=10**6).model_dump_json()
    process = subprocess.Popen([sys.executable, "-c", code, endless], stdout=subprocess.PIPE, text=True)
    try:
        assert "go\n" in iter(process.stdout.readline, "")
    finally:
        process.kill()
        process.wait()
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end and not nobody_listens(trial.addresses):
        time.sleep(0.1)
    assert nobody_listens(trial.addresses)


def test_echoes_end_in_time_but_not_before_two(trial):
    sizes = [(3000, 70), (8, 100_000)]
    for measured in measure(changed(trial, method="echo", exchanges=sizes, runs=10**6, seconds=1e-9), LOOPBACK):
        assert measured.latencies_ms.shape == (2,)
        assert (measured.latencies_ms > 0).all()
    assert nobody_listens(trial.addresses)


# Over a link


@pytest.mark.usefixtures("emulation")
def test_over_a_link_bytes_are_plausible(solo_folder, tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (4, 1, 28, 28), dtype=np.uint8)
    np.save(tmp_path / "images.npy", images)
    write_certificates(tmp_path / "certs", [COORDINATOR, "node-0"])
    with emulated_network([COORDINATOR, "host-0"], Link(10e6, 0.005)) as network:
        trial = Trial(
            method="nonn",
            folder=as_network(solo_folder, "teacher", tmp_path / "network"),
            names=["node-0"],
            addresses=[f"{network.address('host-0')}:{PORT}"],
            prefixes=[network.prefix("host-0")],
            certificates=tmp_path / "certs",
            sensor=tmp_path / "images.npy",
            exchanges=["broadcast"],
            runs=5,
            seconds=PATIENCE,
        )
        (measured,) = measure(trial, network)
    assert (len(measured.latencies_ms), measured.absent) == (5, 0)
    asked, answered = images[0].size, 4 * 10
    assert asked + answered < measured.wire_bytes() < 1.6 * (asked + answered) + 2048
    coordinator, node = measured.traffic[COORDINATOR], measured.traffic["host-0"]
    assert coordinator.sent_bytes > 5 * asked
    assert node.sent_bytes > 5 * answered
    # Acknowledgements may be under way when the counters are read.
    assert node.received_bytes == pytest.approx(coordinator.sent_bytes, abs=200)


# Failures


def test_a_network_that_is_not_there_is_an_error(trial, tmp_path, capfd):
    before = children()
    with pytest.raises(UserError, match="measuring nonn on 3 devices failed; its messages stand above"):
        measure(changed(trial, folder=tmp_path / "nowhere"), LOOPBACK)
    assert children() <= before
    said = capfd.readouterr().err
    assert "nowhere/manifest.json: no such file" in said
    assert "Traceback" not in said


@pytest.mark.parametrize("method", ["nonn", "echo"])
def test_a_device_that_cannot_start_stops_the_others(trial, tmp_path, capfd, method):
    before, marked = children(), tmp_path / "network"
    marked.symlink_to(trial.folder)  # so that the nodes' commands say whose they are
    with socket.create_server(("127.0.0.1", 0)) as taken:
        blocked = f"127.0.0.1:{taken.getsockname()[1]}"
        addresses = [*trial.addresses[:2], blocked]
        exchanges = ["sensor"] if method == "nonn" else [(10, 10)]
        with pytest.raises(UserError, match=f"measuring {method} on 3 devices failed"):
            measure(changed(trial, method=method, folder=marked, addresses=addresses, exchanges=exchanges), LOOPBACK)
    assert blocked in capfd.readouterr().err
    assert children() <= before
    assert not mentions(str(marked))
    assert nobody_listens(trial.addresses[:2])


@pytest.mark.parametrize("length", [1, 200_000], ids=["read first", "left unread"])
def test_a_process_that_ends_at_once_is_an_error(trial, monkeypatch, length):
    monkeypatch.setattr(sys, "executable", "false")
    before, threads = children(), threading.enumerate()
    with pytest.raises(UserError, match="measuring nonn on 1 devices failed"):
        measure(changed(trial, names=["x" * length]), LOOPBACK)
    assert children() <= before
    watchdogs = [t for t in threading.enumerate() if isinstance(t, threading.Timer) and t not in threads]
    assert all(watchdog.finished.is_set() for watchdog in watchdogs)  # or they would keep this process for minutes


# Echoes


async def exchange(address: str, request: bytes, n_bytes: int) -> bytes:
    """All that comes back for a request, after which nothing more is sent."""
    host, port = address.split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(request)
    answer = await reader.readexactly(n_bytes)
    writer.write_eof()
    rest = await reader.read()
    writer.close()
    return answer + rest


def test_every_request_is_answered_with_as_many_bytes_as_it_says():
    addresses = [f"127.0.0.1:{port}" for port in free_ports(2)]

    async def scenario():
        async with asyncio.timeout(PATIENCE), tcp_echoes(addresses, [[], ["env", "PLACE=1"]]) as ask_all:
            for _ in range(3):
                assert await ask_all((100, 300)) == 2
            for address in addresses:
                # Two requests and a half.
                request = echo_server.SIZES.pack(100, 300).ljust(100, b"x")
                assert await exchange(address, (3 * request)[:250], 600) == bytes(600)

    before = children()
    asyncio.run(scenario())
    assert children() <= before
    assert nobody_listens(addresses)


def test_an_echo_that_cannot_listen_is_an_error():
    first = f"127.0.0.1:{free_ports(1)[0]}"

    async def scenario(blocked):
        async with asyncio.timeout(PATIENCE):
            with pytest.raises(UserError, match=f"echo-1 did not start: {blocked}: cannot listen there"):
                async with tcp_echoes([first, blocked], [[], []]):
                    pass

    with socket.create_server(("127.0.0.1", 0)) as taken:
        asyncio.run(scenario(f"127.0.0.1:{taken.getsockname()[1]}"))
    assert nobody_listens([first])


def test_an_echo_does_not_outlive_its_standard_input():
    """As when the trial is killed."""

    async def scenario():
        port = free_ports(1)[0]
        command = [sys.executable, "-m", "nonn.testbed.echo_server", f"127.0.0.1:{port}"]
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(*command, stdin=pipe, stderr=pipe)
        async with asyncio.timeout(PATIENCE):
            assert await process.stderr.readline() == f"echo at 127.0.0.1:{port}, plain text\n".encode()
            process.stdin.close()
            assert await process.wait() == 0

    asyncio.run(scenario())


def test_an_echo_waits_for_who_does_not_read():
    written = []

    async def scenario():
        reader = asyncio.StreamReader()
        reader.feed_data(3 * echo_server.SIZES.pack(echo_server.SIZES.size, 100))
        reader.feed_eof()
        writer = SimpleNamespace(write=written.append, drain=asyncio.Event().wait, close=lambda: None)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(echo_server.answer(reader, writer), 0.1)

    asyncio.run(scenario())
    assert len(written) == 1
