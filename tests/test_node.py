"""A node answers the stock Triton client, and refuses everything that is not what its manifest promises."""

import asyncio
import shutil
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from functools import partial

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton
from clusters import (
    BROKEN,
    CHANNELS,
    FEATURE_LIMIT,
    N_FEATURES,
    PATIENCE,
    SIZE,
    make_image,
    plain_node,
    refusal,
    stub_of,
    until,
    write_student,
)
from grpc import StatusCode, aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from processes import running
from prometheus_client import CollectorRegistry
from tritonclient.grpc import service_pb2 as oip
from tritonclient.grpc import service_pb2_grpc as oip_grpc

from nonn.cli import main
from nonn.core.errors import UserError
from nonn.core.files import read_json, write_json
from nonn.runtime import metrics, node
from nonn.runtime.addresses import is_loopback, split_address
from nonn.runtime.node import ServedStudent
from nonn.runtime.protocol import MIN_MESSAGE_LIMIT, Contract, make_request
from nonn.runtime.serving import serve, serving
from nonn.runtime.session import open_session, run_onnx
from nonn.runtime.tls import Identity

CONTRACT = Contract("0", CHANNELS, SIZE, N_FEATURES[0], FEATURE_LIMIT)


def counts(meters) -> tuple[int, int]:
    """Requests that a node has answered, and those that it has not."""
    return meters.statistics.success.count, meters.statistics.fail.count


# Anybody's client


def test_the_stock_triton_client_can_call_a_node(network_folder):
    def call(address: str, image: np.ndarray) -> np.ndarray:
        with triton.InferenceServerClient(address) as client:
            assert client.is_server_live()
            assert client.is_server_ready()
            assert client.is_model_ready("0")
            assert not client.is_model_ready("1")
            metadata = client.get_model_metadata("0", as_json=True)
            assert metadata["inputs"] == [{"name": "image", "datatype": "UINT8", "shape": ["-1", "1", "4", "4"]}]
            assert metadata["outputs"] == [{"name": "features", "datatype": "FP32", "shape": ["-1", "3"]}]
            tensor = triton.InferInput("image", [1, *image.shape], "UINT8")
            tensor.set_data_from_numpy(image[None])
            wanted = triton.InferRequestedOutput("features")
            result = client.infer("0", [tensor], outputs=[wanted], request_id="seven", client_timeout=PATIENCE)
            assert result.get_response().id == "seven"
            statistics = client.get_inference_statistics("0").model_stats[0].inference_stats
            assert (statistics.success.count, statistics.fail.count) == (1, 0)
            assert statistics.success.ns > 0
            return result.as_numpy("features")

    async def scenario():
        image = make_image()
        async with plain_node(network_folder) as (address, _):
            features = await asyncio.to_thread(call, address, image)
        np.testing.assert_array_equal(features, run_onnx(network_folder / "0.onnx", image[None]))

    asyncio.run(scenario())


def test_health_is_told_in_the_standard_way(network_folder, monkeypatch):
    async def scenario():
        async with plain_node(network_folder) as (address, _), aio.insecure_channel(address) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            answer = await stub.Check(health_pb2.HealthCheckRequest())
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
            monkeypatch.setattr(ServedStudent, "is_ready", False)
            answer = await stub.Check(health_pb2.HealthCheckRequest())
            assert answer.status == health_pb2.HealthCheckResponse.NOT_SERVING
            code, _ = await refusal(stub.Check(health_pb2.HealthCheckRequest(service="unheard of")))
            assert code == StatusCode.NOT_FOUND
            code, _ = await refusal(stub.Watch(health_pb2.HealthCheckRequest()).read())
            assert code == StatusCode.UNIMPLEMENTED

    asyncio.run(scenario())


# Students of any speed


@pytest.mark.parametrize(("quick", "has_thread"), [(0.0, True), (60.0, False)])
def test_a_quick_student_needs_no_thread(network_folder, monkeypatch, quick, has_thread):
    monkeypatch.setattr(node, "QUICK_S", quick)
    image = make_image()

    async def scenario():
        async with plain_node(network_folder) as (address, _), stub_of(address) as stub:
            answer = await stub.ModelInfer(make_request(CONTRACT, image))
            features = np.frombuffer(answer.raw_output_contents[0], np.float32)
            np.testing.assert_array_equal(features, run_onnx(network_folder / "0.onnx", image[None])[0])

    asyncio.run(scenario())
    assert (ServedStudent(network_folder / "0.onnx").quick_batch == 0) == has_thread


def test_a_slow_student_keeps_nobody_else_waiting(network_folder, monkeypatch):
    monkeypatch.setattr(node, "QUICK_S", 0.0)
    student = ServedStudent(network_folder / "0.onnx")
    run, images, released = student.run, [], threading.Event()

    def slowly(image: np.ndarray) -> np.ndarray:
        images.append(image)
        assert released.wait(PATIENCE)
        return run(image)

    student.run = slowly
    student.admission.check = lambda *_: 0.0  # none is refused, however slow this machine is

    async def scenario():
        async with serving(student, "127.0.0.1:0") as (port, meters), stub_of(f"127.0.0.1:{port}") as stub:
            first = asyncio.ensure_future(stub.ModelInfer(make_request(CONTRACT, make_image(0))))
            await until(lambda: images)
            assert (await stub.ServerLive(oip.ServerLiveRequest(), timeout=PATIENCE)).live
            given_up = stub.ModelInfer(make_request(CONTRACT, make_image(1)), timeout=0.5)
            assert (await refusal(given_up))[0] == StatusCode.DEADLINE_EXCEEDED
            await until(lambda: counts(meters) == (0, 1))  # the node has heard of it
            released.set()
            assert (await first).outputs
            assert (await stub.ModelInfer(make_request(CONTRACT, make_image(2)))).outputs

    asyncio.run(scenario())
    assert [image.tobytes() for image in images] == [make_image(seed).tobytes() for seed in (0, 2)]


# Requests that are not what was agreed


@pytest.mark.parametrize(("damage", "code", "message"), BROKEN.values(), ids=BROKEN)
def test_what_is_not_agreed_is_refused(network_folder, damage, code, message):
    async def scenario():
        async with plain_node(network_folder) as (address, meters), stub_of(address) as stub:
            request = make_request(CONTRACT, make_image())
            damage(request)
            status, details = await refusal(stub.ModelInfer(request))
            assert status == (code or StatusCode.INVALID_ARGUMENT)
            assert message in details
            await stub.ModelInfer(make_request(CONTRACT, make_image()))  # the node is unharmed
            assert counts(meters) == (1, 1)

    asyncio.run(scenario())


def test_large_messages_and_rubbish_never_reach_the_student(network_folder):
    async def scenario():
        async with plain_node(network_folder) as (address, meters), stub_of(address) as stub:
            request = make_request(CONTRACT, make_image())
            request.raw_input_contents[0] = bytes(MIN_MESSAGE_LIMIT)
            status, _ = await refusal(stub.ModelInfer(request))
            assert status == StatusCode.RESOURCE_EXHAUSTED
            async with aio.insecure_channel(address) as channel:
                call = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
                status, _ = await refusal(call(b"\xff" * 100))
                assert status == StatusCode.INVALID_ARGUMENT
            assert counts(meters) == (0, 0)
            await stub.ModelInfer(make_request(CONTRACT, make_image()))

    asyncio.run(scenario())


@pytest.mark.parametrize("method", ["RepositoryModelLoad", "RepositoryModelUnload", "SystemSharedMemoryRegister"])
def test_nobody_can_load_unload_or_share_memory(network_folder, method):
    async def scenario():
        async with plain_node(network_folder) as (address, _), stub_of(address) as stub:
            request = getattr(oip, f"{method}Request")()
            assert (await refusal(getattr(stub, method)(request)))[0] == StatusCode.UNIMPLEMENTED

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("weight", "problem"),
    [(np.inf, "that are not finite"), (1e9, "beyond the limit of 20")],  # inf − and 0·inf
)
def test_a_node_does_not_send_what_a_student_cannot_have(network_folder, tmp_path, weight, problem):
    shutil.copytree(network_folder, tmp_path / "export")
    student = ServedStudent(tmp_path / "export/0.onnx")
    write_student(tmp_path / "other.onnx", np.full((16, 3), weight, np.float32))
    student.run = partial(node.run_one_by_one, open_session(tmp_path / "other.onnx"))

    async def scenario():
        async with serving(student, "127.0.0.1:0") as (port, _), stub_of(f"127.0.0.1:{port}") as stub:
            status, details = await refusal(stub.ModelInfer(make_request(CONTRACT, make_image())))
            assert status == StatusCode.INTERNAL
            assert details.startswith("the student has features ")
            assert problem in details

    asyncio.run(scenario())


def test_large_images_raise_the_message_limit():
    assert Contract("0", 3, 32, 64, 1.0).message_limit == MIN_MESSAGE_LIMIT
    assert 3 * 224 * 224 < Contract("0", 3, 224, 64, 1.0).message_limit < 3 * 224 * 224 + 5000


# Mutual TLS


def test_the_coordinators_certificate_opens_a_node(network_folder, certificates):
    async def scenario():
        identity = Identity.of("node-0", certificates)
        async with serving(ServedStudent(network_folder / "0.onnx"), "127.0.0.1:0", identity, ["coordinator"]) as (
            port,
            _,
        ):
            credentials = Identity.of("coordinator", certificates).for_client()
            for name in (None, "node-0", "localhost"):
                async with stub_of(f"127.0.0.1:{port}", credentials, name) as stub:
                    assert (await stub.ModelInfer(make_request(CONTRACT, make_image()))).outputs
            async with stub_of(f"127.0.0.1:{port}", credentials, "node-1") as stub:  # it is not that one
                status, _ = await refusal(stub.ServerLive(oip.ServerLiveRequest()))
                assert status == StatusCode.UNAVAILABLE

    asyncio.run(scenario())


def test_strangers_are_refused(network_folder, certificates, tmp_path):
    from nonn.runtime.certs import write_certificates

    write_certificates(tmp_path, ["coordinator"])  # the right name of the wrong authority
    trusted = (certificates / "ca.pem").read_bytes()
    forged = [(tmp_path / f"coordinator.{kind}").read_bytes() for kind in ("key", "pem")]
    strangers = {
        "no certificate": (grpc.ssl_channel_credentials(trusted), StatusCode.UNAVAILABLE),
        "wrong authority": (grpc.ssl_channel_credentials(trusted, *forged), StatusCode.UNAVAILABLE),
        "not allowed": (Identity.of("stranger", certificates).for_client(), StatusCode.PERMISSION_DENIED),
        "another node": (Identity.of("node-1", certificates).for_client(), StatusCode.PERMISSION_DENIED),
        "plain text": (None, StatusCode.UNAVAILABLE),
    }

    async def scenario():
        identity = Identity.of("node-0", certificates)
        async with serving(ServedStudent(network_folder / "0.onnx"), "127.0.0.1:0", identity, ["coordinator"]) as (
            port,
            m,
        ):
            for who, (credentials, expected) in strangers.items():
                async with stub_of(f"127.0.0.1:{port}", credentials) as stub:
                    status, _ = await refusal(stub.ModelInfer(make_request(CONTRACT, make_image()), timeout=PATIENCE))
                    assert status == expected, who
            async with aio.secure_channel(f"127.0.0.1:{port}", strangers["not allowed"][0]) as channel:
                check = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
                assert (await refusal(check))[0] == StatusCode.PERMISSION_DENIED
            assert counts(m) == (0, 0)
            assert m.rejections._value.get() == 3

    asyncio.run(scenario())


@pytest.mark.parametrize("address", ["0.0.0.0:0", "192.0.2.1:9100", "[::]:0", "example.org:9100"])
def test_plain_text_stays_on_this_machine(network_folder, address):
    async def scenario():
        with pytest.raises(UserError, match="plain text is for loopback addresses only"):
            async with serving(ServedStudent(network_folder / "0.onnx"), address):
                pass

    asyncio.run(scenario())


@pytest.mark.parametrize("flags", [[], ["--insecure", "--cert", "a"], ["--cert", "a", "--key", "b"]])
def test_plain_text_must_be_asked_for(network_folder, flags):
    with pytest.raises(SystemExit, match="--cert, --key and --ca together, or --insecure"):
        main(["node", str(network_folder / "0.onnx"), *flags])


def test_to_be_attached_takes_a_pipe(network_folder):
    command = [sys.executable, "-m", "nonn", "node", network_folder / "0.onnx", "--address", "127.0.0.1:0"]
    command += ["--insecure", "--attached"]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=PATIENCE)
    assert done.returncode == 1
    assert b"nonn node: --attached: standard input is no pipe that could close; leave it out" in done.stderr


def test_names_of_callers_need_certificates(network_folder):
    with pytest.raises(SystemExit, match="--allow: callers have no names in plain text"):
        main(["node", str(network_folder / "0.onnx"), "--insecure", "--allow", "coordinator"])


def test_addresses():
    assert split_address("[::1]:80") == ("::1", 80)
    assert [is_loopback(a) for a in ("127.9.9.9:1", "[::1]:1", "localhost:1", "10.0.0.1:1")] == [True] * 3 + [False]
    for wrong in ("127.0.0.1", ":80", "::1:80", "host:http", "host:70000", ""):
        with pytest.raises(ValueError, match="is not host:port"):
            split_address(wrong)


# Starting


def test_a_student_that_is_not_the_manifests_is_refused(network_folder, tmp_path):
    folder = shutil.copytree(network_folder, tmp_path / "export")
    with pytest.raises(UserError, match=r"final\.onnx: not a student .* Choose one of 0\.onnx, 1\.onnx"):
        ServedStudent(folder / "final.onnx")
    (folder / "0.onnx").write_bytes((folder / "0.onnx").read_bytes() + b"\0")
    with pytest.raises(UserError, match=r"0\.onnx: its SHA-256 is not that of the manifest"):
        ServedStudent(folder / "0.onnx")
    (folder / "1.onnx").unlink()
    with pytest.raises(UserError, match=r"1\.onnx: cannot be read"):
        ServedStudent(folder / "1.onnx")
    manifest = read_json(folder / "manifest.json")
    image = manifest["image"] | {"size": manifest["image"]["size"] + 1}
    write_json(folder / "manifest.json", manifest | {"image": image})
    with pytest.raises(UserError, match=r"2\.onnx: no student for the images of its manifest"):
        ServedStudent(folder / "2.onnx")
    write_json(folder / "manifest.json", manifest | {"image": manifest["image"] | {"channels": True}})
    with pytest.raises(UserError, match=r"not the manifest of an exported network \(image\.channels\)"):
        ServedStudent(folder / "2.onnx")
    for key in ("classes", "students"):
        write_json(folder / "manifest.json", manifest | {key: [*manifest[key], manifest[key][0]]})
        with pytest.raises(UserError, match=r"not the manifest of an exported network \(.* is listed twice\)"):
            ServedStudent(folder / "2.onnx")
    write_json(folder / "manifest.json", manifest | {"students": [{"file": "../2.onnx"}]})
    with pytest.raises(UserError, match="not the manifest of an exported network"):
        ServedStudent(folder / "2.onnx")
    (folder / "manifest.json").write_text("{")
    with pytest.raises(UserError, match="not the manifest of an exported network"):
        ServedStudent(folder / "2.onnx")


def test_a_taken_port_is_refused(network_folder):
    async def scenario():
        async with plain_node(network_folder) as (address, _):
            with pytest.raises(UserError, match=r"127\.0\.0\.1:\d+: cannot listen there"):
                async with serving(ServedStudent(network_folder / "1.onnx"), address):
                    pass

    asyncio.run(scenario())


def test_the_command_serves_counts_and_stops(network_folder, free_port):
    command = [sys.executable, "-m", "nonn", "node", str(network_folder / "0.onnx"), "--address", "127.0.0.1:0"]
    command += ["--insecure", "--attached", "--metrics-port", str(free_port)]
    for stop in (lambda p: p.send_signal(signal.SIGTERM), lambda p: p.stdin.close()):
        with running(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            announced = process.stderr.readline()
            assert announced.startswith("model 0 at 127.0.0.1:"), announced
            with grpc.insecure_channel(announced.split()[3].rstrip(",")) as channel:
                stub = oip_grpc.GRPCInferenceServiceStub(channel)
                stub.ModelInfer(make_request(CONTRACT, make_image()), timeout=PATIENCE)
                with pytest.raises(grpc.RpcError):
                    stub.ModelInfer(oip.ModelInferRequest(), timeout=PATIENCE)
            with urllib.request.urlopen(f"http://127.0.0.1:{free_port}/metrics", timeout=PATIENCE) as page:
                told = page.read().decode()
            assert 'nonn_requests_total{model="0"} 2.0' in told
            assert 'nonn_failures_total{model="0"} 1.0' in told
            assert 'nonn_request_seconds_count{model="0"} 1.0' in told
            stop(process)
            assert process.wait(timeout=PATIENCE) == 0


def test_a_taken_metrics_port_is_refused(network_folder):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        running = serve(ServedStudent(network_folder / "0.onnx"), "127.0.0.1:0", None, [], taken.getsockname()[1])
        with pytest.raises(UserError, match=r"--metrics-port: .* another program listens there\. Choose another port"):
            asyncio.run(running)


@pytest.mark.parametrize("accepted", ["text/plain; version=x", "application/openmetrics-text; version=1.x", "*/*"])
def test_whatever_is_accepted_metrics_are_told(accepted):
    answer = metrics._respond(f"GET /metrics HTTP/1.1\r\nAccept: {accepted}\r\n\r\n".encode(), CollectorRegistry())
    assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
