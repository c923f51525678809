"""Split networks over real sockets: exact, guarded, and never hanging when a device is gone."""

import asyncio
import contextlib
import dataclasses
import signal
import socket

import numpy as np
import pytest
from clusters import PATIENCE, PLENTY_MS, free_ports, nobody_listens, refusal, until
from grpc import StatusCode, aio
from splits import image_of, in_int8, write_shortcut, write_tiny
from tritonclient.grpc import service_pb2 as oip
from tritonclient.grpc import service_pb2_grpc as oip_grpc

from nonn.cli import main
from nonn.core.errors import UserError
from nonn.runtime import processes
from nonn.runtime.certs import write_certificates
from nonn.runtime.processes import running
from nonn.runtime.protocol import Contract, make_request, make_response
from nonn.runtime.session import run_onnx
from nonn.runtime.tls import Identity
from nonn.split.coordinator import SplitCoordinator, SplitFailedError, device_commands
from nonn.split.exchange import EXCHANGE, Exchange
from nonn.split.node import SplitDevice, devices_at, serving
from nonn.split.plan import run_in_process
from nonn.split.planner import plan_split

METHODS = ("channels", "rows")
#: Milliseconds that a test waits for in vain.
FEW = 300


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "model.onnx"
    write_shortcut(path)
    return path


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("tiny") / "tiny.onnx")


@pytest.fixture(scope="module")
def certs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("certs")
    write_certificates(folder, ["device-0", "device-1", "device-2", "coordinator", "stranger"])
    return folder


def free_addresses(count: int) -> list[str]:
    return [f"127.0.0.1:{port}" for port in free_ports(count)]


@contextlib.asynccontextmanager
async def served(plan, folder, certificates=None, absent=()):
    """Serve a plan's devices in this process, all or without some; yield addresses and services."""
    plan.save(folder / "plan")
    addresses, services = free_addresses(plan.n_devices), {}
    async with contextlib.AsyncExitStack() as stack:
        for node in devices_at(addresses):
            if node.name not in absent:
                identity = Identity.of(node.name, certificates) if certificates else None
                device = SplitDevice(folder / "plan" / node.model)
                _, services[node.name] = await stack.enter_async_context(serving(device, addresses, identity))
        if not absent:
            async with asyncio.timeout(PATIENCE):
                await asyncio.gather(*(service.connected.wait() for service in services.values()))
        yield addresses, services


# Exactness and bytes


@pytest.mark.parametrize("secure", [False, True], ids=["plain", "tls"])
@pytest.mark.parametrize("n_devices", [2, 3])
@pytest.mark.parametrize("method", METHODS)
def test_over_sockets_the_logits_are_those_of_the_whole(model, folder, certs, method, n_devices, secure):
    plan = plan_split(model, n_devices, method)

    async def scenario():
        async with served(plan, folder, certs if secure else None) as (addresses, services):
            identity = Identity.of("coordinator", certs) if secure else None
            async with SplitCoordinator(plan, addresses, PLENTY_MS, identity) as coordinator:
                for seed in range(3):
                    image = image_of(plan, seed)
                    expected = run_onnx(model, image[None])[0]
                    np.testing.assert_allclose(await coordinator.classify(image), expected, rtol=1e-4, atol=1e-5)
            assert not any(service.exchanges or service.running for service in services.values())

    asyncio.run(scenario())


@pytest.mark.parametrize("method", METHODS)
def test_an_int8_network_answers_over_sockets_what_it_answers_in_one_process(model, folder, method):
    path = folder / "int8.onnx"
    path.write_bytes(model.read_bytes())
    plan = plan_split(in_int8(path), 2, method)

    async def scenario():
        async with served(plan, folder) as (addresses, _), SplitCoordinator(plan, addresses, PLENTY_MS) as coordinator:
            for seed in range(2):
                image = image_of(plan, seed)
                logits = await coordinator.classify(image)
                np.testing.assert_array_equal(logits, run_in_process(plan, image).logits)
                np.testing.assert_allclose(logits, run_onnx(path, image[None])[0], rtol=1e-5, atol=1e-5)

    asyncio.run(scenario())


@pytest.mark.parametrize("method", METHODS)
def test_a_plan_moves_the_bytes_that_are_announced(model, folder, monkeypatch, method):
    taken = []
    put = Exchange.put
    monkeypatch.setattr(
        Exchange, "put", lambda self, name, values: taken.append(values.nbytes) or put(self, name, values)
    )
    plan = plan_split(model, 3, method)

    async def scenario():
        async with served(plan, folder) as (addresses, _), SplitCoordinator(plan, addresses, PLENTY_MS) as coordinator:
            return await coordinator.classify(image_of(plan))

    asyncio.run(scenario())
    assert (len(taken), sum(taken)) == (len(plan.messages), plan.payload_bytes())


def test_images_wait_for_each_other(tiny, folder):
    plan = plan_split(tiny, 2, "channels")

    async def scenario():
        async with served(plan, folder) as (addresses, _), SplitCoordinator(plan, addresses, PLENTY_MS) as coordinator:
            images = [image_of(plan, seed) for seed in range(8)]
            results = await asyncio.gather(*(coordinator.classify(image) for image in images))
            np.testing.assert_allclose(results, run_onnx(tiny, np.array(images)), rtol=1e-4, atol=1e-5)

    asyncio.run(scenario())


# Refusals


def slice_request(plan, message, image_id: str = "one") -> oip.ModelInferRequest:
    tensor = oip.ModelInferRequest.InferInputTensor(name=message.name, datatype="FP32", shape=message.shape)
    what = {"model_name": EXCHANGE, "model_version": plan.parts[0].version, "id": image_id}
    return oip.ModelInferRequest(**what, inputs=[tensor], raw_input_contents=[bytes(message.n_bytes)])


NOT_A_NUMBER = np.full(16, np.nan, np.float32).tobytes()
DAMAGES = {
    "no id": (lambda r: setattr(r, "id", ""), "give the image an id"),
    "long id": (lambda r: setattr(r, "id", "x" * 65), "give the image an id"),
    "unknown slice": (lambda r: setattr(r.inputs[0], "name", "map9@1"), "no slice 'map9@1' is expected here"),
    "another plan": (lambda r: setattr(r, "model_version", "7"), "a slice of another plan (version '7', not"),
    "no input": (lambda r: r.ClearField("inputs"), "expected 1 input, not 0"),
    "type": (lambda r: setattr(r.inputs[0], "datatype", "UINT8"), "expected the type FP32, not 'UINT8'"),
    "shape": (lambda r: r.inputs[0].shape.__setitem__(2, 2), "expected the shape [1, 4, 1, 4], not [1, 4, 2, 4]"),
    "too short": (lambda r: r.raw_input_contents.__setitem__(0, bytes(60)), "expected 64 bytes, not 60"),
    "no data": (lambda r: r.ClearField("raw_input_contents"), "one raw tensor, not 0"),
    "not finite": (lambda r: r.raw_input_contents.__setitem__(0, NOT_A_NUMBER), "values that are not finite"),
    "typed data": (lambda r: r.inputs[0].contents.fp32_contents.extend([0] * 16), "as raw_input_contents"),
}


def test_slices_that_are_not_agreed_are_refused(tiny, folder):
    plan = plan_split(tiny, 2, "rows")
    (message,) = plan.parts[0].received(0)

    async def scenario():
        async with served(plan, folder) as (addresses, services), aio.insecure_channel(addresses[0]) as channel:
            stub = oip_grpc.GRPCInferenceServiceStub(channel)
            for damage, expected in DAMAGES.values():
                request = slice_request(plan, message)
                damage(request)
                code, details = await refusal(stub.ModelInfer(request))
                assert code.name in ("INVALID_ARGUMENT", "NOT_FOUND", "FAILED_PRECONDITION")
                assert expected in details
            assert not services["device-0"].exchanges
            await stub.ModelInfer(slice_request(plan, message))
            code, details = await refusal(stub.ModelInfer(slice_request(plan, message)))
            assert (code, details) == (StatusCode.ALREADY_EXISTS, f"{message.name} has arrived before")
            # What nobody asks for does not pile up.
            for number in range(50):
                await stub.ModelInfer(slice_request(plan, message, str(number)))
            assert len(services["device-0"].exchanges) <= 5

    asyncio.run(scenario())


def test_under_tls_everybody_may_only_send_what_is_theirs(tiny, folder, certs):
    plan = plan_split(tiny, 3, "rows")
    message = next(m for m in plan.parts[1].received(0) if m.sender == 0)
    image = make_request(plan.parts[1].contract, image_of(plan))
    image.id = "one"

    async def ask(address: str, name: str, request) -> StatusCode:
        options = [("grpc.ssl_target_name_override", "device-1")]
        credentials = Identity.of(name, certs).for_client()
        async with aio.secure_channel(address, credentials, options) as channel:
            return (await refusal(oip_grpc.GRPCInferenceServiceStub(channel).ModelInfer(request, timeout=PATIENCE)))[0]

    async def scenario():
        async with served(plan, folder, certs) as (addresses, services):
            for name in ("device-2", "coordinator", "stranger"):  # the slice is device-0's
                assert await ask(addresses[1], name, slice_request(plan, message)) == StatusCode.PERMISSION_DENIED
            for name in ("device-0", "stranger"):  # only the coordinator sends images
                assert await ask(addresses[1], name, image) == StatusCode.PERMISSION_DENIED
            assert not services["device-1"].exchanges

    asyncio.run(scenario())


def test_a_device_refuses_what_it_cannot_serve(tiny, folder, capsys):
    plan_split(tiny, 2, "rows").save(folder / "plan")
    part = str(folder / "plan" / "0")
    serve = ["split-node", part, "--devices"]
    for arguments, message in [
        ([*serve, "127.0.0.1:7100", "--insecure"], "--devices: the plan is for 2 devices, not 1"),
        ([*serve, "127.0.0.1:7100", "10.0.0.1:7100", "--insecure"], "10.0.0.1:7100: plain text is for loopback"),
        ([*serve, "127.0.0.1:7100", "nowhere", "--insecure"], "--devices: 'nowhere' is not host:port"),
        ([*serve, "127.0.0.1:7100", "127.0.0.1:7101"], "give --cert, --key and --ca together, or --insecure"),
        (["split-node", "nowhere", "--devices", "127.0.0.1:7100", "--insecure"], "nowhere/part.json: no such file"),
    ]:
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert message in stopped.value.code
    assert capsys.readouterr().out == ""


def test_a_part_that_does_not_fit_together_is_refused(tiny, folder):
    plan = plan_split(tiny, 2, "rows")
    wrong = plan.parts[0].model_copy(update={"columns": (0, 5)})
    dataclasses.replace(plan, parts=[wrong, plan.parts[1]]).save(folder / "plan")
    with pytest.raises(UserError, match=r"plan/0: its segments do not run \(its features are not 5\)"):
        SplitDevice(folder / "plan" / "0")


# Failures


@pytest.mark.parametrize("method", METHODS)
def test_without_one_device_there_is_no_class(model, folder, method):
    plan = plan_split(model, 3, method)

    async def scenario():
        async with served(plan, folder, absent=["device-1"]) as (addresses, services):
            assert not any(service.device.is_ready for service in services.values())
            async with SplitCoordinator(plan, addresses, PLENTY_MS) as coordinator:
                with pytest.raises(SplitFailedError, match=r"no class \(.*device-1: unavailable.*all its devices"):
                    await coordinator.classify(image_of(plan))

    asyncio.run(scenario())


def test_a_silent_peer_is_named_after_the_deadline(model, folder, monkeypatch):
    plan = plan_split(model, 3, "channels")

    async def scenario():
        async with served(plan, folder) as (addresses, services):
            async with SplitCoordinator(plan, addresses, FEW) as coordinator:
                with monkeypatch.context() as patch:
                    patch.setattr(services["device-1"], "_send", lambda *_: None)
                    with pytest.raises(SplitFailedError, match="device-0: unavailable: round 0: nothing from device-1"):
                        await coordinator.classify(image_of(plan))
                coordinator.timeout = PATIENCE
                await coordinator.classify(image_of(plan))  # back again, and nothing has stuck
            assert not any(service.exchanges or service.running for service in services.values())

    asyncio.run(scenario())


def test_a_device_that_fails_says_so_at_once(model, folder, monkeypatch, capsys):
    plan = plan_split(model, 2, "rows")

    def fail(*_):
        raise RuntimeError("out of memory")

    async def scenario():
        async with served(plan, folder) as (addresses, services):
            monkeypatch.setattr(services["device-1"].device, "compute", fail)
            async with SplitCoordinator(plan, addresses, PLENTY_MS) as coordinator:
                with pytest.raises(SplitFailedError, match="device-1: internal: a segment failed"):
                    await coordinator.classify(image_of(plan))

    asyncio.run(scenario())
    assert "model 1, segment 0: out of memory" in capsys.readouterr().err


def test_a_newer_image_takes_the_place_of_an_older_one(tiny, folder):
    plan = plan_split(tiny, 2, "rows")

    async def scenario():
        async with served(plan, folder) as (addresses, services), aio.insecure_channel(addresses[0]) as channel:
            stub = oip_grpc.GRPCInferenceServiceStub(channel)
            requests = [make_request(plan.parts[0].contract, image_of(plan)) for _ in range(2)]
            for number, request in enumerate(requests):
                request.id = str(number)
            first = asyncio.ensure_future(stub.ModelInfer(requests[0], timeout=PATIENCE))
            await until(lambda: services["device-0"].running)
            twin = stub.ModelInfer(requests[0], timeout=PATIENCE)
            assert (await refusal(twin))[0] == StatusCode.ALREADY_EXISTS
            second = asyncio.ensure_future(stub.ModelInfer(requests[1], timeout=1))
            assert (await refusal(first))[0] == StatusCode.ABORTED
            assert "nothing from device-1" in (await refusal(second))[1]

    asyncio.run(scenario())


def test_the_coordinator_refuses_what_does_not_fit(tiny):
    plan = plan_split(tiny, 2, "rows")
    with pytest.raises(UserError, match="the plan is for 2 devices, not 1"):
        SplitCoordinator(plan, ["127.0.0.1:7100"], 100)
    with pytest.raises(UserError, match="a deadline of 0 ms is not in reach"):
        SplitCoordinator(plan, free_addresses(2), 0)
    with pytest.raises(ValueError, match="expected an image of uint8"):
        asyncio.run(SplitCoordinator(plan, free_addresses(2), 100).classify(np.zeros((1, 4, 4), np.float32)))


def test_an_answer_that_is_not_agreed_is_refused(tiny):
    plan = plan_split(tiny, 2, "rows")

    class Rogue(oip_grpc.GRPCInferenceServiceServicer):
        async def ModelInfer(self, request, context):
            contract = Contract(request.model_name, 1, 4, 6, version=plan.parts[0].version)
            values = np.full((1, 6), np.inf, np.float32)
            return make_response(contract, request.id, values)

    async def scenario():
        server = aio.server()
        oip_grpc.add_GRPCInferenceServiceServicer_to_server(Rogue(), server)
        address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        await server.start()
        try:
            async with SplitCoordinator(plan, [address] * 2, PLENTY_MS) as coordinator:
                with pytest.raises(SplitFailedError, match="features that are not finite"):
                    await coordinator.classify(image_of(plan))
        finally:
            await server.stop(0)

    asyncio.run(scenario())


# Processes


def test_processes_serve_survive_a_stopped_peer_and_leave_nothing(model, folder, certs):
    plan = plan_split(model, 2, "rows")
    plan.save(folder / "plan")
    addresses = free_addresses(2)
    image = image_of(plan)

    async def scenario():
        identity = Identity.of("coordinator", certs)
        prefixes = [["env", "PLACE=0"], ["env", "PLACE=1"]]
        async with (
            running(device_commands(folder / "plan", addresses, certs, prefixes)) as children,
            SplitCoordinator(plan, addresses, PLENTY_MS, identity) as coordinator,
        ):
            expected = run_onnx(model, image[None])[0]
            np.testing.assert_allclose(await coordinator.classify(image), expected, rtol=1e-4, atol=1e-5)
            coordinator.timeout = FEW / 1000
            children["device-1"].process.send_signal(signal.SIGSTOP)
            try:
                with pytest.raises(SplitFailedError, match="device-1: no answer by the deadline"):
                    await coordinator.classify(image)
            finally:
                children["device-1"].process.send_signal(signal.SIGCONT)
            coordinator.timeout = PATIENCE
            np.testing.assert_allclose(await coordinator.classify(image), expected, rtol=1e-4, atol=1e-5)
        assert all(child.has_exited for child in children.values())

    asyncio.run(scenario())
    assert nobody_listens(addresses)


def test_a_device_that_cannot_start_stops_the_others(tiny, folder, monkeypatch):
    plan_split(tiny, 2, "rows").save(folder / "plan")
    first, second = free_addresses(2)

    async def scenario(addresses, message):
        with pytest.raises(UserError, match=message):
            async with running(device_commands(folder / "plan", addresses)):
                pass

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        blocked = f"127.0.0.1:{taken.getsockname()[1]}"
        asyncio.run(scenario([first, blocked], f"device-1 did not start: .*{blocked}: cannot listen there"))
        assert nobody_listens([first])
    monkeypatch.setattr(processes, "START_TIMEOUT_S", 0.05)
    asyncio.run(scenario([first, second], r"not ready in 0.05 s \(device-0: "))
    assert nobody_listens([first, second])
