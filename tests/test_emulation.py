"""Emulated links with real packets: the relay, a cluster across links, and nothing left behind.

The times of real packets are not asserted: ``nonn links`` measures them.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from random import Random
from types import SimpleNamespace

import pytest
from clusters import PATIENCE, PLENTY_MS, make_image
from PIL import Image
from processes import running

from nonn.cli import main
from nonn.core.errors import UserError
from nonn.core.files import read_json
from nonn.core.links import PRESETS, Link, round_trip
from nonn.runtime.cluster import local_cluster, write_cluster
from nonn.testbed import relay
from nonn.testbed.echo import measure_round_trips
from nonn.testbed.emulation import DEVICE, Counters, EmulatedNetwork, emulated_network, missing_privileges

#: One bit a microsecond: a packet of 125 bytes takes 1 ms.
MEGABIT = Link(1e6)
PACKET = bytes(125)


def packet_to(host: int) -> bytes:
    """125 bytes from one host to another, of which a relay reads the destination."""
    return bytes(16) + bytes([10, 77, 0, host]) + bytes(105)


@pytest.fixture
def relayed(monkeypatch):
    """A function that has the relay run for a second: milliseconds, device and packet of all that it has passed on.

    `sent` are milliseconds, device and packet of all that it finds. Time passes only while the relay waits.
    """

    def run(link: Link, sent: list[tuple[float, int, bytes]]) -> list[tuple[float, int, bytes]]:
        now, waiting, passed_on = 0.0, list(sent), []

        def ready(device: int) -> list[tuple[float, int, bytes]]:
            return [entry for entry in waiting if entry[1] == device and entry[0] / 1000 <= now]

        def select(devices: list[int], _writing: list, _failing: list, pause: float) -> tuple[list[int]]:
            nonlocal now
            later = [time / 1000 for time, _, _ in waiting if time / 1000 > now]
            if not any(map(ready, devices)):
                now = min([now + pause, *later])
            return ([device for device in devices if ready(device)],)

        def read(device: int, _most: int) -> bytes:
            if not ready(device):
                raise BlockingIOError
            waiting.remove(entry := ready(device)[0])
            return entry[2]

        def write(device: int, packet: bytes) -> None:
            passed_on.append((round(1000 * now, 6), device, packet))

        monkeypatch.setattr(relay, "time", SimpleNamespace(monotonic=lambda: now))
        monkeypatch.setattr(relay, "select", SimpleNamespace(select=select))
        monkeypatch.setattr(relay, "os", SimpleNamespace(read=read, write=write, getppid=lambda: 1 if now < 1 else 0))
        relay.relay([70, 71, 72], ["10.77.0.1", "10.77.0.2", "10.77.0.3"], link, parent=1)
        assert not waiting
        return passed_on

    return run


def test_the_relay_passes_packets_on_when_they_are_due(relayed):
    first, second, third = map(packet_to, (2, 3, 1))
    sent = [(0, 70, first), (0, 70, second), (400, 72, third)]
    assert relayed(Link(1e6, 0.010), sent) == [(11, 71, first), (12, 72, second), (411, 70, third)]


def test_the_relay_drops_what_is_for_nobody(relayed):
    assert relayed(MEGABIT, [(0, 70, packet_to(99)), (5, 70, packet_to(2))]) == [(6, 71, packet_to(2))]


# ---- real packets


@pytest.mark.usefixtures("emulation")
def test_on_a_slow_link_tcp_waits_for_a_long_queue_instead_of_sending_again():
    hosts, answer = [f"node-{i}" for i in range(8)], bytes(2800)
    with emulated_network(["coordinator", *hosts], Link(250e3)) as network, contextlib.ExitStack() as sockets:
        with network.inside("coordinator"):
            server = sockets.enter_context(socket.create_server((network.address("coordinator"), 0)))
        pairs = []
        for host in hosts:
            with network.inside(host):
                node = sockets.enter_context(socket.create_connection(server.getsockname()))
            pairs.append((node, sockets.enter_context(server.accept()[0])))
        before = network.counters()
        for node, _ in pairs:
            node.sendall(answer)
        for _, connection in pairs:
            assert connection.recv(len(answer), socket.MSG_WAITALL) == answer
        after = network.counters()
    # Two packets each; in all they keep the coordinator's line busy for 0.75 s.
    assert {(after[host] - before[host]).sent_bytes for host in hosts} == {len(answer) + 2 * 52}


@pytest.mark.usefixtures("emulation")
def test_exactly_the_packets_that_are_lost_do_not_arrive():
    link = Link(100e6, loss=0.3, seed=5)
    random, lost = Random(link.seed), 0
    with emulated_network(["a", "b"], link) as network, contextlib.ExitStack() as sockets:
        ends = []
        for host in network.hosts:
            with network.inside(host):
                ends.append(sockets.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)))
        sender, receiver = ends
        receiver.bind((network.address("b"), 0))
        receiver.settimeout(PATIENCE)
        for number in range(100):
            sender.sendto(bytes([number]), receiver.getsockname())
            if random.random() < link.loss:
                lost += 1
            else:
                assert receiver.recv(1) == bytes([number])
        assert network.counters()["a"].sent_packets == 100
        assert network.counters()["b"].received_packets == 100 - lost
    assert 0 < lost < 100


@pytest.mark.usefixtures("emulation")
def test_counters_are_exact():
    with emulated_network(["a", "b", "c"], Link(100e6)) as network:
        before = network.counters()
        assert set(before.values()) == {Counters(0, 0, 0, 0)}
        assert len(measure_round_trips(network, "a", "b", 100, 7)) == 7
        assert len(measure_round_trips(network, "a", "b", 3000, 2)) == 2  # three packets each way
        after = network.counters()
    n_bytes = 7 * 128 + 2 * (3008 + 3 * 20)
    assert after["a"] - before["a"] == after["b"] == Counters(n_bytes, 13, n_bytes, 13)
    assert after["c"] == Counters(0, 0, 0, 0)


def devices() -> list[str]:
    return [name for _, name in socket.if_nameindex()]


@pytest.mark.usefixtures("emulation")
def test_hosts_are_apart_from_this_machine_and_from_other_networks():
    with (
        emulated_network(["a", "b"], Link(100e6)) as one,
        emulated_network(["a", "b"], Link(100e6, 0.030)) as two,
    ):
        assert one.address("b") == two.address("b")
        for network in (one, two):
            assert len(measure_round_trips(network, "a", "b", 64, 5)) == 5
        assert one.counters()["a"] == two.counters()["a"] == Counters(5 * 92, 5, 5 * 92, 5)
        assert DEVICE not in devices()  # no way there from here
        with one.inside("a"):
            assert devices() == ["lo", DEVICE]
        assert DEVICE not in devices()


@pytest.mark.usefixtures("emulation")
def test_commands_run_on_their_host():
    with emulated_network(["a", "b"], Link(100e6)) as network:
        shown = subprocess.check_output([*network.prefix("b"), "ip", "-brief", "address"], text=True)
    assert f"{network.address('b')}/24" in shown
    assert "127.0.0.1/8" in shown


@pytest.mark.usefixtures("emulation")
def test_a_cluster_works_across_links(network_folder, certificates, tmp_path, monkeypatch):
    """Nodes and coordinator on hosts of their own: gRPC under mutual TLS."""
    monkeypatch.chdir(tmp_path)
    Image.fromarray(make_image()[0]).save("image.png")
    cluster = local_cluster(network_folder, certificates, 7100, PLENTY_MS)
    names = [node.name for node in cluster.nodes]
    with emulated_network(["coordinator", *names], Link(20e6, 0.002)) as network, contextlib.ExitStack() as stack:
        nodes = [n.model_copy(update={"address": f"{network.address(n.name)}:7100"}) for n in cluster.nodes]
        cluster = cluster.model_copy(update={"nodes": nodes})
        write_cluster(Path("cluster.yaml"), cluster)
        processes = []
        for node in nodes:
            identity = cluster.identity(node.name)
            command = [*network.prefix(node.name), sys.executable, "-m", "nonn", "node"]
            command += [str(network_folder / f"{node.model}.onnx"), "--address", node.address]
            command += ["--cert", str(identity.certificate), "--key", str(identity.key), "--ca", str(identity.ca)]
            processes.append(stack.enter_context(running(command, stderr=subprocess.PIPE, text=True)))
        for process in processes:
            while "mutual TLS" not in (line := process.stderr.readline()):
                assert line, "the node has ended"
        command = [*network.prefix("coordinator"), sys.executable, "-m", "nonn", "predict", "image.png"]
        said = subprocess.check_output([*command, "--cluster", "cluster.yaml"], text=True)
        assert all(f"{name}:" in said for name in names)
        assert "absent" not in said
        assert all(count.received_packets > 5 for count in network.counters().values())


# ---- nothing is left behind


def relays_of(parent: int) -> set[int]:
    """Processes of relays that a process has started, also if it is gone by now."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # gone meanwhile
            _, *arguments = path.read_text().split("\0")
            if arguments[:2] == ["-m", "nonn.testbed.relay"] and json.loads(arguments[2])["parent"] == parent:
                found.add(int(path.parent.name))
    return found


@pytest.mark.usefixtures("emulation")
def test_nothing_is_left_after_an_error():
    places = []

    def fail() -> None:
        with emulated_network(["a", "b"], Link(1e6)) as network:
            places.append(Path(network.prefix("a")[-1].removeprefix("--net=")))
            assert places[0].exists()
            assert len(relays_of(os.getpid())) == 1
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert not places[0].exists()
    assert not relays_of(os.getpid())


@pytest.mark.usefixtures("emulation")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_nothing_is_left_when_the_owner_is_ended(number):
    code = """
import time
from nonn.core.links import Link
from nonn.testbed.emulation import emulated_network
with emulated_network(["a", "b"], Link(1e6)) as network:
    print("ready", flush=True)
    time.sleep(60)
"""
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as owner:
        assert owner.stdout.readline() == "ready\n"
        assert len(relays_of(owner.pid)) == 1
        owner.send_signal(number)
        owner.wait()
    end = time.monotonic() + PATIENCE
    while relays_of(owner.pid) and time.monotonic() < end:
        time.sleep(0.02)
    assert not relays_of(owner.pid)


@pytest.mark.usefixtures("emulation")
def test_a_relay_that_ends_early_is_reported():
    network = emulated_network(["a"], Link(1e6))
    network.__enter__()
    (relay,) = relays_of(os.getpid())
    os.kill(relay, signal.SIGKILL)
    os.waitid(os.P_PID, relay, os.WEXITED | os.WNOWAIT)
    with pytest.raises(UserError, match="ended early"):
        network.__exit__(None, None, None)


# ---- without privileges, and the command


@pytest.fixture
def unprivileged(monkeypatch):
    monkeypatch.setenv("PATH", "")


@pytest.mark.usefixtures("unprivileged")
def test_without_the_means_it_is_loopback():
    assert "ip and nsenter not found; install iproute2" in missing_privileges()
    with pytest.raises(UserError, match="links cannot be emulated here"), emulated_network(["a"], Link(1e6)):
        pass
    network = EmulatedNetwork(("a", "b"))
    assert not network.is_emulated
    assert network.prefix("a") == []
    assert network.counters() == {}
    assert len(measure_round_trips(network, "a", "b", 3000, 3)) == 3


def test_hosts_need_different_names():
    with pytest.raises(UserError, match="different names"), emulated_network(["a", "a"], Link(1e6)):
        pass


@pytest.mark.usefixtures("emulation")
def test_the_command_measures_a_link(folder, monkeypatch, capsys):
    monkeypatch.setattr("nonn.testbed.echo.ECHO_SECONDS", 0.05)
    monkeypatch.setattr("nonn.testbed.echo.WARMUP_SECONDS", 0.1)
    monkeypatch.setattr("nonn.testbed.echo.STREAM_SECONDS", 0.2)
    main(["links", "--link", "wifi50", "--json", "links.json"])
    assert "wifi50: 50 Mbit/s, 2 ms one way, one shared medium" in capsys.readouterr().out
    written = read_json(folder / "links.json")
    assert written["note"] is None
    rows = written["links"]["wifi50"]["round_trips"]
    assert [row["payload_bytes"] for row in rows] == [64, 256, 1024, 4096, 12288]
    assert rows[-1]["theory_ms"] == pytest.approx(1000 * round_trip(PRESETS["wifi50"], 12288))
    assert written["links"]["wifi50"]["tcp_mbps"] > 0


@pytest.mark.usefixtures("unprivileged")
def test_the_command_without_the_means(folder, monkeypatch, capsys):
    monkeypatch.setattr("nonn.testbed.echo.WARMUP_SECONDS", 0.0)
    monkeypatch.setattr("nonn.testbed.echo.STREAM_SECONDS", 0.1)
    monkeypatch.setattr("nonn.testbed.echo.MOST", 10)
    main(["links", "--json", "links.json"])
    assert capsys.readouterr().out.startswith("loopback\n")
    written = read_json(folder / "links.json")
    assert "not found" in written["note"]
    assert written["links"]["loopback"]["round_trips"][0]["theory_ms"] is None


def test_an_unknown_link_is_refused():
    with pytest.raises(SystemExit) as stopped:
        main(["links", "--link", "wifi"])
    assert str(stopped.value).startswith("nonn links: no link 'wifi'; choose one of ethernet941, ")
