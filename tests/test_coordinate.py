"""Applications call a whole network with the stock Triton client, and get no more of it than a node gives."""

import asyncio
import contextlib
import shutil
import signal
import subprocess
import sys
import urllib.request

import numpy as np
import pytest
import tritonclient.grpc as triton
from clusters import (
    BROKEN,
    CLASSES,
    PATIENCE,
    cluster_of,
    free_ports,
    hang,
    make_image,
    plain_node,
    refusal,
    rogue_node,
    stub_of,
)
from grpc import StatusCode, aio
from processes import running
from tritonclient.grpc import service_pb2 as oip

from nonn.cli import main
from nonn.runtime.certs import write_certificates
from nonn.runtime.cluster import Cluster, write_cluster
from nonn.runtime.coordinator import Coordinator
from nonn.runtime.node import ServedStudent
from nonn.runtime.predict import classify
from nonn.runtime.protocol import MIN_MESSAGE_LIMIT, make_request
from nonn.runtime.served_network import ServedNetwork
from nonn.runtime.serving import serving
from nonn.runtime.tls import Identity


@contextlib.asynccontextmanager
async def network_of(cluster: Cluster, identity: Identity | None = None):
    """Address of a coordinator that serves, and its network."""
    async with Coordinator(cluster) as coordinator:
        network = ServedNetwork(coordinator)
        async with serving(network, "127.0.0.1:0", identity, ["application"]) as (port, _):
            yield f"127.0.0.1:{port}", network


@contextlib.asynccontextmanager
async def small_network(export, absent: int = 0):
    """A served network of three nodes, the last `absent` of which are not there."""
    async with contextlib.AsyncExitStack() as stack:
        nodes = [await stack.enter_async_context(plain_node(export, i)) for i in range(3 - absent)]
        addresses = [address for address, _ in nodes] + [f"127.0.0.1:{port}" for port in free_ports(absent)]
        yield await stack.enter_async_context(network_of(cluster_of(export, addresses)))


def infer(address: str, image: np.ndarray, outputs: list[str] | None = None, **connection) -> triton.InferResult:
    with triton.InferenceServerClient(address, **connection) as client:
        tensor = triton.InferInput("image", [1, *image.shape], "UINT8")
        tensor.set_data_from_numpy(image[None])
        wanted = [triton.InferRequestedOutput(name) for name in outputs] if outputs else None
        return client.infer("export", [tensor], outputs=wanted, request_id="nine", client_timeout=PATIENCE)


def test_the_stock_triton_client_can_call_a_network(network_folder):
    def describe(address: str) -> dict:
        with triton.InferenceServerClient(address) as client:
            assert client.is_server_live()
            assert client.is_server_ready()
            assert client.is_model_ready("export")
            assert not client.is_model_ready("0")  # a student, not the network
            return client.get_model_metadata("export", as_json=True)

    async def scenario():
        async with small_network(network_folder) as (address, _):
            metadata = await asyncio.to_thread(describe, address)
            assert metadata["inputs"] == [{"name": "image", "datatype": "UINT8", "shape": ["1", "1", "4", "4"]}]
            assert metadata["outputs"] == [
                {"name": "probabilities", "datatype": "FP32", "shape": ["1", "4"]},
                {"name": "label", "datatype": "BYTES", "shape": ["1"]},
                {"name": "present", "datatype": "BYTES", "shape": ["-1"]},
            ]
            for seed in range(5):
                result = await asyncio.to_thread(infer, address, make_image(seed))
                alone = classify(network_folder, make_image(seed))
                assert result.get_response().id == "nine"
                np.testing.assert_allclose(result.as_numpy("probabilities"), [alone.probabilities], rtol=1e-4)
                assert result.as_numpy("label").tolist() == [alone.label.encode()]
                assert result.as_numpy("present").tolist() == [b"node-0", b"node-1", b"node-2"]
            result = await asyncio.to_thread(infer, address, make_image(), ["present"])
            assert [output.name for output in result.get_response().outputs] == ["present"]

    asyncio.run(scenario())


def test_a_missing_node_is_not_among_the_present_and_is_counted(network_folder):
    async def scenario():
        async with small_network(network_folder, absent=1) as (address, network):
            result = await asyncio.to_thread(infer, address, make_image())
            assert result.as_numpy("present").tolist() == [b"node-0", b"node-1"]
            assert result.as_numpy("label").tolist()[0].decode() in CLASSES
            samples = [sample for metric in network.absences.collect() for sample in metric.samples]
            assert {s.labels["node"]: s.value for s in samples if s.name == "nonn_absences_total"} == {"node-2": 1}

    asyncio.run(scenario())


def test_a_caller_in_a_hurry_is_answered_without_a_node_that_hangs(network_folder, monkeypatch):
    monkeypatch.setattr("nonn.runtime.served_network.CALLERS_SHARE", 0.5)  # as long for the nodes as for the way back

    async def scenario():
        async with contextlib.AsyncExitStack() as stack:
            nodes = [await stack.enter_async_context(plain_node(network_folder, i)) for i in range(2)]
            nodes.append(await stack.enter_async_context(rogue_node(hang)))
            cluster = cluster_of(network_folder, [address for address, _ in nodes])
            address, network = await stack.enter_async_context(network_of(cluster))
            stub = await stack.enter_async_context(stub_of(address))
            for _ in range(2):
                request = make_request(network.contract, make_image())
                answer = await stub.ModelInfer(request, timeout=3)
                present = answer.raw_output_contents[list(network.contract.outputs).index("present")]
                assert b"node-1" in present
                assert b"node-2" not in present
            # Whoever waits less than the cluster's deadline proves nothing about a node.
            assert not any(connection.failures for connection in network.coordinator.connections)

    asyncio.run(scenario())


def test_without_any_node_it_is_unavailable_and_says_so(network_folder):
    async def scenario():
        async with small_network(network_folder, absent=3) as (address, network), stub_of(address) as stub:
            for _ in range(3):
                status, details = await refusal(stub.ModelInfer(make_request(network.contract, make_image())))
                assert status == StatusCode.UNAVAILABLE
                assert "no node answered (node-0: " in details
            assert not (await stub.ServerReady(oip.ServerReadyRequest())).ready  # all breakers are open
            assert (await stub.ServerLive(oip.ServerLiveRequest())).live

    asyncio.run(scenario())


def test_what_is_not_agreed_is_refused_as_at_a_node(network_folder):
    async def scenario():
        async with small_network(network_folder) as (address, network), stub_of(address) as stub:
            sound = make_request(network.contract, make_image())
            for what, (damage, code, _) in BROKEN.items():
                request = oip.ModelInferRequest()
                request.CopyFrom(sound)
                damage(request)
                assert (await refusal(stub.ModelInfer(request)))[0] == (code or StatusCode.INVALID_ARGUMENT), what
            request = oip.ModelInferRequest()
            request.CopyFrom(sound)
            request.outputs.extend([oip.ModelInferRequest.InferRequestedOutputTensor(name="label")] * 2)
            assert "asked for twice" in (await refusal(stub.ModelInfer(request)))[1]
            request.raw_input_contents[:] = [bytes(MIN_MESSAGE_LIMIT)]
            assert (await refusal(stub.ModelInfer(request)))[0] == StatusCode.RESOURCE_EXHAUSTED
            async with aio.insecure_channel(address) as channel:
                call = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
                assert (await refusal(call(b"\xff" * 100)))[0] == StatusCode.INVALID_ARGUMENT
            assert (await stub.ModelInfer(sound)).outputs  # it is unharmed

    asyncio.run(scenario())


@contextlib.asynccontextmanager
async def encrypted_nodes(export, certificates):
    """Addresses of three nodes under mutual TLS."""
    async with contextlib.AsyncExitStack() as stack:
        addresses = []
        for i in range(3):
            identity = Identity.of(f"node-{i}", certificates)
            node = serving(ServedStudent(export / f"{i}.onnx"), "127.0.0.1:0", identity, ["coordinator"])
            addresses.append(f"127.0.0.1:{(await stack.enter_async_context(node))[0]}")
        yield addresses


@pytest.fixture
def as_application(certificates, tmp_path) -> dict:
    """What an application calls with under mutual TLS: settings of the Triton client."""
    folder = tmp_path / "certs"
    folder.mkdir()
    for name in ("ca.pem", "ca.key"):
        shutil.copy(certificates / name, folder)
    write_certificates(folder, ["application"])
    files = {"root_certificates": "ca.pem", "private_key": "application.key", "certificate_chain": "application.pem"}
    return {"ssl": True, **{key: str(folder / name) for key, name in files.items()}}


def test_under_mutual_tls_only_applications_may_call(network_folder, certificates, as_application):
    def call(address: str) -> list[bytes]:
        return infer(address, make_image(), **as_application).as_numpy("present").tolist()

    async def scenario():
        async with contextlib.AsyncExitStack() as stack:
            addresses = await stack.enter_async_context(encrypted_nodes(network_folder, certificates))
            cluster = cluster_of(network_folder, addresses, certificates)
            address, network = await stack.enter_async_context(network_of(cluster, cluster.own_identity))
            assert await asyncio.to_thread(call, address) == [b"node-0", b"node-1", b"node-2"]
            request = make_request(network.contract, make_image())
            async with stub_of(address, Identity.of("stranger", certificates).for_client()) as stub:
                assert (await refusal(stub.ModelInfer(request)))[0] == StatusCode.PERMISSION_DENIED
            async with stub_of(address) as stub:
                assert (await refusal(stub.ModelInfer(request, timeout=PATIENCE)))[0] == StatusCode.UNAVAILABLE

    asyncio.run(scenario())


@pytest.mark.parametrize("is_encrypted", [False, True])
def test_the_command_serves_counts_and_stops(
    is_encrypted, network_folder, certificates, as_application, free_port, tmp_path
):
    path = tmp_path / "cluster.yaml"

    async def scenario():
        async with contextlib.AsyncExitStack() as stack:
            if is_encrypted:
                addresses = await stack.enter_async_context(encrypted_nodes(network_folder, certificates))
            else:
                nodes = [await stack.enter_async_context(plain_node(network_folder, i)) for i in range(3)]
                addresses = [address for address, _ in nodes]
            write_cluster(path, cluster_of(network_folder, addresses, certificates if is_encrypted else None))
            await asyncio.to_thread(call)

    def call():
        arguments = ["--cluster", str(path), "--address", "127.0.0.1:0", "--metrics-port", str(free_port)]
        command = [sys.executable, "-m", "nonn", "coordinate", *arguments]
        with running(command, stderr=subprocess.PIPE, text=True) as process:
            announced = process.stderr.readline()
            assert announced.startswith("model export at 127.0.0.1:"), announced
            assert announced.endswith(", mutual TLS\n" if is_encrypted else ", plain text\n"), announced
            connection = as_application if is_encrypted else {}
            assert len(infer(announced.split()[3].rstrip(","), make_image(), **connection).as_numpy("present")) == 3
            with urllib.request.urlopen(f"http://127.0.0.1:{free_port}/metrics", timeout=PATIENCE) as page:
                assert 'nonn_requests_total{model="export"} 1.0' in page.read().decode()
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=PATIENCE) == 0

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--address", "0.0.0.0:0"], "plain text is for loopback addresses only"),
        (["--allow", "me"], "--allow: callers have no names in plain text"),
        (["--address", "nowhere"], "'nowhere' is not host:port"),
    ],
)
def test_impossible_settings_are_refused(network_folder, folder, flags, complaint):
    write_cluster(folder / "cluster.yaml", cluster_of(network_folder, [f"127.0.0.1:{port}" for port in free_ports(3)]))
    with pytest.raises(SystemExit, match=complaint):
        main(["coordinate", *flags])
