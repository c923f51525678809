"""Connections, handshakes, certificates and standard error of a server, and what strangers can do to them."""

import asyncio
import contextlib
import datetime
import os
import re
import socket
import ssl
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from clusters import (
    CHANNELS,
    FEATURE_LIMIT,
    N_FEATURES,
    PATIENCE,
    SIZE,
    cluster_of,
    make_image,
    plain_node,
    rogue_node,
    stub_of,
    until,
)
from cryptography import x509
from grpc import StatusCode, aio
from processes import running
from prometheus_client import CollectorRegistry

from nonn.core.errors import UserError
from nonn.runtime import certs, metrics, serving
from nonn.runtime.certs import write_certificates
from nonn.runtime.channel import reason_of
from nonn.runtime.coordinator import Coordinator
from nonn.runtime.logs import LINES_PER_WINDOW, Limiter, in_plain_words
from nonn.runtime.metrics import serving_metrics
from nonn.runtime.node import ServedStudent
from nonn.runtime.protocol import Contract, make_request, make_response
from nonn.runtime.tls import Identity

CONTRACT = Contract("0", CHANNELS, SIZE, N_FEATURES[0], FEATURE_LIMIT)


# Certificates


def dated(folder, monkeypatch, start: int, days: int) -> Identity:
    """An identity whose certificate is good for some days from `start` days on, of an authority that is good today."""
    write_certificates(folder, ["other"])

    class Shifted:
        @staticmethod
        def now(zone):
            return datetime.datetime.now(zone) + datetime.timedelta(days=start)

    shifted = SimpleNamespace(datetime=Shifted, timedelta=datetime.timedelta, UTC=datetime.UTC)
    with monkeypatch.context() as patch:
        patch.setattr(certs, "datetime", shifted)
        pair = certs.make_certificate("node-0", certs._read_authority(folder), days)
    certs._write_pair(pair, folder / "node-0.pem", folder / "node-0.key")
    return Identity.of("node-0", folder)


def test_an_expired_certificate_is_named_with_its_date_and_remedy(tmp_path, monkeypatch):
    identity = dated(tmp_path, monkeypatch, -10, 5)
    for make in (identity.for_server, identity.for_client):
        with pytest.raises(
            UserError, match=r"node-0\.pem: has expired on .* Is the clock right\? .*nonn certs .* node-0"
        ):
            make()


def test_a_certificate_from_the_future_asks_for_the_clock(tmp_path, monkeypatch):
    identity = dated(tmp_path, monkeypatch, 3, 5)
    with pytest.raises(UserError, match=r"node-0\.pem: is not valid before .* Is the clock right\?"):
        identity.for_server()


def test_a_certificate_that_ends_soon_is_spoken_of(tmp_path, monkeypatch, capsys):
    dated(tmp_path, monkeypatch, 0, 20).warn()
    assert "node-0.pem: ends on " in capsys.readouterr().err
    signer = dated(tmp_path, monkeypatch, 0, 200)
    signer.warn()
    assert not capsys.readouterr().err
    lasting = signer.certificate.read_bytes()
    chain = dated(tmp_path, monkeypatch, 0, 20)
    chain.certificate.write_bytes(chain.certificate.read_bytes() + lasting)
    chain.warn()
    assert "node-0.pem: ends on " in capsys.readouterr().err


@pytest.mark.skipif(os.name != "posix", reason="modes of files are POSIX's")
def test_a_key_that_others_may_read_is_refused_like_ssh_does(tmp_path):
    write_certificates(tmp_path, ["node-0"])
    (tmp_path / "node-0.key").chmod(0o640)
    with pytest.raises(UserError, match=r"node-0\.key: others may read .*mode 0640.*chmod 600 .*node-0\.key"):
        Identity.of("node-0", tmp_path).for_server()


def test_key_and_certificate_of_two_are_refused(certificates):
    identity = Identity(certificates / "node-0.pem", certificates / "node-1.key", certificates / "ca.pem")
    with pytest.raises(UserError, match="do not belong together"):
        identity.for_server()


@pytest.mark.parametrize("key", ["node-0.pem", "ca.pem"])
def test_a_certificate_for_a_key_is_no_matter_of_its_mode(key, certificates):
    with pytest.raises(UserError, match=rf"{key}: is no private key"):
        Identity(certificates / "node-0.pem", certificates / key, certificates / "ca.pem").for_server()


def test_who_may_sign_nothing_is_no_authority(certificates):
    for name in ("node-0", "node-1"):
        identity = Identity(certificates / "node-0.pem", certificates / "node-0.key", certificates / f"{name}.pem")
        for make in (identity.for_server, identity.for_client):
            with pytest.raises(UserError, match=rf"{name}\.pem: is no certificate of an authority\. Name the ca\.pem"):
                make()


def serial_at(port: int, caller: Identity) -> int:
    """Serial number of the certificate that a server shows."""
    context = ssl.create_default_context(cafile=caller.ca)
    context.check_hostname = False
    context.set_alpn_protocols(["h2"])
    context.load_cert_chain(caller.certificate, caller.key)
    with socket.create_connection(("127.0.0.1", port), PATIENCE) as raw, context.wrap_socket(raw) as secure:
        return x509.load_der_x509_certificate(secure.getpeercert(binary_form=True)).serial_number


def serial_in(path) -> int:
    return x509.load_pem_x509_certificate(path.read_bytes()).serial_number


def test_renewed_certificates_are_used_at_once_and_damaged_ones_never(network_folder, tmp_path):
    write_certificates(tmp_path, ["node-0", "coordinator"])
    identity, caller = Identity.of("node-0", tmp_path), Identity.of("coordinator", tmp_path)

    async def scenario():
        student = ServedStudent(network_folder / "0.onnx")
        async with serving.serving(student, "127.0.0.1:0", identity, ["coordinator"]) as (port, _):
            first = await asyncio.to_thread(serial_at, port, caller)
            assert first == serial_in(identity.certificate)
            write_certificates(tmp_path, ["node-0"])
            second = await asyncio.to_thread(serial_at, port, caller)
            assert second == serial_in(identity.certificate) != first
            identity.key.write_bytes(b"-----BEGIN NOTHING")
            assert await asyncio.to_thread(serial_at, port, caller) == second

    asyncio.run(scenario())


def test_words_of_a_node_cannot_write_over_a_terminal():
    error = aio.AioRpcError(StatusCode.INTERNAL, aio.Metadata(), aio.Metadata(), "\x1b]0;all is well\nnode-1: up")
    assert reason_of(error) == r"internal: \x1b]0;all is well\nnode-1: up"


def test_the_reason_of_a_failed_handshake_is_not_cut_off(network_folder, certificates, tmp_path):
    write_certificates(tmp_path, ["coordinator"])

    async def scenario():
        student, identity = ServedStudent(network_folder / "0.onnx"), Identity.of("node-0", certificates)
        async with serving.serving(student, "127.0.0.1:0", identity, ["coordinator"]) as (port, _):
            credentials = Identity.of("coordinator", tmp_path).for_client()
            async with stub_of(f"127.0.0.1:{port}", credentials) as stub:
                with pytest.raises(Exception, match="failed to connect") as error:
                    await stub.ModelInfer(make_request(CONTRACT, make_image()), timeout=PATIENCE)
                return reason_of(error.value)

    assert asyncio.run(scenario()).startswith("unavailable: its certificate is not signed by the authority")


# Another export


def test_a_node_of_another_export_is_absent_with_that_reason(network_folder):
    async def another(request, _):
        contract = Contract("2", CHANNELS, SIZE, N_FEATURES[2], FEATURE_LIMIT, version="7")
        return make_response(contract, request.id, np.ones((1, N_FEATURES[2]), np.float32))

    async def scenario():
        async with contextlib.AsyncExitStack() as stack:
            addresses = [(await stack.enter_async_context(plain_node(network_folder, i)))[0] for i in range(2)]
            addresses.append((await stack.enter_async_context(rogue_node(another)))[0])
            network = await stack.enter_async_context(Coordinator(cluster_of(network_folder, addresses)))
            for _ in range(3):
                answer = await network.classify(make_image())
                assert answer.present == ["node-0", "node-1"]
            assert "serves model '2' of another export" in answer.absent["node-2"]
            assert network.connections[2].breaker_is_open

    asyncio.run(scenario())


# Connections


def silent_connections(port: int, count: int) -> list[socket.socket]:
    return [socket.create_connection(("127.0.0.1", port), PATIENCE) for _ in range(count)]


def is_closed(connection: socket.socket) -> bool:
    connection.setblocking(False)
    try:
        while content := connection.recv(4096):
            del content
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def test_silent_connections_are_ended_and_then_others_are_served(network_folder, certificates, monkeypatch):
    monkeypatch.setattr(serving, "HANDSHAKE_S", 1)
    monkeypatch.setattr(serving, "MAX_CONNECTIONS", 20)

    async def scenario():
        student, identity = ServedStudent(network_folder / "0.onnx"), Identity.of("node-0", certificates)
        async with serving.serving(student, "127.0.0.1:0", identity, ["coordinator"]) as (port, _):
            silent = await asyncio.to_thread(silent_connections, port, 60)
            await until(lambda: sum(map(is_closed, silent)) >= 40)  # beyond the limit: at once
            await until(lambda: all(map(is_closed, silent)))
            credentials = Identity.of("coordinator", certificates).for_client()
            async with stub_of(f"127.0.0.1:{port}", credentials) as stub:
                assert (await stub.ModelInfer(make_request(CONTRACT, make_image()), timeout=PATIENCE)).outputs
            for connection in silent:
                connection.close()

    asyncio.run(scenario())


def test_the_limit_of_connections_leaves_files_for_the_rest(monkeypatch):
    limits = {"soft": 256, "hard": 256}
    monkeypatch.setattr(serving.resource, "getrlimit", lambda _: tuple(limits.values()))
    monkeypatch.setattr(serving.resource, "setrlimit", lambda *_: None)
    assert serving.connection_limit() == (256 - serving.OTHER_FILES) // 2
    limits["hard"] = 1 << 20
    assert serving.connection_limit() == serving.MAX_CONNECTIONS


@pytest.mark.parametrize("address", ["127.0.0.1", "192.0.2.1", "no-such-machine.invalid"])
def test_why_nothing_can_listen_there_has_one_cause(network_folder, certificates, address):
    causes = {
        "127.0.0.1": "another program listens",
        "192.0.2.1": "no such address",
        "no-such-machine.invalid": "no mac",
    }

    async def scenario():
        async with plain_node(network_folder) as (taken, _):
            place, identity = f"{address}:{taken.rpartition(':')[2]}", Identity.of("node-1", certificates)
            with pytest.raises(UserError, match="cannot listen there") as error:
                async with serving.serving(ServedStudent(network_folder / "1.onnx"), place, identity, ["coordinator"]):
                    pass
            assert causes[address] in str(error.value)
            assert "belong together" not in str(error.value)

    asyncio.run(scenario())


def test_a_port_that_is_taken_is_said_in_one_line(network_folder):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = "{}:{}".format(*taken.getsockname())
        command = (sys.executable, "-m", "nonn", "node", network_folder / "1.onnx", "--address", address, "--insecure")
        ended = subprocess.run(command, stderr=subprocess.PIPE, timeout=PATIENCE)
    assert ended.returncode == 1
    assert len(ended.stderr.splitlines()) == 1, ended.stderr


# The metrics port


def test_half_sent_requests_end_and_keep_nobody_from_the_metrics(monkeypatch):
    monkeypatch.setattr(metrics, "CONNECTION_TIMEOUT_S", 1.0)

    async def ask(port: int, request: bytes) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(request)
        content = await reader.read()
        writer.close()
        return content

    async def scenario():
        registry = CollectorRegistry()
        async with serving_metrics(registry, 0) as port:
            silent = [await asyncio.open_connection("127.0.0.1", port) for _ in range(150)]
            for _, writer in silent:
                writer.write(b"GET /metrics HTTP/1.1\r\nHost:")
            for reader, writer in silent:
                with contextlib.suppress(ConnectionError):
                    assert not await asyncio.wait_for(reader.read(), PATIENCE)
                writer.close()
            answer = await ask(port, b"GET /metrics HTTP/1.1\r\n\r\n")
            assert answer.startswith(b"HTTP/1.1 200 OK\r\nContent-Type: text/plain")
            for host, status in ((b"localhost:9", b"200"), (b"127.0.0.1", b"200"), (b"evil.example:9", b"403")):
                answer = await ask(port, b"GET /metrics HTTP/1.1\r\nHost: " + host + b"\r\n\r\n")
                assert answer.startswith(b"HTTP/1.1 " + status)
            assert (await ask(port, b"POST / HTTP/1.1\r\n\r\n")).startswith(b"HTTP/1.1 405 ")
            assert (await ask(port, b"GET /else HTTP/1.1\r\n\r\n")).startswith(b"HTTP/1.1 404 ")

    asyncio.run(scenario())


# Standard error


def test_repeated_lines_are_counted_not_written():
    class Clock:
        now = 0.0

        def __call__(self):
            return self.now

    clock = Clock()
    limiter = Limiter(clock)
    written = [line for i in range(1000) for line in limiter.passed(b"refused 10.0.0.1:%d" % i)]
    assert len(written) == LINES_PER_WINDOW
    clock.now = 60.0
    assert list(limiter.passed(b"else")) == [b"995 more lines like: refused #.#.#.#:#", b"else"]
    assert len([line for i in range(200) for line in limiter.passed(b"x" * i)]) < 100  # kinds are few as well


def test_a_refused_handshake_is_told_with_its_address():
    trace = (
        b"I1126 07:08:37 8882 handshaker.cc:155] CallNextHandshakerLocked: error=UNKNOWN: Ssl handshake failed "
        b"(TSI_PROTOCOL_FAILURE): SSL_ERROR_SSL: error:100000f7:SSL routines:OPENSSL_internal:WRONG_VERSION_NUMBER: "
        b"x: OK shutdown=false index=2, args={endpoint=0x7f, args={grpc.internal.endpoint_peer_address="
        b"ipv4:10.0.0.7:4711, grpc.internal.server_credentials=0x55}}"
    )
    assert in_plain_words(trace) == b"refused a connection from 10.0.0.7:4711: it speaks no TLS"
    assert not in_plain_words(trace.replace(b"error=UNKNOWN: Ssl", b"error=OK Ssl"))
    assert in_plain_words(b"anything else") == b"anything else"


def test_a_pipe_that_nobody_empties_keeps_nobody_waiting():
    code = (
        "import sys\nfrom nonn.runtime.logs import relayed_stderr\n"
        "with relayed_stderr():\n  for i in range(3000): print('x' * i, file=sys.stderr)\n"
        "print('done', flush=True)"
    )
    with running([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"done\n"
        process.stderr.close()
        process.wait(timeout=PATIENCE)


def test_junk_at_a_node_whose_log_nobody_reads(network_folder, certificates):
    """It goes on serving, and its log names the addresses of the first few."""
    identity = Identity.of("node-0", certificates)
    files = ["--cert", str(identity.certificate), "--key", str(identity.key), "--ca", str(identity.ca)]
    command = [sys.executable, "-m", "nonn", "node", str(network_folder / "0.onnx"), "--address", "127.0.0.1:0"]
    with running([*command, *files], stderr=subprocess.PIPE) as process:
        port = int(process.stderr.readline().split()[3].rstrip(b",").rpartition(b":")[2])
        addresses = []
        for _ in range(1500):
            with socket.create_connection(("127.0.0.1", port), PATIENCE) as connection:
                addresses.append(connection.getsockname()[1])
                connection.sendall(b"\0" * 50)

        async def call():
            credentials = Identity.of("coordinator", certificates).for_client()
            async with stub_of(f"127.0.0.1:{port}", credentials) as stub:
                return await stub.ModelInfer(make_request(CONTRACT, make_image()), timeout=PATIENCE)

        assert asyncio.run(call()).outputs
        process.terminate()
        log = process.stderr.read().decode()
        assert process.wait(timeout=PATIENCE) == 0
    named = re.findall(r"refused a connection from 127\.0\.0\.1:(\d+): it speaks no TLS", log)
    assert 0 < len(named) <= 3 * LINES_PER_WINDOW
    assert set(map(int, named)) <= set(addresses)
    assert len(log.splitlines()) < 10 * LINES_PER_WINDOW
