"""Certificates that are replaced while they are in use."""

import asyncio
import contextlib
import shutil

from clusters import PATIENCE, cluster_of, make_image, until

from nonn.runtime import channel, coordinator, serving, tls
from nonn.runtime.certs import write_certificates
from nonn.runtime.coordinator import Coordinator
from nonn.runtime.node import ServedStudent
from nonn.runtime.tls import Identity


@contextlib.asynccontextmanager
async def coordinator_of(export, certificates, own):
    """A coordinator whose certificates are in one folder, of three nodes whose certificates are in another."""
    async with contextlib.AsyncExitStack() as stack:
        addresses = []
        for i in range(3):
            student, identity = ServedStudent(export / f"{i}.onnx"), Identity.of(f"node-{i}", certificates)
            node = serving.serving(student, "127.0.0.1:0", identity, ["coordinator"])
            addresses.append(f"127.0.0.1:{(await stack.enter_async_context(node))[0]}")
        yield await stack.enter_async_context(Coordinator(cluster_of(export, addresses, own)))


def test_a_coordinator_takes_renewed_certificates(network_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(coordinator, "POLL_S", 0.02)
    write_certificates(tmp_path, ["node-0", "node-1", "node-2", "coordinator"])

    async def scenario():
        async with coordinator_of(network_folder, tmp_path, tmp_path) as network:
            former = [connection.channel for connection in network.connections]
            write_certificates(tmp_path, ["coordinator"])
            await until(lambda: all(c.channel is not f for c, f in zip(network.connections, former, strict=True)))
            assert not (await network.classify(make_image())).absent

    asyncio.run(scenario())


def test_a_coordinator_takes_renewed_certificates_by_slow_links(network_folder, tmp_path, monkeypatch):
    """Over which a handshake takes longer than the first image would wait for it."""
    monkeypatch.setattr(coordinator, "POLL_S", 0.02)
    monkeypatch.setattr(channel, "CONNECT_TIMEOUT_S", 0.0)
    write_certificates(tmp_path, ["node-0", "node-1", "node-2", "coordinator"])

    async def scenario():
        async with coordinator_of(network_folder, tmp_path, tmp_path) as network:
            await until(lambda: all(c.channel.get_state() == channel.READY for c in network.connections))
            former = [connection.channel for connection in network.connections]
            write_certificates(tmp_path, ["coordinator"])
            await until(lambda: all(c.channel is not f for c, f in zip(network.connections, former, strict=True)))

    asyncio.run(scenario())


def test_a_coordinator_keeps_connections_that_new_certificates_would_end(network_folder, tmp_path, monkeypatch, capfd):
    """Nodes get those of another authority later than the coordinator."""
    monkeypatch.setattr(coordinator, "POLL_S", 0.02)
    monkeypatch.setattr(coordinator, "MAX_RENEWAL_PAUSE_S", 0.1)
    own, nodes, new = (tmp_path / name for name in ("own", "nodes", "new"))
    names = ["node-0", "node-1", "node-2", "coordinator"]
    write_certificates(nodes, names)
    write_certificates(new, names)
    shutil.copytree(nodes, own)

    async def scenario():
        async with coordinator_of(network_folder, nodes, own) as network:
            former = [connection.channel for connection in network.connections]
            tried = []
            reopen = network._reopen
            network._reopen = lambda connections: tried.append(connections) or reopen(connections)
            shutil.copytree(new, own, dirs_exist_ok=True)
            await until(lambda: len(tried) > 3)
            assert capfd.readouterr().err.count("node-0, node-1, node-2: not to be reached") == 1
            assert [connection.channel for connection in network.connections] == former
            assert not (await network.classify(make_image())).absent
            for name in ("ca.pem", "node-1.key", "node-1.pem"):
                shutil.copy2(new / name, nodes)
            await until(lambda: network.connections[1].channel is not former[1])
            assert not (await network.classify(make_image())).absent

    asyncio.run(scenario())


def test_the_certificate_that_is_checked_is_the_one_that_is_used(certificates, tmp_path, monkeypatch):
    """Also if the file is replaced in between."""
    shutil.copytree(certificates, tmp_path, dirs_exist_ok=True)
    identity, read = Identity.of("node-0", tmp_path), tls._read_pem

    def read_once(path):
        content = read(path)
        path.write_bytes(b"-----BEGIN SOMETHING ELSE")
        return content

    monkeypatch.setattr(tls, "_read_pem", read_once)
    identity.for_server()


def test_whatever_new_certificates_meet_a_coordinator_goes_on(network_folder, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(coordinator, "POLL_S", 0.02)
    write_certificates(tmp_path, ["node-0", "node-1", "node-2", "coordinator"])

    async def unforeseen(_):
        raise ValueError("unforeseen")

    async def scenario():
        async with coordinator_of(network_folder, tmp_path, tmp_path) as network:
            former = [connection.channel for connection in network.connections]
            monkeypatch.setattr(network, "_reopen", unforeseen)
            said = ""
            write_certificates(tmp_path, ["coordinator"])
            async with asyncio.timeout(PATIENCE):
                while "ValueError: unforeseen. The certificates from before stay in use." not in said:
                    await asyncio.sleep(0.01)
                    said += capfd.readouterr().err
            monkeypatch.delattr(network, "_reopen")
            await until(lambda: all(c.channel is not f for c, f in zip(network.connections, former, strict=True)))

    asyncio.run(scenario())


def test_whatever_new_certificates_meet_a_node_goes_on(certificates, tmp_path, monkeypatch, capsys):
    """A file may also vanish between two looks at it."""
    shutil.copytree(certificates, tmp_path, dirs_exist_ok=True)
    renewals = []
    monkeypatch.setattr("grpc.dynamic_ssl_server_credentials", lambda _, renewed, **__: renewals.append(renewed))
    Identity.of("node-0", tmp_path).for_server()
    read = tls._read_pem

    def read_and_remove(path):
        content = read(path)
        path.unlink()
        return content

    shutil.copyfile(certificates / "ca.pem", tmp_path / "ca.pem")
    monkeypatch.setattr(tls, "_read_pem", read_and_remove)
    assert renewals[0]() is None
    expected = "node-0.key: cannot be read (No such file or directory). Make certificates with `nonn certs`. "
    assert f"{expected}The certificates from before stay in use." in capsys.readouterr().err
