"""A coordinator goes over to another export while it answers, and no request is lost."""

import asyncio
import contextlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from clusters import CLASSES, cluster_of, free_ports, make_image, plain_node, sha256, until, write_export, write_student
from grpc import StatusCode
from tritonclient.utils import deserialize_bytes_tensor

from nonn.cli import main
from nonn.core.errors import UserError
from nonn.live import following
from nonn.live.following import FollowedNetwork
from nonn.runtime.channel import open_channel
from nonn.runtime.cluster import Node, write_cluster
from nonn.runtime.exported import read_manifest
from nonn.runtime.predict import classify
from nonn.runtime.protocol import ProtocolError, make_request
from nonn.runtime.served_network import network_version
from nonn.testbed import replacement


@pytest.fixture(scope="module")
def exports(tmp_path_factory) -> list[Path]:
    """Two exports of one network: all students of the second have other weights."""
    folder = tmp_path_factory.mktemp("exports")
    former = write_export(folder / "former")
    new = shutil.copytree(former, folder / "new")
    manifest = json.loads((new / "manifest.json").read_text())
    for student in manifest["students"]:
        weight = np.random.default_rng(9).normal(size=(16, student["n_features"])).astype(np.float32) / 500
        write_student(new / student["file"], weight)
        student["sha256"] = sha256(new / student["file"])
    (new / "manifest.json").write_text(json.dumps(manifest))
    return [former, new]


@pytest.fixture(autouse=True)
def attentive(monkeypatch):
    """Nobody sleeps for long."""
    monkeypatch.setattr(following, "FILE_POLL_S", 0.02)
    monkeypatch.setattr("nonn.runtime.coordinator.FIRST_PAUSE_S", 0.02)
    monkeypatch.setattr("nonn.runtime.coordinator.MAX_PAUSE_S", 0.05)
    monkeypatch.setattr("nonn.runtime.cluster.LONGEST_DEADLINE_MS", 1e6)


class Bench:
    """Three nodes of this process that can be replaced, and the network of their cluster file."""

    def __init__(self, folder: Path, export: Path, deadline_ms: float = 2000):
        self.ports, self.nodes = free_ports(3), {}
        self.file = folder / "cluster.yaml"
        addresses = [f"127.0.0.1:{port}" for port in self.ports]
        self.cluster = cluster_of(export, addresses, deadline_ms=deadline_ms)
        write_cluster(self.file, self.cluster)

    async def __aenter__(self):
        for position in range(3):
            await self.serve(position, self.cluster.export)
        self.network = FollowedNetwork(self.file)
        await self.network.__aenter__()
        return self

    async def __aexit__(self, *reason):
        await self.network.__aexit__(*reason)
        for node in self.nodes.values():
            await node.aclose()

    async def begin(self, export: Path) -> None:
        """Name another export, and wait until the network knows of it."""
        self.name(export)
        await until(lambda: self.network.next is not None)

    async def serve(self, position: int, export: Path) -> None:
        """Let a node serve its student of an export, in place of the one that it serves."""
        if before := self.nodes.pop(position, None):
            await before.aclose()
        self.nodes[position] = contextlib.AsyncExitStack()
        await self.nodes[position].enter_async_context(plain_node(export, position, self.ports[position]))

    def name(self, export: Path) -> None:
        write_cluster(self.file, self.cluster.model_copy(update={"export": export}))

    async def ask(self, version: str = "", seed: int = 0) -> tuple[str, int, np.ndarray]:
        """Version, number of students and probabilities of an answer."""
        request = make_request(self.network.current.coordinator.placed[0][2], make_image(seed))
        request.model_version = version
        answer = await self.network.infer(request, make_image(seed)[None], None)
        raw = dict(zip([o.name for o in answer.outputs], answer.raw_output_contents, strict=True))
        return (
            answer.model_version,
            len(deserialize_bytes_tensor(raw["present"])),
            np.frombuffer(raw["probabilities"], "<f4"),
        )


def test_a_changed_deadline_counts_from_then_on(exports, tmp_path):
    async def scenario():
        async with Bench(tmp_path, exports[0]) as bench:
            current = bench.network.current
            write_cluster(bench.file, bench.cluster.model_copy(update={"deadline_ms": 1500}))
            await until(lambda: current.coordinator.timeout == 1.5)
            assert (bench.network.admission.timeout, bench.network.current) == (1.5, current)
            assert {connection.timeout for connection in current.coordinator.connections} == {1.5}
            assert (await bench.ask())[1] == 3

    asyncio.run(scenario())


def test_a_network_goes_over_to_another_export_node_by_node(exports, tmp_path):
    former, new = exports
    versions = [network_version(read_manifest(folder)) for folder in exports]

    async def scenario():
        async with Bench(tmp_path, former) as bench:
            assert (await bench.ask())[:2] == (versions[0], 3)
            await bench.begin(new)
            name = bench.network.contract.model
            seen = []

            async def ask_on():
                while True:
                    version, present, probabilities = await bench.ask(seed=len(seen) % 3)
                    seen.append((version, present))
                    if present == 3:
                        expected = classify(exports[versions.index(version)], make_image((len(seen) - 1) % 3))
                        np.testing.assert_allclose(probabilities, expected.probabilities, rtol=1e-4)
                    await asyncio.sleep(0)

            asking = asyncio.create_task(ask_on())
            for position in range(3):
                await bench.serve(position, new)
                connection = bench.network.next and bench.network.next.coordinator.connections[position]
                await until(lambda connection=connection: connection is None or not connection.breaker_is_open)
            await until(lambda: bench.network.next is None)
            count = len(seen)
            await until(lambda: len(seen) > count + 3 or asking.done())
            asking.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await asking  # raises what was wrong with a request
            assert seen[-1] == (versions[1], 3)
            assert {version for version, _ in seen} == set(versions)
            assert bench.network.contract.model == name
            assert bench.network.contract.version == versions[1]
            for position in range(3):
                await bench.serve(position, former)
            with pytest.raises(ProtocolError) as error:
                await bench.ask()
            assert error.value.code == StatusCode.UNAVAILABLE

    asyncio.run(scenario())


def test_a_new_export_is_forgotten_when_the_file_is_put_back(exports, tmp_path):
    former, new = exports

    async def scenario():
        async with Bench(tmp_path, former) as bench:
            await bench.begin(new)
            await bench.serve(0, new)
            await until(lambda: not bench.network.next.coordinator.connections[0].breaker_is_open)
            await bench.serve(0, former)
            bench.name(former)
            await until(lambda: bench.network.next is None)
            await until(lambda: not bench.network.current.coordinator.connections[0].breaker_is_open)
            assert (await bench.ask())[:2] == (network_version(read_manifest(former)), 3)

    asyncio.run(scenario())


def test_nodes_beside_the_former_ones_leave_no_answer_incomplete(exports, tmp_path):
    former, new = exports

    async def scenario():
        async with Bench(tmp_path, former) as bench, contextlib.AsyncExitStack() as stack:
            addresses = [(await stack.enter_async_context(plain_node(new, i)))[0] for i in range(2)]
            (last,) = free_ports(1)
            write_cluster(bench.file, cluster_of(new, [*addresses, f"127.0.0.1:{last}"], deadline_ms=2000))
            await until(lambda: bench.network.next is not None)
            await until(lambda: following.share_present(bench.network.next) > 0.5)
            assert (await bench.ask())[:2] == (network_version(read_manifest(former)), 3)
            await stack.enter_async_context(plain_node(new, 2, last))
            await until(lambda: bench.network.next is None)
            assert (await bench.ask())[:2] == (network_version(read_manifest(new)), 3)

    asyncio.run(scenario())


def test_what_cannot_follow_is_said_once_and_changes_nothing(exports, tmp_path, capfd):
    other = shutil.copytree(exports[1], tmp_path / "other")
    manifest = json.loads((other / "manifest.json").read_text())
    (other / "manifest.json").write_text(json.dumps(manifest | {"classes": [*CLASSES[:-1], "emu"]}))

    async def scenario():
        async with Bench(tmp_path, exports[0]) as bench:
            for export in (other, tmp_path / "nothing"):
                bench.name(export)
                said = "other classes" if export is other else "nothing"
                await until(lambda said=said: said in bench.network._last_problem)
                await asyncio.sleep(0.1)
                assert bench.network.next is None
            bench.file.write_text("nodes: 3")
            await until(lambda: "nodes" in bench.network._last_problem)
            with pytest.MonkeyPatch.context() as patch:  # what nobody has thought of
                patch.setattr("nonn.live.following.load_cluster", lambda _: 1 / 0)
                await until(lambda: "division by zero" in bench.network._last_problem)
            bench.file.write_text('export: "e\\0"')
            await until(lambda: "export: has a character that no file name may have" in bench.network._last_problem)
            assert (await bench.ask())[1] == 3

    asyncio.run(scenario())
    assert capfd.readouterr().err.count("other classes") == 1


def test_encryption_neither_begins_nor_ends_while_a_file_is_followed(exports, tmp_path, monkeypatch):
    """Least of all does plain text go to other machines, which a file with `tls` may name."""
    monkeypatch.setattr(following, "MAX_RETRY_PAUSE_S", 0.02)

    async def scenario():
        async with Bench(tmp_path, exports[0]) as bench:
            elsewhere = cluster_of(exports[1], [f"192.0.2.1:{port}" for port in bench.ports], tls=tmp_path)
            write_cluster(bench.file, elsewhere)
            await until(lambda: "tls: is read at the start alone" in bench.network._last_problem)
            assert bench.network.next is None
            bench.name(exports[1])
            await until(lambda: bench.network.next is not None)

    asyncio.run(scenario())


def test_other_certificates_are_refused_once_the_export_is_there(exports, tmp_path, certificates, capfd, monkeypatch):
    """It is read again and again until then."""
    monkeypatch.setattr(following, "FILE_POLL_S", 3600.0)
    said, addresses = "tls: is read at the start alone", [f"127.0.0.1:{port}" for port in free_ports(3)]
    others, half = shutil.copytree(certificates, tmp_path / "others"), shutil.copytree(exports[0], tmp_path / "half")
    (half / read_manifest(half).final.blocks).unlink()
    file = tmp_path / "cluster.yaml"
    write_cluster(file, cluster_of(exports[0], addresses, tls=certificates))

    async def scenario():
        async with FollowedNetwork(file) as network:
            write_cluster(file, cluster_of(half, addresses, tls=others))
            with pytest.raises(UserError):
                await network._read_again()
            assert said not in capfd.readouterr().err
            write_cluster(file, cluster_of(exports[0], addresses, tls=others))
            await network._read_again()
            assert capfd.readouterr().err.count(said) == 1

    asyncio.run(scenario())


def test_plain_text_stays_on_this_machine():
    node = Node(name="node-0", address="192.0.2.1:7100", model="0")
    with pytest.raises(UserError, match=r"node-0: 192\.0\.2\.1:7100 is not on this machine"):
        open_channel(node, 1000, None)


def test_it_follows_on_whatever_happens(exports, tmp_path, monkeypatch):
    """Also while the former export still has calls under way."""
    former, new = exports

    async def scenario():
        async with Bench(tmp_path, former, deadline_ms=50_000) as bench:
            with monkeypatch.context() as patch:  # what nobody has thought of
                patch.setattr(following, "share_present", lambda _: 1 / 0)
                bench.name(new)
                await until(lambda: "division by zero" in bench.network._last_problem)
            for position in range(3):
                await bench.serve(position, new)
            await until(lambda: bench.network.current.contract.version == network_version(read_manifest(new)))
            await bench.begin(former)

    asyncio.run(scenario())


def test_what_cannot_be_used_is_read_less_and_less_often(exports, tmp_path, monkeypatch):
    read = []
    load = following.load_cluster
    monkeypatch.setattr(following, "load_cluster", lambda path: read.append(path) or load(path))

    async def scenario():
        async with Bench(tmp_path, exports[0]) as bench:
            bench.name(tmp_path / "nothing")
            await until(lambda: "nothing" in bench.network._last_problem)
            count = len(read)
            await asyncio.sleep(1.0)  # 50 looks
            assert len(read) - count < 10

    asyncio.run(scenario())


def test_a_node_that_was_put_back_counts_for_the_former_export_again(exports, tmp_path):
    former, new = exports

    async def scenario():
        async with Bench(tmp_path, former) as bench:
            await bench.begin(new)
            current, coming = bench.network.current.coordinator, bench.network.next.coordinator
            for export, here, there in ((new, coming, current), (former, current, coming)):
                await bench.serve(0, export)
                await until(
                    lambda h=here, t=there: t.connections[0].breaker_is_open and not h.connections[0].breaker_is_open
                )

    asyncio.run(scenario())


def test_a_request_for_a_version_is_answered_by_the_current_export_alone(exports, tmp_path):
    former, new = exports

    async def scenario():
        async with Bench(tmp_path, former) as bench:
            await bench.begin(new)
            for position in range(2):
                await bench.serve(position, new)
            for share, network in ((1 / 3, bench.network.current), (2 / 3, bench.network.next)):
                await until(lambda s=share, n=network: following.share_present(n) == s)
            assert (await bench.ask())[:2] == (network_version(read_manifest(new)), 2)
            version = network_version(read_manifest(former))
            assert (await bench.ask(version))[:2] == (version, 1)

    asyncio.run(scenario())


@pytest.mark.slow
def test_no_request_is_lost_while_nodes_are_replaced(exports, monkeypatch, capsys):
    monkeypatch.setattr(replacement, "PAUSE_S", 1.0)
    former, new = exports
    main(["replace", str(former), "--by", str(new), "--requests", "40", "--deadline-ms", "2000"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("requests lost of ")
    assert lines[-1].endswith(": 0")
    assert lines[-2] == "answers of neither export: 0"
    assert lines[-3].startswith("3 nodes replaced")
    assert any("answered by 3 students of the new export" in line for line in lines)


def test_an_answer_of_neither_export_is_found_out(exports):
    images = np.stack([make_image(0), make_image(1)])
    reference = replacement.Reference(exports[0], images)
    np.testing.assert_allclose(
        reference.probabilities(1, [0, 1, 2]), classify(exports[0], images[1]).probabilities, rtol=1e-6
    )
    lost = replacement.Replacement(("1", "2"), wrong=2)
    lost.lost["UNAVAILABLE: no node answered"] += 3
    assert lost.problems() == [
        "3 requests were lost (UNAVAILABLE: no node answered)",
        "2 answers were of neither export",
        "not all nodes served the new export at the end",
    ]


def test_an_export_of_another_task_cannot_take_the_place(exports, tmp_path):
    other = shutil.copytree(exports[1], tmp_path / "other")
    manifest = json.loads((other / "manifest.json").read_text())
    (other / "manifest.json").write_text(json.dumps(manifest | {"classes": [*CLASSES[:-1], "emu"]}))
    with pytest.raises(SystemExit) as error:
        main(["replace", str(exports[0]), "--by", str(other)])
    assert "classes" in str(error.value)


def test_health_says_which_nodes_serve_their_students(exports, tmp_path, capsys):
    async def scenario():
        async with Bench(tmp_path, exports[0]) as bench:
            await asyncio.to_thread(main, ["health", "--cluster", str(bench.file)])
            assert capsys.readouterr().out.count("serves ") == 3
            await bench.serve(1, exports[1])
            await bench.nodes.pop(2).aclose()
            await asyncio.to_thread(main, ["health", "--cluster", str(bench.file), "--node", "node-0"])
            with pytest.raises(SystemExit) as error:
                await asyncio.to_thread(main, ["health", "--cluster", str(bench.file), "--wait", "0.3"])
            assert "2 of 3 nodes" in str(error.value)
            lines = capsys.readouterr().out.splitlines()
            assert "serves no model '1' of version" in lines[2]
            assert "unavailable" in lines[3]

    asyncio.run(scenario())
